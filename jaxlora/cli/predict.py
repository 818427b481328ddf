"""`jaxlora predict`: predict one example, or a whole table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.progress import Progress, SpinnerColumn, TextColumn

from jaxlora.cli.flags import bytes_of, call, choose_task
from jaxlora.cli.terminal import count, note_truncated, print_json, say
from jaxlora.data.quoting import Quoting
from jaxlora.serving import predict_table
from jaxlora.serving.answers import show_value, to_record
from jaxlora.serving.predictor import Predictor
from jaxlora.utils import cache, process
from jaxlora.utils.errors import ConfigError, UserError


def predict(
    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    *,
    bank: Path,
    task: str | None = None,
    input: Path | None = None,
    output: Path | None = None,
    text: str | None = None,
    base: str | None = None,
    memory: str = "2GiB",
    quoting: Quoting | None = None,
    strict: bool = False,
    json: bool = False,
) -> None:
    """Predict one example given by its texts, or a whole table.

    Args:
      texts: a sentence, or the two sentences of a pair.
      bank: a bank, or the folder of a finished run.
      task: the task; default: the table's column task, or the only task.
      input: a table: CSV, TSV, JSON lines (also as .gz), Parquet, or a folder of Hugging Face
        datasets, with texts and optional columns task and id.
      output: file for the answers: .csv or .tsv, or .jsonl or .parquet with all probabilities; all
        but Parquet also as .gz.
      text: the text column, or the two columns of a pair, separated by a comma; default: as in
        training, or sentence (or text), or sentence1 and sentence2.
      base: new path of the base, if it has moved; its content must be the same.
      memory: limit of the cache of recently used tasks, such as 512MB or 4GiB: half for adapters
        on the device, a quarter for heads on the device, a quarter for host memory.
      quoting: double quotes in the table: none: they are part of the text; standard: as in any
        CSV; default: as in training, where quotes there showed it; else standard, but none for
        tabs if a field opens a quote and does not close it.
      strict: refuse a table with blank texts instead of leaving their answers empty.
      json: print the answer to one example as JSON.
    """
    if (input is None) == (not texts) or (input is None) != (output is None):
        raise UserError('give --task and texts ("a" "b"), or --input and --output')
    if json and output is not None:
        raise ConfigError("json", "is for one example; `output` with .jsonl has all answers")
    process.reuse_memory()
    process.keep_programs(cache.cache_dir() / "xla")
    predictor = Predictor.load(bank, base, bytes_of("memory", memory))
    if input is not None and output is not None:
        _answer_table(predictor, input, output, task, text, quoting, strict)
    else:
        _answer_one(predictor, task, texts, json)


def _answer_table(
    predictor: Predictor,
    input: Path,
    output: Path,
    task: str | None,
    text: str | None,
    quoting: Quoting | None,
    strict: bool,
) -> None:
    """Predict a table, and show the number of rows that are done."""
    columns, notes = (SpinnerColumn(), TextColumn("{task.completed:,} answered")), list[str]()
    with Progress(*columns, transient=True) as bar:
        shown = bar.add_task("")
        rows = predict_table.predict_file(
            predictor, input, output, task, lambda n: bar.update(shown, completed=n),
            text=text, quoting=quoting, strict=strict, note=notes.append,
        )  # fmt: skip
    say("; ".join([f"{output}: {count(rows, 'answer')}", *notes]))


def _answer_one(
    predictor: Predictor, task: str | None, texts: Sequence[str], as_json: bool
) -> None:
    """Print the answer to one example."""
    task = choose_task(task, predictor.tasks)
    (answer,) = predictor([(task, *texts)], note_truncated(predictor))
    record = to_record(predictor.task(task), answer)
    if as_json:
        print_json(record)
        return
    if answer.probabilities is None:
        print(show_value(predictor.task(task), answer.value))
        return
    each = ", ".join(f"{name} {p:.4f}" for name, p in answer.probabilities.items())
    print(f"{record['label'] or 'no label'}  ({each})")


def main(words: Sequence[str]) -> None:
    """Run `predict`."""
    call(predict, "jaxlora predict", words)
