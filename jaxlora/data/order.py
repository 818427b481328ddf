"""Which examples each step draws, as a pure function of (seed, step)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlora.utils.extras import explained

if TYPE_CHECKING:
    import grain


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
    """The order in which the tasks of several groups draw; all groups begin and end together.

    The group with the most steps takes part in each of N; one with n steps in n of them. These are
    chosen so that the same number of groups takes part in each step, give or take one: groups lie
    side by side on a circle, each as long as its share n / N, and a step takes those on which the
    teeth of a comb fall, one for each length N, which a golden angle turns from step to step
    (systematic sampling, Madow 1949, "On the Theory of Systematic Sampling, II").

    Attributes:
      orders: of each group.
      counts: n, how many steps each group takes.
      stops: after how many of its own steps each group ends, if earlier.
    """

    orders: tuple[Order, ...]
    counts: tuple[int, ...]
    stops: tuple[int, ...] = ()

    @property
    def steps(self) -> int:
        """N, the number of steps."""
        return max(self.counts)

    @property
    def batch_size(self) -> int:
        """B, which is the same for all groups."""
        return self.orders[0].batch_size

    @functools.cached_property
    def _taken(self) -> np.ndarray:
        """How many of its own steps each group has taken, `i32[N + 1, K]`."""
        turns = np.arange(self.steps) * ((5**0.5 - 1) / 2) % 1
        angle = turns.argsort().argsort()[:, None]  # each N-th of a turn once
        ends = np.cumsum(self.counts)[None]
        parts = (angle + ends) // self.steps > (angle + ends - self.counts) // self.steps
        taken = np.concatenate([np.zeros_like(parts[:1]), parts]).cumsum(0, dtype=np.int32)
        return np.minimum(taken, self.stops) if self.stops else taken

    def taken(self, step: int) -> list[int]:
        """Return how many of its own steps each group has taken before step k.

        >>> order = JointOrder((), (4, 2, 2))
        >>> [order.taken(step) for step in range(5)]
        [[0, 0, 0], [1, 0, 1], [2, 1, 1], [3, 1, 2], [4, 2, 2]]
        """
        return [int(number) for number in self._taken[step]]

    def takes_part(self, step: int) -> list[bool]:
        """Return which groups take part in step k (from 0)."""
        return [bool(part) for part in self._taken[step + 1] > self._taken[step]]

    def steps_from(self, start: int) -> Sequence[int]:
        """Return the steps from k on in which any group takes part."""
        anyone = (np.diff(self._taken[start:], axis=0) > 0).any(1)
        return [int(step) for step in start + np.flatnonzero(anyone)]

    def at(self, step: int) -> list[np.ndarray]:
        """Return each task's example numbers of step k; none if its group takes no part."""
        drawn: list[np.ndarray] = []
        parts = zip(self.orders, self.taken(step), self.takes_part(step), strict=True)
        for order, own_step, there in parts:
            none = np.zeros((len(order.streams), 0), np.int64)
            drawn += [*(order.at(own_step) if there else none)]
        return drawn


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
    grain = import_grain()
    streams = (
        grain.MapDataset.range(n).shuffle(_stream_seed(seed, name)).repeat()
        for name, n in sizes.items()
    )
    return Order(tuple(streams), max(sizes.values()), batch_size)


def import_grain() -> Any:
    """Import Grain, which is only needed for training."""
    with explained():
        import grain

    return grain


def _stream_seed(seed: int, name: str) -> int:
    # Hashed, because Grain shuffles repetition n with seed + n.
    return int(np.random.SeedSequence([seed, *name.encode()]).generate_state(1)[0])
