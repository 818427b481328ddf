"""Nash-MTL: the Nash bargaining solution between the tasks."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlora.aggregation.bargain import solve_bargain
from jaxlora.aggregation.gram import cosines, inverse_norms, norms
from jaxlora.aggregation.method import Method, member, of_gram


def nash_weights(K: jax.Array) -> jax.Array:
    """Return `α √‖K‖` with `K α = 1/α` and the Frobenius norm, `f32[T]`.

    With `z = α · norms` it is `C z = 1/z`, C the cosines: it does not depend on the norms at all.
    """
    ones = jnp.ones_like(K[0])
    lengths = norms(K)
    C = jnp.where(jnp.eye(len(K), dtype=bool), 1, cosines(K))  # also for zero gradients
    size = jnp.max(lengths)
    relative = lengths / jnp.where(size > 0, size, 1)
    frobenius = jnp.sqrt(jnp.sum((cosines(K) * relative[:, None] * relative[None, :]) ** 2))
    return jnp.sqrt(frobenius) * size * inverse_norms(K) * solve_bargain(C, ones, 1.0)


@member(
    "Navon et al. 2022",
    "non-conflicting", "permutation", "homogeneous", "stationary", "unit",
)  # fmt: skip
def nash_mtl() -> Method:
    """Maximize the product of the tasks' gains: `K α = 1/α`.

    Navon et al. 2022, "Multi-Task Learning as a Bargaining Game", claim 3.1. The equation fixes
    the update's length (`√T`) whatever the gradients'; here it is scaled with the gradients, by the
    root of the Gram matrix's Frobenius norm, as in the authors' program, so that a learning rate
    keeps its meaning. Their limit of the update's norm is `optax.clip_by_global_norm(1.0)` behind.
    Where positive weights sum the gradients to zero no solution exists, and the update is near zero.
    """
    return of_gram("nash_mtl", nash_weights)
