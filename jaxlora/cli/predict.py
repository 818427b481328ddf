"""`jaxlora predict`: predict one example, or a whole table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.progress import Progress, SpinnerColumn, TextColumn

from jaxlora.cli.terminal import say
from jaxlora.data.quoting import Quoting
from jaxlora.serving.answers import cells
from jaxlora.serving.predict_table import predict_file
from jaxlora.serving.predictor import Predictor
from jaxlora.utils import cache, process
from jaxlora.utils.errors import UserError


def predict(
    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    *,
    bank: Path,
    task: str | None = None,
    input: Path | None = None,
    output: Path | None = None,
    base: str | None = None,
    quoting: Quoting | None = None,
    strict: bool = False,
) -> None:
    """Predict one example given by its texts, or a whole table.

    Args:
      texts: a sentence, or the two of a pair.
      bank: a bank, or the folder of a finished run.
      task: the task; a table may have a column task instead.
      input: a table with a header: sentence (or sentence1, sentence2), task, id.
      output: where its answers go: a .csv, or a .jsonl with all probabilities.
      base: where the base is now, if it has moved; it must be the same.
      quoting: of the table: none: a double quote is part of the text; standard: as in any CSV;
        default: standard, and none for tabs if a field opens a quote and does not close it.
      strict: refuse a table with blank texts, instead of leaving their answers empty.
    """
    if (input is None) == (not texts) or (input is None) != (output is None):
        raise UserError('give --task and texts ("a" "b"), or --input and --output')
    process.reuse_memory()
    process.keep_programs(cache.cache_dir() / "xla")
    predictor = Predictor.load(bank, base)
    if input is not None and output is not None:
        columns, notes = (SpinnerColumn(), TextColumn("{task.completed:,} answered")), list[str]()
        with Progress(*columns, transient=True) as bar:
            shown = bar.add_task("")
            count = predict_file(
                predictor, input, output, task, lambda n: bar.update(shown, completed=n),
                quoting=quoting, strict=strict, note=notes.append,
            )  # fmt: skip
        say("; ".join([f"{output}: {count:,} answer{'' if count == 1 else 's'}", *notes]))
        return
    if task is None:
        raise UserError(f"--task is missing; there are {', '.join(predictor.tasks)}")
    (answer,) = predictor([(task, *texts)])
    value, label, _ = cells(predictor.task(task), answer)
    if answer.probabilities is None:
        print(value)
        return
    each = ", ".join(f"{name} {p:.4f}" for name, p in answer.probabilities.items())
    print(f"{label or 'no label'}  ({each})")


def main(words: Sequence[str]) -> None:
    """Run `predict`."""
    tyro.cli(predict, prog="jaxlora predict", args=words)
