"""Encode any number of sentences, decode the heads' outputs, and score a split."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.data import packing
from jaxlora.data.tokenized import Examples
from jaxlora.nn import heads
from jaxlora.nn.encode import PackedTokens
from jaxlora.tasks.kinds import LabelForm
from jaxlora.tasks.task import Task
from jaxlora.utils.trees import Tree

ROWS = 16  # rows of a chunk: enough to keep the device busy, few enough for little padding
SHORT_ROWS = (32, 64)  # lengths of rows for a few sentences, besides the longest
FEW_ROWS = (1, 4, 8, ROWS)
MOST_FREQUENT = 32  # classes of a set that is answered to every example, to compare with
PART_SIZES = (16, 256, 4096)  # examples that a head takes at a time, padded
MIN_TOKENS = 2  # [CLS], [SEP]: a word of characters that BERT drops leaves nothing between

# Tokens that share an adapter where several are served together, and what an encoder takes then,
# as a multiple of its time with one: short blocks gather the factors more often, long ones are
# padded more. Reckoned from the matmuls of a MiniLM layer with four adapters of rank 16 on CPU (of
# 4 tokens each it would be 1.4).
BLOCKS = {8: 1.1, 32: 1.01}

EncodeRows = Callable[..., jax.Array]


def encode(
    encode_rows: EncodeRows,
    frozen: Tree,
    trainable: Tree,
    examples: Examples,
    max_length: int,
    owner: np.ndarray | None = None,
) -> np.ndarray:
    """Encode all sentences of some examples.

    Args:
      encode_rows: from `encode.make_encode`, or with an owner from `encode.make_mixed_encode`.
      frozen, trainable: the model's collections.
      examples: any number of them; a few take a small program, many one program in turn.
      max_length: row length; no sentence is longer.
      owner: `i64[sentences]`, which adapter of `trainable` each sentence uses.

    Returns:
      `f32[sentences, H]`, in the order of `examples`' sentences.

    Raises:
      ValueError: if there are no sentences.
    """
    if not len(examples):
        raise ValueError("nothing to encode")
    parts, numbers = [], []
    for chunk, rows, *owners in chunks(examples, max_length, owner):
        parts.append(np.asarray(encode_rows(frozen, trainable, rows, *owners))[: len(chunk)])
        numbers.append(chunk)
    vectors = np.concatenate(parts)
    out = np.empty_like(vectors)
    out[np.concatenate(numbers)] = vectors
    return out


def chunks(
    examples: Examples, max_length: int, owner: np.ndarray | None = None
) -> Iterator[tuple[Any, ...]]:
    """Pack sentences into chunks of one shape.

    Yields:
      Numbers of sentences, their rows, and with an owner `i32[R, S / block]`, that of each block.
    """
    shape, where, block = _layout(examples.lengths, max_length, owner)
    slots = -(-shape.tokens // MIN_TOKENS)
    order = np.argsort(where.row, kind="stable")
    starts = np.arange(0, where.rows, shape.rows)
    parts = np.split(order, np.searchsorted(where.row[order], starts[1:]))
    for first, numbers in zip(starts, parts, strict=True):
        sentences = [examples.sentence(n) for n in numbers]
        mine = packing.Placement(where.row[numbers] - first, where.start[numbers], shape.rows)
        types = None if examples.types is None else examples.types_of(numbers)
        rows = packing.fill(sentences, range(len(numbers)), slots, shape, mine, types)
        yield numbers, rows, *([] if owner is None else [_owners(owner[numbers], rows, block)])


def _layout(
    lengths: np.ndarray, max_length: int, owner: np.ndarray | None
) -> tuple[packing.Shape, packing.Placement, int]:
    """Choose the shape of chunks, each sentence's place, and the tokens of a block."""
    if owner is None or (owner == owner[0]).all():
        shape = chunk_shape(lengths, max_length)
        return shape, packing.place(lengths, shape.length), shape.length
    found = []
    for block, factor in BLOCKS.items():
        place = packing.by_owner(owner, block)
        shape = chunk_shape(lengths, _whole_blocks(max_length, block), place)
        where = place(lengths, shape.length)
        cost = factor * shape.cost * -(-where.rows // shape.rows)
        found.append((cost, shape, where, block))
    return min(found, key=lambda one: one[0])[1:]


def _owners(owner: np.ndarray, rows: PackedTokens, block: int) -> np.ndarray:
    """Return the owner of each block of packed rows; padding has the first of all."""
    blocks = rows.segment_ids.reshape(len(rows.segment_ids), -1, block).max(-1)
    return np.where(blocks > 0, owner[blocks - 1], owner[0]).astype(np.int32)


def chunk_shape(
    lengths: np.ndarray, max_length: int, place: packing.Place = packing.place
) -> packing.Shape:
    """Return the cheapest small shape that holds all sentences, or else a full chunk's.

    Small shapes have 1, 4, 8 or 16 rows, so that there are few programs.

    >>> chunk_shape(np.array([12]), 128), chunk_shape(np.array([12] * 1000), 128)
    (Shape(rows=1, length=32), Shape(rows=16, length=128))
    """
    full = packing.Shape(ROWS, max_length)
    if lengths.sum() > full.tokens:
        return full
    needed = {n: place(lengths, n).rows for n in row_lengths(max_length) if lengths.max() <= n}
    small = [
        packing.Shape(rows, length)
        for length, least in needed.items()
        for rows in FEW_ROWS
        if rows >= least
    ]
    return min(small, key=lambda shape: shape.cost, default=full)


def row_lengths(max_length: int) -> list[int]:
    """Return the lengths that rows may have, the longest last.

    >>> row_lengths(128), row_lengths(48)
    ([32, 64, 128], [32, 48])
    """
    return sorted({n for n in (*SHORT_ROWS, max_length) if n <= max_length})


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
        for shape, block in sorted(_shapes(max_length, owners > 1)):
            slots = -(-shape.tokens // MIN_TOKENS)
            rows = packing.fill([], [], slots, shape, types=types)
            blocks = np.zeros((shape.rows, shape.length // block), np.int32)
            encode_rows(frozen, trainable, rows, *([blocks] if owners else []))


def _shapes(max_length: int, mixed: bool) -> set[tuple[packing.Shape, int]]:
    """Return the shapes that chunks may have, each with the tokens of a block."""
    lengths = [(n, n) for n in row_lengths(max_length)]  # all sentences have one owner
    for block in BLOCKS if mixed else ():
        lengths += [(n, block) for n in row_lengths(_whole_blocks(max_length, block))]
    return {(packing.Shape(rows, n), block) for n, block in lengths for rows in FEW_ROWS}


def _whole_blocks(length: int, block: int) -> int:
    return -(-length // block) * block


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
