"""A dev set taken out of a training table: by class, and the same at every reading."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence

from jaxlora.data.raw_examples import TextExample
from jaxlora.tasks.kinds import LabelForm
from jaxlora.tasks.task import Task

Rows = list[TextExample]


def hold_out(rows: Sequence[TextExample], share: float, task: Task) -> tuple[Rows, Rows]:
    """Split rows into those to train on and a dev set.

    Each class gives its share (at least one text, and not all of them); scores are one class, and
    of a set of classes the rarest counts. The texts of a class are ordered by their sha256 and the
    first are taken. So the split depends on no order, no seed and no machine, equal texts never end
    on both sides, and when rows are appended to a table, few of the others change sides.

    Args:
      rows: all rows; those without a label stay with the training rows.
      share: of each class's texts, above 0 and below 1.
      task: says what labels are.

    Returns:
      The training rows and the dev rows, each in the order of `rows`.

    >>> row = TextExample("0", "a", "", 1.0)
    >>> rows = [row._replace(sentence1=str(n), label=n % 2) for n in range(10)]
    >>> train, dev = hold_out(rows, 0.2, Task("t", "binary"))
    >>> len(train), sorted(row.label for row in dev)
    (8, [0, 1])
    """
    stratum_of = STRATA[task.form](rows)
    strata: dict[Hashable, set[str]] = defaultdict(set)
    taken_by: dict[str, Hashable] = {}
    for row in rows:
        if row.labelled:
            # A text with two labels belongs to the first, so that it is on one side.
            stratum = taken_by.setdefault(_key(row), stratum_of(row))
            strata[stratum].add(_key(row))
    held = {key for keys in strata.values() for key in sorted(keys)[: _count(len(keys), share)]}
    dev = [row for row in rows if row.labelled and _key(row) in held]
    train = [row for row in rows if not row.labelled or _key(row) not in held]
    return train, dev


def _by_rarest(rows: Sequence[TextExample]) -> Callable[[TextExample], Hashable]:
    """Return a function from a row to the rarest class of its set; None for an empty set."""
    sets = [row.label for row in rows if isinstance(row.label, tuple)]
    counts = Counter(number for one in sets for number in one)

    def rarest(row: TextExample) -> Hashable:
        assert isinstance(row.label, tuple)
        return min(row.label, key=lambda number: (counts[number], number), default=None)

    return rarest


# What rows that give the same share have in common, by the form of their labels.
STRATA: dict[LabelForm, Callable[[Sequence[TextExample]], Callable[[TextExample], Hashable]]] = {
    "class": lambda _: lambda row: row.label,
    "classes": _by_rarest,
    "score": lambda _: lambda _: None,
}


def _key(row: TextExample) -> str:
    return hashlib.sha256("\0".join((row.sentence1, row.sentence2)).encode()).hexdigest()


def _count(texts: int, share: float) -> int:
    return min(max(1, round(share * texts)), texts - 1)
