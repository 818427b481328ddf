"""`jaxlora export`: write a task for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tyro

from jaxlora.cli.terminal import Folder, say
from jaxlora.serving import bank as banks
from jaxlora.serving import export_merged, export_peft


def merged(out: Folder, /, bank: Path, task: str, base: str | None = None) -> None:
    """Write a task as a Hugging Face folder, its adapter merged into the weights.

    Args:
      out: a new folder.
      bank: a bank, or the folder of a finished run.
      task: the task.
      base: where the base is now, if it has moved; it must be the same.
    """
    trained = banks.load(bank).at(base)
    export_merged.save(out, trained.load_base(), trained, task)
    say(f"{out}: {task}, merged; its {export_merged.README} says how to apply it")


def peft(out: Folder, /, bank: Path, task: str, base: str | None = None) -> None:
    """Write a task's adapter as a PEFT folder, with its head beside it.

    Args:
      out: a new folder.
      bank: a bank, or the folder of a finished run.
      task: the task.
      base: where the base is now, if it has moved; it must be the same.
    """
    trained = banks.load(bank).at(base)
    if base is not None:
        trained.load_base()  # the folder would name it, so it must be the right one
    export_peft.save(out, trained, task)
    say(f"{out}: {task} for PEFT")


COMMANDS = {"merged": merged, "peft": peft}


def main(words: Sequence[str]) -> None:
    """Run one of `COMMANDS`."""
    about = "Write a task for other programs."
    tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog="jaxlora export", description=about, args=words
    )
