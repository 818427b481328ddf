"""The optimizers of a group, and their learning rate schedules."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlora.aggregation import MEMBERS, aggregate
from jaxlora.pcgrad import pcgrad
from jaxlora.training.config import OptimizerConfig, Schedule, Surgery
from jaxlora.utils.trees import Tree

Optimizers = tuple[optax.GradientTransformation, optax.GradientTransformation]


def aggregator(name: Surgery, num_tasks: int, seed: int) -> optax.GradientTransformation:
    """Return the transform that combines gradients `[T, ...]` over their task axis.

    Args:
      name: name of an aggregator in `MEMBERS`, or `none` for a sum that records conflicts.
      num_tasks: T.
      seed: seed of methods that use random numbers, such as PCGrad's orders of tasks.
    """
    if name in ("pcgrad", "none"):
        return pcgrad(num_tasks, seed, surgery=name == "pcgrad")
    make = MEMBERS[name].make
    draws = "seed" in inspect.signature(make).parameters
    return aggregate(make(seed=seed) if draws else make(), num_tasks)


def from_config(config: OptimizerConfig, num_tasks: int, steps: int, seed: int) -> Optimizers:
    """Return the optimizers of the encoder and of the heads, see `optimizers`.

    Args:
      config: settings of the optimizers.
      num_tasks: T.
      steps: number of steps of the group, for the schedules.
      seed: seed of the aggregator.
    """
    rates = schedules(config, steps)
    return optimizers(
        num_tasks,
        rates["encoder"],
        rates["heads"],
        clip=config.clip,
        weight_decay=config.weight_decay,
        seed=seed,
        lora_plus_ratio=config.lora_plus_ratio,
        surgery=config.surgery,
    )


def schedules(config: OptimizerConfig, steps: int) -> dict[str, optax.Schedule]:
    """Return the learning rate schedules, over `steps` steps, of the encoder and of the heads."""
    peaks = {"encoder": config.learning_rate, "heads": config.head_learning_rate}
    warmup, decay = config.warmup_steps, config.schedule
    return {name: schedule(peak, steps, warmup=warmup, decay=decay) for name, peak in peaks.items()}


def rates_by_step(config: OptimizerConfig, steps: int) -> dict[str, np.ndarray]:
    """Return the values of `schedules` for all updates of a group, `f32[steps]` each."""
    found = schedules(config, steps)
    rates = jax.jit(lambda updates: {name: rate(updates) for name, rate in found.items()})
    return {k: np.asarray(v, np.float32) for k, v in rates(jnp.arange(steps)).items()}


class GradNorm(NamedTuple):
    """State of `clip_by_global_norm`.

    Attributes:
      grad_norm: `f32[]`, norm of the last gradient before clipping.
    """

    grad_norm: jax.Array


def clip_by_global_norm(most: float) -> optax.GradientTransformation:
    """Clip to the norm `most` as `optax.clip_by_global_norm`, and store the norm in the state."""
    clip = optax.clip_by_global_norm(most)

    def init(params: Tree) -> GradNorm:
        return GradNorm(jnp.zeros(()))

    def update(updates: Tree, state: GradNorm, params: Any = None) -> tuple[Tree, GradNorm]:
        norm = jnp.asarray(optax.tree.norm(updates), jnp.float32)
        return clip.update(updates, optax.EmptyState())[0], GradNorm(norm)

    return optax.GradientTransformation(init, update)


def optimizers(
    num_tasks: int,
    learning_rate: optax.ScalarOrSchedule,
    head_learning_rate: optax.ScalarOrSchedule,
    *,
    clip: float = 1.0,
    weight_decay: float = 0.0,
    seed: int = 0,
    lora_plus_ratio: float = 1.0,
    surgery: Surgery = "pcgrad",
) -> Optimizers:
    """Return the optimizers of the encoder (aggregator → clip → AdamW) and of the heads (AdamW).

    Clipping applies to the combined gradient of the encoder, not to the heads. Biases and LayerNorm
    are not decayed. The learning rate of the adapters' B is that of A times `lora_plus_ratio`
    (Hayou et al. 2024, "LoRA+", section 4).
    """
    steps = [
        aggregator(surgery, num_tasks, seed),
        clip_by_global_norm(clip),
        optax.adamw(learning_rate, weight_decay=weight_decay, mask=_decayed),
    ]
    if lora_plus_ratio != 1:
        steps.append(optax.masked(optax.scale(lora_plus_ratio), _is_b))
    return optax.chain(*steps), optax.adamw(
        head_learning_rate, weight_decay=weight_decay, mask=_decayed
    )


def _decayed(tree: Tree) -> Tree:
    return jax.tree_util.tree_map_with_path(lambda p, _: p[-1].key not in ("bias", "scale"), tree)


def _is_b(tree: Tree) -> Tree:
    return jax.tree_util.tree_map_with_path(lambda p, _: p[-1].key == "B", tree)


def schedule(peak: float, steps: int, *, warmup: float, decay: Schedule) -> optax.Schedule:
    """Return a schedule with a linear warm-up, followed by `decay`.

    The warm-up begins at `peak / warmup` and its last step has `peak`, so no step has rate 0.

    Args:
      peak: the largest rate.
      steps: total number of steps.
      warmup: steps over which the rate rises; below 1: a share of all steps.
      decay: `constant`, or `linear` down to 0.

    >>> rate = schedule(1.0, steps=4, warmup=2, decay="linear")
    >>> [float(rate(step)) for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    warmup = min(round(warmup * steps if warmup < 1 else warmup), steps)
    end = {"constant": peak, "linear": 0.0}[decay]
    return optax.join_schedules(
        [
            optax.linear_schedule(peak / max(1, warmup), peak, max(1, warmup - 1)),
            optax.linear_schedule(peak, end, max(1, steps - warmup)),
        ],
        [warmup],
    )
