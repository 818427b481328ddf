"""Gradient accumulation with a task axis."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlora.aggregation.checks import check_number


def accumulate(
    tx: optax.GradientTransformation, num_tasks: int, steps: int
) -> optax.GradientTransformationExtraArgs:
    """Average each task's gradients over several steps, then apply `tx` to the averages once.

    This is `optax.MultiSteps` with a task axis in its accumulators, which otherwise have the shapes
    of the parameters. Losses are not averaged: an aggregator that weights by them gets those of the
    last step. To aggregate in each step and average the results instead, use
    `chain(aggregate(…), MultiSteps(adamw(…), 4))`.

    Args:
      tx: a transform that begins with `aggregate` or `pcgrad`.
      num_tasks: T.
      steps: number of steps to accumulate over.

    >>> from jaxlora.aggregation import aggregate
    >>> chain = optax.chain(aggregate("sum", num_tasks=2), optax.sgd(1.0))
    >>> tx = accumulate(chain, num_tasks=2, steps=2)
    >>> state = tx.init({"w": jnp.zeros(2)})
    >>> for scale in (1.0, 3.0):
    ...     grads = {"w": scale * jnp.array([[1.0, 0.0], [-1.0, 1.0]])}
    ...     updates, state = tx.update(grads, state, {"w": jnp.zeros(2)})
    >>> updates["w"].tolist()
    [-0.0, -2.0]
    """
    check_number(num_tasks)
    around = optax.MultiSteps(tx, steps)

    def init(params: optax.Params) -> Any:
        state = around.init(params)
        stacked = jax.tree.map(lambda x: jnp.zeros((num_tasks, *x.shape), x.dtype), state.acc_grads)
        return state._replace(acc_grads=stacked)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, Any]:
        found, after = around.update(updates, state, params, **extra)
        ended = after.mini_step == 0
        # `MultiSteps` multiplies by 0 instead, which keeps what is not finite.
        sums = jax.tree.map(lambda x: jnp.where(ended, 0, x), after.acc_grads)
        found = jax.tree.map(lambda x: jnp.where(ended, x, 0), found)
        return found, after._replace(acc_grads=sums)

    return optax.GradientTransformationExtraArgs(init, update)
