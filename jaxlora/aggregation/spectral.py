"""Eigendecomposition of a Gram matrix that distinguishes zero eigenvalues from rounding errors."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def eigen(K: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return eigenvalues `f32[T]`, eigenvectors `f32[T, T]`, and a mask of nonzero eigenvalues."""
    values, vectors = jnp.linalg.eigh(K, symmetrize_input=False)
    noise = 4 * len(K) * jnp.finfo(K.dtype).eps * jnp.max(values)
    return values, vectors, values > noise


def pinv_times(K: jax.Array, b: jax.Array) -> jax.Array:
    """Return `K⁺ b`, `f32[T]`, with the pseudo-inverse of K.

    >>> pinv_times(jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.ones(2)).tolist()
    [0.5, 0.0]
    """
    values, vectors, kept = eigen(K)
    return vectors @ (jnp.where(kept, 1 / jnp.where(kept, values, 1), 0) * (vectors.T @ b))
