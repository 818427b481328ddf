"""PCGrad: gradient surgery for tasks that share parameters, as an optax transform.

Yu et al. 2020, "Gradient Surgery for Multi-Task Learning", algorithm 1. Every task's gradient is
projected onto the normal plane of each gradient it conflicts with (negative dot product), the
others visited in a fresh random order for each task; the projected gradients are then summed.

A projection only ever adds multiples of the original gradients, so the whole algorithm runs on
T×T numbers (the *Gram form*): with `K = G Gᵀ`, task i starts from coefficients `w = e_i` and, for
each other task j with `K[j]·w < 0`, subtracts `(K[j]·w) / K[j, j]` from `w[j]`. The gradients are
read twice (dot products, weighted sum) and never flattened, copied or concatenated. There is no
epsilon: the result scales exactly with the gradients.

`jaxlora.pcgrad` is the function `pcgrad`, and `import jaxlora.pcgrad as name` gives it, too; write
`from jaxlora.pcgrad import gram` for what else is here.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlora.aggregation.gram import combine, cosines, gram
from jaxlora.utils.trees import Tree, names

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

_HIGHEST = jax.lax.Precision.HIGHEST
_RANDOM = "threefry2x32"  # fixed, so that a state's key data means the same under any JAX setting


def orders(key: jax.Array, num_tasks: int) -> jax.Array:
    """For each task its own random order of visits, `i32[T, T]` (its own entry is skipped later).

    >>> jnp.sort(orders(jax.random.key(0), 3), axis=-1).tolist()
    [[0, 1, 2], [0, 1, 2], [0, 1, 2]]
    """
    keys = jax.random.split(key, num_tasks)
    return jax.vmap(lambda k: jax.random.permutation(k, num_tasks))(keys).astype(jnp.int32)


def project(K: jax.Array, orders: jax.Array) -> jax.Array:
    """Coefficients of the projected gradients: `projected_i = Σ_j W[i, j] g_j`.

    Args:
      K: `f32[T, T]`, Gram matrix.
      orders: `i32[T, T]`, row i the order in which task i visits the others; `j = i` is skipped.

    Returns:
      `f32[T, T]`. A zero gradient never conflicts. No conflict gives the identity.

    >>> K = gram({"w": jnp.array([[1.0, 0.0], [-1.0, 1.0]])})
    >>> project(K, jnp.array([[1, 0], [0, 1]])).tolist()
    [[1.0, 0.5], [1.0, 1.0]]
    """

    def one_task(i: jax.Array, order: jax.Array) -> jax.Array:
        def visit(w: jax.Array, j: jax.Array) -> tuple[jax.Array, None]:
            dot = jnp.dot(K[j], w, precision=_HIGHEST)
            conflict = (j != i) & (dot < 0) & (K[j, j] > 0)
            step = jnp.where(conflict, dot / jnp.where(K[j, j] > 0, K[j, j], 1), 0)
            return w.at[j].add(-step), None

        start = jax.nn.one_hot(i, K.shape[0], dtype=K.dtype)
        return jax.lax.scan(visit, start, order)[0]

    return jax.vmap(one_task)(jnp.arange(K.shape[0]), orders)


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
      surgery: False only sums the gradients, to compare with; the state tells what it would have
        met all the same.

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
    _check_number(num_tasks)

    def init(params: optax.Params) -> PCGradState:
        del params
        return PCGradState(
            jax.random.key_data(jax.random.key(seed, impl=_RANDOM)),
            jnp.zeros((), jnp.int32),
            jnp.zeros((num_tasks, num_tasks), jnp.float32),
        )

    def update(
        updates: optax.Updates, state: PCGradState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, PCGradState]:
        _check_task_axis("pcgrad", num_tasks, updates, params)
        key, order_key = jax.random.split(jax.random.wrap_key_data(state.key, impl=_RANDOM))
        empty = jnp.zeros((num_tasks, num_tasks), jnp.float32)  # what a tree without leaves has
        K = gram(updates) + empty
        weights = jnp.ones(num_tasks, jnp.float32)
        if surgery:
            weights = project(K, orders(order_key, num_tasks)).sum(0)
        conflicts = jnp.sum(jnp.triu(K < 0, 1), dtype=jnp.int32)
        return combine(updates, weights), PCGradState(
            jax.random.key_data(key), conflicts, cosines(K)
        )

    return optax.GradientTransformation(init, update)


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
    _check_number(num_tasks)

    def update(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        _check_task_axis("sum_tasks", num_tasks, updates, params)
        return combine(updates, jnp.ones(num_tasks, jnp.float32)), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def _check_number(num_tasks: int) -> None:
    if num_tasks < 1:
        raise ValueError(f"num_tasks must be at least 1, got {num_tasks}")


def _check_task_axis(who: str, num_tasks: int, grads: Tree, params: Tree | None) -> None:
    """Refuse leaves that are not `[num_tasks, *shape of the parameter]`, as far as it is known."""
    stacked = [jnp.shape(x) for x in jax.tree.leaves(grads)]
    shapes = [shape[1:] for shape in stacked]
    if names(params) == names(grads):
        shapes = [jnp.shape(x) for x in jax.tree.leaves(params)]
    for name, found, shape in zip(names(grads), stacked, shapes, strict=True):
        if found != (num_tasks, *shape):
            raise ValueError(
                f"{who}(num_tasks={num_tasks}) needs one gradient per task along the first axis, "
                f"but leaf {name!r} has shape {found} instead of {(num_tasks, *shape)}; stack "
                "the tasks' gradients (and under optax.MultiSteps its acc_grads; optax.flatten "
                "goes behind it)"
            )
    for name, leaf in zip(names(grads), jax.tree.leaves(grads), strict=True):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"{who} takes real floats, but leaf {name!r} is {jnp.result_type(leaf)}; for "
                "complex parameters put optax.contrib.split_real_and_imaginary around it"
            )
