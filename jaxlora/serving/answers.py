"""Answers: what a task says of a request, as values and as cells of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from jaxlora.serving import inference
from jaxlora.tasks.kinds import LabelForm
from jaxlora.tasks.task import Task
from jaxlora.utils.errors import UserError


class Answer(NamedTuple):
    """The prediction of a task for one request.

    Attributes:
      task: its name.
      value: on the label's scale: a class's number, or a score; of a set the numbers of its
        classes.
      label: the class's name, or the names in a set; None for a score.
      probabilities: of each class, by name; None for a score.
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


# A prediction of each form → value and label of an answer.
VALUES: dict[LabelForm, Callable[[Task, np.ndarray], tuple[Any, Any]]] = {
    "class": _class,
    "classes": _classes,
    "score": _score,
}


def answers(task: Task, outputs: np.ndarray) -> list[Answer]:
    """Return the answers that a head's outputs mean.

    Raises:
      UserError: if any is NaN.
    """
    values = inference.decode(task, outputs)
    if bad := int(np.isnan(values).reshape(len(values), -1).any(-1).sum()):
        raise UserError(
            f"{task.name}: {bad} of {len(values)} answers are not numbers "
            "(NaN); the weights of its adapter, its head or the base hold such or are too large"
        )
    to_value = VALUES[task.form]
    if not task.classes:
        return [Answer(task.name, *to_value(task, one), None) for one in values]
    return [
        Answer(task.name, *to_value(task, one), dict(zip(task.classes, p.tolist(), strict=True)))
        for one, p in zip(values, inference.probabilities(task, outputs), strict=True)
    ]


def show_value(task: Task, value: float | tuple[int, ...] | np.ndarray) -> str:
    """Return a prediction as a cell: a class's number, those in a set, or a score.

    >>> tags = Task("tags", "multilabel", classes=("a", "b", "c"))
    >>> show_value(tags, (0, 2)), show_value(Task("t", "binary"), 1.0)
    ('0|2', '1')
    """
    if isinstance(value, tuple):
        return task.label_delimiter.join(map(str, value))
    return f"{value:.0f}" if task.classes else f"{value:.4f}"


def to_record(task: Task, answer: Answer) -> dict[str, Any]:
    """Return the values of an answer by their columns, of the same types in every format.

    `prediction` is a class's number or a score; a set has none. `label` is the class's name, or the
    names in a set separated by the task's `label_delimiter`; `labels` are these names as a list.
    `probability` is the class's.

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
    """Return predictions or labels as names: a class, those in a set, or a score.

    >>> name_labels(Task("tags", "multilabel", classes=("a", "b")), np.array([[1, 1], [0, 0]]))
    [('a', 'b'), ()]
    """
    if not task.classes:
        return [f"{value:.4g}" for value in values]
    return [VALUES[task.form](task, one)[1] for one in values]


def show_labels(task: Task, values: np.ndarray) -> list[str]:
    """Return predictions or labels as cells of delimited text, see `name_labels`.

    Args:
      task: what they are of.
      values: `f[E]`, or `f[E, K]` of sets.

    >>> show_labels(Task("tags", "multilabel", classes=("a", "b")), np.array([[1, 1], [0, 0]]))
    ['a|b', '']
    """
    found = name_labels(task, values)
    return [name if isinstance(name, str) else _joined(task, name) for name in found]
