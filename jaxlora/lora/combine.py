"""Weighted sums of adapters: exact by concatenation, or the nearest adapter of a given rank.

`Σ wᵢ sᵢ Aᵢ Bᵢ = [A₁ … A_T] [w₁ s₁ B₁; …; w_T s_T B_T]`, so the sum of adapters with any ranks,
scales and layers is one adapter whose rank is the sum of theirs. Its truncated singular value
decomposition is the nearest adapter of a lower rank (Eckart & Young 1936). In PEFT, these are the
combination types `cat` and `svd`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxlora.lora.adapter import Adapter, Path, describe
from jaxlora.utils import trees
from jaxlora.utils.errors import ConfigError
from jaxlora.utils.trees import Tree


def add(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Compute the exact weighted sum of adapters.

    The rank of each layer is the sum of its ranks, but at most `min(in, out)`, the highest that any
    kernel has.

    Args:
      adapters: trees with their configurations; they may adapt different layers.
      weights: one weight for each adapter.

    Raises:
      ValueError: if there are no adapters, or the numbers of adapters and weights differ.

    >>> from jaxlora.lora import LoraConfig
    >>> a = {"q": {"A": jnp.ones((2, 1)), "B": jnp.ones((1, 2))}}
    >>> one = (a, LoraConfig(1, 1.0, ("q",)))
    >>> tree, config = add([one, one], [1.0, -0.5])
    >>> tree["q"]["B"].tolist(), config.rank, config.scale_of(("q",))
    ([[1.0, 1.0], [-0.5, -0.5]], 2, 1.0)
    """
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"got {len(adapters)} adapters and {len(weights)} weights")
    parts: dict[Path, list[tuple[jax.Array, jax.Array]]] = {}
    for (tree, config), weight in zip(adapters, weights, strict=True):
        flat = trees.flatten(tree)
        for path in sorted({path[:-1] for path in flat}):
            a, b = (jnp.asarray(flat[*path, name]) for name in "AB")
            parts.setdefault(path, []).append((a, weight * config.scale_of(path) * b))
    factors = {}
    for path, found in parts.items():
        a = jnp.concatenate([a for a, _ in found], -1)
        b = jnp.concatenate([b for _, b in found], -2)
        most = min(a.shape[-2], b.shape[-1])
        factors[path] = _truncate(a, b, most) if a.shape[-1] > most else (a, b)
    return _unscaled(factors)


def truncate(adapter: Adapter, rank: int) -> Adapter:
    """Find the nearest adapter of a given rank, for each layer in the Frobenius norm of `s A B`.

    Args:
      adapter: tree and configuration.
      rank: the new rank; layers with a lower rank keep theirs.

    Raises:
      ValueError: if the rank is below 1.

    >>> from jaxlora.lora import LoraConfig
    >>> a = {"q": {"A": jnp.eye(2), "B": jnp.diag(jnp.array([3.0, 0.1]))}}
    >>> tree, _ = truncate((a, LoraConfig(2, 2.0, ("q",))), 1)
    >>> jnp.round(tree["q"]["A"] @ tree["q"]["B"], 5).tolist()
    [[3.0, 0.0], [0.0, 0.0]]
    """
    if rank < 1:
        raise ConfigError("rank", "must be at least 1", rank)
    tree, config = adapter
    flat, factors = trees.flatten(tree), {}
    for path in sorted({path[:-1] for path in flat}):
        a, b = (jnp.asarray(flat[*path, name]) for name in "AB")
        factors[path] = _truncate(a, config.scale_of(path) * b, rank)
    return _unscaled(factors)


def _truncate(a: jax.Array, b: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """Truncate factors `[..., in, r]` and `[..., r, out]` to a rank without forming `[in, out]`."""
    left, ra = jnp.linalg.qr(a)
    right, rb = jnp.linalg.qr(jnp.swapaxes(b, -1, -2))
    u, sizes, vt = jnp.linalg.svd(_exact(ra, jnp.swapaxes(rb, -1, -2)), full_matrices=False)
    root = jnp.sqrt(sizes[..., None, :rank])
    return (
        _exact(left, u[..., :rank] * root),
        jnp.swapaxes(root, -1, -2) * _exact(vt[..., :rank, :], jnp.swapaxes(right, -1, -2)),
    )


def _exact(a: jax.Array, b: jax.Array) -> jax.Array:
    """Compute `a @ b` in full float32, even if the accelerator's default precision is lower."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _unscaled(factors: dict[Path, tuple[jax.Array, jax.Array]]) -> Adapter:
    flat: dict[Path, jax.Array] = {}
    for path, (a, b) in factors.items():
        flat[*path, "A"], flat[*path, "B"] = a, b
    ranks = {path: (a.shape[-1], float(a.shape[-1])) for path, (a, _) in factors.items()}
    tree: Tree = trees.unflatten(flat)
    return tree, describe(ranks)
