"""Nash-MTL: the Nash bargaining solution between the tasks."""

from __future__ import annotations

from jaxlora.aggregation.method import Method, member, of_gram
from jaxlora.aggregation.methods.fairgrad import fair_weights


@member("Navon et al. 2022", "non-conflicting", "permutation", "stationary")
def nash_mtl() -> Method:
    """Maximize the product of the tasks' gains: weights `α > 0` with `K α = 1/α`.

    Navon et al. 2022, "Multi-Task Learning as a Bargaining Game", claim 3.1. The authors solve it
    by a sequence of convex programs; it is the minimum of the convex `½ αᵀ K α − Σ log α`, which
    Newton's method finds. The update's length is `√T`, whatever the gradients' is; to limit it to 1
    as the authors do, put `optax.clip_by_global_norm(1.0)` behind. Where positive weights sum the
    gradients to zero there is no solution, and the update is near zero.
    """
    return of_gram("nash_mtl", lambda K: fair_weights(K, 1.0))
