"""Encode any number of sentences, decode the heads' outputs, and score a split."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import heads, metrics
from jaxlora.data import packing
from jaxlora.data.examples import Examples
from jaxlora.step import Rows
from jaxlora.tasks import Task
from jaxlora.trees import Tree

ROWS = 16  # rows of a chunk: enough to keep the device busy, few enough for little padding
MIN_TOKENS = 2  # [CLS], [SEP]: a word of characters that BERT drops leaves nothing between

EncodeRows = Callable[[Tree, Tree, Rows], jax.Array]


def encode(
    encode_rows: EncodeRows, frozen: Tree, trainable: Tree, examples: Examples, max_length: int
) -> np.ndarray:
    """Vectors of all sentences of some examples.

    Args:
      encode_rows: from `step.make_encode`; sees one shape only, so it compiles once.
      frozen, trainable: the model's collections.
      examples: any number of them.
      max_length: row length; no sentence is longer.

    Returns:
      `f32[sentences, H]`, in the order of `examples`' sentences.

    Raises:
      ValueError: if there are no sentences.
    """
    if not len(examples):
        raise ValueError("nothing to encode")
    parts, numbers = [], []
    for chunk, rows in chunks(examples, max_length):
        parts.append(np.asarray(encode_rows(frozen, trainable, rows))[: len(chunk)])
        numbers.append(chunk)
    vectors = np.concatenate(parts)
    out = np.empty_like(vectors)
    out[np.concatenate(numbers)] = vectors
    return out


def chunks(examples: Examples, max_length: int) -> Iterator[tuple[np.ndarray, Rows]]:
    """Pack sentences into chunks of `ROWS` rows: (their numbers, their rows)."""
    shape = packing.Shape(ROWS, max_length)
    slots = shape.tokens // MIN_TOKENS
    where = packing.place(examples.lengths, max_length)
    order = np.argsort(where.row, kind="stable")
    starts = np.searchsorted(where.row[order], range(0, where.rows, ROWS))
    for numbers in np.split(order, starts[1:]):
        # Packed alone, best-fit places a chunk's sentences just as it did among all.
        sentences = [examples.sentence(n) for n in numbers]
        yield numbers, packing.fill(sentences, range(len(numbers)), slots, shape)


def outputs(
    task: Task, head: Tree, vectors: np.ndarray, sentences: int, pair_features: str
) -> np.ndarray:
    """What a task's head says of sentence vectors: `f32[E, K]` or `f32[E]`."""
    u, v = vectors[::sentences], vectors[sentences - 1 :: sentences]
    return np.asarray(task.apply_head(head, u, v, pair_features=pair_features))


def decode(task: Task, outputs: np.ndarray) -> np.ndarray:
    """Predictions `f32[E]` on the label's scale: class, 0/1 or score."""
    return np.asarray(task.decode(jnp.asarray(outputs)))


def untrained(task: Task, examples: Examples, vectors: np.ndarray) -> float:
    """What needs no training: the score a trained model must beat.

    Single sentences: the most frequent class. Pairs: the cosine of the untrained vectors, for a
    0/1 label cut at the threshold that does best on these very examples (so it is generous).
    """
    labels = examples.labels
    if not task.pair:
        return float(np.unique(labels, return_counts=True)[1].max() / len(labels))
    scores = np.asarray(heads.cosine(jnp.asarray(vectors[::2]), jnp.asarray(vectors[1::2])))
    if not task.integer:
        return metrics.pearson(scores, labels)
    ranked = labels[np.argsort(-scores, kind="stable")]
    true_above = np.concatenate([[0], np.cumsum(ranked == 1)])
    false_below = (ranked == 0).sum() - np.concatenate([[0], np.cumsum(ranked == 0)])
    return float((true_above + false_below).max() / len(labels))
