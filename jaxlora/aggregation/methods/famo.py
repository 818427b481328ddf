"""FAMO: weights that make all losses fall at the same rate, computed from the losses alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlora.aggregation.method import Method, check_range, member, preference_of

_LEAST = 1e-8  # added to a loss before its logarithm, as in the authors' code


class FAMOState(NamedTuple):
    """State of `famo`; all but `taken` are `f32[T]`.

    Attributes:
      logits: logits of the weights.
      first: Adam's first moment of the logits' gradient.
      second: Adam's second moment of the logits' gradient.
      before: logarithms of the last step's losses.
      taken: `i32[]`, number of steps so far.
    """

    logits: jax.Array
    first: jax.Array
    second: jax.Array
    before: jax.Array
    taken: jax.Array


@member("Liu et al. 2023", "permutation", "homogeneous", "unit")
def famo(
    learning_rate: float = 0.025,
    weight_decay: float = 1e-3,
    min_losses: Sequence[float] | None = None,
) -> Method:
    """Weight `∇ log L_i` by the softmax of logits that track how much each loss has fallen.

    `w_i = c z_i / L_i`, `z = softmax(logits)`, with `c` such that the weights sum to 1. Adam
    updates the logits by the gradient of `z·(log L(t) − log L(t + 1))`: Liu et al. 2023, "FAMO:
    Fast Adaptive Multitask Optimization", algorithm 1. An optimizer cannot evaluate the losses
    after its own update, so `L(t + 1)` are the losses of the next call, on that call's batch.

    Args:
      learning_rate: Adam's learning rate for the logits.
      weight_decay: weight decay of the logits, added to their gradient.
      min_losses: the minimum of each loss, subtracted from it; 0 if not given.
    """
    check_range("learning_rate", learning_rate, 0)
    check_range("weight_decay", weight_decay, 0)

    def init(num_tasks: int, part: int) -> FAMOState:
        zeros = jnp.zeros(num_tasks)
        return FAMOState(zeros, zeros, zeros, zeros, jnp.int32(0))

    def weights(K: jax.Array, losses: jax.Array, s: FAMOState) -> tuple[jax.Array, FAMOState]:
        above = losses - preference_of(min_losses, len(K), 0.0) + _LEAST
        fallen = jnp.where(s.taken > 0, s.before - jnp.log(above), 0)
        z = jax.nn.softmax(s.logits)
        slope = z * (fallen - z @ fallen) + weight_decay * s.logits
        first, second = 0.9 * s.first + 0.1 * slope, 0.999 * s.second + 0.001 * slope**2
        n = jnp.maximum(s.taken, 1).astype(K.dtype)
        change = first / (1 - 0.9**n) / (jnp.sqrt(second / (1 - 0.999**n)) + 1e-8)
        logits = s.logits - learning_rate * jnp.where(s.taken > 0, change, 0)
        shares = jax.nn.softmax(logits) / above
        after = FAMOState(logits, first, second, jnp.log(above), s.taken + 1)
        return shares / jnp.sum(shares), after

    return Method("famo", init, weights, needs_losses=True, every_step=True)
