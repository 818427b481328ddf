"""`jaxlora combine`: add a task to a bank whose adapter is a weighted sum of others'."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import tyro

from jaxlora.cli.terminal import Folder, say
from jaxlora.data.task_files import check_name
from jaxlora.serving import bank as banks
from jaxlora.serving.task_models import combine_tasks
from jaxlora.utils.errors import UserError


def combine(
    bank: Folder,
    /,
    task: tuple[str, ...],
    name: Annotated[str, tyro.conf.arg(name="as")],
    weight: tuple[float, ...] = (),
    head: str | None = None,
    rank: int | None = None,
) -> None:
    """Add a task to a bank whose adapter is a weighted sum of others'.

    Args:
      bank: the bank.
      task: whose adapters.
      name: what to call the new task.
      weight: one for each; default: equal weights that sum to 1.
      head: the task whose head and labels it takes over; default: the first.
      rank: the nearest adapter of this rank, by singular value decomposition; default: the exact
        sum, whose rank is the sum of ranks.
    """
    check_name(name, "--as")
    if not task:
        raise UserError("--task: name at least one task whose adapter to take")
    if len(set(task)) != len(task):
        raise UserError(f"--task {' '.join(task)}: names a task twice; add up the weights")
    weights = weight or (1 / len(task),) * len(task)
    if len(weights) != len(task):
        raise UserError(f"--weight: {len(weights)} weights for {len(task)} tasks")
    if not all(map(math.isfinite, weights)):
        raise UserError(f"--weight {' '.join(map(str, weights))}: must be finite numbers")
    if rank is not None and rank < 1:
        raise UserError(f"--rank must be at least 1, got {rank}")
    trained = banks.load(bank)
    for one in (*task, head or task[0]):
        trained.find(one)
    parts = dict(zip(task, weights, strict=True))
    made = combine_tasks(trained, parts, name, head or task[0], rank)
    banks.add(bank, made, [name])
    say(f"{bank}: added {name}")


def main(words: Sequence[str]) -> None:
    """Run `combine`."""
    tyro.cli(combine, prog="jaxlora combine", args=words)
