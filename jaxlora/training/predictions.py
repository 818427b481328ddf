"""Tables with the predictions of a trained group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from jaxlora.data.tokenized import Examples
from jaxlora.serving import inference
from jaxlora.serving.answers import show_labels, show_value
from jaxlora.tasks.evaluation import Evaluation
from jaxlora.tasks.task import Task
from jaxlora.training import run_folder
from jaxlora.training.task_group import Cohort, outputs
from jaxlora.utils.trees import Tree

MOST_CLASSES = 100  # number of classes up to which each has a column of probabilities


def predict_splits(
    out: Path, cohort: Cohort, tasks: Iterable[Task], best: dict[str, Tree], splits: tuple[str, ...]
) -> tuple[dict[str, float], dict[str, Evaluation]]:
    """Write predictions for the tasks of a group.

    Args:
      out: folder of the run.
      cohort: the cohort of the group.
      tasks: the group's tasks, with their final thresholds.
      best: the group's best `{"trainable", "heads"}`.
      splits: splits to predict, including `dev`.

    Returns:
      The scores on labelled test sets, and the evaluation on each dev set.
    """
    scores, dev = {}, {}
    for task in tasks:
        for split in splits:
            examples = cohort.data[task.name][split]
            if not len(examples):
                continue
            found = outputs(cohort, task, best["trainable"], best["heads"], split)
            path = out / "predictions" / f"{task.name}-{split}.csv"
            columns = make_columns(task, examples, found)
            run_folder.write_table(
                path, _with_blank(columns, examples) if split == "test" else columns
            )
            if split == "dev":
                dev[task.name] = _evaluation(task, examples, found)
            elif examples.labelled:
                scores[task.name] = task.score(inference.decode(task, found), examples.labels)
    return scores, dev


def _evaluation(task: Task, examples: Examples, found: np.ndarray) -> Evaluation:
    probabilities = inference.probabilities(task, found) if task.classes else None
    return Evaluation(task, inference.decode(task, found), examples.labels, probabilities)


def make_columns(task: Task, examples: Examples, found: np.ndarray) -> dict[str, Iterable[str]]:
    """Return the columns of a table of predictions.

    Args:
      task: the task.
      examples: the examples; the column `label` is added if all have a label.
      found: outputs of the head for them.
    """
    predictions, labels = inference.decode(task, found), examples.labels
    columns: dict[str, Iterable[str]] = {"id": examples.ids}
    columns["prediction"] = _values(task, predictions)
    if examples.labelled:
        one = labels.ndim == 1
        columns["label"] = [f"{label:g}" for label in labels] if one else _values(task, labels)
    if not task.classes:
        return columns
    probabilities = inference.probabilities(task, found)
    columns["predicted_class"] = _names(task, predictions)
    if examples.labelled:
        columns["label_class"] = _names(task, labels)
    # The confidence of a set of classes is that of its least certain class.
    sure = Evaluation(task, np.nan_to_num(predictions), labels, probabilities).confidence
    columns["confidence"] = [f"{p:.4f}" for p in sure.reshape(len(sure), -1).min(-1)]
    if len(task.classes) <= MOST_CLASSES:
        each = zip(task.classes, probabilities.T, strict=True)
        columns |= {f"p({name})": [f"{p:.4f}" for p in column] for name, column in each}
    return columns


def _values(task: Task, values: np.ndarray) -> list[str]:
    """Format values: the number of a class, the numbers in a set of classes, or a score."""
    if task.form == "classes":
        return [
            "nan" if np.isnan(row).any() else show_value(task, tuple(np.flatnonzero(row).tolist()))
            for row in values
        ]
    return [show_value(task, float(one)) for one in values]


def _names(task: Task, values: np.ndarray) -> list[str]:
    """Return the names of classes, empty where a value is not finite."""
    finite = np.isfinite(values).reshape(len(values), -1).all(-1)
    shown = show_labels(task, np.nan_to_num(values))
    return [name if known else "" for name, known in zip(shown, finite, strict=True)]


def _with_blank(
    columns: Mapping[str, Iterable[str]], examples: Examples
) -> Mapping[str, Iterable[str]]:
    """Insert the rows with blank text, with a `reason` in place of a prediction."""
    if not examples.blank:
        return columns
    rows = [[*row, ""] for row in zip(*columns.values(), strict=True)]
    width = len(columns) - 1
    for blank in examples.blank:
        rows.insert(blank.at, [blank.id, *[""] * width, "blank text"])
    return dict(zip([*columns, "reason"], zip(*rows, strict=True), strict=True))
