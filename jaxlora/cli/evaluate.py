"""`jaxlora evaluate`: score a task of a bank on a table of labelled examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from jaxlora.cli.flags import call, choose_task
from jaxlora.cli.terminal import CONSOLE, Folder, count, note_truncated, print_json, say
from jaxlora.data.quoting import Quoting
from jaxlora.data.raw_examples import TextExample
from jaxlora.data.tables import MissingColumnsError
from jaxlora.serving import evaluate_table, evaluation_page
from jaxlora.serving.evaluate_table import Labelled, Report, show_names
from jaxlora.serving.predictor import Predictor
from jaxlora.serving.task_models import TaskModel
from jaxlora.tasks.evaluation import Evaluation, Interval
from jaxlora.tasks.task import Task
from jaxlora.utils import cache, files, process
from jaxlora.utils.errors import ConfigError, UserError

MOST_SHOWN = 12  # number of classes up to which the confusion matrix is printed
WORST_SHOWN = 5
NOTHING = "no label"  # shown for an empty set of classes


def evaluate(
    bank: Folder,
    /,
    *,
    input: Path,
    task: str | None = None,
    text: str | None = None,
    label: str | None = None,
    quoting: Quoting | None = None,
    against: Path | None = None,
    page: Path | None = None,
    json: bool = False,
    base: str | None = None,
) -> None:
    """Score a task on labelled examples: classes, confusion, calibration, worst mistakes.

    Intervals are 95 % bootstrap intervals from 1,000 resamples.

    Args:
      bank: a bank, or the folder of a finished run.
      input: a table with texts and labels.
      task: the task; default: the only one.
      text: the text column, or the two columns of a pair, separated by a comma; default: as in
        training, or sentence (or text), or sentence1 and sentence2.
      label: the label column, or several columns of 0 and 1, separated by commas; default: as in
        training, or label.
      quoting: double quotes in the table: none: they are part of the text; standard: as in any
        CSV; default: as in training, where quotes there showed it; else as in jaxlora predict.
      against: another bank or run, whose task of the same name is compared on the same rows.
      page: also write everything to this HTML file.
      json: print everything as JSON.
      base: new path of the base, if it has moved; its content must be the same.
    """
    process.reuse_memory()
    process.keep_programs(cache.cache_dir() / "xla")
    _check_place(page)
    predictor = Predictor.load(bank, base)
    name = choose_task(task, predictor.tasks)
    labelled = _read(predictor.trained.find(name), input, text, label, quoting)
    other = None if against is None else _other(against, base, predictor.task(name), labelled.rows)
    found = evaluate_table.evaluate(predictor, name, labelled.rows, note_truncated(predictor))
    report = evaluate_table.report(found, input, labelled, other)
    if page is not None:
        files.write_text(files.local(page), evaluation_page.page([(report, found)]))
    if json:
        print_json(evaluate_table.to_json(report))
        return
    show(report)
    if page is not None:
        say(f"{page}: the same as a page")


def _check_place(page: Path | None) -> None:
    """Check that the page can be written, before the evaluation."""
    file = None if page is None else files.local(page)
    if file is not None and file.is_dir():
        raise ConfigError("page", "is a folder; name a file", page)
    if file is not None and not file.absolute().parent.is_dir():
        raise ConfigError("page", f"there is no folder {file.parent}; make it first", page)


def _read(
    model: TaskModel, path: Path, text: str | None, label: str | None, quoting: Quoting | None
) -> Labelled:
    """Read the labelled examples of a table."""
    try:
        return evaluate_table.read_table(model, path, text, label, quoting)
    except MissingColumnsError as error:
        raise UserError(f"{error} Name other columns with `text` and `label`.") from None


def _other(
    bank: Path, base: str | None, task: Task, rows: Sequence[TextExample]
) -> tuple[str, Evaluation]:
    """Evaluate the task of the same name in another bank on the same rows."""
    predictor = Predictor.load(bank, base)
    evaluate_table.check_same(task, predictor.task(task.name))
    return str(bank), evaluate_table.evaluate(predictor, task.name, rows)


def show(found: Report) -> None:
    """Print a report."""
    rows = f"{found.title}: {count(found.rows, 'labelled row')} of {found.source}"
    say("; ".join([rows, *found.notes]))
    for what, left in (("without a label", found.unlabelled), ("with a blank text", found.blank)):
        if left:
            say(f"left out: {count(left, 'row')} {what}")
    _show_scores("metric", found.scores)
    if found.against is not None:
        _show_scores(f"minus {found.against}", found.differences)
    if found.classes:
        lines = [
            (c.name, *(f"{x:.3f}" for x in (c.precision, c.recall, c.f1)), f"{c.support:,}")
            for c in found.classes
        ]
        _show_table(("class", "precision", "recall", "F1", "rows"), lines)
    if 0 < len(found.confusion) <= MOST_SHOWN:
        names = [row.name for row in found.classes]
        lines = [(n, *map(str, row)) for n, row in zip(names, found.confusion, strict=True)]
        _show_table(("label ↓ predicted →", *names), lines)
    if found.calibration_error is not None:
        say(f"expected calibration error: {found.calibration_error:.3f}")
    if found.thresholds:
        each = ", ".join(f"{name} {value:.3f}" for name, value in found.thresholds.items())
        say(f"thresholds that it decides with: {each}")
    if found.best_threshold is not None:
        say(f"best threshold here: {found.best_threshold:.3f}, with F1 {found.best_f1:.3f}")
    for one in found.mistakes[:WORST_SHOWN]:
        sure = "" if one.confidence is None else f" ({one.confidence:.2f})"
        shown = " ‖ ".join(one.texts)
        label, guess = (show_names(x, NOTHING) for x in (one.label, one.prediction))
        say(f"{found.unit} {one.line}: {label}, predicted {guess}{sure}: {shown[:100]}")


def _show_scores(title: str, scores: Mapping[str, Interval]) -> None:
    rows = [(n, f"{s.value:.4f}", f"{s.low:.4f} … {s.high:.4f}") for n, s in scores.items()]
    _show_table((title, "value", "95 % interval"), rows)


def _show_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table()
    for number, name in enumerate(head):
        table.add_column(escape(name), justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    CONSOLE.print(table)


def main(words: Sequence[str]) -> None:
    """Run `evaluate`."""
    call(evaluate, "jaxlora evaluate", words)
