"""Packing of many short sentences into few rows, with few distinct shapes.

Sentences average 15–25 tokens, so a padded batch is mostly padding. Here each batch is packed into
rows of equal length by best-fit decreasing. Every shape is compiled separately, so a run uses only
a few shapes, chosen from its batches before training.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlora.nn.encode import PackedTokens

ROW_LENGTHS = (64, 96)
# Row length at which attention costs as much as the rest of the encoder (MiniLM on CPU).
ATTENTION = 256
# Cost of compiling one more program, as the number of tokens trained in the same time.
PROGRAM_COST = 30_000
# Safety factor for the shapes of a long run over the largest sampled batch.
SPARE = 1.25


class Shape(NamedTuple):
    """The shape of packed rows: `rows` × `length` tokens."""

    rows: int
    length: int

    @property
    def tokens(self) -> int:
        """Number of tokens of this shape, including padding."""
        return self.rows * self.length

    @property
    def cost(self) -> float:
        """Cost of this shape in tokens; attention makes long rows more expensive."""
        return self.tokens * (1 + self.length / ATTENTION)


class Placement(NamedTuple):
    """Row and start of each sentence, `row, start: i64[n]`, and the number of rows."""

    row: np.ndarray
    start: np.ndarray
    rows: int


Place = Callable[[Any, int], Placement]
"""`(lengths of sentences, row length) → Placement`."""


def place(lengths: Sequence[int] | np.ndarray, row_length: int) -> Placement:
    """Assign sentences to rows by best-fit decreasing.

    The longest sentences are placed first, each in the fullest row that has enough free tokens.

    Args:
      lengths: number of tokens of each sentence, from 1 to `row_length`.
      row_length: number of tokens of a row.

    Raises:
      ValueError: if a sentence is longer than a row (truncate it first) or has no tokens.

    >>> place([5, 3, 4, 2], 8).rows
    2
    """
    lengths = np.asarray(lengths)
    if lengths.size and lengths.max() > row_length:
        raise ValueError(f"a sentence of {lengths.max()} tokens does not fit rows of {row_length}")
    if lengths.size and lengths.min() < 1:
        raise ValueError(f"a sentence of {lengths.min()} tokens; it needs at least one")
    row, start = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    by_free: list[list[int]] = [[] for _ in range(row_length + 1)]  # rows by free tokens
    rows = 0
    for n in np.argsort(-lengths, kind="stable").tolist():
        need = int(lengths[n])
        free = next((f for f in range(need, row_length + 1) if by_free[f]), None)
        if free is None:
            r, free, rows = rows, row_length, rows + 1
        else:
            r = by_free[free].pop()
        row[n], start[n] = r, row_length - free
        by_free[free - need].append(r)
    return Placement(row, start, rows)


def place_by_owner(
    lengths: Sequence[int] | np.ndarray, owner: np.ndarray, row_length: int, block: int
) -> Placement:
    """Place sentences so that each block of consecutive tokens belongs to one owner.

    The sentences of each owner are packed into strips, and the strips into rows, each starting at a
    block boundary. Strips are as long as a row, which suits owners with many sentences, or half as
    long, so that owners with few can share rows; the result with fewer rows is returned.

    Args:
      lengths: number of tokens of each sentence, from 1 to `row_length`.
      owner: `i64[n]`, index of each sentence's owner, such as its task.
      row_length: number of tokens of a row, a multiple of `block`.
      block: number of tokens of a block.

    Raises:
      ValueError: see `place`.

    >>> place_by_owner([5, 2, 3, 9], np.array([0, 1, 0, 1]), 32, 8)
    Placement(row=array([0, 0, 0, 0]), start=array([16, 9, 21,  0]), rows=1)
    """
    lengths = np.asarray(lengths)
    order = np.argsort(owner, kind="stable")
    owners = np.split(order, np.flatnonzero(np.diff(owner[order])) + 1)
    limits = (row_length, row_length // 2) if len(owners) > 1 else (row_length,)
    placed = [_place_strips(lengths, owners, row_length, block, limit) for limit in limits]
    return min(placed, key=lambda placement: placement.rows)


def _place_strips(
    lengths: np.ndarray, owners: Sequence[np.ndarray], row_length: int, block: int, limit: int
) -> Placement:
    """Place the sentences of each owner in strips of up to `limit` tokens if they fit."""
    strip, start = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    ends: list[int] = []  # number of tokens in each strip
    for mine in owners:
        fits = mine.size and max(lengths[mine]) <= limit
        where = place(lengths[mine], limit if fits else row_length)
        strip[mine], start[mine] = len(ends) + where.row, where.start
        ends += np.bincount(where.row, lengths[mine], where.rows).astype(int).tolist()
    outer = place([-(-end // block) for end in ends], row_length // block)
    return Placement(outer.row[strip], start + block * outer.start[strip], outer.rows)


def by_owner(owner: np.ndarray, block: int) -> Place:
    """Return `place_by_owner` for these owners, or `place` if `block` is 1."""
    if block == 1:
        return place
    return lambda lengths, row_length: place_by_owner(lengths, owner, row_length, block)


def fill(
    sentences: Sequence[np.ndarray],
    slots: Iterable[int],
    num_slots: int,
    shape: Shape,
    where: Placement | None = None,
    types: Sequence[Any] | None = None,
) -> PackedTokens:
    """Pack sentences into rows of a shape.

    Args:
      sentences: token ids of each sentence.
      slots: slot of each sentence in the batch, `0 … num_slots - 1`.
      num_slots: number of slots; the `cls_index` of a slot without a sentence is 0.
      shape: shape of the rows; must be large enough for the placement.
      where: placement of the sentences; None: from `place`.
      types: for each sentence, its token types or a single type; None: all are 0.

    Returns:
      `PackedTokens` of NumPy arrays.

    >>> rows = fill([np.array([7, 8]), np.array([9])], [0, 1], 2, Shape(1, 4))
    >>> rows.tokens.tolist(), rows.segment_ids.tolist(), rows.cls_index.tolist()
    ([[7, 8, 9, 0]], [[1, 1, 2, 0]], [0, 2])
    """
    where = where or place([len(s) for s in sentences], shape.length)
    if where.rows > shape.rows:
        raise ValueError(f"{where.rows} rows needed, {shape.rows} given")
    tokens, positions, segment_ids, kinds = np.zeros((4, *shape), np.int32)
    cls_index = np.zeros(num_slots, np.int32)
    each = [0] * len(sentences) if types is None else types
    for sentence, kind, slot, row, start in zip(
        sentences, each, slots, where.row, where.start, strict=True
    ):
        span = slice(start, start + len(sentence))
        tokens[row, span] = sentence
        positions[row, span] = np.arange(len(sentence))
        segment_ids[row, span] = slot + 1
        cls_index[slot] = row * shape.length + start
        kinds[row, span] = kind
    return PackedTokens(tokens, positions, segment_ids, cls_index, None if types is None else kinds)


def stack(packs: Sequence[PackedTokens]) -> PackedTokens:
    """Stack packs of equal shape along a new leading axis."""
    stacked: PackedTokens = jax.tree.map(lambda *x: np.stack(x), *packs)
    return stacked


def row_lengths(max_length: int) -> tuple[int, ...]:
    """Return the candidate row lengths for shapes.

    >>> row_lengths(128), row_lengths(64)
    ((64, 96, 128), (64,))
    """
    return (*(n for n in ROW_LENGTHS if n < max_length), max_length)


def needs(packs: Sequence[np.ndarray], lengths: Sequence[int], place: Place = place) -> list[int]:
    """Count the rows that the packs of a batch need at each row length.

    Args:
      packs: for each pack, the lengths of its sentences.
      lengths: row lengths; every sentence fits the last one.
      place: places a pack in rows.

    Returns:
      For each row length, the maximum over the packs, or 0 if a sentence is longer than the row.

    >>> needs([np.array([5, 3]), np.array([2])], (4, 6, 8))
    [0, 2, 1]
    """
    longest = max(int(pack.max()) for pack in packs)
    return [
        max(place(pack, length).rows for pack in packs) if longest <= length else 0
        for length in lengths
    ]


def larger(needs: np.ndarray, lengths: Sequence[int], longest: int) -> np.ndarray:
    """Return the needs of a hypothetical batch, `SPARE` times larger than any sampled one.

    Args:
      needs: needs of the sampled batches, see `choose_shapes`.
      lengths: row lengths, ascending.
      longest: length of the longest sentence in all examples.

    >>> larger(np.array([[0, 4], [5, 3]]), (64, 128), 100)
    array([0, 5])
    """
    return np.where(longest <= np.array(lengths), np.ceil(SPARE * needs.max(0)), 0).astype(int)


def choose_shapes(
    needs: np.ndarray, lengths: Sequence[int], most: int, repeated: float = 1.0
) -> list[Shape]:
    """Choose the shapes that minimize the cost of a run, including compilation.

    The search is exhaustive over combinations of a few quantiles of the needs.

    Args:
      needs: `i64[steps, len(lengths)]`, the number of rows that each batch needs at each row
        length, or 0 if one of its sentences is longer than the row.
      lengths: row lengths, ascending; every batch fits the last one.
      most: maximum number of shapes.
      repeated: number of batches of the run that each sampled batch represents.

    Returns:
      Shapes, cheapest first, such that every batch fits at least one.

    >>> choose_shapes(np.array([[2, 1]] * 9 + [[0, 3]]), (64, 128), 1)
    [Shape(rows=3, length=128)]
    >>> choose_shapes(np.array([[2, 1]] * 9000 + [[0, 3]]), (64, 128), 2)
    [Shape(rows=2, length=64), Shape(rows=3, length=128)]
    """
    distinct, counts = np.unique(needs, axis=0, return_counts=True)
    candidates = [
        Shape(int(rows), length)
        for column, length in enumerate(lengths)
        for rows in _quantiles(needs[:, column])
    ]
    cost = np.full((len(candidates), len(distinct)), np.inf)
    for i, shape in enumerate(candidates):
        rows = distinct[:, lengths.index(shape.length)]
        cost[i, (rows > 0) & (rows <= shape.rows)] = shape.cost
    best = min(
        (
            chosen
            for k in range(1, most + 1)
            for chosen in itertools.combinations(range(len(candidates)), k)
        ),
        key=lambda chosen: (
            repeated * (cost[list(chosen)].min(0) @ counts) + PROGRAM_COST * len(chosen)
        ),
    )
    return sorted((candidates[i] for i in best), key=lambda s: s.cost)


def _quantiles(rows: np.ndarray) -> list[int]:
    rows = rows[rows > 0]
    if not rows.size:
        return []
    marks = (0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 1.0)
    return sorted({int(np.quantile(rows, q, method="higher")) for q in marks})


def fitting(shapes: Sequence[Shape], packs: Sequence[Sequence[int]], place: Place = place) -> Shape:
    """Return the cheapest shape that fits each pack of sentences.

    If none fits, rows are added to the longest one. This can happen after a group has ended early,
    since best-fit decreasing may need more rows for fewer sentences.

    Args:
      shapes: shapes, cheapest first.
      packs: for each pack, the lengths of its sentences.
      place: places a pack in rows.

    >>> fitting([Shape(1, 8), Shape(1, 16)], [[8, 8]]), fitting([Shape(1, 16)], [[9, 9]])
    (Shape(rows=1, length=16), Shape(rows=2, length=16))
    """
    for shape in shapes:
        if all(
            max(lengths) <= shape.length and place(lengths, shape.length).rows <= shape.rows
            for lengths in packs
        ):
            return shape
    length = max(shape.length for shape in shapes)
    return Shape(max(place(lengths, length).rows for lengths in packs), length)
