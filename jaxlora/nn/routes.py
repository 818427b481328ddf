"""How a layer chooses among several adapters: a route says which adapter each token uses.

Without a route there is one adapter, for all tokens.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
from flax import struct

from jaxlora.nn import ops


class Route(Protocol):
    """Computes `x A B` with the right one of T adapters."""

    def low_rank(self, x: jax.Array, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
        """Return `f32[R, S, out]` for `x: [R, S, in]`, `a: [T, in, r]` and `b: [T, r, out]`."""


@struct.dataclass
class ByTask:
    """In training: a token uses its task's adapter, and each task has a gradient of its own.

    Attributes:
      task: `bool[R, S, T]`, whose each token is.
      adapter_of_task: the number of each task's adapter, ascending; see `ops.low_rank_per_task`.
    """

    task: jax.Array
    adapter_of_task: tuple[int, ...] = struct.field(pytree_node=False)

    def low_rank(self, x: jax.Array, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
        """See `Route`."""
        return ops.low_rank_per_task(x, a, b, self.task, self.adapter_of_task, dtype)


@struct.dataclass
class ByBlock:
    """In serving: each block of consecutive tokens uses one adapter.

    Attributes:
      owner: `i32[R, S / block]`, the number of each block's adapter.
    """

    owner: jax.Array

    def low_rank(self, x: jax.Array, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
        """See `Route`."""
        return ops.low_rank_by_block(x, a, b, self.owner, dtype)
