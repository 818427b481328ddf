"""The predictions of a trained group, as tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from jaxlora.data.tokenized import Examples
from jaxlora.serving import inference
from jaxlora.tasks.task import Task
from jaxlora.training import run_folder
from jaxlora.training.task_group import Cohort, TaskGroup, outputs
from jaxlora.utils.trees import Tree


def predict_splits(
    out: Path, cohort: Cohort, group: TaskGroup, best: dict[str, Tree], splits: tuple[str, ...]
) -> dict[str, float]:
    """Write predictions of a group's tasks; returns the scores of the test sets with labels."""
    scores = {}
    for task in group.tasks:
        for split in splits:
            examples = cohort.data[task.name][split]
            if not len(examples):
                continue
            found = outputs(cohort, task, best["trainable"], best["heads"], split)
            predictions = inference.decode(task, found)
            path = out / "predictions" / f"{task.name}-{split}.csv"
            shown = [f"{p:.0f}" if task.integer else f"{p:.4f}" for p in predictions]
            columns: dict[str, Iterable[str]] = {"id": examples.ids, "prediction": shown}
            if split == "dev":
                columns |= _compared(task, examples, found)
            run_folder.write_table(
                path, _with_blank(columns, examples) if split == "test" else columns
            )
            if split == "test" and examples.labelled:
                scores[task.name] = task.score(predictions, examples.labels)
    return scores


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


def _compared(task: Task, examples: Examples, found: np.ndarray) -> dict[str, list[str]]:
    """The labels, and the probability of each predicted class (none for scores)."""
    confidence = [""] * len(examples)
    if task.integer:
        confidence = [f"{p:.4f}" for p in inference.probabilities(task, found).max(-1)]
    return {"label": [f"{label:g}" for label in examples.labels], "confidence": confidence}
