"""Validation of per-task gradients, before anything is computed."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlora.utils.trees import Tree, names


def check_number(num_tasks: int) -> None:
    """Raise a ValueError if the number of tasks is below one."""
    if num_tasks < 1:
        raise ValueError(f"num_tasks must be at least 1, got {num_tasks}")


def check_task_axis(who: str, num_tasks: int, grads: Tree, params: Tree | None) -> None:
    """Check that leaves are real floats of shape `[num_tasks, *shape of the parameter]`.

    Trailing axes are checked only if `params` has the same leaves as `grads`.

    Raises:
      ValueError: if not; the message names the transform, the leaf and the remedy.
    """
    stacked = [jnp.shape(x) for x in jax.tree.leaves(grads)]
    shapes = [shape[1:] for shape in stacked]
    if names(params) == names(grads):
        shapes = [jnp.shape(x) for x in jax.tree.leaves(params)]
    for name, found, shape in zip(names(grads), stacked, shapes, strict=True):
        if found != (num_tasks, *shape):
            raise ValueError(
                f"{who} needs one gradient per task along the first axis, "
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
