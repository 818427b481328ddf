"""`jaxlora bank`: manage the adapters and heads of many tasks with one base."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from jaxlora.cli.flags import call_one
from jaxlora.cli.terminal import CONSOLE, Folder, Name, Names, count, print_json, say
from jaxlora.nn.bert import param_shapes
from jaxlora.serving import bank as banks
from jaxlora.serving.task_models import TaskModels
from jaxlora.utils import trees
from jaxlora.utils.errors import UserError


def add(folder: Folder, /, run: Path, task: Names = ()) -> None:
    """Add the tasks of a finished run to a bank, which is created if it is missing.

    Args:
      folder: the bank.
      run: the --out folder of the run.
      task: tasks to add; default: all.
    """
    source, names = _chosen(run, task)
    banks.add(folder, source, names)
    say(f"{folder}: added {', '.join(names)}")


def update(folder: Folder, /, run: Path, task: Names = (), if_better: bool = False) -> None:
    """Replace tasks of a bank by those of a finished run, without changing other tasks.

    Earlier versions are kept, see `jaxlora bank history` and `rollback`.

    Args:
      folder: the bank.
      run: the --out folder of the run.
      task: tasks to replace; default: all of the run.
      if_better: replace a task only if its score on the same dev set is better.
    """
    source, names = _chosen(run, task)
    changes = banks.add(folder, source, names, replace=True, if_better=if_better)
    for change in changes:
        say(f"{change.task}: {_describe(change)}")
    made = [change.task for change in changes if change.made]
    say(f"{folder}: updated {', '.join(made) or 'nothing'}")


def _chosen(run: Path, task: tuple[str, ...]) -> tuple[TaskModels, tuple[str, ...]]:
    """Load a run, and return it with the names of the chosen tasks."""
    source = banks.load(run)
    return source, tuple(dict.fromkeys(task)) or tuple(source.models)


def _describe(change: banks.Change) -> str:
    scores = f"{change.metric} {_score(change.before)} → {_score(change.after)}"
    if not change.made:
        return f"{scores}, not better: left as it is"
    if not change.same_dev:
        return f"{scores}, not known to be on one dev set"
    if change.better or change.before == change.after:
        return scores
    return f"{scores}: the score {'fell' if change.greater else 'rose'}; see bank rollback"


def _score(score: float | None) -> str:
    return "unknown" if score is None else f"{score:.4f}"


def history(folder: Folder, task: Name, /, json: bool = False) -> None:
    """Show the versions of a task that a bank keeps, the current one last.

    Args:
      folder: the bank.
      task: name of the task.
      json: print JSON.
    """
    versions = banks.history(folder, task)
    if json:
        print_json([dataclasses.asdict(version) for version in versions])
        return
    table = Table("version", "dev", "variant", "data", "adapter", "head")
    for number, version in enumerate(versions, 1):
        facts, present = version.facts, " (present)" if number == len(versions) else ""
        score = f"{version.task.metric_name} {_score(facts.dev.get(version.task.metric))}"
        cells = (
            f"{number}{present}", score, facts.variant or "", (facts.data or "")[:12],
            version.adapter or "none", version.head or "none",
        )  # fmt: skip
        table.add_row(*map(escape, cells))
    CONSOLE.print(table)


def rollback(folder: Folder, task: Name, /, version: int | None = None) -> None:
    """Restore an earlier version of a task. A second rollback without --version undoes it.

    Args:
      folder: the bank.
      task: name of the task.
      version: number of the version in `jaxlora bank history`; default: the previous one.
    """
    banks.rollback(folder, task, version)
    present = banks.history(folder, task)[-1]
    score = _score(present.facts.dev.get(present.task.metric))
    say(f"{folder}: {task} is back at {present.task.metric_name} {score}")


def remove(folder: Folder, task: Name, /) -> None:
    """Remove a task from a bank.

    Args:
      folder: the bank.
      task: name of the task.
    """
    banks.remove(folder, task)
    say(f"{folder}: removed {task}")


def list_tasks(folder: Folder, /, base: str | None = None, json: bool = False) -> None:
    """Show the tasks of a bank with scores, parameters and bytes, compared with full models.

    Args:
      folder: the bank.
      base: new path of the base, if it has moved.
      json: print JSON.
    """
    rows = banks.contents(folder)
    if json:
        print_json([dataclasses.asdict(row) for row in rows])
        return
    found = banks.load_base_spec(folder).at(base).load_base()
    table = Table("task", "what", "dev", "adapter", "adapter M", "head M", "kB")
    users: dict[str, list[str]] = {}
    for row in rows:
        users.setdefault(row.adapter, []).append(row.task)
    for row in rows:
        score = "" if row.score is None else f"{row.metric} {row.score:.4f}"
        others = [task for task in users[row.adapter] if task != row.task]
        adapter = f"shared with {', '.join(others)}" if others else "own"
        cells = (
            row.task, row.title, score, adapter if row.adapter_parameters else "none",
            f"{row.adapter_parameters / 1e6:.3f}", f"{row.head_parameters / 1e6:.3f}",
            f"{row.bytes / 1e3:,.0f}",
        )  # fmt: skip
        table.add_row(*map(escape, cells))
    CONSOLE.print(table)
    each = trees.count(param_shapes(found.config))
    adapters = {row.adapter: row.adapter_parameters for row in rows}
    heads = sum(row.head_parameters for row in rows)
    added = sum(adapters.values()) + heads
    say(
        f"{count(len(rows), 'task')}: {added / 1e6:.2f}M parameters added "
        f"({sum(r.bytes for r in rows) / 1e6:.1f} MB) to a base of {each / 1e6:.2f}M: "
        f"{(each + added) / 1e6:.2f}M in all; a full model for each would be "
        f"{(each * len(rows) + heads) / 1e6:.2f}M."
    )


def show(folder: Folder, task: Name, /) -> None:
    """Show everything that a bank stores about a task, as JSON.

    Args:
      folder: the bank.
      task: name of the task.
    """
    print(banks.describe(folder, task))


def verify(folder: Folder, /, base: str | None = None, json: bool = False) -> None:
    """Verify the checksums of all files of a bank, and of its base.

    Args:
      folder: the bank.
      base: new path of the base, if it has moved.
      json: print JSON.
    """
    problems = banks.verify(folder, base)
    if json:
        print_json({"problems": problems})
    if problems:
        raise UserError("\n".join(problems))
    if not json:
        say(f"{folder}: all is well")


COMMANDS: dict[str, Callable[..., None]] = {
    "list": list_tasks,
    "add": add,
    "update": update,
    "remove": remove,
    "history": history,
    "rollback": rollback,
    "show": show,
    "verify": verify,
}


def main(words: Sequence[str]) -> None:
    """Run one of `COMMANDS`."""
    about = "Manage the adapters and heads of many tasks with one base."
    call_one(COMMANDS, "jaxlora bank", about, words)
