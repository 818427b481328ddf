"""`jaxlora combine`: add a task whose adapter is a weighted sum of others in the bank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import tyro

from jaxlora.cli.flags import call
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
    """Add a task to a bank, with a weighted sum of the adapters of other tasks in it.

    Args:
      bank: the bank.
      task: tasks whose adapters are summed.
      name: name of the new task.
      weight: a weight for each of them; default: equal weights that sum to 1.
      head: task whose head and labels the new one uses; default: the first.
      rank: approximate the sum by this rank with a singular value decomposition; default: the
        exact sum, whose rank is the sum of the ranks, or the highest that a layer can have.
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
    call(combine, "jaxlora combine", words)
