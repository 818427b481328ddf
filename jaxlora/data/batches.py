"""Which examples step k trains on, and the batch they make: a pure function of (seed, k)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import grain
import numpy as np

from jaxlora.data import packing
from jaxlora.data.examples import Examples
from jaxlora.step import Batch, Rows


@dataclasses.dataclass(frozen=True)
class Order:
    """The order in which a group's tasks are read, over the whole run.

    In an epoch every task draws as many examples as the largest set has: the largest is seen
    exactly once, the shorter ones are stretched (repeated, newly shuffled each time), as evenly as
    can be.

    Attributes:
      draws: `i64[T, epochs * E]`, example numbers, E the size of the largest set.
      size: E.
      batch_size: B; an epoch's last batch may be smaller.
    """

    draws: np.ndarray
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
        return self.draws[:, start:stop]


def make_order(sizes: Mapping[str, int], batch_size: int, epochs: int, seed: int) -> Order:
    """Shuffle and stretch with Grain.

    Args:
      sizes: examples of each task.
      batch_size: B.
      epochs: passes over the largest set.
      seed: of all shuffles; each task and each repetition has its own.

    >>> order = make_order({"long": 4, "short": 2}, batch_size=4, epochs=1, seed=0)
    >>> np.sort(order.at(0)).tolist()
    [[0, 1, 2, 3], [0, 0, 1, 1]]
    """
    size = max(sizes.values())
    draws = []
    for name, n in sizes.items():
        stream = grain.MapDataset.range(n).shuffle(_seed(seed, name)).repeat()
        draws.append([stream[i] for i in range(epochs * size)])
    return Order(np.array(draws, np.int64), size, batch_size)


def _seed(seed: int, name: str) -> int:
    return int(np.random.SeedSequence([seed, *name.encode()]).generate_state(1)[0])


@dataclasses.dataclass(frozen=True)
class PackedBatches:
    """Batches of packed rows; indexing gives step k's batch.

    Attributes:
      examples: training examples by task, in the order of the task axis.
      order: which examples each step draws.
      shapes: the shapes to pack into, from `plan`.
    """

    examples: Mapping[str, Examples]
    order: Order
    shapes: tuple[packing.Shape, ...]

    def __getitem__(self, step: int) -> Batch:
        chosen = self.order.at(step)
        shape = packing.fitting(self.shapes, _lengths(self.examples, chosen))
        slots = slot_count(self.examples, self.order.batch_size)
        rows = [
            self._task_rows(examples, numbers, slots, shape)
            for examples, numbers in zip(self.examples.values(), chosen, strict=True)
        ]
        return Batch(Rows(*map(np.stack, zip(*rows, strict=True))), *targets(self, chosen))

    def _task_rows(
        self, examples: Examples, numbers: np.ndarray, slots: int, shape: packing.Shape
    ) -> Rows:
        sentences = sentence_numbers(examples, numbers)
        index = slot_numbers(examples, len(numbers), self.order.batch_size)
        return packing.fill([examples.sentence(s) for s in sentences], index, slots, shape)


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


def _lengths(examples: Mapping[str, Examples], chosen: np.ndarray) -> list[np.ndarray]:
    return [
        e.lengths[sentence_numbers(e, numbers)]
        for e, numbers in zip(examples.values(), chosen, strict=True)
    ]


def plan(
    examples: Mapping[str, Examples], order: Order, steps: int, max_length: int, most: int
) -> PackedBatches:
    """Look at all batches of a run and choose the shapes they are packed into.

    Args:
      examples: training examples by task.
      order: which examples each step draws.
      steps: how many steps the run has.
      max_length: the longest row, and the longest sentence.
      most: how many shapes (compiled programs) at the most.
    """
    lengths = packing.row_lengths(max_length)
    needs = np.zeros((steps, len(lengths)), np.int64)
    for step in range(steps):
        tasks = _lengths(examples, order.at(step))
        longest = max(int(n.max()) for n in tasks)
        for column, length in enumerate(lengths):
            if longest <= length:
                needs[step, column] = max(packing.place(n, length).rows for n in tasks)
    return PackedBatches(examples, order, tuple(packing.choose_shapes(needs, lengths, most)))


def prefetch(batches: PackedBatches | VectorBatches, start: int, stop: int) -> Iterator[Batch]:
    """Batches of steps `start … stop - 1`, made by Grain in a thread while the device works."""
    steps = grain.MapDataset.range(start, stop).map(batches.__getitem__)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
