"""DualProj: the mean gradient, projected onto the dual cone."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from jaxlora.aggregation.gram import cosines, inverse_norms, norms
from jaxlora.aggregation.method import Method, member, of_gram, preference_of
from jaxlora.aggregation.qp import nonneg_qp


def dual_projection(K: jax.Array, preference: jax.Array) -> jax.Array:
    """Return the `v ≥ preference` with the smallest `vᵀ K v`, `f32[T]`.

    With `v = preference + y / norms`, y is `argmin ½ yᵀ C y + (C norms preference)·y`, `y ≥ 0`.
    """
    C = cosines(K)
    return preference + nonneg_qp(C, C @ (norms(K) * preference)) * inverse_norms(K)


@member(
    "Lopez-Paz & Ranzato 2017",
    "non-conflicting", "permutation", "homogeneous", "stationary", "unit",
)  # fmt: skip
def dualproj(preference: Sequence[float] | None = None) -> Method:
    """Project the mean gradient onto the directions that conflict with no task.

    The weights are `argmin vᵀ K v` with `v ≥ 1/T`: Lopez-Paz & Ranzato 2017, "Gradient Episodic
    Memory for Continual Learning", equation 11, for the mean of all tasks.

    Args:
      preference: weight of each task in the mean; 1/T each if not given.
    """
    return of_gram(
        "dualproj", lambda K: dual_projection(K, preference_of(preference, len(K), 1 / len(K)))
    )
