"""UPGrad: the mean of the gradients' projections onto the dual cone."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxlora.aggregation.gram import cosines, inverse_norms, norms
from jaxlora.aggregation.method import Method, member, of_gram, preference_of
from jaxlora.aggregation.qp import nonneg_qp


def projections(K: jax.Array) -> jax.Array:
    """Return the coefficients V of the projected gradients: `projected_i = Σ_j V[i, j] g_j`.

    Row i of `V: f32[T, T]` is the `v ≥ e_i` with the smallest `vᵀ K v`. It is solved for
    `u = v · norms / ‖g_i‖ = e_i + y`, where `y ≥ 0` minimizes `½ yᵀ C y + C[i]·y` with the cosines
    C, which does not depend on the norms.

    >>> projections(jnp.array([[1.0, -1.0], [-1.0, 2.0]])).round(4).tolist()
    [[1.0, 0.5], [1.0, 1.0]]
    """
    C = cosines(K)
    more = jax.vmap(nonneg_qp, (None, 0))(C, C)
    return jnp.eye(len(K), dtype=K.dtype) + norms(K)[:, None] * more * inverse_norms(K)[None, :]


@member(
    "Quinton & Rey 2024",
    "non-conflicting", "permutation", "homogeneous", "linear", "stationary", "unit",
)  # fmt: skip
def upgrad(preference: Sequence[float] | None = None) -> Method:
    """Project each gradient onto the directions that conflict with no task, then average.

    Quinton & Rey 2024, "Jacobian Descent for Multi-Objective Optimization", section 3 (UPGrad) and
    proposition 1: for each i `argmin vᵀ K v` with `v ≥ e_i / T`, then the sum. Without conflicts
    it is the mean.

    Args:
      preference: weight of each task's projection; 1/T each if not given.
    """
    return of_gram(
        "upgrad", lambda K: preference_of(preference, len(K), 1 / len(K)) @ projections(K)
    )
