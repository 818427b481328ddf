"""The batch of step k, as a pure function of (seed, k)."""

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

MAX_SAMPLED = 2048  # batches from which a run's shapes are chosen; this takes about a second


class Batch(NamedTuple):
    """The examples of one step for all T tasks of the groups that take it.

    Attributes:
      inputs: for adapters, `PackedTokens` of T·N sentences, where sentence n of task t has number
        `t N + n`; for full fine-tuning, `PackedTokens` with a leading axis `[T]`; for a frozen
        encoder, vectors `f32[T, N, H]`. The first sentence of example b is sentence b of its task,
        the second one is sentence `B + b`.
      labels: `f32[T, B]`.
      weights: `f32[T, B]`, 1 for a real example, 0 for padding; a task whose group has ended has
        padding alone.
    """

    inputs: Any
    labels: Any
    weights: Any


@dataclasses.dataclass(frozen=True)
class Order:
    """The endless order in which a group's tasks draw their examples.

    In an epoch every task draws as many examples as the largest training set has: each example of
    the largest set is drawn exactly once, and smaller sets are repeated, reshuffled each time.

    Attributes:
      streams: example numbers of each task, computed when indexed.
      size: E, the size of the largest training set, which is the number of draws in an epoch.
      batch_size: B; the last batch of an epoch may be smaller.
    """

    streams: tuple[grain.MapDataset[int], ...]
    size: int
    batch_size: int

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in an epoch, `ceil(E / B)`."""
        return -(-self.size // self.batch_size)

    def at(self, step: int) -> np.ndarray:
        """Return the example numbers of step k (from 0), `i64[T, b]` with `b ≤ B`."""
        epoch, k = divmod(step, self.steps_per_epoch)
        start = epoch * self.size + k * self.batch_size
        stop = min(start + self.batch_size, (epoch + 1) * self.size)
        return np.array([[stream[i] for i in range(start, stop)] for stream in self.streams])


@dataclasses.dataclass(frozen=True)
class JointOrder:
    """The order in which the tasks of several groups draw, where all begin at step 0.

    Attributes:
      orders: of each group.
      stops: how many steps each group takes.
    """

    orders: tuple[Order, ...]
    stops: tuple[int, ...]

    @property
    def steps(self) -> int:
        """Number of steps until all groups have ended."""
        return max(self.stops)

    @property
    def batch_size(self) -> int:
        """B, which is the same for all groups."""
        return self.orders[0].batch_size

    def at(self, step: int) -> list[np.ndarray]:
        """Return each task's example numbers of step k (from 0); none after its group's end."""
        drawn: list[np.ndarray] = []
        for order, stop in zip(self.orders, self.stops, strict=True):
            none = np.zeros((len(order.streams), 0), np.int64)
            drawn += [*(order.at(step) if step < stop else none)]
        return drawn

    def until(self, stops: Sequence[int]) -> JointOrder:
        """Return the same order for groups of which some end earlier."""
        return dataclasses.replace(self, stops=tuple(map(min, stops, self.stops)))


def make_order(sizes: Mapping[str, int], batch_size: int, seed: int) -> Order:
    """Shuffle the examples of every task, differently in each repetition.

    Args:
      sizes: task → number of training examples.
      batch_size: B.
      seed: seed of all shuffles; each task is shuffled differently.

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
    """Import Grain, which is only needed for training."""
    with explained():
        import grain

    return grain


def _stream_seed(seed: int, name: str) -> int:
    # Hashed, because Grain shuffles repetition n with seed + n.
    return int(np.random.SeedSequence([seed, *name.encode()]).generate_state(1)[0])


