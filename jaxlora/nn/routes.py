"""Routes: a route selects the adapter of each token, where a layer has several.

Without a route, all tokens use the same adapter.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
from flax import struct

from jaxlora.nn import ops


class Route(Protocol):
    """Computes `x A B` with one of T adapters for each token."""

    def low_rank(self, x: jax.Array, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
        """Return `f32[R, S, out]` for `x: [R, S, in]`, `a: [T, in, r]` and `b: [T, r, out]`."""


@struct.dataclass
class ByTask:
    """Route for training: a token uses its task's adapter, and each task gets its own gradient.

    The cost grows with the number of adapters, which are computed side by side.

    Attributes:
      task: `bool[R, S, T]`, one-hot task of each token.
      adapter_of_task: index of each task's adapter, ascending; see `ops.low_rank_per_task`.
    """

    task: jax.Array
    adapter_of_task: tuple[int, ...] = struct.field(pytree_node=False)

    def low_rank(self, x: jax.Array, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
        """See `Route`."""
        return ops.low_rank_per_task(x, a, b, self.task, self.adapter_of_task, dtype)


@struct.dataclass
class ByBlock:
    """Route by blocks of consecutive tokens; the cost does not depend on the number of adapters.

    Attributes:
      owner: `i32[R, S / block]`, the index of each block's adapter.
    """

    owner: jax.Array

    def low_rank(self, x: jax.Array, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
        """See `Route`."""
        return ops.low_rank_by_block(x, a, b, self.owner, dtype)
