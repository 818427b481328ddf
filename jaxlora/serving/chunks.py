"""Sentences cut into chunks of packed rows, whose few shapes are compiled once.

A set of sentences is packed at one or several row lengths, short ones in short rows where that
pays, and its rows are covered with chunks of 1, 4, 8, 16 or 64 rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlora.data import packing
from jaxlora.data.packing import Placement, Shape
from jaxlora.data.tokenized import Examples
from jaxlora.nn.encode import PackedTokens

ROWS = (1, 4, 8, 16, 64)
TOKENS = 2048  # of the largest chunks; on CPU larger ones need more time for a token, not less
SHORTEST = 64  # length of rows, but for
TINY = (16, 32)  # those of a single row for a few words
MIN_TOKENS = 2  # [CLS], [SEP]: a word of characters that BERT drops leaves nothing between

# MiniLM on two cores of an AMD EPYC: a chunk takes 4.5 ms and 0.11 ms a token; at this row length
# attention would take as much as all the rest.
START = 40  # tokens that take the time of a chunk without any
ATTENTION = 640
PROGRAM = 10_000  # tokens that take the time of compiling a shape

# Tokens that share an adapter where several are served together, and the time of a token then, as a
# multiple of that with one: short blocks gather the factors more often, long ones are padded more.
# Measured as above, with 3 to 150 adapters of rank 8 (blocks of 16 tokens: 1.2).
BLOCKS = {8: 1.4, 32: 1.12}


class Chunks(NamedTuple):
    """Sentences in rows of one length, and the chunks that take those rows.

    Attributes:
      numbers: `i64[n]`, which sentences.
      where: their places.
      shapes: of the chunks, which together have at least as many rows.
      block: tokens that have one owner.
    """

    numbers: np.ndarray
    where: Placement
    shapes: tuple[Shape, ...]
    block: int


def _cost(shapes: Sequence[Shape]) -> float:
    """Return the time that chunks take, in tokens."""
    return sum(START + shape.tokens * (1 + shape.length / ATTENTION) for shape in shapes)


def chunks(
    examples: Examples,
    max_length: int,
    owner: np.ndarray | None = None,
    few_programs: bool = False,
) -> Iterator[tuple[Any, ...]]:
    """Pack sentences into chunks.

    Args:
      examples: with at least one sentence.
      max_length: length of the longest rows; no sentence is longer.
      owner: `i64[sentences]`, which adapter each sentence uses; None: there is one.
      few_programs: take chunks of one shape for each row length.

    Yields:
      Numbers of sentences, their rows, and with an owner `i32[R, S / block]`, that of each block.
    """
    for part in plan(examples.lengths, max_length, owner, few_programs):
        order = np.argsort(part.where.row, kind="stable")
        ends = np.cumsum([shape.rows for shape in part.shapes])
        cuts = np.split(order, np.searchsorted(part.where.row[order], ends[:-1]))
        for shape, end, mine in zip(part.shapes, ends, cuts, strict=True):
            numbers = part.numbers[mine]
            place = Placement(
                part.where.row[mine] - (end - shape.rows), part.where.start[mine], shape.rows
            )
            types = None if examples.types is None else examples.types_of(numbers)
            sentences = [examples.sentence(n) for n in numbers]
            rows = packing.fill(sentences, range(len(numbers)), slots(shape), shape, place, types)
            owners = [] if owner is None else [_owners(owner[numbers], rows, part.block)]
            yield numbers, rows, *owners


def slots(shape: Shape) -> int:
    """Return the most sentences that a chunk can hold."""
    return -(-shape.tokens // MIN_TOKENS)


def _owners(owner: np.ndarray, rows: PackedTokens, block: int) -> np.ndarray:
    """Return the owner of each block of packed rows; padding has the first of all."""
    blocks = rows.segment_ids.reshape(len(rows.segment_ids), -1, block).max(-1)
    return np.where(blocks > 0, owner[blocks - 1], owner[0]).astype(np.int32)


def plan(
    lengths: np.ndarray,
    max_length: int,
    owner: np.ndarray | None = None,
    few_programs: bool = False,
) -> list[Chunks]:
    """Choose the chunks that cost least; see `chunks` for the arguments.

    >>> [one.shapes for one in plan(np.array([12]), 128)]
    [(Shape(rows=1, length=16),)]
    >>> [one.shapes for one in plan(np.array([12] * 20 + [90]), 128)]
    [(Shape(rows=4, length=64),), (Shape(rows=1, length=128),)]
    """
    blocks: dict[int, float] = BLOCKS
    if owner is None or (owner == owner[0]).all():
        owner, blocks = None, {1: 1.0}
    found = []
    for block, factor in blocks.items():
        usable = row_lengths(max_length, block)
        for least in usable:
            parts = _by_length(lengths, owner, [n for n in usable if n >= least], block)
            chosen = [_cover(*part, usable[-1], block, few_programs) for part in parts]
            shapes = [shape for one in chosen for shape in one.shapes]
            programs = PROGRAM * len(set(shapes)) if few_programs else 0
            found.append((factor * _cost(shapes) + programs, chosen))
    return min(found, key=lambda one: one[0])[1]


def _by_length(
    lengths: np.ndarray, owner: np.ndarray | None, usable: Sequence[int], block: int
) -> Iterator[tuple[np.ndarray, Placement, int]]:
    """Place each sentence in the shortest rows that hold it."""
    chosen = np.searchsorted(usable, lengths)
    for k in np.unique(chosen).tolist():
        numbers = np.flatnonzero(chosen == k)
        place = packing.place if owner is None else packing.by_owner(owner[numbers], block)
        yield numbers, place(lengths[numbers], usable[k]), usable[k]


def _cover(
    numbers: np.ndarray,
    where: Placement,
    length: int,
    longest: int,
    block: int,
    few_programs: bool,
) -> Chunks:
    """Choose the chunks for placed rows; a block of one token stands for a whole row."""
    sizes = row_counts(length, longest)
    tables = [(rows,) for rows in sizes] if few_programs else [sizes]
    covers = [_cheapest(where.rows, table, length) for table in tables]
    return Chunks(numbers, where, min(covers, key=_cost), length if block == 1 else block)


def _cheapest(rows: int, sizes: tuple[int, ...], length: int) -> tuple[Shape, ...]:
    """Cover some rows with chunks of these sizes at the least cost.

    >>> [shape.rows for shape in _cheapest(21, (1, 4, 8, 16), 64)]
    [16, 4, 1]
    """
    whole, rest = divmod(rows, sizes[-1])
    return (Shape(sizes[-1], length),) * whole + _cheapest_below(rest, sizes, length)


@functools.lru_cache(1 << 12)
def _cheapest_below(rows: int, sizes: tuple[int, ...], length: int) -> tuple[Shape, ...]:
    """Do the same for fewer rows than the largest chunk's, by trying each size first."""
    if not rows:
        return ()
    covers = [
        (Shape(size, length), *_cheapest_below(max(rows - size, 0), sizes, length))
        for size in reversed(sizes)
    ]
    return min(covers, key=_cost)


