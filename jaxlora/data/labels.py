"""Inference of a task's kind, classes and range from its column of labels."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal

from jaxlora.data.raw_examples import (
    YES_OR_NO,
    is_missing,
    is_not_finite,
    parse_number,
    split_names,
)
from jaxlora.tasks.kinds import KINDS, KindName, LabelForm

MOST_NUMBERED = 20  # more distinct whole numbers than this are scores, not classes
MOST_CLASSES = 1000
MOST_ODD = 0.2  # up to this share of rows, labels among scores that are no numbers are mistakes
DELIMITER = "|"  # default delimiter of the class names in a label set
SEPARATORS = (DELIMITER, ",", ";")  # common delimiters


@dataclasses.dataclass(frozen=True)
class FoundLabels:
    """Summary of the labels in a task's tables.

    Attributes:
      kind: the given kind, or the inferred one: classification, binary, multilabel or regression.
      counts: class → number of rows, in the order of the classes; empty for scores.
      range: lowest and highest score; None for classes.
      missing: number of rows without a label.
      empty: number of rows with an empty label set.
    """

    kind: KindName
    counts: Mapping[str, int]
    range: tuple[float, float] | None
    missing: int
    empty: int = 0

    @property
    def odd(self) -> tuple[str, ...]:
        """Names of classes that are no numbers, if most are numbers; they may be mistakes."""
        words = tuple(name for name in self.counts if parse_number(name) is None)
        return words if 2 * len(words) < len(self.counts) else ()

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; the second class of a binary task is the positive one."""
        return tuple(self.counts)


class WrongLabelError(ValueError):
    """An error caused by a single label.

    Attributes:
      label: the label as written.
    """

    def __init__(self, label: str, message: str) -> None:
        super().__init__(message)
        self.label = label


def find_labels(
    written: Iterable[str] | Counter[str],
    kind: KindName | None = None,
    delimiter: str | None = None,
    *,
    lists: bool = False,
) -> FoundLabels:
    """Infer the kind of a task, and its classes or range, from its labels.

    Numbers are scores if any is not whole, or if there are more than `MOST_NUMBERED` distinct
    values, or more than 2 and more than half as many as rows; a few other labels among them, see
    `MOST_ODD`, are refused. Two distinct values make the task binary. If they mean no and yes, yes
    is the positive class, else the last in order. Classes are ordered by value if all are numbers,
    else by name. Different spellings of a number are one class, named by the most frequent spelling
    without `.0`.

    The task is multilabel if the labels are lists, a delimiter is given, or `|` separates names
    that recur in different cells.

    Args:
      written: the labels as written, or a counter of them.
      kind: kind of the task; None: inferred.
      delimiter: separates the names in a label set; None: `|`.
      lists: whether labels come from lists; if not, sets of classes need the delimiter somewhere.

    Raises:
      ValueError: if there is no label, only one value, or the values do not fit the kind.
      WrongLabelError: if a single label is the cause.

    >>> find_labels(["yes", "no", "Yes", "yes", ""]).counts
    {'no': 1, 'yes': 3}
    >>> find_labels(["2", "10", "1", "2.0", "1", "10"]).classes
    ('1', '2', '10')
    >>> find_labels(["0.5", "4"]).range
    (0.5, 4.0)
    >>> find_labels(["a|b", "b", "", "b|c"]).counts
    {'a': 1, 'b': 3, 'c': 1}
    """
    cells = written if isinstance(written, Counter) else Counter(map(str.strip, written))
    if kind is None and (lists or delimiter or _look_like_sets(cells)):
        kind = "multilabel"
    if kind is None:
        kind = _guess_kind(_without_missing(cells))
    mark = delimiter or DELIMITER
    if KINDS[kind].form == "classes" and not lists and not any(mark in cell for cell in cells):
        _refuse_no_sets(cells, mark)
    return FINDERS[KINDS[kind].form](cells, kind, mark)


def _look_like_sets(cells: Mapping[str, int]) -> bool:
    """Return whether cells contain `DELIMITER` and no more distinct names than distinct cells.

    Some name then recurs, since a cell with two names adds more names than cells.
    """
    there = _without_missing(cells)
    names = {name for cell in there for name in split_names(cell, DELIMITER)}
    separated = any(DELIMITER in cell for cell in there)
    return separated and "" not in names and len(names) <= len(there)


def _without_missing(cells: Mapping[str, int]) -> dict[str, int]:
    return {cell: count for cell, count in cells.items() if not is_missing(cell)}


def _find_scores(cells: Mapping[str, int], kind: KindName, delimiter: str) -> FoundLabels:
    there = _without_missing(cells)
    _check_finite(there)
    return FoundLabels(kind, {}, _find_range(_numbers(there)), _count_missing(cells, there))


def _find_classes(cells: Mapping[str, int], kind: KindName, delimiter: str) -> FoundLabels:
    there = _without_missing(cells)
    _check_finite(there)
    merged = _merge_spellings(there, _numbers(there), kind)
    _check_classes(merged, kind)
    if KINDS[kind].ordered and any(parse_number(name) is None for name in merged):
        raise ValueError(f"classes of an {kind} task have an order: name them, the lowest first")
    return FoundLabels(kind, merged, None, _count_missing(cells, there))


def _check_finite(labels: Iterable[str]) -> None:
    """Raise an error for values such as `inf` if all other labels are numbers."""
    numbers = _numbers(labels)
    wrong = [label for label, number in numbers.items() if number is None]
    if wrong and len(wrong) < len(numbers) and all(map(is_not_finite, wrong)):
        raise WrongLabelError(
            wrong[0],
            f"label {wrong[0][:60]!r} among numbers is not finite; correct it, or write "
            "nothing if it is missing",
        )


