"""Evaluate a task of a bank or run on a table of labelled examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlora.data import tables
from jaxlora.data.arrow import ArrowSheet
from jaxlora.data.quoting import Quoting, Tally
from jaxlora.data.raw_examples import TextExample, is_blank, sentences, to_array
from jaxlora.data.sheet import Sheet
from jaxlora.data.tables import Columns
from jaxlora.serving.answers import name_labels
from jaxlora.serving.predict_table import choose_texts
from jaxlora.serving.predictor import Predictor
from jaxlora.serving.task_models import TaskModel
from jaxlora.tasks.evaluation import RESAMPLES, Bin, ClassRow, Evaluation, Interval
from jaxlora.tasks.task import Task
from jaxlora.utils import files
from jaxlora.utils.errors import UserError


class Mistake(NamedTuple):
    """A wrong prediction, or a score with a large error.

    Attributes:
      line: line, or row, see `Report.unit`; 0 if the example is not from a table.
      id: id of the example.
      texts: one sentence, or the two of a pair.
      label, prediction: a class name, a tuple of names (multilabel), or a formatted score.
      confidence: probability of the predicted class; for a multilabel task, that of its most
        confident mistake; None for scores.
    """

    line: int
    id: str
    texts: tuple[str, ...]
    label: str | tuple[str, ...]
    prediction: str | tuple[str, ...]
    confidence: float | None


@dataclasses.dataclass(frozen=True)
class Report:
    """An evaluation as plain values.

    Attributes:
      task, title, kind: name, title and kind of the task.
      source: the table, or the split of a run.
      rows: number of examples that were scored.
      unlabelled, blank: numbers of rows left out.
      resamples: number of bootstrap resamples of the intervals.
      scores: metric → value and 95 % interval.
      classes: one row per class; empty for scores.
      confusion: counts of examples by label and prediction; empty for multilabel tasks and scores.
      calibration_error: see `Evaluation.calibration`; None for scores.
      calibration: its bins.
      best_threshold, best_f1: see `Evaluation.best_threshold`; None unless the task is binary.
      thresholds: class → decision threshold; empty: 0.5, or the most probable class.
      mistakes: the worst mistakes.
      against: the bank it is compared with, if any.
      differences: metric → difference to that bank's score, with a 95 % interval.
      notes: how the table was read, see `Sheet.describe`.
      unit: what `Mistake.line` counts, `line` or `row`.
    """

    task: str
    title: str
    kind: str
    source: str
    rows: int
    unlabelled: int
    blank: int
    resamples: int
    scores: dict[str, Interval]
    classes: list[ClassRow]
    confusion: list[list[int]]
    calibration_error: float | None
    calibration: list[Bin]
    best_threshold: float | None
    best_f1: float | None
    thresholds: dict[str, float]
    mistakes: list[Mistake]
    against: str | None = None
    differences: dict[str, Interval] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unit: str = "line"


@dataclasses.dataclass(frozen=True)
class Labelled:
    """The rows of a table that can be scored, and the numbers of rows left out.

    Attributes:
      rows: the rows with a label and without blank text.
      unlabelled, blank: numbers of rows left out.
      notes, unit: see `Report`.
    """

    rows: Sequence[TextExample]
    unlabelled: int
    blank: int
    notes: tuple[str, ...] = ()
    unit: str = "line"


def read_table(
    model: TaskModel,
    path: Path,
    text: str | None = None,
    label: str | None = None,
    quoting: Quoting | None = None,
) -> Labelled:
    """Read labelled examples for a task.

    Args:
      model: the task.
      path: a table of any format in `table_formats`.
      text, label: see `choose_columns`.
      quoting: meaning of double quotes in delimited text; None: as in training, see
        `tables.open_like`.

    Raises:
      UserError: see `read_labelled`.
    """
    sheet = tables.open_like(files.local(path), model.facts.reading, quoting)
    _, header = next(sheet.rows(), (0, []))
    columns = choose_columns(model.facts.columns, header, text, label)
    return read_labelled(model.task, sheet, columns)


def read_labelled(task: Task, sheet: Sheet, columns: Columns) -> Labelled:
    """Read the labelled examples of a table.

    Raises:
      UserError: if the table cannot be read, or has no example to score.
    """
    wanted = "two texts: name their columns" if task.pair else "one text: name its column"
    if len(columns.text) != 1 + task.pair:
        raise UserError(
            f"{sheet.path}: {task.name} reads {wanted} with `text` "
            f"(taken: {', '.join(columns.text)})"
        )
    tally = Tally()
    rows = tables.read_sheet(task, sheet, columns, tally=tally)
    labelled = [row for row in rows if row.labelled]
    kept = [row for row in labelled if not any(map(is_blank, sentences(row, task).values()))]
    if not kept:
        raise UserError(f"{sheet.path}: no row has both a text and a label; check the columns")
    left_out = len(rows) - len(labelled), len(labelled) - len(kept)
    unit = "row" if isinstance(sheet, ArrowSheet) else "line"
    return Labelled(kept, *left_out, tuple(sheet.describe(tally)), unit)


def choose_columns(
    known: Columns | None, header: Sequence[str], text: str | None = None, label: str | None = None
) -> Columns:
    """Return the requested columns, or by default those of the training tables.

    If the table lacks those, the texts are chosen by `choose_texts`, and the labels are in its
    column `label`, if it has one.

    Args:
      known: the columns of the training tables; None: unknown.
      header: the columns of the table.
      text, label: the requested columns, separated by commas: two columns of text for pairs, and
        several columns of 0 and 1 for multilabel tasks.
    """
    texts = choose_texts(known, header, text)
    missing = known is None or not set(known.labels) <= set(header)
    usual = "label" if known is None or (missing and "label" in header) else known.label
    return Columns(texts, tables.split_label(label) or usual)


def evaluate(
    predictor: Predictor,
    task: str,
    rows: Sequence[TextExample],
    truncated: Callable[[int], Any] = lambda _: None,
) -> Evaluation:
    """Predict labelled examples with a task and return the evaluation.

    Args:
      predictor, task: the predictor, and the name of its task.
      rows: labelled examples.
      truncated: see `Predictor`.

    Raises:
      UserError: if no task has that name.
    """
    chosen = predictor.task(task)
    answers = predictor([(task, *sentences(row, chosen).values()) for row in rows], truncated)
    probabilities = [
        [one.probabilities[name] for name in chosen.classes] for one in answers if one.probabilities
    ]
    return Evaluation(
        chosen,
        to_array([answer.value for answer in answers], chosen, np.float64),
        to_array([row.label for row in rows], chosen, np.float64),
        np.array(probabilities) if probabilities else None,
    )


def check_same(task: Task, other: Task) -> None:
    """Refuse to compare tasks whose labels mean different things.

    Raises:
      UserError: naming what differs.
    """
    for field in ("kind", "pair", "classes", "low", "high"):
        mine, theirs = getattr(task, field), getattr(other, field)
        if mine != theirs:
            raise UserError(f"`against`: its {task.name} has {field} {theirs}, this one {mine}")


def report(
    found: Evaluation,
    source: str | Path,
    labelled: Labelled,
    against: tuple[str, Evaluation] | None = None,
    resamples: int = RESAMPLES,
) -> Report:
    """Build the report of an evaluation.

    Args:
      found: the evaluation of the rows.
      source: the table or split of the rows.
      labelled: the rows.
      against: another model's name and its evaluation of the same rows.
      resamples: number of bootstrap resamples.
    """
    task = found.task
    error, bins = found.calibration() if task.classes else (None, [])
    threshold = found.best_threshold() if task.positive is not None else (None, None)
    return Report(
        task.name, task.title, task.kind, str(source), len(labelled.rows),
        labelled.unlabelled, labelled.blank, resamples,
        scores=found.scores(resamples),
        classes=found.classes,
        confusion=found.confusion.tolist(),
        calibration_error=error,
        calibration=bins,
        best_threshold=threshold[0],
        best_f1=threshold[1],
        thresholds=dict(zip(task.classes[-task.outputs :], task.thresholds, strict=False)),
        mistakes=_mistakes(found, labelled.rows),
        against=None if against is None else against[0],
        differences={} if against is None else found.differences(against[1], resamples),
        notes=labelled.notes,
        unit=labelled.unit,
    )  # fmt: skip


def _mistakes(found: Evaluation, rows: Sequence[TextExample]) -> list[Mistake]:
    worst = found.worst()
    labels, predictions = (
        name_labels(found.task, values[worst]) for values in (found.labels, found.predictions)
    )
    sure = found.badness[worst].tolist() if found.task.classes else [None] * len(worst)
    read = [rows[n] for n in worst]
    return [
        Mistake(row.line, row.id, tuple(sentences(row, found.task).values()), *told)
        for row, *told in zip(read, labels, predictions, sure, strict=True)
    ]


def show_names(label: str | tuple[str, ...], none: str = "") -> str:
    """Format a class name, or a tuple of them, for display.

    >>> show_names("a"), show_names(("a", "b")), show_names((), none="–")
    ('a', 'a, b', '–')
    """
    return (label if isinstance(label, str) else ", ".join(label)) or none


def to_json(found: Report) -> dict[str, object]:
    """Return a report as JSON values; an interval is an object with `value`, `low` and `high`."""
    plain = dataclasses.asdict(found)
    for part in ("scores", "differences"):
        named: Mapping[str, Interval] = getattr(found, part)
        plain[part] = {name: interval._asdict() for name, interval in named.items()}
    for part in ("classes", "calibration", "mistakes"):
        plain[part] = [one._asdict() for one in getattr(found, part)]
    return plain
