"""`jaxlora export`: write a task for other programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro

from jaxlora.cli.terminal import Folder, say
from jaxlora.serving import bank as banks
from jaxlora.serving import export_merged, export_peft
from jaxlora.serving.task_models import TaskModels


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is exported, and where to.

    Attributes:
      out: a new folder.
      bank: a bank, or the folder of a finished run.
      task: the task.
      base: where the base is now, if it has moved; it must be the same.
    """

    out: Folder
    bank: Path
    task: str
    base: str | None = None

    @property
    def trained(self) -> TaskModels:
        """What the bank holds."""
        return banks.load(self.bank).at(self.base)


def merged(export: Asked) -> None:
    """Write a task as a Hugging Face folder, its adapter merged into the weights."""
    trained = export.trained
    export_merged.save(export.out, trained.load_base(), trained, export.task)
    readme = export_merged.README
    say(f"{export.out}: {export.task}, merged; its {readme} says how to apply it")


def peft(export: Asked) -> None:
    """Write a task's adapter as a PEFT folder, with its head beside it."""
    trained = export.trained
    if export.base is not None:
        trained.load_base()  # the folder would name it, so it must be the right one
    export_peft.save(export.out, trained, export.task)
    say(f"{export.out}: {export.task} for PEFT")


COMMANDS = {"merged": merged, "peft": peft}


def main(words: Sequence[str]) -> None:
    """Run one of `COMMANDS`."""
    about = "Write a task for other programs."
    tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="jaxlora export",
        description=about,
        args=words,
        config=(tyro.conf.OmitArgPrefixes,),
    )
