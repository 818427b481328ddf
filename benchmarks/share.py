"""Measure the fraction of a LoRA step outside the network: `python -m benchmarks.share`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import tyro

from benchmarks import harness
from benchmarks.work import Ours, Work
from jaxlora.formats import huggingface
from jaxlora.pcgrad import pcgrad
from jaxlora.serving.task_models import Dtype
from jaxlora.training.config import VariantName
from jaxlora.utils import trees


@dataclasses.dataclass(frozen=True)
class Flags:
    """Measure the fractions of a step that PCGrad and the host's work take.

    Attributes:
      base: the base model.
      variant: the variant to train.
      batch_sizes: sentences or pairs of each task.
      dtypes: float32, bfloat16.
      rounds: number of timed runs.
      steps: steps per run.
      out: folder of the JSON file.
    """

    base: str = "minilm"
    variant: VariantName = "lora3"
    batch_sizes: tuple[int, ...] = (8, 32)
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    rounds: int = 5
    steps: int = 10
    out: Path = harness.OUT


def make_projection(ours: Ours) -> Callable[[], Any]:
    """Build PCGrad alone, on gradients with the shapes of the trained tree."""
    (cohort,) = ours.cohorts
    count = len(cohort.train_step.tasks)
    tx, tree = pcgrad(count), _trainable(ours)
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    grads = jax.tree.unflatten(
        structure,
        [jax.random.normal(k, (count, *x.shape)) for k, x in zip(keys, leaves, strict=True)],
    )
    state = tx.init(tree)
    update = jax.jit(lambda grads, state: tx.update(grads, state)[0])
    return lambda: jax.block_until_ready(update(grads, state))


def _trainable(ours: Ours) -> Any:
    """Return the tree that all tasks share."""
    ((state,),) = (cohort.states.values() for cohort in ours.cohorts)
    return state.trainable


def host_seconds(ours: Ours, steps: int) -> float:
    """Measure the seconds to build the batch of a step, without other load."""
    (cohort,) = ours.cohorts
    began = time.perf_counter()
    for step in range(steps):
        cohort.batches[step]
    return (time.perf_counter() - began) / steps


def measure(work: Work, flags: Flags) -> dict[str, Any]:
    """Measure one row of the table."""
    ours = Ours(work, huggingface.load(flags.base))
    ours.compile()
    project = make_projection(ours)
    sides: dict[str, Callable[[], Any]] = {
        "projection": project,
        "steps": lambda: ours.run(flags.steps),
    }
    for side in sides.values():
        side()
    ours.waited = 0.0
    spreads = harness.interleave(sides, flags.rounds, warmups=0)
    waited = ours.waited / (flags.rounds * flags.steps)
    each = spreads["steps"].per(flags.steps)
    return {
        "variant": work.variant,
        "batch": work.batch_size,
        "dtype": work.dtype,
        "M trained": round(trees.count(_trainable(ours)) / 1e6, 2),
        "step ms": each,
        "PCGrad ms": spreads["projection"],
        "PCGrad %": 100 * spreads["projection"].median / each.median,
        "host ms": 1e3 * host_seconds(ours, 100),
        "waiting for the host %": 100 * waited / each.median,
    }


def main(flags: Flags) -> None:
    """Measure all combinations."""
    rows = [
        measure(Work(flags.variant, size, dtype), flags)
        for size in flags.batch_sizes
        for dtype in flags.dtypes
    ]
    harness.show("share", "PCGrad's and the host's share of a LoRA step", rows, flags.out)


if __name__ == "__main__":
    main(tyro.cli(Flags))
