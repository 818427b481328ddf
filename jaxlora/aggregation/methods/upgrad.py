"""UPGrad: the mean of the gradients' projections onto the dual cone."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from jaxlora.aggregation.gram import cosines, inverse_norms, norms
from jaxlora.aggregation.method import Method, member, of_gram, preference_of
from jaxlora.aggregation.qp import nonneg_qp


def unconflicting(K: jax.Array, preference: jax.Array) -> jax.Array:
    """Return the weights of UPGrad, `f32[T]`.

    The projection of `g_i` is `Σ_j v_j g_j` with the smallest `vᵀ K v` of all `v ≥ e_i`. Divided by
    `‖g_i‖`, and with `u = v · norms`, it is `u = e_i + y`, `y = argmin ½ yᵀ C y + C[i]·y` over
    `y ≥ 0`, C the cosines: it does not depend on the norms at all.
    """
    C = cosines(K)
    more = jax.vmap(nonneg_qp, (None, 0))(C, C)
    return preference + (preference * norms(K)) @ more * inverse_norms(K)


@member(
    "Quinton & Rey 2024",
    "non-conflicting", "permutation", "homogeneous", "linear", "stationary", "unit",
)  # fmt: skip
def upgrad(preference: Sequence[float] | None = None) -> Method:
    """Project each gradient onto the directions that conflict with no task, then average.

    Quinton & Rey 2024, "Jacobian Descent for Multi-Objective Optimization", section 3 (UPGrad) and
    proposition 1: for each i `argmin vᵀ K v` with `v ≥ e_i / T`, then the sum. No conflict gives
    the mean.

    Args:
      preference: weight of each task's projection; 1/T each if not given.
    """
    return of_gram(
        "upgrad", lambda K: unconflicting(K, preference_of(preference, len(K), 1 / len(K)))
    )