def _find_sets(cells: Mapping[str, int], kind: KindName, delimiter: str) -> FoundLabels:
    found = count_sets(cells, delimiter)
    if not found.counts:
        raise ValueError("no row has a label")
    if "" in found.counts:
        odd = next(cell for cell in cells if cell and "" in split_names(cell, delimiter))
        raise ValueError(f"{odd[:60]!r} has nothing on one side of a {delimiter!r}")
    if len(found.counts) > MOST_CLASSES:
        raise ValueError(f"{len(found.counts):,} different labels; name another column")
    return found


def _refuse_no_sets(cells: Mapping[str, int], delimiter: str) -> None:
    if not _without_missing(cells):
        raise ValueError("no row has a label")
    raise ValueError(
        f"no row has two labels, {delimiter!r} never occurs; name the `label_delimiter`, or "
        "another kind"
    )


def find_set(
    cells: Iterable[str], classes: Sequence[str], separators: Sequence[str] = SEPARATORS
) -> tuple[str, str] | None:
    """Find a cell that is not a class itself but joins several; return it and its separator.

    >>> find_set(["a", "b, a"], ["a", "b", "c"]), find_set(["a|b"], ["a|b", "a", "b"])
    (('b, a', ','), None)
    """
    known = set(classes)
    for cell in cells:
        for mark in separators if cell not in known else ():
            names = split_names(cell, mark)
            if len(names) > 1 and known.issuperset(names):
                return cell, mark
    return None


def count_sets(cells: Mapping[str, int], delimiter: str, names: Sequence[str] = ()) -> FoundLabels:
    """Count the class names in cells that are label sets.

    Args:
      cells: cell → number of rows.
      delimiter: separates the names.
      names: the classes to count, in order; `()`: all that occur, by value or name.

    >>> count_sets({"a|b": 2, "b": 1, "": 4}, "|").counts
    {'a': 2, 'b': 3}
    """
    sets = {cell: count for cell, count in cells.items() if not cell or not is_missing(cell)}
    counts: Counter[str] = Counter()
    for cell, count in sets.items():
        for name in set(split_names(cell, delimiter)):
            counts[name] += count
    ordered = names or sorted(counts, key=_by_number_or_name(counts))
    missing = sum(cells.values()) - sum(sets.values())
    return FoundLabels(
        "multilabel", {name: counts[name] for name in ordered}, None, missing, sets.get("", 0)
    )


def _by_number_or_name(names: Iterable[str]) -> Callable[[str], Decimal | str]:
    numbers = _numbers(names)
    if None in numbers.values():
        return str
    return lambda name: numbers[name] or Decimal(0)


# Label form → `(cells, kind, delimiter) → FoundLabels`.
FINDERS: dict[LabelForm, Callable[[Mapping[str, int], KindName, str], FoundLabels]] = {
    "class": _find_classes,
    "classes": _find_sets,
    "score": _find_scores,
}


def _numbers(labels: Iterable[str]) -> dict[str, Decimal | None]:
    return {label: parse_number(label) for label in labels}


def _count_missing(cells: Mapping[str, int], there: Mapping[str, int]) -> int:
    if not there:
        raise ValueError("no row has a label" if cells else "there are no rows")
    return sum(cells.values()) - sum(there.values())


def _guess_kind(counts: Mapping[str, int]) -> KindName:
    numbers = _numbers(counts)
    values = {number for number in numbers.values() if number is not None}
    rows = sum(counts.values())
    many = len(values) > min(MOST_NUMBERED, max(2, rows // 2))
    odd = sum(counts[label] for label, number in numbers.items() if number is None)
    scores = many or any(v != v.to_integral_value() for v in values)
    if values and scores and odd <= MOST_ODD * rows:
        return "regression"
    return "binary" if len(_merge_spellings(counts, numbers, "binary")) == 2 else "classification"


def _find_range(numbers: Mapping[str, Decimal | None]) -> tuple[float, float]:
    wrong = [label for label, number in numbers.items() if number is None]
    if wrong:
        raise WrongLabelError(
            wrong[0],
            f"label {wrong[0][:60]!r} is not a number, but scores are numbers; correct it, leave "
            "it empty if it is missing, or name another `kind`",
        )
    values = [float(number) for number in numbers.values() if number is not None]
    if min(values) == max(values):
        raise ValueError(f"every row has the label {values[0]:g}, so there is nothing to learn")
    return min(values), max(values)


def _merge_spellings(
    counts: Mapping[str, int], numbers: Mapping[str, Decimal | None], kind: KindName
) -> dict[str, int]:
    """Return class → number of rows, ordered; a class is named by its most frequent spelling."""
    as_answers = KINDS[kind].positive and all(label.casefold() in YES_OR_NO for label in counts)
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
    # Programs such as pandas write whole numbers as 1.0 if a column has missing values.
    return {name.removesuffix(".0") if numeric else name: n for name, n in found.items()}


def _check_classes(counts: Mapping[str, int], kind: KindName) -> None:
    shown = ", ".join(f"{name[:40]!r} ({count:,})" for name, count in [*counts.items()][:5])
    if len(counts) == 1:
        raise ValueError(f"every row has the label {next(iter(counts))[:60]!r}; nothing to learn")
    if KINDS[kind].positive and len(counts) != 2:
        raise ValueError(f"a {kind} task has two labels, not {len(counts):,}: {shown}, …")
    rows = sum(counts.values())
    if len(counts) > MOST_CLASSES or len(counts) > max(MOST_NUMBERED, rows // 2):
        raise ValueError(
            f"{len(counts):,} different labels in {rows:,} rows, such as {shown}; they look like "
            "text or ids: name another column, or the `classes`"
        )
