"""The batch of step k, as a pure function of (seed, k)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlora.data import packing
from jaxlora.data.order import JointOrder, import_grain
from jaxlora.data.tokenized import Examples

MAX_SAMPLED = 2048  # batches inspected to choose the shapes of a run; takes about a second


class Batch(NamedTuple):
    """The examples of one step for all T tasks.

    Attributes:
      inputs: for adapters, `PackedTokens` of T·N slots, where slot n of task t has index `t N + n`;
        for full fine-tuning, `PackedTokens` with a leading axis `[T]`; for a frozen encoder,
        sentence vectors `f32[T, N, H]`. The first sentence of example b is in slot b of its task,
        the second one in slot `B + b`.
      labels: `f32[L, B]`, one row per task, or K rows for a multilabel task with K classes.
      weights: `f32[T, B]`, 1 for a real example, 0 for padding; all padding for a task whose group
        takes no part in the step.
    """

    inputs: Any
    labels: Any
    weights: Any


class _Sentences(NamedTuple):
    """The sentences of a batch: their tokens, token types and slots."""

    tokens: list[np.ndarray]
    types: list[Any]
    slots: np.ndarray


def _sentences(examples: Examples, drawn: np.ndarray, batch_size: int) -> _Sentences:
    numbers = sentence_numbers(examples, drawn)
    return _Sentences(
        [examples.sentence(n) for n in numbers],
        examples.types_of(numbers),
        slot_numbers(examples, len(drawn), batch_size),
    )


def _together(parts: Sequence[_Sentences], slots: int) -> _Sentences:
    """Concatenate the sentences of all tasks, with `slots` slots per task."""
    return _Sentences(
        list(itertools.chain.from_iterable(part.tokens for part in parts)),
        list(itertools.chain.from_iterable(part.types for part in parts)),
        np.concatenate([part.slots + t * slots for t, part in enumerate(parts)]),
    )


@dataclasses.dataclass(frozen=True)
class PackedBatches:
    """Batches of packed rows; `batches[k]` is the batch of step k.

    Attributes:
      examples: training examples by task, in the order of the task axis.
      order: which examples each step draws.
      shapes: shapes of the packed rows, from `choose_batch_shapes`.
      mixed: whether sentences of different tasks share rows; otherwise each task has its own rows.
      block: number of consecutive tokens of a mixed row that belong to one task, see
        `packing.place_by_owner`; 1: no constraint.
    """

    examples: Mapping[str, Examples]
    order: JointOrder
    shapes: tuple[packing.Shape, ...]
    mixed: bool
    block: int = 1

    def __getitem__(self, step: int) -> Batch:
        chosen = self.order.at(step)
        slots = slot_count(self.examples, self.order.batch_size)
        parts = [
            _sentences(examples, drawn, self.order.batch_size)
            for examples, drawn in zip(self.examples.values(), chosen, strict=True)
        ]
        if self.mixed:
            parts, slots = [_together(parts, slots)], slots * len(parts)
        place = packing.by_owner(owners(self.examples, chosen), self.block)
        sizes = [list(map(len, part.tokens)) for part in parts]
        shape = packing.fitting(self.shapes, sizes, place)
        typed = any(examples.types is not None for examples in self.examples.values())
        packs = [
            packing.fill(
                part.tokens, part.slots, slots, shape, place(size, shape.length),
                part.types if typed else None,
            )
            for part, size in zip(parts, sizes, strict=True)
        ]  # fmt: skip
        inputs = packs[0] if self.mixed else packing.stack(packs)
        return Batch(inputs, *targets(self, chosen))


@dataclasses.dataclass(frozen=True)
class VectorBatches:
    """Batches of precomputed sentence vectors, for a frozen encoder.

    Attributes:
      examples: training examples by task.
      order: which examples each step draws.
      vectors: task → `f32[sentences, H]`, one vector per sentence of its examples.
    """

    examples: Mapping[str, Examples]
    order: JointOrder
    vectors: Mapping[str, np.ndarray]

    def __getitem__(self, step: int) -> Batch:
        chosen = self.order.at(step)
        slots = slot_count(self.examples, self.order.batch_size)
        inputs = []
        for (name, examples), numbers in zip(self.examples.items(), chosen, strict=True):
            table = self.vectors[name]
            out = np.zeros((slots, table.shape[1]), np.float32)
            index = slot_numbers(examples, len(numbers), self.order.batch_size)
            out[index] = table[sentence_numbers(examples, numbers)]
            inputs.append(out)
        return Batch(np.stack(inputs), *targets(self, chosen))


def slot_count(examples: Mapping[str, Examples], batch_size: int) -> int:
    """Return N, the number of sentence slots per task in a batch."""
    return batch_size * max(e.sentences for e in examples.values())


def sentence_numbers(examples: Examples, numbers: np.ndarray) -> np.ndarray:
    """Return the sentence indices of examples: all first sentences, then all second ones."""
    return np.concatenate([numbers * examples.sentences + k for k in range(examples.sentences)])


def slot_numbers(examples: Examples, count: int, batch_size: int) -> np.ndarray:
    """Return the slots of the sentences of `count` examples: example b has slots b and `B + b`."""
    return np.concatenate([np.arange(count) + k * batch_size for k in range(examples.sentences)])


def owners(examples: Mapping[str, Examples], chosen: Sequence[np.ndarray]) -> np.ndarray:
    """Return the task index of each sentence in a batch, in the order of the tasks."""
    counts = [e.sentences * len(n) for e, n in zip(examples.values(), chosen, strict=True)]
    return np.repeat(np.arange(len(counts)), counts)


def targets(
    batches: PackedBatches | VectorBatches, chosen: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return labels `f32[L, B]` and weights `f32[T, B]` of the chosen examples, see `Batch`."""
    size = batches.order.batch_size
    labels: list[np.ndarray] = []
    weights = np.zeros((len(chosen), size), np.float32)
    for t, (examples, numbers) in enumerate(zip(batches.examples.values(), chosen, strict=True)):
        labels.append(np.zeros((examples.targets.shape[1], size), np.float32))
        labels[t][:, : len(numbers)] = examples.targets[numbers].T
        weights[t, : len(numbers)] = 1
    return np.concatenate(labels), weights