@dataclasses.dataclass(frozen=True)
class PackedBatches:
    """Batches of packed rows; indexing with k gives the batch of step k.

    Attributes:
      examples: training examples by task, in the order of the task axis.
      order: which examples each step draws.
      shapes: shapes of the packed rows, from `choose_batch_shapes`.
      mixed: whether sentences of different tasks share rows, or each task has rows of its own.
    """

    examples: Mapping[str, Examples]
    order: JointOrder
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
    """Batches of precomputed sentence vectors, for a frozen encoder.

    Attributes:
      examples: training examples by task.
      order: which examples each step draws.
      vectors: task → `f32[sentences, H]`, one vector for each sentence of its examples.
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
    """Return N, the maximum number of sentences of a task in a batch."""
    return batch_size * max(e.sentences for e in examples.values())


def sentence_numbers(examples: Examples, numbers: np.ndarray) -> np.ndarray:
    """Return the sentence numbers of some examples: all first sentences, then all second ones."""
    return np.concatenate([numbers * examples.sentences + k for k in range(examples.sentences)])


def slot_numbers(examples: Examples, count: int, batch_size: int) -> np.ndarray:
    """Return the slots of these sentences: example b of the batch has slots b and `B + b`."""
    return np.concatenate([np.arange(count) + k * batch_size for k in range(examples.sentences)])


def targets(
    batches: PackedBatches | VectorBatches, chosen: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return labels and weights `f32[T, B]` of the chosen examples."""
    labels, weights = np.zeros((2, len(chosen), batches.order.batch_size), np.float32)
    for t, (examples, numbers) in enumerate(zip(batches.examples.values(), chosen, strict=True)):
        labels[t, : len(numbers)] = examples.labels[numbers]
        weights[t, : len(numbers)] = 1
    return labels, weights


def choose_batch_shapes(
    examples: Mapping[str, Examples],
    order: JointOrder,
    max_length: int,
    most: int,
    mixed: bool,
    multiple: int = 1,
) -> PackedBatches:
    """Choose the shapes of packed rows for the batches of a run.

    For runs of up to `MAX_SAMPLED` steps every batch is considered. For longer runs, where that
    would take minutes, only `MAX_SAMPLED` evenly spaced batches are. Their shapes then also hold a
    batch somewhat larger than all of these (`packing.larger`), and a last shape holds any batch; it
    is compiled only if a batch needs it.

    Args:
      examples: training examples by task.
      order: which examples each step draws.
      max_length: length of the longest row, and of the longest sentence.
      most: maximum number of shapes, that is, of compiled programs. A run of more than
        `MAX_SAMPLED` steps has up to `max(2, most)` and the one for any batch.
      mixed: whether sentences of different tasks share rows.
      multiple: the number of rows is a multiple of this; used for the number of devices.
    """
    lengths, steps = packing.row_lengths(max_length), order.steps
    sampled = np.linspace(0, steps - 1, min(steps, MAX_SAMPLED)).round().astype(int)
    needs = _needs(examples, order, sampled.tolist(), lengths, mixed)
    last: list[packing.Shape] = []
    if len(needs) < steps:
        each = [order.batch_size * e.sentences for e in examples.values()]
        longest = max(int(e.lengths.max()) for e in examples.values())
        larger = packing.larger(needs, lengths, longest)
        rows = _round_up(sum(each) if mixed else max(each), multiple)
        last = [packing.Shape(rows, max_length)]
        needs, most = np.concatenate([needs, larger[None]]), max(2, most)
    shapes = packing.choose_shapes(_round_up(needs, multiple), lengths, most, steps / len(needs))
    return PackedBatches(examples, order, (*shapes, *last), mixed)


def _needs(
    examples: Mapping[str, Examples],
    order: JointOrder,
    steps: Sequence[int],
    lengths: Sequence[int],
    mixed: bool,
) -> np.ndarray:
    """Count the rows that the batches of some steps need at each row length."""
    sizes = [e.lengths for e in examples.values()]  # a property: computed once, not at every step
    found = []
    for step in steps:
        packs = [
            size[sentence_numbers(e, numbers)]
            for e, size, numbers in zip(examples.values(), sizes, order.at(step), strict=True)
        ]
        found.append(packing.needs([np.concatenate(packs)] if mixed else packs, lengths))
    return np.array(found)


def _round_up(rows: Any, multiple: int) -> Any:
    """Round one or many numbers of rows up to a multiple."""
    return -(-rows // multiple) * multiple


def prefetch(
    batches: PackedBatches | VectorBatches,
    start: int,
    put: Callable[[Batch], Batch] = lambda batch: batch,
) -> Iterator[Batch]:
    """Iterate over the batches from step `start` to the end, built by Grain in another thread.

    Args:
      batches: batches, indexed by step.
      start: the first step.
      put: puts a batch on the devices.
    """
    grain = _import_grain()
    steps = grain.MapDataset.range(start, batches.order.steps).map(batches.__getitem__).map(put)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
