"""Aligned-MTL: set all singular values of the gradients to the smallest nonzero one."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxlora.aggregation.method import Method, member, of_gram, preference_of
from jaxlora.aggregation.spectral import eigen


def align(K: jax.Array, preference: jax.Array) -> jax.Array:
    """Return `√λ_min V Λ^(−1/2) Vᵀ preference`, `f32[T]`, over the nonzero eigenvalues."""
    size = jnp.max(jnp.diag(K))
    values, vectors, kept = eigen(K / jnp.where(size > 0, size, 1))
    least = jnp.min(jnp.where(kept, values, jnp.inf))
    stretch = jnp.where(kept, jnp.sqrt(least / jnp.where(kept, values, 1)), 0)
    return jnp.where(size > 0, vectors @ (stretch * (vectors.T @ preference)), preference)


@member("Senushkin et al. 2023", "permutation", "homogeneous", "unit")
def aligned_mtl(preference: Sequence[float] | None = None) -> Method:
    """Make the gradients as nearly orthogonal and equally long as possible, then average them.

    Senushkin et al. 2023, "Independent Component Alignment for Multi-Task Learning", algorithm 1:
    all singular values of the matrix of gradients are replaced by the smallest nonzero one. In
    float32, singular values below about 1e-3 of the largest count as zero.

    Args:
      preference: weight of each task; 1/T each if not given.
    """
    return of_gram("aligned_mtl", lambda K: align(K, preference_of(preference, len(K), 1 / len(K))))
