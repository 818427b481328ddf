"""Which examples step k trains on, and the batch they make: a pure function of (seed, k)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxlora.data import packing
from jaxlora.data.tokenized import Examples
from jaxlora.nn.encode import PackedTokens
from jaxlora.utils.extras import explained

if TYPE_CHECKING:
    import grain

LOOKED_AT = 2048  # of a run's batches when its shapes are chosen: a second, however long it is


class Batch(NamedTuple):
    """One step's examples of every task of a group.

    Attributes:
      inputs: for adapters `PackedTokens` of T·N sentences, task t's sentence n being number
        `t N + n`; for whole encoders `PackedTokens` with leading `[T]`; for a frozen one vectors
        `f32[T, N, H]`. First sentences come first: example b is sentence b, its second one is
        sentence `B + b`.
      labels: `f32[T, B]`.
      weights: `f32[T, B]`, 1 for a real example, 0 for padding.
    """

    inputs: Any
    labels: Any
    weights: Any


@dataclasses.dataclass(frozen=True)
class Order:
    """The order in which a group's tasks are read, without end.

    In an epoch every task draws as many examples as the largest set has: the largest is seen
    exactly once, the shorter ones are stretched (repeated, newly shuffled each time), as evenly as
    can be.

    Attributes:
      streams: the example numbers of each task; indexing draws them, so nothing is stored.
      size: E, the size of the largest set, and the draws of an epoch.
      batch_size: B; an epoch's last batch may be smaller.
    """

    streams: tuple[grain.MapDataset[int], ...]
    size: int
    batch_size: int

    @property
    def steps_per_epoch(self) -> int:
        """`ceil(E / B)`."""
        return -(-self.size // self.batch_size)

    def at(self, step: int) -> np.ndarray:
        """Example numbers of step k (from 0), `i64[T, b]` with `b ≤ B`."""
        epoch, k = divmod(step, self.steps_per_epoch)
        start = epoch * self.size + k * self.batch_size
        stop = min(start + self.batch_size, (epoch + 1) * self.size)
        return np.array([[stream[i] for i in range(start, stop)] for stream in self.streams])


def make_order(sizes: Mapping[str, int], batch_size: int, seed: int) -> Order:
    """Shuffle every task's examples, and again for each repetition.

    Args:
      sizes: examples of each task.
      batch_size: B.
      seed: of all shuffles; each task has its own.

    >>> order = make_order({"long": 4, "short": 2}, batch_size=4, seed=0)
    >>> np.sort(order.at(0)).tolist()
    [[0, 1, 2, 3], [0, 0, 1, 1]]
    """
    grain = _import_grain()
    streams = (
        grain.MapDataset.range(n).shuffle(_stream_seed(seed, name)).repeat()
        for name, n in sizes.items()
    )
    return Order(tuple(streams), max(sizes.values()), batch_size)


def _import_grain() -> Any:
    """Import Grain, which only training needs."""
    with explained():
        import grain

    return grain


def _stream_seed(seed: int, name: str) -> int:
    # Mixed, since Grain's own next shuffle has the next seed.
    return int(np.random.SeedSequence([seed, *name.encode()]).generate_state(1)[0])


@dataclasses.dataclass(frozen=True)
class PackedBatches:
    """Batches of packed rows; indexing gives step k's batch.

    Attributes:
      examples: training examples by task, in the order of the task axis.
      order: which examples each step draws.
      shapes: the shapes to pack into, from `choose_batch_shapes`.
      mixed: whether the tasks share rows (see `step.task_encoder`) or each has its own.
    """

    examples: Mapping[str, Examples]
    order: Order
    shapes: tuple[packing.Shape, ...]
    mixed: bool

    def __getitem__(self, step: int) -> Batch:
        chosen = self.order.at(step)
        slots = slot_count(self.examples, self.order.batch_size)
        sentences, numbers = [], []
        for examples, drawn in zip(self.examples.values(), chosen, strict=True):
            sentences.append([examples.sentence(n) for n in sentence_numbers(examples, drawn)])
            numbers.append(slot_numbers(examples, len(drawn), self.order.batch_size))
        if self.mixed:
            sentences = [list(itertools.chain.from_iterable(sentences))]
            numbers = [np.concatenate([n + t * slots for t, n in enumerate(numbers)])]
            slots *= len(chosen)
        shape = packing.fitting(self.shapes, [list(map(len, part)) for part in sentences])
        packs = [
            packing.fill(part, index, slots, shape)
            for part, index in zip(sentences, numbers, strict=True)
        ]
        inputs = packs[0] if self.mixed else PackedTokens(*map(np.stack, zip(*packs, strict=True)))
        return Batch(inputs, *targets(self, chosen))


@dataclasses.dataclass(frozen=True)
class VectorBatches:
    """Batches of ready sentence vectors, for an encoder that never changes.

    Attributes:
      examples: training examples by task.
      order: which examples each step draws.
      vectors: `f32[sentences, H]` by task, one vector for each sentence of `examples`.
    """

    examples: Mapping[str, Examples]
    order: Order
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
    """N: sentences a task may have in a batch."""
    return batch_size * max(e.sentences for e in examples.values())


def sentence_numbers(examples: Examples, numbers: np.ndarray) -> np.ndarray:
    """Sentences of some examples: all first ones, then all second ones."""
    return np.concatenate([numbers * examples.sentences + k for k in range(examples.sentences)])


def slot_numbers(examples: Examples, count: int, batch_size: int) -> np.ndarray:
    """Slots of those sentences: example b's are b and `B + b`."""
    return np.concatenate([np.arange(count) + k * batch_size for k in range(examples.sentences)])


