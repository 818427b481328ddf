"""UW: uncertainty weighting."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlora.aggregation.method import Method, check_range, member


@member("Kendall et al. 2018", "permutation", "homogeneous")
def uw(learning_rate: float = 0.025) -> Method:
    """Learn a variance for each task: the loss is `Σ ½ e^(−s) L + ½ s`, the weights `½ e^(−s)`.

    Kendall et al. 2018, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry
    and Semantics", section 3.3, with `s = log σ²`, initially 0. This transform updates s by plain
    gradient descent along `½ (1 − e^(−s) L)`.

    Args:
      learning_rate: learning rate of the log-variances.
    """
    check_range("learning_rate", learning_rate, 0)

    def weights(
        K: jax.Array, losses: jax.Array, log_variances: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        precision = jnp.exp(-log_variances)
        slopes = 0.5 * (1 - precision * losses)
        return 0.5 * precision, log_variances - learning_rate * slopes

    return Method("uw", lambda num_tasks, part: jnp.zeros(num_tasks), weights, True, True)
