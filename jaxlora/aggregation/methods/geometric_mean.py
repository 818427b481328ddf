"""The gradient of the losses' geometric mean."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.aggregation.method import Method, member


@member("Chennupati et al. 2019", "permutation", "homogeneous")
def geometric_mean() -> Method:
    """Follow the gradient of `(Π L_i)^(1/T)`: weights `(Π L)^(1/T) / (T L_i)`.

    Chennupati et al. 2019, "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss
    Strategy for Multi-Task Learning", section 3.2. Losses must be positive; others give NaN.
    """

    def weights(K: jax.Array, losses: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        return jnp.exp(jnp.mean(jnp.log(losses))) / (len(K) * losses), state

    return Method("geometric_mean", lambda num_tasks, part: (), weights, needs_losses=True)
