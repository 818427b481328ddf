"""PCGrad: gradient surgery for tasks that share parameters, as an optax transform.

Yu et al. 2020, "Gradient Surgery for Multi-Task Learning", algorithm 1. Every task's gradient is
projected onto the normal plane of each gradient it conflicts with (negative dot product), the
others visited in a fresh random order for each task; the projected gradients are then summed.

It is one of the family `jaxlora.aggregate`, under a name, and with a state, of its own: dot
products of the gradients, projections on T×T numbers (`project`), a weighted sum of the gradients.
These are read twice and never flattened, copied or concatenated. There is no epsilon: the result
scales exactly with the gradients.

`jaxlora.pcgrad` is the function `pcgrad`, and `import jaxlora.pcgrad as name` gives it, too; write
`from jaxlora.pcgrad import gram` for what else is here.
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
    """State of `pcgrad`, with what the last update saw.

    Attributes:
      key: `u32[2]`, raw data of the PRNG key for the next update's orders. Raw, as in optax, so
        that the state can be saved by anything that saves arrays (flax, NumPy, pickle, Orbax).
      conflicts: `i32[]`, pairs of tasks whose raw gradients had a negative dot product.
      cosines: `f32[T, T]`, cosines between the raw gradients.
    """

    key: jax.Array
    conflicts: jax.Array
    cosines: jax.Array


def pcgrad(num_tasks: int, seed: int = 0, *, surgery: bool = True) -> optax.GradientTransformation:
    """Combine per-task gradients by PCGrad; an optax transform to put first in a chain.

    `update` takes leaves `[num_tasks, ...]` (one gradient per task, for instance from
    `jax.vmap(jax.grad(loss))` or `jax.jacrev`) and returns leaves `[...]`: the sum of the
    projected gradients. It only sees what it is given: keep the parameters that belong to one task
    (heads) away from it, for instance by `optax.partition` with `sum_tasks` for the heads.
    Call it inside `jax.jit`, as any optax transform. Dot products are float32: gradient norms
    between about 1e-18 and 1e18 are projected, smaller ones are only summed.

    Optax's wrappers: `inject_hyperparams`, `named_chain`, `partition` and `masked` work around it
    (what `masked` leaves out keeps its task axis: give that to `sum_tasks`). `MultiSteps` around it
    accumulates each task's gradients and projects their mean once, if its accumulator is given the
    task axis (see below). `apply_if_finite`, `conditionally_mask`, `conditionally_transform`,
    `flatten` and `contrib.sam` cannot be around it, since they take gradients that have the
    shapes of the parameters; put them behind it, `chain(pcgrad(T), apply_if_finite(adamw(…), 5))`.
    A gradient that is not finite makes the sum so, too.

    Args:
      num_tasks: T, the size of every leaf's leading axis; 1 makes it the identity.
      seed: seed of the random visiting orders.
      surgery: False only sums the gradients, to compare with; the state still has their conflicts
        and cosines.

    Returns:
      An `optax.GradientTransformation` whose state is a `PCGradState`.

    Raises:
      ValueError: if `num_tasks < 1`, or a leaf is not `[num_tasks, ...]` (with `params` given to
        `update`, also if the rest is not its parameter's shape) or no real floats.

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
    """Sum per-task gradients; the optax transform for heads beside `pcgrad`.

    A head's gradient of every other task is zero, so the sum is the gradient of its own task.
    Without it, leaves that still have the task axis reach `optax.apply_updates`, which broadcasts
    the parameter to `[num_tasks, ...]` without an error.

    Args:
      num_tasks: T, the size of every leaf's leading axis.

    Returns:
      An `optax.GradientTransformation` without a state: leaves `[T, ...]` → `[...]`.

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
