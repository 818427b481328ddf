"""PCGrad: gradient surgery for tasks that share parameters, as an optax transform.

Yu et al. 2020, "Gradient Surgery for Multi-Task Learning", algorithm 1. Each task's gradient is
projected onto the normal plane of every gradient it conflicts with (negative dot product). Each
task visits the others in a new random order. The projected gradients are then summed.

This is `jaxlora.aggregate` with the method `pcgrad` and a smaller state. It computes the dot
products of the gradients, the projections as T×T coefficients (`project`), and a weighted sum of
the gradients. The gradients are read twice and never concatenated. No epsilon is added, so the
result scales exactly with the gradients.

`jaxlora.pcgrad` is the function `pcgrad`, even after `import jaxlora.pcgrad as name`. Import the
module's other names with `from jaxlora.pcgrad import gram`.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlora.aggregation import aggregate, methods
from jaxlora.aggregation.checks import check_number, check_task_axis
from jaxlora.aggregation.gram import combine, cosines, gram
from jaxlora.aggregation.methods.pcgrad import orders, project
from jaxlora.aggregation.transform import AggregateState

__all__ = [
    "PCGradState",
    "combine",
    "cosines",
    "gram",
    "orders",
    "pcgrad",
    "project",
    "sum_tasks",
]


class PCGradState(NamedTuple):
    """State of `pcgrad`, with statistics of the last update.

    Attributes:
      key: `u32[2]`, raw data of the PRNG key for the next update's visiting orders. It is raw, as
        in optax, so that any library that saves arrays can save the state (flax, NumPy, Orbax).
      conflicts: `i32[]`, number of task pairs whose raw gradients had a negative dot product.
      cosines: `f32[T, T]`, cosines between the raw gradients.
    """

    key: jax.Array
    conflicts: jax.Array
    cosines: jax.Array


def pcgrad(num_tasks: int, seed: int = 0, *, surgery: bool = True) -> optax.GradientTransformation:
    """Combine per-task gradients by PCGrad; put this optax transform first in a chain.

    `update` takes leaves `[num_tasks, ...]` (one gradient per task, for instance from
    `per_task_grads` or `jax.vmap(jax.grad(loss))`) and returns leaves `[...]`, the sum of the
    projected gradients. Pass it only shared parameters: gradients of parameters that belong to one
    task (heads) would change the norms. `optax.partition` with `sum_tasks` handles the heads. Call
    it inside `jax.jit`, as any optax transform. Dot products are float32: gradients with norms
    between about 1e-18 and 1e18 are projected, smaller ones are only summed.

    Optax's `inject_hyperparams`, `named_chain`, `partition` and `masked` can wrap it. Leaves that
    `masked` leaves out keep their task axis; pass those to `sum_tasks`. `MultiSteps` around it
    accumulates each task's gradients and projects their mean once, if its accumulator gets the task
    axis (see below). `apply_if_finite`, `conditionally_mask`, `conditionally_transform`, `flatten`
    and `contrib.sam` cannot wrap it, since they need gradients with the shapes of the parameters;
    put them after it, as in `chain(pcgrad(T), apply_if_finite(adamw(…), 5))`. A non-finite gradient
    makes the sum non-finite.

    Args:
      num_tasks: T, the size of every leaf's leading axis; with 1 the transform is the identity.
      seed: seed of the random visiting orders.
      surgery: False only sums the gradients, as a baseline; the state still has their conflicts
        and cosines.

    Returns:
      An `optax.GradientTransformation` whose state is a `PCGradState`.

    Raises:
      ValueError: if `num_tasks < 1`. From `update`: if a leaf is not `[num_tasks, ...]`, or, given
        `params`, not `[num_tasks, *parameter.shape]`, or if its dtype is not a real float.

    >>> tx = optax.chain(pcgrad(num_tasks=2), optax.sgd(1.0))
    >>> state = tx.init({"w": jnp.zeros(2)})
    >>> grads = {"w": jnp.array([[1.0, 0.0], [-1.0, 1.0]])}
    >>> updates, state = tx.update(grads, state)
    >>> updates["w"].tolist()
    [-0.5, -1.5]
    >>> int(state[0].conflicts), round(float(state[0].cosines[0, 1]), 4)
    (1, -0.7071)

    Accumulate over four batches:

    >>> steps = optax.MultiSteps(tx, every_k_schedule=4)
    >>> state = steps.init({"w": jnp.zeros(2)})
    >>> stacked = jax.tree.map(lambda x: jnp.stack([x] * 2), state.acc_grads)
    >>> state = state._replace(acc_grads=stacked)
    >>> for _ in range(4):
    ...     updates, state = steps.update(grads, state)
    >>> updates["w"].tolist()
    [-0.5, -1.5]
    """
    rule = methods.pcgrad(seed)
    if not surgery:
        rule = dataclasses.replace(rule, weights=lambda K, losses, key: (jnp.ones_like(K[0]), key))
    inner = aggregate(rule, num_tasks)

    def init(params: optax.Params) -> PCGradState:
        return _state(inner.init(params))

    def update(
        updates: optax.Updates, state: PCGradState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, PCGradState]:
        check_task_axis(f"pcgrad(num_tasks={num_tasks})", num_tasks, updates, params)
        before = inner.init(params)._replace(rules=(state.key,))
        combined, after = inner.update(updates, before, params)
        return combined, _state(after)

    return optax.GradientTransformation(init, update)


def _state(state: AggregateState) -> PCGradState:
    return PCGradState(state.rules[0], state.conflicts, state.cosines)


def sum_tasks(num_tasks: int) -> optax.GradientTransformation:
    """Sum per-task gradients; use this optax transform for heads next to `pcgrad`.

    A head gets a zero gradient from every other task, so the sum is the gradient of its own task.
    Without this transform, leaves that still have the task axis reach `optax.apply_updates`, which
    silently broadcasts the parameter to `[num_tasks, ...]`.

    Args:
      num_tasks: T, the size of every leaf's leading axis.

    Returns:
      A stateless `optax.GradientTransformation`: leaves `[T, ...]` → `[...]`.

    Raises:
      ValueError: see `pcgrad`.

    >>> params = {"trunk": jnp.zeros(2), "heads": {"a": jnp.zeros(()), "b": jnp.zeros(())}}
    >>> shared = optax.chain(pcgrad(2), optax.sgd(1.0))
    >>> own = optax.chain(sum_tasks(2), optax.sgd(1.0))
    >>> tx = optax.partition({"shared": shared, "own": own}, {"trunk": "shared", "heads": "own"})
    >>> heads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([0.0, 5.0])}
    >>> grads = {"trunk": jnp.array([[1.0, 0.0], [-1.0, 1.0]]), "heads": heads}
    >>> updates, _ = tx.update(grads, tx.init(params), params)
    >>> jax.tree.map(lambda x: x.tolist(), updates)
    {'heads': {'a': -3.0, 'b': -5.0}, 'trunk': [-0.5, -1.5]}
    """
    check_number(num_tasks)

    def update(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        check_task_axis(f"sum_tasks(num_tasks={num_tasks})", num_tasks, updates, params)
        return combine(updates, jnp.ones(num_tasks, jnp.float32)), state

    return optax.GradientTransformation(optax.init_empty_state, update)
