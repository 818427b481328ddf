"""Split sentences into chunks of packed rows with few distinct shapes, to compile few programs.

Sentences are packed at one or several row lengths, short ones into short rows where that is faster.
The rows are then covered with chunks of 1, 4, 8, 16 or 64 rows.
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
TOKENS = 2048  # tokens of the largest chunks; on CPU larger ones take more time per token
SHORTEST = 64  # shortest row length, except for chunks of a single row:
TINY = (16, 32)
MIN_TOKENS = 2  # [CLS] and [SEP]; BERT's tokenizer may drop all characters between them

# The cost model, in tokens; measured with MiniLM on two cores of an AMD EPYC: 4.5 ms per chunk and
# 0.11 ms per token.
START = 40  # fixed cost of a chunk
ATTENTION = 640  # row length at which attention takes as much time as everything else
PROGRAM = 10_000  # cost of compiling a shape

# With several adapters: block length → time per token relative to one adapter. Short blocks gather
# the factors more often, long blocks have more padding. Measured as above, with 3 to 150 adapters
# of rank 8 (blocks of 16 tokens: 1.2).
BLOCKS = {8: 1.4, 32: 1.12}


class Chunks(NamedTuple):
    """Sentences packed into rows of one length, and the chunks that cover these rows.

    Attributes:
      numbers: `i64[n]`, indices of the sentences.
      where: their positions in the rows.
      shapes: shapes of the chunks, which together have at least as many rows.
      block: number of consecutive tokens that share one owner.
    """

    numbers: np.ndarray
    where: Placement
    shapes: tuple[Shape, ...]
    block: int


def _cost(shapes: Sequence[Shape]) -> float:
    """Return the estimated time of chunks, in tokens."""
    return sum(START + shape.tokens * (1 + shape.length / ATTENTION) for shape in shapes)


def chunks(
    examples: Examples,
    max_length: int,
    owner: np.ndarray | None = None,
    few_programs: bool = False,
) -> Iterator[tuple[Any, ...]]:
    """Pack sentences into chunks.

    Args:
      examples: at least one sentence.
      max_length: length of the longest rows; no sentence is longer.
      owner: `i64[sentences]`, the adapter of each sentence; None: a single adapter or none.
      few_programs: use only one chunk shape per row length.

    Yields:
      Indices of sentences, their packed rows, and if `owner` is given, the owner of each block,
      `i32[R, S / block]`.
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
    """Return the maximum number of sentences in a chunk."""
    return -(-shape.tokens // MIN_TOKENS)


def _owners(owner: np.ndarray, rows: PackedTokens, block: int) -> np.ndarray:
    """Return the owner of each block of packed rows; blocks of padding get `owner[0]`."""
    blocks = rows.segment_ids.reshape(len(rows.segment_ids), -1, block).max(-1)
    return np.where(blocks > 0, owner[blocks - 1], owner[0]).astype(np.int32)


def plan(
    lengths: np.ndarray,
    max_length: int,
    owner: np.ndarray | None = None,
    few_programs: bool = False,
) -> list[Chunks]:
    """Choose the chunks with the lowest cost; see `chunks` for the arguments.

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
    """Yield the sentences of each row length, with each in the shortest row that fits it."""
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
    """Choose the chunks that cover packed rows; a `block` of 1 means a whole row."""
    sizes = row_counts(length, longest)
    tables = [(rows,) for rows in sizes] if few_programs else [sizes]
    covers = [_cheapest(where.rows, table, length) for table in tables]
    return Chunks(numbers, where, min(covers, key=_cost), length if block == 1 else block)


def _cheapest(rows: int, sizes: tuple[int, ...], length: int) -> tuple[Shape, ...]:
    """Cover `rows` rows with chunks of the given sizes (row counts) at the lowest cost.

    >>> [shape.rows for shape in _cheapest(21, (1, 4, 8, 16), 64)]
    [16, 4, 1]
    """
    whole, rest = divmod(rows, sizes[-1])
    return (Shape(sizes[-1], length),) * whole + _cheapest_below(rest, sizes, length)


@functools.lru_cache(1 << 12)
def _cheapest_below(rows: int, sizes: tuple[int, ...], length: int) -> tuple[Shape, ...]:
    """Do the same for fewer rows than the largest size, by trying each size first."""
    if not rows:
        return ()
    covers = [
        (Shape(size, length), *_cheapest_below(max(rows - size, 0), sizes, length))
        for size in reversed(sizes)
    ]
    return min(covers, key=_cost)


def row_counts(length: int, longest: int) -> tuple[int, ...]:
    """Return the possible row counts of chunks with rows of one length.

    >>> row_counts(64, 128), row_counts(128, 128), row_counts(16, 128)
    ((1, 4, 8, 16), (1, 4, 8, 16), (1,))
    """
    if length in TINY and length < longest:
        return (1,)
    return tuple(rows for rows in ROWS if rows == 1 or rows * length <= TOKENS)


def row_lengths(max_length: int, block: int = 1) -> list[int]:
    """Return the possible row lengths in ascending order, multiples of `block`.

    >>> row_lengths(128), row_lengths(48), row_lengths(512)
    ([16, 32, 64, 128], [16, 32, 48], [16, 32, 64, 128, 256, 512])
    """
    longest = -(-max_length // block) * block
    doubled = [SHORTEST << k for k in range(max_length.bit_length())]
    return [*(n for n in (*TINY, *doubled) if n < longest and n % block == 0), longest]


def every_shape(max_length: int, mixed: bool) -> set[tuple[Shape, int]]:
    """Return all `(shape, block)` that chunks may have.

    Args:
      max_length: see `chunks`.
      mixed: whether a chunk may have several owners.
    """
    found = set()
    for block in (1, *BLOCKS) if mixed else (1,):
        lengths = row_lengths(max_length, block)
        for length in lengths:
            for rows in row_counts(length, lengths[-1]):
                found.add((Shape(rows, length), length if block == 1 else block))
    return found
