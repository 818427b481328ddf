"""A least-recently-used cache of adapters in device memory.

All adapters of one width are stored in shared arrays, one row ("slot") per adapter. A call copies
only adapters that are not cached, and a program's shapes depend only on the number of slots.
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
    """Adapters of one width, each loaded into a slot on first use. Not thread-safe.

    Attributes:
      most: the number of slots that the budget allows, which limits the adapters per call.
    """

    def __init__(
        self,
        load: Callable[[str], Adapter],
        shapes: Mapping[Path, tuple[int, ...]],
        budget: int,
        adapters: int,
    ) -> None:
        """Allocate the first slots.

        Args:
          load: reads an adapter by its name.
          shapes: the shape of each factor of an adapter, see `lora.widen`.
          budget: bytes for all slots; `FIRST_SLOTS` are allowed regardless.
          adapters: number of adapters of this width.
        """
        self._load, self._shapes = load, shapes
        size = 4 * sum(math.prod(shape) for shape in shapes.values())
        self.most = max(FIRST_SLOTS, budget // size)
        # A power of two, so that banks of similar sizes share programs.
        first = min(FIRST_SLOTS, 1 << (adapters - 1).bit_length())
        self._slot: dict[str, int] = {}  # by name, the most recently used last
        like = bert.unstack_layers(trees.unflatten({p: np.zeros(s) for p, s in shapes.items()}))
        self._slots = jax.tree.map(lambda x: jnp.zeros((first, *x.shape)), like)

    def __call__(self, names: Sequence[str]) -> tuple[Tree, np.ndarray]:
        """Load the adapters that are not in slots yet.

        Args:
          names: distinct names, at most `most`.

        Returns:
          All slots, leaves `[slots, ...]` as `encode.make_mixed_encode` takes them, and the slot of
          each name, `i64[len(names)]`. Both are valid until the next call.
        """
        for name in names:
            if name in self._slot:
                self._slot[name] = self._slot.pop(name)
        for name in names:
            if name not in self._slot:
                # Loading may fail, so it comes before a slot is taken.
                adapter = bert.unstack_layers(lora.widen(self._load(name), self._shapes))
                slot = self._free_slot()
                self._slots = _put(self._slots, adapter, slot)
                self._slot[name] = slot
        return self._slots, np.array([self._slot[name] for name in names])

    def reserve(self, adapters: int) -> None:
        """Allocate slots for a number of adapters, at most `most`."""
        self._resize(min(self.most, adapters))

    @property
    def _count(self) -> int:
        return len(jax.tree.leaves(self._slots)[0])

    def _resize(self, count: int) -> None:
        if count > self._count:
            self._slots = _grow(self._slots, count - self._count)

    def _free_slot(self) -> int:
        """Return a free slot; else grow the arrays, or evict the least recently used adapter.

        If an error or Ctrl-C ends a call before the slot is filled, the slot stays free.
        """
        if len(self._slot) == self._count:
            self._resize(min(GROWTH * self._count, self.most))
        if len(self._slot) == self._count:
            self._slot.pop(next(iter(self._slot)))
        return min(set(range(self._count)) - set(self._slot.values()))


@functools.partial(jax.jit, donate_argnums=0)
def _put(slots: Tree, adapter: Tree, slot: int) -> Tree:
    return jax.tree.map(lambda all_, one: all_.at[slot].set(one), slots, adapter)


def _grow(slots: Tree, more: int) -> Tree:
    return jax.tree.map(lambda x: jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1)), slots)
