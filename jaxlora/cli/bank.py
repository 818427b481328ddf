"""`jaxlora bank`: keep the adapters and heads of many tasks of one base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import tyro
from rich.markup import escape
from rich.table import Table

from jaxlora.cli.terminal import CONSOLE, Folder, Name, say
from jaxlora.nn.bert import param_shapes
from jaxlora.serving import bank as banks
from jaxlora.utils import trees
from jaxlora.utils.errors import UserError


def add(folder: Folder, /, run: Path, task: tuple[str, ...] = ()) -> None:
    """Put the tasks of a finished run into a bank (created if it is missing).

    Args:
      folder: the bank.
      run: a run's --out folder.
      task: which of its tasks; default: all.
    """
    source = banks.load(run)
    names = tuple(dict.fromkeys(task)) or tuple(source.models)
    banks.add(folder, source, names)
    say(f"{folder}: added {', '.join(names)}")


def update(folder: Folder, /, run: Path, task: tuple[str, ...] = ()) -> None:
    """Replace tasks of a bank by those of a finished run; the others are not touched.

    Args:
      folder: the bank.
      run: a run's --out folder.
      task: which of its tasks; default: all.
    """
    source = banks.load(run)
    names = tuple(dict.fromkeys(task)) or tuple(source.models)
    banks.add(folder, source, names, replace=True)
    say(f"{folder}: updated {', '.join(names)}")


def remove(folder: Folder, task: Name, /) -> None:
    """Remove a task from a bank.

    Args:
      folder: the bank.
      task: its name.
    """
    banks.remove(folder, task)
    say(f"{folder}: removed {task}")


def list_tasks(folder: Folder, /, base: str | None = None) -> None:
    """Show a bank's tasks: scores, parameters and bytes, beside one full model for each task.

    Args:
      folder: the bank.
      base: where its base is now, if it has moved.
    """
    rows, found = banks.contents(folder), banks.load_base_spec(folder).at(base).load_base()
    table = Table("task", "what", "dev", "adapter", "adapter M", "head M", "kB")
    for row in rows:
        score = "" if row.score is None else f"{row.metric} {row.score:.4f}"
        others = [r.task for r in rows if r.adapter == row.adapter and r.task != row.task]
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
        f"{len(rows)} tasks add {added / 1e6:.2f}M parameters "
        f"({sum(r.bytes for r in rows) / 1e6:.1f} MB) to a base of {each / 1e6:.2f}M: "
        f"{(each + added) / 1e6:.2f}M in all; a full model for each would be "
        f"{(each * len(rows) + heads) / 1e6:.2f}M."
    )


def show(folder: Folder, task: Name, /) -> None:
    """Show everything that a bank stores about a task.

    Args:
      folder: the bank.
      task: its name.
    """
    print(banks.describe(folder, task))


def verify(folder: Folder, /, base: str | None = None) -> None:
    """Compare every file of a bank with its checksum, and the base with its own.

    Args:
      folder: the bank.
      base: where its base is now, if it has moved.
    """
    problems = banks.verify(folder, base)
    if problems:
        raise UserError("\n".join(problems))
    say(f"{folder}: all is well")


COMMANDS: dict[str, Callable[..., None]] = {
    "list": list_tasks,
    "add": add,
    "update": update,
    "remove": remove,
    "show": show,
    "verify": verify,
}


def main(words: Sequence[str]) -> None:
    """Run one of `COMMANDS`."""
    about = "Keep the adapters and heads of many tasks of one base."
    tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog="jaxlora bank", description=about, args=words
    )
