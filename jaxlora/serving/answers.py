"""Answers to requests, as Python values and as table cells."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from jaxlora.data.delimited import show_score
from jaxlora.serving import inference
from jaxlora.tasks.kinds import LabelForm
from jaxlora.tasks.task import Task
from jaxlora.utils.errors import UserError


class Answer(NamedTuple):
    """The prediction of a task for one request.

    Attributes:
      task: its name.
      value: a class index or a score; for a multilabel task, the indices of its classes.
      label: the class name, or a tuple of names for a multilabel task; None for a score.
      probabilities: class name → probability; None for a score.
    """

    task: str
    value: float | tuple[int, ...]
    label: str | tuple[str, ...] | None
    probabilities: dict[str, float] | None


def _class(task: Task, found: np.ndarray) -> tuple[float, str]:
    return float(found), task.classes[int(found)]


def _classes(task: Task, found: np.ndarray) -> tuple[tuple[int, ...], tuple[str, ...]]:
    numbers = tuple(np.flatnonzero(found).tolist())
    return numbers, tuple(task.classes[n] for n in numbers)


def _score(task: Task, found: np.ndarray) -> tuple[float, None]:
    return float(found), None


# Form of labels → function that returns the value and label of an answer.
VALUES: dict[LabelForm, Callable[[Task, np.ndarray], tuple[Any, Any]]] = {
    "class": _class,
    "classes": _classes,
    "score": _score,
}


def answers(task: Task, outputs: np.ndarray) -> list[Answer]:
    """Decode a head's outputs, `f32[E]` or `f32[E, K]`, to answers.

    Raises:
      UserError: if any output is NaN.
    """
    values = inference.decode(task, outputs)
    if bad := int(np.isnan(values).reshape(len(values), -1).any(-1).sum()):
        raise UserError(
            f"{task.name}: {bad} of {len(values)} answers are not numbers "
            "(NaN); the weights of its adapter, its head or the base are NaN or too large"
        )
    to_value = VALUES[task.form]
    if not task.classes:
        return [Answer(task.name, *to_value(task, one), None) for one in values]
    return [
        Answer(task.name, *to_value(task, one), dict(zip(task.classes, p.tolist(), strict=True)))
        for one, p in zip(values, inference.probabilities(task, outputs), strict=True)
    ]


def show_value(task: Task, value: float | tuple[int, ...] | np.ndarray) -> str:
    """Format a prediction as a table cell: a class index, a set of them, or a score.

    >>> tags = Task("tags", "multilabel", classes=("a", "b", "c"))
    >>> show_value(tags, (0, 2)), show_value(Task("t", "binary"), 1.0)
    ('0|2', '1')
    """
    if isinstance(value, tuple):
        return task.label_delimiter.join(map(str, value))
    return f"{value:.0f}" if task.classes else show_score(float(value))


def to_record(task: Task, answer: Answer) -> dict[str, Any]:
    """Return an answer as column → value, with the same types in every table format.

    `prediction` is a class index or a score; None for a multilabel task. `label` is the class name;
    for a multilabel task, the names joined by its `label_delimiter`, and `labels` lists them.
    `probability` is that of the predicted class.

    >>> to_record(Task("t", "binary"), Answer("t", 1.0, "yes", {"no": 0.25, "yes": 0.75}))["label"]
    'yes'
    """
    prediction, label, probability = None, None, None
    if isinstance(answer.label, tuple):
        label = _joined(task, answer.label)
    elif not isinstance(answer.value, tuple):
        label = answer.label
        prediction = answer.value if label is None else round(answer.value)
        probability = (answer.probabilities or {}).get(label or "")
    return {
        "task": answer.task, "prediction": prediction, "label": label,
        "labels": list(answer.label) if isinstance(answer.label, tuple) else None,
        "probability": probability, "probabilities": answer.probabilities,
    }  # fmt: skip


def _joined(task: Task, parts: Iterable[str]) -> str:
    return task.label_delimiter.join(parts)


def name_labels(task: Task, values: np.ndarray) -> list[str | tuple[str, ...]]:
    """Return predictions or labels by name: a class, a tuple of classes, or a formatted score.

    >>> name_labels(Task("tags", "multilabel", classes=("a", "b")), np.array([[1, 1], [0, 0]]))
    [('a', 'b'), ()]
    """
    if not task.classes:
        return [show_score(float(value)) for value in values]
    return [VALUES[task.form](task, one)[1] for one in values]


def show_labels(task: Task, values: np.ndarray) -> list[str]:
    """Return predictions or labels as cells of delimited text, see `name_labels`.

    Args:
      task: their task.
      values: `f[E]`, or `f[E, K]` for a multilabel task.

    >>> show_labels(Task("tags", "multilabel", classes=("a", "b")), np.array([[1, 1], [0, 0]]))
    ['a|b', '']
    """
    found = name_labels(task, values)
    return [name if isinstance(name, str) else _joined(task, name) for name in found]
