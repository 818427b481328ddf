"""Labelled examples as text, and the parser of labels."""

from __future__ import annotations

import math
import re
import unicodedata
from decimal import Decimal, InvalidOperation
from typing import NamedTuple

from jaxlora.tasks.task import Task
from jaxlora.utils.errors import UserError


class TextExample(NamedTuple):
    """One example as a source provides it.

    Attributes:
      id: its id in the source.
      sentence1: the sentence, or the first of a pair.
      sentence2: the second of a pair; empty for single-sentence tasks.
      label: on the task's scale; NaN if unlabelled.
      line: its line in the file, from 1; 0 if it is from no file.
    """

    id: str
    sentence1: str
    sentence2: str
    label: float
    line: int = 0


UNLABELLED = math.nan
_DIGITS = re.compile(r"[0-9]{1,9}")
# What programs write for a missing value, in lower case.
MISSING = ("", "nan", "-nan", "na", "<na>", "#na", "n/a", "#n/a", "none", "null")

# Words for the two answers of a binary task, in lower case.
YES_OR_NO = {
    **dict.fromkeys(("0", "no", "n", "false", "f"), 0),
    **dict.fromkeys(("1", "yes", "y", "true", "t"), 1),
}


def parse_label(text: str, task: Task, where: str) -> float:
    """Parse a label and check it against the task's range.

    Args:
      text: the label as written, e.g. `"3"`, `"1.0"`, `"4.6"` or the name of a class; of a binary
        task whose classes are among `YES_OR_NO` also any other of those words.
      task: determines the classes or the range.
      where: `file:line`, for the message.

    Returns:
      The label on the task's scale; NaN if it is missing (see `MISSING`).

    Raises:
      UserError: if it is neither the name of a class nor a number in the range.

    >>> from jaxlora.tasks.task import SST
    >>> parse_label("3.0", SST, "sst.csv:7"), parse_label("NaN", SST, "sst.csv:8")
    (3.0, nan)
    >>> parse_label("7", SST, "sst.csv:7")
    Traceback (most recent call last):
    ...
    jaxlora.utils.errors.UserError: sst.csv:7: label '7' is not a whole number from 0 to 4 ...
    """
    written = text.strip()
    if written in task.classes:
        return float(task.classes.index(written))
    if is_missing(written, task.classes):
        return UNLABELLED
    if task.kind == "binary" and _answers(task.classes) and written.casefold() in YES_OR_NO:
        return float(YES_OR_NO[written.casefold()])
    number = parse_number(written)
    if number is not None and task.integer:
        number = _class_number(number, task.classes)
    if number is not None and task.low <= float(number) <= task.high:
        return float(number)
    shown = text if len(text) <= 60 else text[:60] + "…"
    raise UserError(
        f"{where}: label {shown!r} is not {_allowed(task)} ({task.title}); "
        "correct the label or delete the line."
    )


def is_missing(written: str, classes: tuple[str, ...] = ()) -> bool:
    """Return whether a label denotes a missing value, unless a class has that name."""
    folded = written.casefold()
    return folded in MISSING and folded not in map(str.casefold, classes)


def _answers(classes: tuple[str, ...]) -> bool:
    """Return whether two classes mean no and yes, in this order."""
    return [YES_OR_NO.get(name.casefold()) for name in classes] == [0, 1]


def parse_number(text: str) -> Decimal | None:
    """Parse a number exactly, so that long numbers do not become equal; None if it is not one.

    >>> parse_number("1e0") == parse_number("01") == 1, parse_number("inf"), parse_number("1_0")
    (True, None, None)
    """
    try:
        value = Decimal(text)
    except InvalidOperation:
        return None
    return value if value.is_finite() and "_" not in text else None


def _class_number(value: Decimal, classes: tuple[str, ...]) -> Decimal | None:
    """Find the class that a number means: by name if names are numbers, else by index.

    None if that is ambiguous: with classes "1 star" and "2 stars", 1 may be a name or an index.

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
    if not task.integer:
        return f"a number from {task.low:g} to {task.high:g}"
    if task.classes == tuple(map(str, range(len(task.classes)))):
        return f"a whole number from {task.low:g} to {task.high:g}"
    return f"one of {', '.join(task.classes)}"


# Categories that BERT's tokenizer drops: separators, control, format (such as U+200B) and private
# characters, and combining marks.
_INVISIBLE = ("Zs", "Zl", "Zp", "Cc", "Cf", "Co", "Mn", "Mc", "Me")
# Letters and symbols with an empty glyph (Hangul fillers, the Braille blank), and the replacement
# for a lost character.
_EMPTY = "\u115f\u1160\u3164\uffa0\u2800\N{REPLACEMENT CHARACTER}"


def is_blank(text: str) -> bool:
    r"""Return whether a string has no letter, digit, punctuation mark or symbol.

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
