"""What a column of labels says about its task: kind, classes, range."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from decimal import Decimal

from jaxlora.data.raw_examples import YES_OR_NO, is_missing, parse_number
from jaxlora.tasks.task import KindName

MOST_NUMBERED = 20  # classes whose names are whole numbers; with more they are scores
MOST_CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class FoundLabels:
    """The labels of a task as they occur in its tables.

    Attributes:
      kind: classification, binary or regression.
      counts: class → number of rows, in the order of the classes; of scores empty.
      range: the lowest and the highest score; of classes None.
      missing: rows without a label.
    """

    kind: KindName
    counts: Mapping[str, int]
    range: tuple[float, float] | None
    missing: int

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; of a binary task the second is the positive one."""
        return tuple(self.counts)


def find_labels(written: Iterable[str], kind: KindName | None = None) -> FoundLabels:
    """Find the kind of a task, and its classes or range, from its labels.

    Numbers are scores if one is not whole, or if there are more than `MOST_NUMBERED` values, or
    more than half as many as rows. Two values are the classes of a binary task; of words that mean
    no and yes, yes is the positive one, else the one that is last in order. Classes are ordered by
    number if all are numbers, else by name. Spellings of one number are one class, named by the
    most frequent, without `.0`.

    Args:
      written: the labels as written.
      kind: of the task; None: found from the labels.

    Raises:
      ValueError: if there is no label, only one value, or the values do not fit the kind.

    >>> find_labels(["yes", "no", "Yes", "yes", ""]).counts
    {'no': 1, 'yes': 3}
    >>> find_labels(["2", "10", "1", "2.0", "1", "10"]).classes
    ('1', '2', '10')
    >>> find_labels(["0.5", "4"]).range
    (0.5, 4.0)
    """
    counts = Counter(label.strip() for label in written)
    missing = sum(counts.pop(label) for label in list(counts) if is_missing(label))
    if not counts:
        raise ValueError("no row has a label")
    numbers = {label: parse_number(label) for label in counts}
    kind = kind or _guess_kind(counts, numbers)
    if kind in ("regression", "similarity"):
        return FoundLabels(kind, {}, _find_range(numbers), missing)
    merged = _merge_spellings(counts, numbers, kind)
    _check_classes(merged, kind)
    return FoundLabels(kind, merged, None, missing)


def _guess_kind(counts: Mapping[str, int], numbers: Mapping[str, Decimal | None]) -> KindName:
    values = {number for number in numbers.values() if number is not None}
    many = len(values) > min(MOST_NUMBERED, max(2, sum(counts.values()) // 2))
    if None not in numbers.values() and (many or any(v != v.to_integral_value() for v in values)):
        return "regression"
    return "binary" if len(_merge_spellings(counts, numbers, "binary")) == 2 else "classification"


def _find_range(numbers: Mapping[str, Decimal | None]) -> tuple[float, float]:
    wrong = [label for label, number in numbers.items() if number is None]
    if wrong:
        raise ValueError(f"label {wrong[0][:60]!r} is not a number, but scores are numbers")
    values = [float(number) for number in numbers.values() if number is not None]
    if min(values) == max(values):
        raise ValueError(f"every row has the label {values[0]:g}, so there is nothing to learn")
    return min(values), max(values)


def _merge_spellings(
    counts: Mapping[str, int], numbers: Mapping[str, Decimal | None], kind: KindName
) -> dict[str, int]:
    """Return the classes in order with their counts, each named by its most frequent spelling."""
    as_answers = kind == "binary" and all(label.casefold() in YES_OR_NO for label in counts)
    numeric = None not in numbers.values()

    def meaning(label: str) -> Decimal | int | str:
        number = numbers[label]
        if as_answers:
            return YES_OR_NO[label.casefold()]
        return number if numeric and number is not None else label

    spellings: dict[Decimal | int | str, dict[str, int]] = {}
    for label, count in counts.items():
        spellings.setdefault(meaning(label), {})[label] = count
    ordered = sorted(spellings.items(), key=lambda item: item[0])
    found = {max(names, key=names.__getitem__): sum(names.values()) for _, names in ordered}
    # Programs write whole numbers as 1.0 where a column has gaps.
    return {name.removesuffix(".0") if numeric else name: n for name, n in found.items()}


def _check_classes(counts: Mapping[str, int], kind: KindName) -> None:
    shown = ", ".join(f"{name[:40]!r} ({count:,})" for name, count in [*counts.items()][:5])
    if len(counts) == 1:
        raise ValueError(f"every row has the label {next(iter(counts))[:60]!r}; nothing to learn")
    if kind == "binary" and len(counts) != 2:
        raise ValueError(f"a binary task has two labels, not {len(counts):,}: {shown}, …")
    rows = sum(counts.values())
    if len(counts) > MOST_CLASSES or len(counts) > max(MOST_NUMBERED, rows // 2):
        raise ValueError(
            f"{len(counts):,} different labels in {rows:,} rows, such as {shown}; they look like "
            "text or ids: name another column, or the `classes`"
        )
