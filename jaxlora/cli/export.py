"""`jaxlora export`: write a task in the format of another program."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from jaxlora.cli.flags import call_one
from jaxlora.cli.terminal import CONSOLE, Folder, count, say
from jaxlora.data.quoting import Quoting
from jaxlora.serving import bank as banks
from jaxlora.serving import evaluate_table, export_merged, export_peft
from jaxlora.serving.evaluate_table import Labelled
from jaxlora.serving.predictor import Predictor
from jaxlora.serving.task_models import TaskModels
from jaxlora.utils.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Asked:
    """What to export, and where.

    Attributes:
      out: a new folder.
      bank: a bank, or the folder of a finished run.
      task: the task.
      base: new path of the base, if it has moved; its content must be the same.
    """

    out: Folder
    bank: Path
    task: str
    base: str | None = None

    @property
    def trained(self) -> TaskModels:
        """The tasks of the bank."""
        return banks.load(self.bank).at(self.base)


def merged(export: Asked) -> None:
    """Write a task as a Hugging Face folder, with its adapter merged into the weights."""
    trained = export.trained
    export_merged.save(export.out, trained.load_base(), trained, export.task)
    readme = export_merged.README
    say(f"{export.out}: {export.task}, merged; its {readme} says how to apply it")


def peft(export: Asked) -> None:
    """Write a task's adapter as a PEFT folder, with its head beside it."""
    trained = export.trained
    if export.base is not None:
        trained.load_base()  # checks the base, since the PEFT folder will name it
    export_peft.save(export.out, trained, export.task)
    say(f"{export.out}: {export.task} for PEFT; its {export_merged.README} says how to apply it")


def onnx(
    export: Asked, int8: bool = False, check: Path | None = None, quoting: Quoting | None = None
) -> None:
    """Write a task for ONNX Runtime: from token ids to probabilities or scores, in one graph.

    Args:
      export: what to export.
      int8: also write model_quantized.onnx, with 8-bit weights and a quarter of the size.
      check: a labelled table, as in jaxlora evaluate; the models are compared with jaxlora's own
        predictions on it.
      quoting: double quotes in this table, as in jaxlora evaluate.
    """
    from jaxlora.serving import export_onnx

    if quoting is not None and check is None:
        raise ConfigError("quoting", "is for the table of `check`; name one", quoting)
    trained = export.trained
    model = trained.find(export.task)
    labelled = None if check is None else evaluate_table.read_table(model, check, quoting=quoting)
    base = trained.load_base()
    export_onnx.save(export.out, base, trained, export.task, int8)
    readme, name = export_merged.README, export.task
    say(f"{export.out}: {name} for ONNX Runtime; its {readme} says how to apply it")
    if labelled is not None:
        say("; ".join([f"{check}: {count(len(labelled.rows), 'labelled row')}", *labelled.notes]))
        _show_compared(export.out, Predictor(base, trained), name, labelled)
    elif int8:
        say("the accuracy of the 8-bit model is not checked; --check=labelled.csv does that")


def _show_compared(folder: Path, predictor: Predictor, name: str, labelled: Labelled) -> None:
    from jaxlora.serving import export_onnx_check

    own, models = export_onnx_check.compare(folder, predictor, name, labelled.rows)
    task, what = predictor.task(name), "probability" if predictor.task(name).classes else "score"
    table = Table()
    for title in ("model", task.metric_name, f"largest difference of a {what}", "MB"):
        table.add_column(title, justify="left" if title == "model" else "right")
    table.add_row("jaxlora", f"{own:.4f}", "", "")
    for one in models:
        size = f"{one.size / 1e6:,.1f}"
        table.add_row(one.file, f"{one.score:.4f}", f"{one.difference:.1e}", size)
    CONSOLE.print(table)


COMMANDS = {"merged": merged, "peft": peft, "onnx": onnx}


def main(words: Sequence[str]) -> None:
    """Run one of `COMMANDS`."""
    about = "Write a task in the format of another program."
    call_one(COMMANDS, "jaxlora export", about, words)
