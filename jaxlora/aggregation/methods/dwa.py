"""DWA: dynamic weight average."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlora.aggregation.method import Method, member


class DWAState(NamedTuple):
    """State of `dwa`; losses are `f32[T]`.

    Attributes:
      total: sum of the losses of this epoch so far.
      newer: mean losses of the previous epoch.
      older: mean losses of the epoch before `newer`.
      taken: `i32[]`, number of steps so far.
    """

    total: jax.Array
    newer: jax.Array
    older: jax.Array
    taken: jax.Array


@member("Liu et al. 2019", "permutation", "homogeneous", "unit")
def dwa(temperature: float = 2.0, steps_per_epoch: int = 1) -> Method:
    """Give more weight to tasks whose loss has fallen less over the last two epochs.

    `w = T · softmax(r / temperature)` with `r = L̄(e − 1) / L̄(e − 2)`; all 1 in the first two
    epochs. Liu et al. 2019, "End-to-End Multi-Task Learning with Attention", equations 7 and 8.

    Args:
      temperature: above 0; higher values make the weights more equal.
      steps_per_epoch: number of steps over which the losses are averaged.
    """
    if not (temperature > 0 and steps_per_epoch >= 1):
        raise ValueError("dwa takes a temperature above 0 and at least one step an epoch")

    def init(num_tasks: int, part: int) -> DWAState:
        zeros = jnp.zeros(num_tasks)
        return DWAState(zeros, zeros, zeros, jnp.int32(0))

    def weights(K: jax.Array, losses: jax.Array, s: DWAState) -> tuple[jax.Array, DWAState]:
        ready = s.taken >= 2 * steps_per_epoch
        rates = jnp.where(ready, s.newer / jnp.where(ready, s.older, 1), 1)
        total, taken = s.total + losses, s.taken + 1
        ended = taken % steps_per_epoch == 0
        after = DWAState(
            jnp.where(ended, 0, total),
            jnp.where(ended, total / steps_per_epoch, s.newer),
            jnp.where(ended, s.newer, s.older),
            taken,
        )
        return len(K) * jax.nn.softmax(rates / temperature), after

    return Method("dwa", init, weights, needs_losses=True, every_step=True)
