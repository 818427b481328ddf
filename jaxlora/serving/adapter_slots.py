"""Adapters on the device: as many as fit a budget, those used last.

Slots are rows of arrays that all adapters of one width share, so a call needs no copy of an adapter
that is there already, and programs depend on the number of slots alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import lora
from jaxlora.lora.adapter import Adapter, Path
from jaxlora.nn import bert
from jaxlora.utils import trees
from jaxlora.utils.trees import Tree

FIRST_SLOTS = 16
GROWTH = 4


class AdapterSlots:
    """Adapters of one width, each put into a slot when it is first asked for.

    Not for several threads at once.

    Attributes:
      most: the number of slots that the budget allows, and so of adapters in one call.
    """

    def __init__(
        self, load: Callable[[str], Adapter], shapes: Mapping[Path, tuple[int, ...]], budget: int
    ) -> None:
        """Make the first slots, empty.

        Args:
          load: reads an adapter by its name.
          shapes: of each factor of an adapter, see `lora.widen`.
          budget: bytes that all slots may take; there are at least `FIRST_SLOTS`.
        """
        self._load, self._shapes = load, shapes
        size = 4 * sum(math.prod(shape) for shape in shapes.values())
        self.most = max(FIRST_SLOTS, budget // size)
        self._slot: dict[str, int] = {}  # by name, the one used last at the end
        like = bert.unstack_layers(trees.unflatten({p: np.zeros(s) for p, s in shapes.items()}))
        self._slots = jax.tree.map(lambda x: jnp.zeros((FIRST_SLOTS, *x.shape)), like)

    def __call__(self, names: Sequence[str]) -> tuple[Tree, np.ndarray]:
        """Put adapters into slots, as far as they are not there yet.

        Args:
          names: different ones, at most `most`.

        Returns:
          All slots, leaves `[slots, ...]` as `encode.make_mixed_encode` takes them, and the slot of
          each name, `i64[len(names)]`. Both hold until the next call.
        """
        self._slot |= {name: self._slot.pop(name) for name in names if name in self._slot}
        for name in names:
            if name not in self._slot:
                adapter = lora.widen(self._load(name), self._shapes)  # first: it may fail
                slot = self._free_slot()
                self._slots = _put(self._slots, bert.unstack_layers(adapter), slot)
                self._slot[name] = slot
        return self._slots, np.array([self._slot[name] for name in names])

    def reserve(self, adapters: int) -> None:
        """Make at once all slots that so many adapters can take."""
        self._resize(min(self.most, adapters))

    @property
    def _count(self) -> int:
        return len(jax.tree.leaves(self._slots)[0])

    def _resize(self, count: int) -> None:
        if count > self._count:
            self._slots = _grow(self._slots, count - self._count)

    def _free_slot(self) -> int:
        """Return an unused slot, or else a new one, or else that of the adapter used first."""
        if len(self._slot) == self._count:
            self._resize(min(GROWTH * self._count, self.most))
        if len(self._slot) < self._count:
            return len(self._slot)
        return self._slot.pop(next(iter(self._slot)))


@functools.partial(jax.jit, donate_argnums=0)
def _put(slots: Tree, adapter: Tree, slot: int) -> Tree:
    return jax.tree.map(lambda all_, one: all_.at[slot].set(one), slots, adapter)


def _grow(slots: Tree, more: int) -> Tree:
    return jax.tree.map(lambda x: jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1)), slots)
