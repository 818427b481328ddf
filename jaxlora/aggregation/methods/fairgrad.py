"""FairGrad: α-fair gains of the tasks."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlora.aggregation.bargain import solve_bargain
from jaxlora.aggregation.gram import cosines, inverse_norms, norms
from jaxlora.aggregation.method import Method, check_range, member, of_gram

_LEAST = 1e-19  # norms below have a square that float32 rounds to zero


def fair_weights(K: jax.Array, alpha: float) -> jax.Array:
    """Return the `w > 0` with `K w = w^(−1/α)`, `f32[T]`; 0 for zero gradients.

    With `z = w · norms`, `p = α` and the cosines C, this is `C z = norms^(1/p − 1) z^(−1/p)`.
    Scaling the norms by s scales z by `s^((1 − p)/(1 + p))`.
    """
    power = (1 - alpha) / (1 + alpha)
    lengths = norms(K)
    size = jnp.max(lengths)
    some = jnp.where(size > 0, size, 1)
    relative = jnp.where(lengths > 0, jnp.maximum(lengths / some, _LEAST), 1)
    C = jnp.where(jnp.eye(len(K), dtype=bool), 1, cosines(K))  # also for zero gradients
    return some**power * inverse_norms(K) * solve_bargain(C, relative**power, alpha)


@member("Ban & Ji 2024", "non-conflicting", "permutation", "stationary")
def fairgrad(alpha: float = 2.0) -> Method:
    """Make the tasks' gains α-fair: `K w = w^(−1/α)`.

    Ban & Ji 2024, "Fair Resource Allocation in Multi-Task Learning", equation 6. `α = 1` is
    Nash-MTL, with an update of length `√T`; as α grows, the update approaches the best worst-case
    gain. Gradients times c give the update times `c^((1 − α)/(1 + α))`, as in the paper.

    Args:
      alpha: degree of fairness, from 0.2 to 5; beyond that, weights leave the range of float32. For
        the best worst-case gain itself, use `cagrad`.
    """
    check_range("alpha", alpha, 0.2, 5)
    return of_gram("fairgrad", lambda K: fair_weights(K, alpha))
