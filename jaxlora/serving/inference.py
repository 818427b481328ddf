"""Encode sentences, apply heads, decode their outputs, and score untrained baselines."""

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

MOST_FREQUENT = 32  # most classes in a constant multilabel answer, see `untrained`
PART_SIZES = (16, 256, 4096)  # batch sizes of heads; smaller batches are padded

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
    """Encode all sentences of the examples.

    Args:
      encode_rows: from `encode.make_encode`, or with `owner` from `encode.make_mixed_encode`.
      frozen, trainable: the model's variable collections.
      examples: at least one example.
      max_length: length of the longest rows; no sentence is longer.
      owner: `i64[sentences]`, the index of each sentence's adapter in `trainable`.
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


def encode_apart(
    encode_rows: EncodeRows,
    frozen: Tree,
    trainable: Tree,
    examples: Examples,
    max_length: int,
    owner: np.ndarray | None = None,
) -> np.ndarray:
    """Encode all sentences, see `encode`; one that overflows does not spoil the others.

    Attention gives other sentences in the row the weight 0, but 0 times a value that is not finite
    is NaN. So sentences without a finite vector are encoded again, each in a row of its own.
    """
    model = encode_rows, frozen, trainable
    vectors = encode(*model, examples, max_length, owner)
    for number in np.flatnonzero(~np.isfinite(vectors).all(-1)):
        one = np.array([number])
        mine = None if owner is None else owner[one]
        vectors[one] = encode(*model, examples.take(one), max_length, mine)
    return vectors


def warm(
    encode_rows: EncodeRows,
    frozen: Tree,
    trainable: Tree,
    max_length: int,
    typed: bool,
    owners: int,
) -> None:
    """Compile an encoder for all shapes of chunks that `encode` may pass to it.

    Args:
      encode_rows, frozen, trainable, max_length: see `encode`.
      typed: whether to compile for examples with token types, too.
      owners: number of adapters; 0: `encode_rows` takes no owners.
    """
    kinds: list[list[Any] | None] = [None, []] if typed else [None]
    for types in kinds:
        for shape, block in sorted(chunks.every_shape(max_length, owners > 1)):
            rows = packing.fill([], [], chunks.slots(shape), shape, types=types)
            blocks = np.zeros((shape.rows, shape.length // block), np.int32)
            encode_rows(frozen, trainable, rows, *([blocks] if owners else []))


def outputs(task: Task, head: Tree, vectors: np.ndarray, pair_features: str) -> np.ndarray:
    """Apply a task's head to its sentences' vectors, `f32[E * sentences, H]`.

    Returns:
      `f32[E, K]` or `f32[E]`.
    """
    sentences = task.sentences
    u, v, like = vectors[::sentences], vectors[sentences - 1 :: sentences], form(task)
    return _by_parts(lambda u, v: _apply_head(like, head, u, v, pair_features), u, v)


def decode(task: Task, outputs: np.ndarray) -> np.ndarray:
    """Decode outputs to class indices or scores, `f32[E]`, or to sets of 0 and 1, `f32[E, K]`."""
    like = form(task)
    above = outputs - task.cuts if task.thresholds else outputs
    return _by_parts(lambda x: _decode(like, x), above)


def probabilities(task: Task, outputs: np.ndarray) -> np.ndarray:
    """Compute the class probabilities, `f32[E, classes]`, of a task with classes."""
    like = form(task)
    return _by_parts(lambda x: _probabilities(like, x), outputs)


def losses(task: Task, outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Compute the loss of each example, `f32[E]`, see `Task.per_example_loss`."""
    like = dataclasses.replace(form(task), class_weights=task.class_weights)
    return _by_parts(lambda x, y: _losses(like, x, y), outputs, labels)


@functools.lru_cache(1 << 16)
def form(task: Task) -> Task:
    """Return a task without names, weights and thresholds, so that similar tasks share programs."""
    numbers = tuple(map(str, range(len(task.classes))))
    return dataclasses.replace(
        task, name="", title="", classes=numbers, metric="", thresholds=(), class_weights=(),
        label_delimiter="|", tune_thresholds=None,
    )  # fmt: skip


def _by_parts(compiled: Callable[..., jax.Array], *arrays: np.ndarray) -> np.ndarray:
    """Apply a jitted function along the first axis in padded batches of a few sizes."""
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
    """Return the sets of the n most frequent classes, `bool[K]`, for n up to `MOST_FREQUENT`."""
    order = np.argsort(-labels.sum(0), kind="stable")
    sizes = range(1, min(len(order), MOST_FREQUENT) + 1)
    return [np.isin(np.arange(len(order)), order[:size]) for size in sizes]


# Form of labels → candidates for a constant answer to all examples.
CONSTANTS: dict[LabelForm, Callable[[np.ndarray], Iterable[Any]]] = {
    "class": np.unique,
    "classes": _frequent,
    "score": lambda labels: (labels.mean(), np.median(labels)),
}


def untrained(task: Task, examples: Examples, vectors: np.ndarray) -> float:
    """Score a baseline that needs no training, by the task's metric.

    For separate pairs of a binary task: the best threshold on the cosine of the untrained vectors,
    chosen on these same examples and so optimistic. For separate pairs with a score: the cosine, on
    the label's scale. Otherwise: the best constant answer.
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
    # The best threshold is the cosine of a positive, or above all cosines.
    cuts = [*np.unique(scores[labels == 1]), np.inf]
    return _best(task, (scores >= cut for cut in cuts), labels)


def _best(task: Task, answers: Iterable[np.ndarray], labels: np.ndarray) -> float:
    scores = (task.score(found, labels) for found in answers)
    return max(scores, key=task.gain, default=float("nan"))
