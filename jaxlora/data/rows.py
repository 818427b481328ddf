"""One labelled example as text, and the checks every source's examples pass."""

from __future__ import annotations

import math
from typing import NamedTuple

from jaxlora.errors import UserError
from jaxlora.tasks import Task


class Row(NamedTuple):
    """One example as it leaves a source.

    Attributes:
      id: the source's own name for it.
      sentence1: the sentence, or the first of a pair.
      sentence2: the second of a pair; empty for single-sentence tasks.
      label: on the task's scale; NaN when unlabelled.
    """

    id: str
    sentence1: str
    sentence2: str
    label: float


UNLABELLED = math.nan


def parse_label(text: str, task: Task, where: str) -> float:
    """Read a label and check it against the task's range.

    Args:
      text: the label as written, e.g. `"3"`, `"1.0"`, `"4.6"` or a class's name.
      task: says the range and whether labels are whole numbers.
      where: `file:line`, for the message.

    Raises:
      UserError: neither a class's name, nor a number in the range (of classes, a whole one).

    >>> from jaxlora.tasks import SST
    >>> parse_label("3.0", SST, "sst.csv:7")
    3.0
    >>> parse_label("7", SST, "sst.csv:7")
    Traceback (most recent call last):
    ...
    jaxlora.errors.UserError: sst.csv:7: label '7' is not a whole number from 0 to 4 (SST-5); ...
    """
    if text.strip() in task.classes:
        return float(task.classes.index(text.strip()))
    try:
        label = float(text)
    except ValueError:
        label = math.nan
    if task.integer:
        label = _class_number(label, task.classes)
    if task.low <= label <= task.high:  # NaN fails the comparison
        return label
    raise UserError(
        f"{where}: label {text!r} is not {_allowed(task)} ({task.title}); "
        "correct the label or delete the line."
    )


def _class_number(value: float, classes: tuple[str, ...]) -> float:
    """The class of a number: the one whose name is that number, or that has it if names are words.

    >>> _class_number(2.0, ("1", "2")), _class_number(1.0, ("no", "yes"))
    (1.0, 1.0)
    """
    try:
        numbers = [float(name) for name in classes]
    except ValueError:
        return value if value.is_integer() else math.nan
    return float(numbers.index(value)) if value in numbers else math.nan


def _allowed(task: Task) -> str:
    if not task.integer:
        return f"a number from {task.low:g} to {task.high:g}"
    if task.classes == tuple(map(str, range(len(task.classes)))):
        return f"a whole number from {task.low:g} to {task.high:g}"
    return f"one of {', '.join(task.classes)}"


def check(row: Row, task: Task, where: str) -> Row:
    """Strip a row's sentences and refuse blank ones.

    Args:
      row: the row as read.
      task: says how many sentences there must be.
      where: `file:line`, for the message.

    Raises:
      UserError: a sentence the task needs is blank.

    >>> from jaxlora.tasks import SST
    >>> check(Row("a", " Good . ", "", 3.0), SST, "sst.csv:2").sentence1
    'Good .'
    """
    row = row._replace(sentence1=row.sentence1.strip(), sentence2=row.sentence2.strip())
    for name, text in sentences(row, task).items():
        if not text:
            raise UserError(f"{where}: {name} is blank; fill it in or delete the line.")
    return row


def sentences(row: Row, task: Task) -> dict[str, str]:
    """The sentences of a row by column name, as many as the task has.

    >>> from jaxlora.tasks import SST
    >>> sentences(Row("a", "Good .", "", 3.0), SST)
    {'sentence': 'Good .'}
    """
    if not task.pair:
        return {"sentence": row.sentence1}
    return {"sentence1": row.sentence1, "sentence2": row.sentence2}
