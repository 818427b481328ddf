"""The predictions of a trained group, as tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from jaxlora.data.tokenized import Examples
from jaxlora.serving import inference
from jaxlora.serving.answers import show_value
from jaxlora.tasks.evaluation import Evaluation
from jaxlora.tasks.task import Task
from jaxlora.training import run_folder
from jaxlora.training.task_group import Cohort, outputs
from jaxlora.utils.trees import Tree


def predict_splits(
    out: Path, cohort: Cohort, tasks: Iterable[Task], best: dict[str, Tree], splits: tuple[str, ...]
) -> dict[str, float]:
    """Write predictions of a group's tasks; returns the scores of the test sets with labels.

    Args:
      out: folder of the run.
      cohort: of the group.
      tasks: of the group, with the thresholds that they are served with.
      best: the group's trees.
      splits: to predict.
    """
    scores = {}
    for task in tasks:
        for split in splits:
            examples = cohort.data[task.name][split]
            if not len(examples):
                continue
            found = outputs(cohort, task, best["trainable"], best["heads"], split)
            predictions = inference.decode(task, found)
            path = out / "predictions" / f"{task.name}-{split}.csv"
            columns: dict[str, Iterable[str]] = {
                "id": examples.ids, "prediction": _shown(task, predictions),
            }  # fmt: skip
            if split == "dev":
                columns |= _compared(task, examples, predictions, found)
            run_folder.write_table(
                path, _with_blank(columns, examples) if split == "test" else columns
            )
            if split == "test" and examples.labelled:
                scores[task.name] = task.score(predictions, examples.labels)
    return scores


def _shown(task: Task, predictions: np.ndarray) -> list[str]:
    """Return numbers of classes, those in sets, or scores."""
    if task.form == "classes":
        return [show_value(task, tuple(np.flatnonzero(row).tolist())) for row in predictions]
    return [show_value(task, float(one)) for one in predictions]


def _with_blank(
    columns: Mapping[str, Iterable[str]], examples: Examples
) -> Mapping[str, Iterable[str]]:
    """A line for each row of the test file: a blank one has no prediction, but a reason."""
    if not examples.blank:
        return columns
    rows = [[*row, ""] for row in zip(*columns.values(), strict=True)]
    for blank in examples.blank:
        rows.insert(blank.at, [blank.id, "", "blank text"])
    return dict(zip([*columns, "reason"], zip(*rows, strict=True), strict=True))


def _compared(
    task: Task, examples: Examples, predictions: np.ndarray, found: np.ndarray
) -> dict[str, list[str]]:
    """Return the labels, and the probability of each prediction.

    Of scores there is none, of a set that of its least certain class.
    """
    labels = [f"{label:g}" for label in examples.labels] if examples.labels.ndim == 1 else None
    confidence = [""] * len(examples)
    if task.classes:
        probabilities = inference.probabilities(task, found)
        sure = Evaluation(task, predictions, examples.labels, probabilities).confidence
        confidence = [f"{p:.4f}" for p in sure.reshape(len(sure), -1).min(-1)]
    return {"label": labels or _shown(task, examples.labels), "confidence": confidence}
