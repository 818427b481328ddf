"""IMTL-G: equal projections on all unit gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlora.aggregation.gram import cosines, norms
from jaxlora.aggregation.method import Method, member, of_gram
from jaxlora.aggregation.spectral import pinv_times


def impartial(K: jax.Array) -> jax.Array:
    """Return the weights of IMTL-G, `f32[T]`, with sum 1; zeros if their sum is zero.

    `K w ∝ norms` is solved as `w ∝ (C⁺ 1) / norms` with the cosines C, which stays accurate for
    norms of any range.
    """
    lengths = norms(K)
    size = jnp.max(lengths)
    inverse = jnp.where(lengths > 0, size / jnp.where(lengths > 0, lengths, 1), 0)
    w = inverse * pinv_times(cosines(K), jnp.ones_like(lengths))
    total = jnp.sum(w)
    sound = jnp.abs(total) > 4 * len(K) * jnp.finfo(K.dtype).eps * jnp.sum(jnp.abs(w))
    return jnp.where(sound, w / jnp.where(sound, total, 1), 0)


@member("Liu et al. 2021b", "permutation", "homogeneous", "unit")
def imtl_g() -> Method:
    """Weight the gradients so that the update has the same projection on each unit gradient.

    Liu et al. 2021, "Towards Impartial Multi-task Learning", section 3.1: weights with sum 1 and
    `d·g_i / ‖g_i‖` equal for all i. For linearly dependent gradients, the pseudo-inverse of their
    cosines is used.
    """
    return of_gram("imtl_g", impartial)
