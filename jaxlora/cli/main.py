"""The command jaxlora: training, banks of adapters, predictions, exports, imports and costs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from jaxlora.utils import process
from jaxlora.utils.errors import UserError, suggestion


class Command(NamedTuple):
    """A subcommand of `jaxlora`."""

    module: str  # imported only if it is called; its `main` takes the remaining arguments
    about: str


COMMANDS = {
    "init": Command("jaxlora.cli.init", "inspect tables of data and write a task file"),
    "train": Command("jaxlora.cli.train", "train your own tasks, or one of the paper's variants"),
    "predict": Command("jaxlora.cli.predict", "predict one example, or a whole table"),
    "evaluate": Command("jaxlora.cli.evaluate", "score a task on a table of labelled examples"),
    "compare": Command("jaxlora.cli.compare", "show how the settings and scores of runs differ"),
    "bank": Command(
        "jaxlora.cli.bank", "list, add, update, remove, show, verify, history, rollback"
    ),
    "combine": Command("jaxlora.cli.combine", "add a task whose adapter is a weighted sum"),
    "export": Command("jaxlora.cli.export", "write a task for other programs: merged, peft, onnx"),
    "import": Command("jaxlora.cli.import_", "add a task from other programs: peft, model"),
    "affinity": Command("jaxlora.cli.affinity", "show which tasks of a run to train together"),
    "cost": Command("jaxlora.cli.cost", "show the cost of a train step"),
}


def usage() -> str:
    """Return the list of commands."""
    lines = (f"  jaxlora {word:<9}{command.about}" for word, command in COMMANDS.items())
    return "\n".join((__doc__ or "", "", *lines, "", "Each takes --help."))


def run(args: Sequence[str]) -> None:
    """Run the command that the first argument names.

    Raises:
      UserError: for bad input.
    """
    word, *rest = args or ("--help",)
    if word in ("-h", "--help"):
        print(usage())
    elif word in COMMANDS:
        import_module(COMMANDS[word].module).main(rest)
    else:
        raise UserError(f"unknown command {word!r}{suggestion(word, COMMANDS)}\n{usage()}")


def main(args: Sequence[str] | None = None) -> int:
    """Run the console script, and return its exit code (2: bad input, 130: interrupted)."""
    return process.exit_code(lambda: run(sys.argv[1:] if args is None else args))