def row_counts(length: int, longest: int) -> tuple[int, ...]:
    """Return the numbers of rows that chunks of a row length may have.

    >>> row_counts(64, 128), row_counts(128, 128), row_counts(16, 128)
    ((1, 4, 8, 16), (1, 4, 8, 16), (1,))
    """
    if length in TINY and length < longest:
        return (1,)
    return tuple(rows for rows in ROWS if rows == 1 or rows * length <= TOKENS)


def row_lengths(max_length: int, block: int = 1) -> list[int]:
    """Return the lengths that rows may have, the longest last: multiples of a block.

    >>> row_lengths(128), row_lengths(48), row_lengths(512)
    ([16, 32, 64, 128], [16, 32, 48], [16, 32, 64, 128, 256, 512])
    """
    longest = -(-max_length // block) * block
    doubled = [SHORTEST << k for k in range(max_length.bit_length())]
    return [*(n for n in (*TINY, *doubled) if n < longest and n % block == 0), longest]


def every_shape(max_length: int, mixed: bool) -> set[tuple[Shape, int]]:
    """Return the shapes that chunks may have, each with the tokens of a block.

    Args:
      max_length: see `chunks`.
      mixed: whether there may be several owners.
    """
    found = set()
    for block in (1, *BLOCKS) if mixed else (1,):
        lengths = row_lengths(max_length, block)
        for length in lengths:
            for rows in row_counts(length, lengths[-1]):
                found.add((Shape(rows, length), length if block == 1 else block))
    return found
