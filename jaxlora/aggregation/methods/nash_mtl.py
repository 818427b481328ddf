"""Nash-MTL: the Nash bargaining solution between the tasks."""

from __future__ import annotations

from jaxlora.aggregation.method import Method, member, of_gram
from jaxlora.aggregation.methods.fairgrad import fair_weights


@member("Navon et al. 2022", "non-conflicting", "permutation", "stationary")
def nash_mtl() -> Method:
    """Maximize the product of the tasks' gains: weights `α > 0` with `K α = 1/α`.

    Navon et al. 2022, "Multi-Task Learning as a Bargaining Game", claim 3.1. The authors solve a
    sequence of convex programs; here Newton's method minimizes the convex `½ αᵀ K α − Σ log α`,
    which has the same solution. The update's length is `√T` for gradients of any length. To limit
    it to 1, as the authors do, put `optax.clip_by_global_norm(1.0)` after it. If some positive
    weights sum the gradients to zero, there is no solution, and the update is near zero.
    """
    return of_gram("nash_mtl", lambda K: fair_weights(K, 1.0))
