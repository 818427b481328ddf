"""The Gram matrix and weighted sums of per-task gradients.

Gradients are pytrees with a leading task axis, leaves `[T, ...]`. They are read twice (dot
products, weighted sum) and never concatenated.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlora.utils.trees import Tree

_HIGHEST = jax.lax.Precision.HIGHEST
_CHUNK = 1 << 16  # elements of each task's gradient in one matmul on CPU
_FEW = 4  # up to this many tasks, a dot product per pair is faster than a matmul


def gram(grads: Tree) -> jax.Array:
    """Compute the dot products of all pairs of gradients, summed over leaves in float32.

    Args:
      grads: leaves `[T, ...]`, any float dtype; float64 is summed in float64.

    Returns:
      `f32[T, T]`, `K[i, j] = g_i · g_j`.

    >>> gram({"w": jnp.array([[3.0, 4.0], [-1.0, 0.0]])}).tolist()
    [[25.0, -3.0], [-3.0, 1.0]]
    """

    def leaf(g: jax.Array) -> jax.Array:
        if len(g) > _FEW:
            return _many(g)
        upper = [[_dots(x, y, range(x.ndim)) for y in g[i:]] for i, x in enumerate(g)]
        square = jnp.stack([jnp.pad(jnp.stack(dots), (i, 0)) for i, dots in enumerate(upper)])
        return square + jnp.triu(square, 1).T

    return jnp.asarray(sum(map(leaf, jax.tree.leaves(grads))))


def _many(g: jax.Array) -> jax.Array:
    """Compute the dot products of many tasks' gradients by matmuls: `[T, ...]` → `f32[T, T]`.

    On one CPU device, XLA's matmul of a few long rows is far below memory bandwidth, and matmuls of
    chunks that fit into the cache are close to it. With several devices, flattening would gather
    sharded leaves.
    """
    alone = jax.default_backend() == "cpu" and jax.device_count() == 1
    if not alone or _everywhere(g) or g.size < 2 * _CHUNK * len(g):
        return _dots(g, g, range(1, g.ndim))
    rows = g.reshape(len(g), -1)
    count = rows.shape[1] // _CHUNK

    def add(n: jax.Array, K: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(rows, n * _CHUNK, _CHUNK, 1)
        return K + _dots(part, part, range(1, 2))

    rest = rows[:, count * _CHUNK :]
    return jax.lax.fori_loop(0, count, add, _dots(rest, rest, range(1, 2)))


def _dots(x: jax.Array, y: jax.Array, axes: range) -> jax.Array:
    # Flattening first would gather sharded leaves.
    contract = (tuple(axes), tuple(axes))
    return jax.lax.dot_general(
        x, y, (contract, ((), ())), precision=_HIGHEST, preferred_element_type=_sum_type(x),
        out_sharding=_everywhere(x),
    )  # fmt: skip


def _sum_type(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _everywhere(x: jax.Array) -> NamedSharding | None:
    """Return the replicated sharding, or None if shardings are not part of types."""
    mesh = jax.typeof(x).sharding.mesh
    return NamedSharding(mesh, PartitionSpec()) if AxisType.Explicit in mesh.axis_types else None


def combine(grads: Tree, weights: jax.Array) -> Tree:
    """Compute the weighted sum over the task axis: leaves `[T, ...]`, `f32[T]` → leaves `[...]`.

    Sums are float32; each leaf is returned in its own dtype.

    >>> combine({"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}, jnp.array([1.0, 0.5]))["w"].tolist()
    [2.5, 4.0]
    """
    return jax.tree.map(lambda g: weighted_sum(g, weights, range(len(g))), grads)


def weighted_sum(g: jax.Array, weights: jax.Array, tasks: Iterable[int]) -> jax.Array:
    """Compute the weighted sum of a subset of a leaf's tasks: `[T, ...]`, `f32[T]` → `[...]`."""
    dtype = _sum_type(g)
    # A chain of sums is one pass over memory; on CPU, XLA's matmul of so few rows is not.
    parts = [weights[t].astype(dtype) * g[t].astype(dtype) for t in tasks]
    return jnp.asarray(sum(parts[1:], parts[0])).astype(g.dtype)


def norms(K: jax.Array) -> jax.Array:
    """Compute the norms of the gradients, `f32[T]`.

    >>> norms(jnp.array([[4.0, -2.0], [-2.0, 9.0]])).tolist()
    [2.0, 3.0]
    """
    return jnp.sqrt(jnp.diag(K))


def inverse_norms(K: jax.Array) -> jax.Array:
    """Compute the inverse norms of the gradients, `f32[T]`; 0 for a zero gradient."""
    return jnp.where(jnp.diag(K) > 0, jax.lax.rsqrt(jnp.diag(K)), 0)


def cosines(K: jax.Array) -> jax.Array:
    """Compute the cosines between all pairs of gradients, `f32[T, T]`; 0 for a zero gradient.

    >>> cosines(jnp.array([[4.0, -2.0], [-2.0, 4.0]])).tolist()
    [[1.0, -0.5], [-0.5, 1.0]]
    """
    inverse = inverse_norms(K)
    return jnp.clip(K * inverse[:, None] * inverse[None, :], -1, 1)
