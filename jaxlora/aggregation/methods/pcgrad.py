"""PCGrad: projections onto the normal planes of conflicting gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.aggregation.method import Method, member, raw_key, split_raw

_HIGHEST = jax.lax.Precision.HIGHEST


def orders(key: jax.Array, num_tasks: int) -> jax.Array:
    """Draw a random visiting order for each task, `i32[T, T]`; `project` skips a task's own entry.

    >>> jnp.sort(orders(jax.random.key(0), 3), axis=-1).tolist()
    [[0, 1, 2], [0, 1, 2], [0, 1, 2]]
    """
    keys = jax.random.split(key, num_tasks)
    return jax.vmap(lambda k: jax.random.permutation(k, num_tasks))(keys).astype(jnp.int32)


def project(K: jax.Array, orders: jax.Array) -> jax.Array:
    """Return the coefficients W of the projected gradients: `projected_i = Σ_j W[i, j] g_j`.

    Args:
      K: `f32[T, T]`, Gram matrix.
      orders: `i32[T, T]`; row i is the order in which task i visits the others; `j = i` is skipped.

    Returns:
      `f32[T, T]`; the identity if there is no conflict. A zero gradient never conflicts.

    >>> K = jnp.array([[1.0, -1.0], [-1.0, 2.0]])
    >>> project(K, jnp.array([[1, 0], [0, 1]])).tolist()
    [[1.0, 0.5], [1.0, 1.0]]
    """

    def one_task(i: jax.Array, order: jax.Array) -> jax.Array:
        def visit(w: jax.Array, j: jax.Array) -> tuple[jax.Array, None]:
            dot = jnp.dot(K[j], w, precision=_HIGHEST)
            conflict = (j != i) & (dot < 0) & (K[j, j] > 0)
            step = jnp.where(conflict, dot / jnp.where(K[j, j] > 0, K[j, j], 1), 0)
            return w.at[j].add(-step), None

        start = jax.nn.one_hot(i, K.shape[0], dtype=K.dtype)
        return jax.lax.scan(visit, start, order)[0]

    return jax.vmap(one_task)(jnp.arange(K.shape[0]), orders)


@member("Yu et al. 2020", "homogeneous", "unit")
def pcgrad(seed: int = 0) -> Method:
    """Project each gradient onto the normal plane of each one it conflicts with, then sum.

    Yu et al. 2020, "Gradient Surgery for Multi-Task Learning", algorithm 1, on the Gram matrix:
    task i starts from `w = e_i`, visits the others in its own random order, and for each j with
    `K[j]·w < 0` subtracts `(K[j]·w) / K[j, j]` from `w[j]`.

    Args:
      seed: seed of the random visiting orders.
    """

    def weights(K: jax.Array, losses: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        after, now = split_raw(key)
        return project(K, orders(now, len(K))).sum(0), after

    return Method("pcgrad", lambda num_tasks, part: raw_key(seed, part), weights)
