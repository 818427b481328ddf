"""Examples as text, and the parsing of labels."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import NamedTuple

import numpy as np

from jaxlora.tasks.kinds import LabelForm
from jaxlora.tasks.task import Task
from jaxlora.utils.errors import UserError

Label = float | tuple[int, ...]


class TextExample(NamedTuple):
    """One example as a source provides it.

    Attributes:
      id: id in the source.
      sentence1: the sentence, or the first of a pair.
      sentence2: the second sentence of a pair; empty for single-sentence tasks.
      label: class index, score, or class indices of a label set; NaN if unlabelled.
      line: line or row in the file, from 1; 0 if it does not come from a file.
    """

    id: str
    sentence1: str
    sentence2: str
    label: Label
    line: int = 0

    @property
    def labelled(self) -> bool:
        """Whether the example has a label."""
        return self.label == self.label  # NaN is not equal to itself


UNLABELLED = math.nan
_DIGITS = re.compile(r"[0-9]{1,9}")
# Common spellings of a missing value, in lower case.
MISSING = ("", "nan", "-nan", "na", "<na>", "#na", "n/a", "#n/a", "none", "null")

# Words for the two answers of a binary task, in lower case.
YES_OR_NO = {
    **dict.fromkeys(("0", "no", "n", "false", "f"), 0),
    **dict.fromkeys(("1", "yes", "y", "true", "t"), 1),
}


def parse_label(text: str, task: Task, where: str) -> Label:
    """Parse a label and check it against the task's classes or range.

    Args:
      text: the label as written, e.g. `"3"`, `"1.0"`, `"4.6"` or a class name. If the classes of a
        binary task mean no and yes, any word in `YES_OR_NO`. For a multilabel task, class names
        separated by the task's `label_delimiter`.
      task: determines the classes or the range.
      where: `file:line`, for the message.

    Returns:
      The class index, the score, or the class indices of a label set; NaN if the label is missing
      (see `MISSING`). An empty label set is not missing.

    Raises:
      UserError: if it is neither a class name nor a number in the range.

    >>> from jaxlora.tasks.task import SST
    >>> parse_label("3.0", SST, "sst.csv:7"), parse_label("NaN", SST, "sst.csv:8")
    (3.0, nan)
    >>> parse_label("7", SST, "sst.csv:7")
    Traceback (most recent call last):
    ...
    jaxlora.utils.errors.UserError: sst.csv:7: label '7' is not a whole number from 0 to 4 ...
    >>> parse_label("c | a", Task("tags", "multilabel", classes=("a", "b", "c")), "tags.csv:2")
    (0, 2)
    """
    found = PARSERS[task.form](text.strip(), task, where)
    if found is None:
        shown = text if len(text) <= 60 else text[:60] + "…"
        remedy = "correct the label or delete the line"
        remedy += ", or add it to the `classes` in training." if task.classes else "."
        if task.form == "score" and parse_number(text.strip()) is not None:
            remedy = "correct the label, or train with a wider range (`range` in a task file)."
        raise UserError(
            f"{where}: label {shown!r} is not {_allowed(task)} ({task.title}); {remedy}"
        )
    return found


def _parse_score(written: str, task: Task, where: str) -> float | None:
    if is_missing(written):
        return UNLABELLED
    return _within(parse_number(written), task)


def _within(number: Decimal | None, task: Task) -> float | None:
    return float(number) if number is not None and task.low <= float(number) <= task.high else None


def _parse_class(written: str, task: Task, where: str) -> float | None:
    if written in task.classes:
        return float(task.classes.index(written))
    if is_missing(written, task.classes):
        return UNLABELLED
    if task.positive is not None and _answers(task.classes) and written.casefold() in YES_OR_NO:
        return float(YES_OR_NO[written.casefold()])
    number = parse_number(written)
    return _within(None if number is None else _class_number(number, task.classes), task)


def _parse_classes(written: str, task: Task, where: str) -> Label:
    if written and is_missing(written, task.classes):
        return UNLABELLED
    names = split_names(written, task.label_delimiter)
    if unknown := [name for name in names if name not in task.classes]:
        raise UserError(
            f"{where}: {unknown[0][:60]!r} in {written[:60]!r} is not one of "
            f"{', '.join(task.classes)} ({task.title}); correct it, add it to the classes "
            f"in training, or check the delimiter of labels, {task.label_delimiter!r}"
        )
    if len(set(names)) != len(names):
        raise UserError(f"{where}: a label is named twice in {written[:60]!r}; delete one")
    return tuple(sorted(map(task.classes.index, names)))


# Label form → `(text, task, where) → label`, or None if the text is not a valid label.
PARSERS: dict[LabelForm, Callable[[str, Task, str], Label | None]] = {
    "class": _parse_class,
    "classes": _parse_classes,
    "score": _parse_score,
}


def split_names(written: str, delimiter: str) -> list[str]:
    """Split a cell into class names; a blank cell has none.

    >>> split_names("a | b", "|"), split_names(" ", "|")
    (['a', 'b'], [])
    """
    return [name.strip() for name in written.split(delimiter)] if written.strip() else []


def join_marks(cells: Sequence[str], names: Sequence[str], delimiter: str, where: str) -> str:
    """Convert columns of 0 and 1 to one cell with the names of the columns that have 1.

    Args:
      cells: one cell per column; if all are missing, the row is unlabelled.
      names: names of the columns.
      delimiter: separates the names.
      where: `file:line`, for the message.

    Raises:
      UserError: for a cell that is neither 0 nor 1, nor a word for no or yes.

    >>> join_marks(["1", "0", "yes"], ["a", "b", "c"], "|", "tags.csv:2")
    'a|c'
    """
    if all(is_missing(cell.strip()) for cell in cells):
        return "nan"
    marks = [YES_OR_NO.get(cell.strip().removesuffix(".0").casefold()) for cell in cells]
    if None in marks:
        at = marks.index(None)
        raise UserError(
            f"{where}: column {names[at]!r} has {cells[at][:60]!r}; where several columns are the "
            "labels, each is 0 or 1"
        )
    return delimiter.join(name for name, mark in zip(names, marks, strict=True) if mark)


def join_names(listed: str, delimiter: str, where: str) -> str:
    """Convert a list of class names to one cell.

    Args:
      listed: the list as JSON; an empty string if it is missing.
      delimiter: separates the names.
      where: `file:line`, for the message.

    Raises:
      UserError: if a name cannot be represented in a cell.

    >>> join_names('["a", "c"]', "|", "x:1"), join_names("[]", "|", "x:1")
    ('a|c', '')
    """
    if not listed:
        return "nan"
    names: list[str | None] = json.loads(listed)
    for name in names:
        if name is None or not name.strip() or "\0" in name:
            raise UserError(f"{where}: {listed[:60]}: an entry is not a label name; correct it")
        if is_missing(name.strip()):
            raise UserError(f"{where}: the label {name!r} denotes a missing value; rename it")
        if delimiter in name:
            raise UserError(
                f"{where}: the label {name[:60]!r} contains {delimiter!r}, which separates labels "
                "in answers; choose another `label_delimiter`"
            )
    return delimiter.join(filter(None, names))


def to_array(
    labels: Sequence[Label], task: Task, dtype: type[np.floating] = np.float32
) -> np.ndarray:
    """Convert labels to `f32[E]`, or for multilabel tasks to `f32[E, K]` of 0 and 1.

    >>> to_array([(0, 2), ()], Task("tags", "multilabel", classes=("a", "b", "c"))).tolist()
    [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    """
    if task.form != "classes":
        return np.array(labels, dtype)
    out = np.zeros((len(labels), len(task.classes)), dtype)
    for row, label in zip(out, labels, strict=True):
        if isinstance(label, tuple):
            row[list(label)] = 1
        else:
            row[:] = label  # NaN: unlabelled
    return out


def is_missing(written: str, classes: tuple[str, ...] = ()) -> bool:
    """Return whether a label denotes a missing value and is not the name of a class."""
    folded = written.casefold()
    return folded in MISSING and folded not in map(str.casefold, classes)


def _answers(classes: tuple[str, ...]) -> bool:
    """Return whether two classes mean no and yes, in this order."""
    return [YES_OR_NO.get(name.casefold()) for name in classes] == [0, 1]


def parse_number(text: str) -> Decimal | None:
    """Parse a finite number exactly, so that long numbers stay distinct; None if it is not one.

    >>> parse_number("1e0") == parse_number("01") == 1, parse_number("inf"), parse_number("1_0")
    (True, None, None)
    """
    try:
        value = Decimal(text)
    except InvalidOperation:
        return None
    return value if value.is_finite() and "_" not in text else None


def is_not_finite(text: str) -> bool:
    """Return whether text denotes an infinite or undefined number.

    >>> is_not_finite("-inf"), is_not_finite("+NaN"), is_not_finite("1e9"), is_not_finite("info")
    (True, True, False, False)
    """
    try:
        return not Decimal(text).is_finite()
    except InvalidOperation:
        return False


def _class_number(value: Decimal, classes: tuple[str, ...]) -> Decimal | None:
    """Return the index of the class that a number denotes; None if there is none.

    It is an index unless a name is a number or contains a number other than its own index. Then it
    must equal exactly one name: with "1 star" and "2 stars", 1 would be ambiguous.

    >>> _class_number(Decimal("2.0"), ("1", "2", "unknown"))
    Decimal('1')
    >>> _class_number(Decimal(2), ("no", "yes", "maybe"))
    Decimal('2')
    >>> _class_number(Decimal(1), ("1 star", "2 stars"))
    """
    numbered = [
        any(int(digits) != n for digits in _DIGITS.findall(name)) for n, name in enumerate(classes)
    ]
    numbers = [parse_number(name.strip()) for name in classes]
    if not any(numbered) and not any(number is not None for number in numbers):
        return value if value == value.to_integral_value() else None
    named = [n for n, number in enumerate(numbers) if number == value]
    return Decimal(named[0]) if len(named) == 1 else None


def _allowed(task: Task) -> str:
    if task.form == "score":
        return f"a number from {task.low:g} to {task.high:g}"
    if task.classes == tuple(map(str, range(len(task.classes)))):
        return f"a whole number from {task.low:g} to {task.high:g}"
    return f"one of {', '.join(task.classes)}"


# Unicode categories that BERT's tokenizer drops: separators, control, format (such as U+200B) and
# private-use characters, and combining marks.
_INVISIBLE = ("Zs", "Zl", "Zp", "Cc", "Cf", "Co", "Mn", "Mc", "Me")
# Letters and symbols with an empty glyph (Hangul fillers, the Braille blank), and the replacement
# character.
_EMPTY = "\u115f\u1160\u3164\uffa0\u2800\N{REPLACEMENT CHARACTER}"


def is_blank(text: str) -> bool:
    r"""Return whether a string contains no letter, digit, punctuation mark or symbol.

    >>> is_blank(" \u200b\ufeff"), is_blank("?")
    (True, False)
    """
    return all(unicodedata.category(c) in _INVISIBLE or c in _EMPTY for c in text)


def sentences(row: TextExample, task: Task) -> dict[str, str]:
    """Return the one or two sentences of an example by column name.

    >>> from jaxlora.tasks.task import SST
    >>> sentences(TextExample("a", "Good .", "", 3.0), SST)
    {'sentence': 'Good .'}
    """
    if not task.pair:
        return {"sentence": row.sentence1}
    return {"sentence1": row.sentence1, "sentence2": row.sentence2}