def choose_batch_shapes(
    examples: Mapping[str, Examples],
    order: JointOrder,
    max_length: int,
    most: int,
    mixed: bool,
    multiple: int = 1,
    block: int = 1,
) -> PackedBatches:
    """Choose the shapes of packed rows for the batches of a run.

    For runs of up to `MAX_SAMPLED` steps, every batch is inspected. For longer runs, where that
    would take minutes, only `MAX_SAMPLED` evenly spaced batches are. The shapes then also fit a
    batch somewhat larger than all of these (`packing.larger`), and a last shape fits any batch. It
    is compiled only if a batch needs it.

    Args:
      examples: training examples by task.
      order: which examples each step draws.
      max_length: maximum length of a row and of a sentence, in tokens.
      most: maximum number of shapes, that is, of compiled programs. A run of more than
        `MAX_SAMPLED` steps has up to `max(2, most)` shapes plus the one that fits any batch.
      mixed: whether sentences of different tasks share rows.
      multiple: the number of rows is a multiple of this, usually the number of devices.
      block: see `PackedBatches`; `max_length` is rounded up to a multiple of it.
    """
    max_length = _round_up(max_length, block)
    lengths, steps = packing.row_lengths(max_length), order.steps
    sampled = np.linspace(0, steps - 1, min(steps, MAX_SAMPLED)).round().astype(int)
    needs = _needs(examples, order, sampled.tolist(), lengths, mixed, block)
    last: list[packing.Shape] = []
    if len(needs) < steps:
        each = [order.batch_size * e.sentences for e in examples.values()]
        longest = max(int(e.lengths.max()) for e in examples.values())
        larger = packing.larger(needs, lengths, longest)
        rows = _round_up(sum(each) if mixed else max(each), multiple)
        last = [packing.Shape(rows, max_length)]
        needs, most = np.concatenate([needs, larger[None]]), max(2, most)
    shapes = packing.choose_shapes(_round_up(needs, multiple), lengths, most, steps / len(needs))
    return PackedBatches(examples, order, (*shapes, *last), mixed, block)


def _needs(
    examples: Mapping[str, Examples],
    order: JointOrder,
    steps: Sequence[int],
    lengths: Sequence[int],
    mixed: bool,
    block: int,
) -> np.ndarray:
    """Count the rows that the batches of some steps need at each row length."""
    sizes = [e.lengths for e in examples.values()]  # a property: computed once, not at every step
    found = []
    for step in steps:
        drawn = order.at(step)
        packs = [
            size[sentence_numbers(e, numbers)]
            for e, size, numbers in zip(examples.values(), sizes, drawn, strict=True)
        ]
        place = packing.by_owner(owners(examples, drawn), block)
        found.append(packing.needs([np.concatenate(packs)] if mixed else packs, lengths, place))
    return np.array(found)


def _round_up(rows: Any, multiple: int) -> Any:
    """Round numbers up to the next multiple."""
    return -(-rows // multiple) * multiple


def prefetch(
    batches: PackedBatches | VectorBatches,
    start: int,
    put: Callable[[Batch], Batch] = lambda batch: batch,
) -> Iterator[tuple[int, Batch]]:
    """Iterate over `(step, batch)` from `start` to the end; a thread builds batches ahead.

    Args:
      batches: batches, indexed by step.
      start: the first step.
      put: transfers a batch to the devices.
    """
    grain = import_grain()
    steps = batches.order.steps_from(start)
    built = grain.MapDataset.source(steps).map(batches.__getitem__).map(put)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return zip(steps, built.to_iter_dataset(options), strict=True)
