"""Encode any number of sentences, decode the heads' outputs, and score a split."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.data import packing
from jaxlora.data.tokenized import Examples
from jaxlora.nn import heads
from jaxlora.serving import chunks
from jaxlora.tasks.kinds import LabelForm
from jaxlora.tasks.task import Task
from jaxlora.utils.trees import Tree

MOST_FREQUENT = 32  # classes of a set that is answered to every example, to compare with
PART_SIZES = (16, 256, 4096)  # examples that a head takes at a time, padded

EncodeRows = Callable[..., jax.Array]


def encode(
    encode_rows: EncodeRows,
    frozen: Tree,
    trainable: Tree,
    examples: Examples,
    max_length: int,
    owner: np.ndarray | None = None,
    few_programs: bool = False,
) -> np.ndarray:
    """Encode all sentences of some examples.

    Args:
      encode_rows: from `encode.make_encode`, or with an owner from `encode.make_mixed_encode`.
      frozen, trainable: the model's collections.
      examples: any number of them.
      max_length: length of the longest rows; no sentence is longer.
      owner: `i64[sentences]`, which adapter of `trainable` each sentence uses.
      few_programs: see `chunks.chunks`.

    Returns:
      `f32[sentences, H]`, in the order of `examples`' sentences.

    Raises:
      ValueError: if there are no sentences.
    """
    if not len(examples):
        raise ValueError("nothing to encode")
    parts, numbers = [], []
    for chunk, rows, *owners in chunks.chunks(examples, max_length, owner, few_programs):
        parts.append(np.asarray(encode_rows(frozen, trainable, rows, *owners))[: len(chunk)])
        numbers.append(chunk)
    vectors = np.concatenate(parts)
    out = np.empty_like(vectors)
    out[np.concatenate(numbers)] = vectors
    return out


def warm(
    encode_rows: EncodeRows,
    frozen: Tree,
    trainable: Tree,
    max_length: int,
    typed: bool,
    owners: int,
) -> None:
    """Compile an encoder for all chunks that `encode` may give it.

    Args:
      encode_rows, frozen, trainable, max_length: see `encode`.
      typed: whether some examples have token types.
      owners: how many adapters sentences may have; 0: none.
    """
    kinds: list[list[Any] | None] = [None, []] if typed else [None]
    for types in kinds:
        for shape, block in sorted(chunks.every_shape(max_length, owners > 1)):
            rows = packing.fill([], [], chunks.slots(shape), shape, types=types)
            blocks = np.zeros((shape.rows, shape.length // block), np.int32)
            encode_rows(frozen, trainable, rows, *([blocks] if owners else []))


def outputs(
    task: Task, head: Tree, vectors: np.ndarray, sentences: int, pair_features: str
) -> np.ndarray:
    """Apply a task's head to sentence vectors: `f32[E, K]` or `f32[E]`."""
    u, v, like = vectors[::sentences], vectors[sentences - 1 :: sentences], form(task)
    return _by_parts(lambda u, v: _apply_head(like, head, u, v, pair_features), u, v)


def decode(task: Task, outputs: np.ndarray) -> np.ndarray:
    """Decode outputs to the label's scale: class, 0/1 or score `f32[E]`, or a set `f32[E, K]`."""
    like = form(task)
    above = outputs - task.cuts if task.thresholds else outputs
    return _by_parts(lambda x: _decode(like, x), above)


def probabilities(task: Task, outputs: np.ndarray) -> np.ndarray:
    """Those of a task with classes: `f32[E, classes]`."""
    like = form(task)
    return _by_parts(lambda x: _probabilities(like, x), outputs)


