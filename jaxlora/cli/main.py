"""The command jaxlora: training, banks of adapters, predictions, exports, imports and costs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from jaxlora.cli.flags import exit_code
from jaxlora.utils.errors import UserError, suggestion


class Command(NamedTuple):
    """A word after `jaxlora`."""

    module: str  # its `main` takes the words that follow; imported only when they are given
    about: str


COMMANDS = {
    "init": Command("jaxlora.cli.init", "look at tables of data and write a task file"),
    "train": Command(
        "jaxlora.cli.train", "train tasks of your own, or one of the paper's variants"
    ),
    "predict": Command("jaxlora.cli.predict", "predict one example, or a whole table"),
    "evaluate": Command("jaxlora.cli.evaluate", "score a task on a table of labelled examples"),
    "bank": Command(
        "jaxlora.cli.bank", "list, add, update, remove, show, verify, history, rollback"
    ),
    "combine": Command("jaxlora.cli.combine", "add a task whose adapter is a weighted sum"),
    "export": Command("jaxlora.cli.export", "write a task for other programs: merged, peft, onnx"),
    "import": Command("jaxlora.cli.import_", "take over a task from other programs: peft, model"),
    "affinity": Command("jaxlora.cli.affinity", "show which tasks of a run go together"),
    "cost": Command("jaxlora.cli.cost", "show what a train step will cost"),
}


def usage() -> str:
    """Return the list of commands."""
    lines = (f"  jaxlora {word:<9}{command.about}" for word, command in COMMANDS.items())
    return "\n".join((__doc__ or "", "", *lines, "", "Each takes --help."))


def run(args: Sequence[str]) -> None:
    """Find the command and call it.

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
    """Run the console script; return the exit code (2: bad input, 130: interrupted)."""
    return exit_code(lambda: run(sys.argv[1:] if args is None else args))
