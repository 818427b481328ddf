"""The gradient of each task with respect to the shared parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.utils.trees import Tree

Loss = Callable[..., Any]


def per_task_grads(
    loss_fns: Callable[..., Any] | Sequence[Loss] | Mapping[str, Loss],
    trunk: Tree,
    heads: Any,
    batches: Any,
    *,
    has_aux: bool = False,
) -> tuple[Any, Tree, Any]:
    """Compute each task's loss and its gradients with respect to the trunk and to its own head.

    `loss_fns` is one of:

    * a function for each task, each with its own batch: one backward pass per task through that
      task's batch.
    * one function that returns the losses of all tasks on a shared batch, `f32[T]`: one forward
      pass, then T unit vectors pulled back together.

    Call it inside `jax.jit`, so that it compiles into one program with the update.

    Args:
      loss_fns: a sequence or a dict by task name of functions `(trunk, head, batch) → loss`; or one
        function `(trunk, heads, batch) → losses`.
      trunk: the shared parameters, a pytree of arrays.
      heads: a sequence or dict of one pytree per task; any pytree if `loss_fns` is one function.
        None or empty if there are no heads; functions of one task then get None.
      batches: a sequence or dict of one batch per task; one batch if `loss_fns` is one function.
      has_aux: whether the functions return `(loss, aux)`. The first result is then
        `(losses, aux)`, where aux is a sequence or dict like `loss_fns`.

    Returns:
      The losses, `f32[T]`; the trunk's gradients, leaves `[T, ...]`, for `aggregate`; the gradients
      of the heads, structured like `heads`.

    Raises:
      ValueError: if the tasks of `loss_fns`, `heads` and `batches` differ, or if one function does
        not return losses `[T]`.

    >>> def loss(trunk, head, x):
    ...     return jnp.sum(trunk["w"] * x) * head
    >>> trunk, heads = {"w": jnp.ones(2)}, {"a": jnp.float32(1), "b": jnp.float32(2)}
    >>> batches = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 4.0])}
    >>> losses, grads, head_grads = per_task_grads({"a": loss, "b": loss}, trunk, heads, batches)
    >>> losses.tolist(), grads["w"].tolist()
    ([3.0, 14.0], [[1.0, 2.0], [6.0, 8.0]])
    >>> {name: float(g) for name, g in head_grads.items()}
    {'a': 3.0, 'b': 7.0}
    """
    if callable(loss_fns):
        return _shared_batch(loss_fns, trunk, heads, batches, has_aux)
    return _own_batches(loss_fns, trunk, heads, batches, has_aux)


def _own_batches(
    loss_fns: Sequence[Loss] | Mapping[Any, Loss],
    trunk: Tree,
    heads: Any,
    batches: Any,
    has_aux: bool,
) -> tuple[Any, Tree, Any]:
    """Differentiate each task's loss in a separate backward pass.

    `jax.jacrev` of the stacked losses would pull each unit vector back through all batches.
    """
    keys = _keys(loss_fns)
    own_heads = dict.fromkeys(keys) if heads is None or not _keys(heads) else heads
    for name, found in (("heads", own_heads), ("batches", batches)):
        if set(_keys(found)) != set(keys):
            raise ValueError(f"{name} are for the tasks {_keys(found)}, loss_fns for {keys}")
    found = [
        jax.value_and_grad(loss_fns[key], argnums=(0, 1), has_aux=has_aux)(
            trunk, own_heads[key], batches[key]
        )
        for key in keys
    ]
    values, grads = zip(*found, strict=True)
    own, heads_grads = zip(*grads, strict=True)
    losses = jnp.stack([value[0] if has_aux else value for value in values])
    aux = _like(loss_fns, [value[1] for value in values]) if has_aux else None
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *own)
    of_heads = _like(heads, heads_grads, keys) if own_heads is heads else heads
    return ((losses, aux) if has_aux else losses), stacked, of_heads


def _keys(tasks: Any) -> list[Any]:
    return list(tasks) if isinstance(tasks, Mapping) else list(range(len(tasks)))


def _like(tasks: Any, values: Sequence[Any], keys: Sequence[Any] | None = None) -> Any:
    """Return the values, which are in the order of `keys`, in a container like `tasks`."""
    if isinstance(tasks, Mapping):
        return dict(zip(keys or tasks, values, strict=True))
    return jax.tree.unflatten(jax.tree.structure(tasks, is_leaf=lambda x: x is not tasks), values)


def _shared_batch(
    losses_fn: Callable[..., Any], trunk: Tree, heads: Any, batch: Any, has_aux: bool
) -> tuple[Any, Tree, Any]:
    """Differentiate all losses after one shared forward pass."""

    def losses_of(trunk: Tree, heads: Any) -> Any:
        return losses_fn(trunk, heads, batch)

    aux: list[Any]
    losses, pull_back, *aux = jax.vjp(losses_of, trunk, heads, has_aux=has_aux)  # type: ignore[call-overload]
    if losses.ndim != 1:
        raise ValueError(f"loss_fns must return losses [T], got shape {losses.shape}")
    grads, head_grads = jax.vmap(pull_back)(jnp.eye(len(losses), dtype=losses.dtype))
    of_heads = jax.tree.map(lambda g: jnp.sum(g, 0), head_grads)
    return ((losses, *aux) if has_aux else losses), grads, of_heads
