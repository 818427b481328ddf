"""ConFIG: the direction with equal cosines, whose length is the sum of the projections."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxlora.aggregation.gram import cosines, inverse_norms, norms
from jaxlora.aggregation.method import Method, member, of_gram, preference_of
from jaxlora.aggregation.spectral import pinv_times


def conflict_free(K: jax.Array, preference: jax.Array) -> jax.Array:
    """Return the weights of ConFIG, `f32[T]`.

    With unit gradients `U` and their cosines C, the direction is `U⁺ p = Uᵀ x`, `x = C⁺ p`. Its
    length is `√(xᵀ C x)`, and `Σ g_i·direction = norms·C x`. If its length is zero, so is the
    update.
    """
    C, lengths = cosines(K), norms(K)
    x = pinv_times(C, preference)
    square = x @ C @ x
    noise = 4 * len(K) * jnp.finfo(K.dtype).eps * jnp.sum(jnp.abs(x)) ** 2
    sound = square > noise
    length = jnp.where(sound, lengths @ (C @ x) / jnp.where(sound, square, 1), 0)
    return length * x * inverse_norms(K)


@member("Liu et al. 2024", "permutation", "homogeneous", "unit")
def config(preference: Sequence[float] | None = None) -> Method:
    """Go in the direction that has the same cosine with each gradient.

    Liu et al. 2024, "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks",
    equations 1 to 3: the unit vector `d̂` along `U⁺ 1`, with the unit gradients U, times
    `Σ g_i·d̂`. Computed from the Gram matrix, without a pseudo-inverse of the gradients.

    Args:
      preference: ratio of the cosines; all 1 if not given.
    """
    return of_gram("config", lambda K: conflict_free(K, preference_of(preference, len(K))))