def losses(task: Task, outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Compute the loss of each example, `f32[E]`, see `Task.per_example_loss`."""
    like = dataclasses.replace(form(task), class_weights=task.class_weights)
    return _by_parts(lambda x, y: _losses(like, x, y), outputs, labels)


@functools.lru_cache(1 << 16)
def form(task: Task) -> Task:
    """Return a task without its names and thresholds: tasks alike share their programs."""
    numbers = tuple(map(str, range(len(task.classes))))
    return dataclasses.replace(
        task, name="", title="", classes=numbers, metric="", thresholds=(), class_weights=(),
        label_delimiter="|", tune_thresholds=None,
    )  # fmt: skip


def _by_parts(compiled: Callable[..., jax.Array], *arrays: np.ndarray) -> np.ndarray:
    """Apply a compiled function of rows to any number of rows, in programs of a few sizes."""
    count = len(arrays[0])
    size = next((n for n in PART_SIZES if n >= count), PART_SIZES[-1])
    parts = []
    for start in range(0, count, size):
        padded = [np.zeros((size, *x.shape[1:]), x.dtype) for x in arrays]
        for whole, x in zip(padded, arrays, strict=True):
            part = x[start : start + size]
            whole[: len(part)] = part
        parts.append(np.asarray(compiled(*padded)))
    return np.concatenate(parts)[:count]


@functools.partial(jax.jit, static_argnums=(0, 4))
def _apply_head(task: Task, head: Tree, u: jax.Array, v: jax.Array, kind: str) -> jax.Array:
    return task.apply_head(head, u, v, pair_features=kind)


_cosine = jax.jit(heads.cosine)


@functools.partial(jax.jit, static_argnums=0)
def _decode_cosine(task: Task, cosines: jax.Array) -> jax.Array:
    return task.decode_cosine(cosines)


@functools.partial(jax.jit, static_argnums=0)
def _decode(task: Task, outputs: jax.Array) -> jax.Array:
    return task.decode(outputs)


@functools.partial(jax.jit, static_argnums=0)
def _losses(task: Task, outputs: jax.Array, labels: jax.Array) -> jax.Array:
    return task.per_example_loss(outputs, labels)


@functools.partial(jax.jit, static_argnums=0)
def _probabilities(task: Task, outputs: jax.Array) -> jax.Array:
    return jnp.asarray(task.probabilities(outputs))


def _frequent(labels: np.ndarray) -> list[np.ndarray]:
    """Return the sets of the most frequent classes, one of each size up to `MOST_FREQUENT`."""
    order = np.argsort(-labels.sum(0), kind="stable")
    sizes = range(1, min(len(order), MOST_FREQUENT) + 1)
    return [np.isin(np.arange(len(order)), order[:size]) for size in sizes]


# Answers that could be given to all examples, by the form of labels.
CONSTANTS: dict[LabelForm, Callable[[np.ndarray], Iterable[Any]]] = {
    "class": np.unique,
    "classes": _frequent,
    "score": lambda labels: (labels.mean(), np.median(labels)),
}


def untrained(task: Task, examples: Examples, vectors: np.ndarray) -> float:
    """Score what needs no training, which a trained model must beat, by the task's own metric.

    Separate pairs of a binary task: the best threshold on the cosine of the untrained vectors
    (chosen on these very examples, so it is generous; equal cosines are on one side). Separate
    pairs with a score: that cosine, on the label's scale. Else the best constant answer.
    """
    labels = examples.labels
    if task.sentences == 1 or task.outputs > 1:
        constants = CONSTANTS[task.form](labels)
        return _best(task, (np.broadcast_to(one, labels.shape) for one in constants), labels)
    scores = _by_parts(_cosine, vectors[::2], vectors[1::2])
    if task.form == "score":
        like = form(task)
        return task.score(_by_parts(lambda x: _decode_cosine(like, x), scores), labels)
    if np.isnan(scores).any():
        return float("nan")
    # A threshold between negatives only gives away: one at each positive's cosine, and one above.
    cuts = [*np.unique(scores[labels == 1]), np.inf]
    return _best(task, (scores >= cut for cut in cuts), labels)


def _best(task: Task, answers: Iterable[np.ndarray], labels: np.ndarray) -> float:
    scores = (task.score(found, labels) for found in answers)
    return max(scores, key=task.gain, default=float("nan"))
