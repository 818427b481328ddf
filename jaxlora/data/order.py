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
    """The infinite order in which the tasks of a group draw their examples.

    In an epoch every task draws as many examples as the largest training set has. Each example of
    the largest set is drawn exactly once; smaller sets are repeated and reshuffled each time.

    Attributes:
      streams: example indices of each task, computed lazily.
      size: E, the size of the largest training set and the number of draws in an epoch.
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
        """Return the example indices of step k (from 0), `i64[T, b]` with `b ≤ B`."""
        epoch, k = divmod(step, self.steps_per_epoch)
        start = epoch * self.size + k * self.batch_size
        stop = min(start + self.batch_size, (epoch + 1) * self.size)
        return np.array([[stream[i] for i in range(start, stop)] for stream in self.streams])


@dataclasses.dataclass(frozen=True)
class JointOrder:
    """The order in which the tasks of several groups draw; all groups start and end together.

    A run has N steps, as many as its longest group. A group with n steps takes part in n of them,
    chosen so that the number of groups per step varies by at most one. The groups are laid end to
    end on a line, each n long, and a comb with teeth N apart selects the groups that it hits. The
    steps use the offsets 0 … N-1 of the comb once each, in the order of a golden-ratio sequence
    (systematic sampling, Madow 1949, "On the Theory of Systematic Sampling, II").

    Attributes:
      orders: the order of each group.
      counts: n, the number of steps of each group.
      stops: number of its own steps after which each group stops early; `()`: none does.
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
        """Number of its own steps that each group has taken before each step, `i32[N + 1, K]`."""
        turns = np.arange(self.steps) * ((5**0.5 - 1) / 2) % 1
        angle = turns.argsort().argsort()[:, None]  # a permutation of the offsets 0 … N-1
        ends = np.cumsum(self.counts)[None]
        parts = (angle + ends) // self.steps > (angle + ends - self.counts) // self.steps
        taken = np.concatenate([np.zeros_like(parts[:1]), parts]).cumsum(0, dtype=np.int32)
        return np.minimum(taken, self.stops) if self.stops else taken

    def taken(self, step: int) -> list[int]:
        """Return the number of its own steps that each group has taken before step k.

        >>> order = JointOrder((), (4, 2, 2))
        >>> [order.taken(step) for step in range(5)]
        [[0, 0, 0], [1, 0, 1], [2, 1, 1], [3, 1, 2], [4, 2, 2]]
        """
        return [int(number) for number in self._taken[step]]

    def takes_part(self, step: int) -> list[bool]:
        """Return whether each group takes part in step k (from 0)."""
        return [bool(part) for part in self._taken[step + 1] > self._taken[step]]

    def steps_from(self, start: int) -> Sequence[int]:
        """Return the steps, from `start` on, in which any group takes part."""
        anyone = (np.diff(self._taken[start:], axis=0) > 0).any(1)
        return [int(step) for step in start + np.flatnonzero(anyone)]

    def at(self, step: int) -> list[np.ndarray]:
        """Return the example indices of each task in step k; empty if its group takes no part."""
        drawn: list[np.ndarray] = []
        parts = zip(self.orders, self.taken(step), self.takes_part(step), strict=True)
        for order, own_step, there in parts:
            none = np.zeros((len(order.streams), 0), np.int64)
            drawn += [*(order.at(own_step) if there else none)]
        return drawn


def make_order(sizes: Mapping[str, int], batch_size: int, seed: int) -> Order:
    """Make the order of a group; examples are reshuffled in each repetition.

    Args:
      sizes: task → number of training examples.
      batch_size: B.
      seed: seed of all shuffles; the shuffles of different tasks are independent.

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
    """Import Grain, which only training needs."""
    with explained():
        import grain

    return grain


def _stream_seed(seed: int, name: str) -> int:
    # Hashed, because Grain shuffles repetition n with seed + n.
    return int(np.random.SeedSequence([seed, *name.encode()]).generate_state(1)[0])
