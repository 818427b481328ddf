"""The Gram matrix of per-task gradients, and weighted sums of them.

Gradients are pytrees with a leading task axis, leaves `[T, ...]`. They are read twice (dot
products, weighted sum) and never flattened, copied or concatenated.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlora.utils.trees import Tree

_HIGHEST = jax.lax.Precision.HIGHEST
_FEW = 4  # tasks; a matmul of so few rows takes longer than a dot product of each pair


def gram(grads: Tree) -> jax.Array:
    """Dot products of all pairs of gradients, summed over leaves in float32.

    Args:
      grads: leaves `[T, ...]`, any float dtype; float64 is summed in float64.

    Returns:
      `f32[T, T]`, `K[i, j] = g_i · g_j`.

    >>> gram({"w": jnp.array([[3.0, 4.0], [-1.0, 0.0]])}).tolist()
    [[25.0, -3.0], [-3.0, 1.0]]
    """

    def leaf(g: jax.Array) -> jax.Array:
        if len(g) > _FEW:
            return _dots(g, g, range(1, g.ndim))
        upper = [[_dots(x, y, range(x.ndim)) for y in g[i:]] for i, x in enumerate(g)]
        square = jnp.stack([jnp.pad(jnp.stack(dots), (i, 0)) for i, dots in enumerate(upper)])
        return square + jnp.triu(square, 1).T

    return jnp.asarray(sum(map(leaf, jax.tree.leaves(grads))))


def _dots(x: jax.Array, y: jax.Array, axes: range) -> jax.Array:
    # Flattening first would gather leaves whose parts lie on several devices.
    contract = (tuple(axes), tuple(axes))
    return jax.lax.dot_general(
        x, y, (contract, ((), ())), precision=_HIGHEST, preferred_element_type=_sum_type(x),
        out_sharding=_everywhere(x),
    )  # fmt: skip


def _sum_type(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _everywhere(x: jax.Array) -> NamedSharding | None:
    """Return the sharding of what all devices hold; None if shardings are not part of types."""
    mesh = jax.typeof(x).sharding.mesh
    return NamedSharding(mesh, PartitionSpec()) if AxisType.Explicit in mesh.axis_types else None


def combine(grads: Tree, weights: jax.Array) -> Tree:
    """Weighted sum over the task axis: leaves `[T, ...]`, `weights: f32[T]` → leaves `[...]`.

    Summed in float32 and returned in each leaf's own dtype.

    >>> combine({"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}, jnp.array([1.0, 0.5]))["w"].tolist()
    [2.5, 4.0]
    """
    return jax.tree.map(lambda g: weighted_sum(g, weights, range(len(g))), grads)


def weighted_sum(g: jax.Array, weights: jax.Array, tasks: Iterable[int]) -> jax.Array:
    """Weighted sum of some of a leaf's tasks: `[T, ...]`, `f32[T]` → `[...]`."""
    dtype = _sum_type(g)
    # A chain of sums is one pass over memory; XLA's matmul for so few rows is not on CPU.
    parts = [weights[t].astype(dtype) * g[t].astype(dtype) for t in tasks]
    return jnp.asarray(sum(parts[1:], parts[0])).astype(g.dtype)


def norms(K: jax.Array) -> jax.Array:
    """Norms of the gradients, `f32[T]`.

    >>> norms(jnp.array([[4.0, -2.0], [-2.0, 9.0]])).tolist()
    [2.0, 3.0]
    """
    return jnp.sqrt(jnp.diag(K))


def inverse_norms(K: jax.Array) -> jax.Array:
    """One over the norms of the gradients, `f32[T]`; 0 for a zero gradient."""
    return jnp.where(jnp.diag(K) > 0, jax.lax.rsqrt(jnp.diag(K)), 0)


def cosines(K: jax.Array) -> jax.Array:
    """Cosine between every pair of gradients, `f32[T, T]`; 0 where a gradient is zero.

    >>> cosines(jnp.array([[4.0, -2.0], [-2.0, 4.0]])).tolist()
    [[1.0, -0.5], [-0.5, 1.0]]
    """
    inverse = inverse_norms(K)
    return jnp.clip(K * inverse[:, None] * inverse[None, :], -1, 1)