def targets(
    batches: PackedBatches | VectorBatches, chosen: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Labels and weights `f32[T, B]` of the chosen examples."""
    labels, weights = np.zeros((2, len(chosen), batches.order.batch_size), np.float32)
    for t, (examples, numbers) in enumerate(zip(batches.examples.values(), chosen, strict=True)):
        labels[t, : len(numbers)] = examples.labels[numbers]
        weights[t, : len(numbers)] = 1
    return labels, weights


def choose_batch_shapes(
    examples: Mapping[str, Examples],
    order: Order,
    steps: int,
    max_length: int,
    most: int,
    mixed: bool,
    multiple: int = 1,
) -> PackedBatches:
    """Choose the shapes that a run's batches are packed into.

    All batches of a run of at most `LOOKED_AT` steps are looked at. To draw half a million would
    take minutes, so of a longer run only so many are, evenly spread. Its shapes also hold a batch
    that is larger than all of these (`packing.larger`); behind them stands one that holds any
    batch, and is compiled only if one occurs that needs it.

    Args:
      examples: training examples by task.
      order: which examples each step draws.
      steps: how many steps the run has.
      max_length: the longest row, and the longest sentence.
      most: how many shapes (compiled programs) at the most; a longer run has up to
        `max(2, most)`, and the one for any batch.
      mixed: whether the tasks share rows.
      multiple: the number of rows is a multiple of this, the number of devices.
    """
    lengths = packing.row_lengths(max_length)
    steps_seen = np.linspace(0, steps - 1, min(steps, LOOKED_AT)).round().astype(int)
    needs = _needs(examples, order, steps_seen.tolist(), lengths, mixed)
    last: list[packing.Shape] = []
    if len(needs) < steps:
        each = [order.batch_size * e.sentences for e in examples.values()]
        longest = max(int(e.lengths.max()) for e in examples.values())
        larger = packing.larger(needs, lengths, longest)
        last = [packing.Shape(_up(sum(each) if mixed else max(each), multiple), max_length)]
        needs, most = np.concatenate([needs, larger[None]]), max(2, most)
    shapes = packing.choose_shapes(_up(needs, multiple), lengths, most, steps / len(needs))
    return PackedBatches(examples, order, (*shapes, *last), mixed)


def _needs(
    examples: Mapping[str, Examples],
    order: Order,
    steps: Sequence[int],
    lengths: Sequence[int],
    mixed: bool,
) -> np.ndarray:
    """The rows that the batches of some steps need at each row length, see `packing.needs`."""
    sizes = [e.lengths for e in examples.values()]  # computed at each look
    found = []
    for step in steps:
        packs = [
            size[sentence_numbers(e, numbers)]
            for e, size, numbers in zip(examples.values(), sizes, order.at(step), strict=True)
        ]
        found.append(packing.needs([np.concatenate(packs)] if mixed else packs, lengths))
    return np.array(found)


def _up(rows: Any, multiple: int) -> Any:
    """Round numbers of rows up to a multiple."""
    return -(-rows // multiple) * multiple


def prefetch(
    batches: PackedBatches | VectorBatches,
    start: int,
    stop: int,
    put: Callable[[Batch], Batch] = lambda batch: batch,
) -> Iterator[Batch]:
    """Batches of steps `start … stop - 1`, made by Grain in a thread while the device works.

    Args:
      batches: indexable by step.
      start, stop: which steps.
      put: brings a batch to the devices.
    """
    grain = _import_grain()
    steps = grain.MapDataset.range(start, stop).map(batches.__getitem__).map(put)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
