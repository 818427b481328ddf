"""Stratified, deterministic split of a training table into training and dev rows."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence

from jaxlora.data.raw_examples import TextExample
from jaxlora.tasks.kinds import LabelForm
from jaxlora.tasks.task import Task

Rows = list[TextExample]


def hold_out(rows: Sequence[TextExample], share: float, task: Task) -> tuple[Rows, Rows]:
    """Split rows into training rows and a dev set, stratified by class.

    Each class contributes the same share of its texts: at least one, but never all of them. Scores
    form a single class, and a label set counts as its rarest class. The texts with the lowest
    SHA-256 are held out, so the split needs no seed and does not depend on row order or machine.
    Equal texts are never on both sides, and appending rows to a table moves few of the others.

    Args:
      rows: all rows; unlabelled rows stay in the training set.
      share: fraction of each class's texts to hold out, above 0 and below 1.
      task: determines the form of the labels.

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
            # A text with two labels counts for the first one only, so it is on one side.
            stratum = taken_by.setdefault(_key(row), stratum_of(row))
            strata[stratum].add(_key(row))
    held = {key for keys in strata.values() for key in sorted(keys)[: _count(len(keys), share)]}
    dev = [row for row in rows if row.labelled and _key(row) in held]
    train = [row for row in rows if not row.labelled or _key(row) not in held]
    return train, dev


def _by_rarest(rows: Sequence[TextExample]) -> Callable[[TextExample], Hashable]:
    """Return a function from a row to its rarest class, or to None for an empty label set."""
    sets = [row.label for row in rows if isinstance(row.label, tuple)]
    counts = Counter(number for one in sets for number in one)

    def rarest(row: TextExample) -> Hashable:
        assert isinstance(row.label, tuple)
        return min(row.label, key=lambda number: (counts[number], number), default=None)

    return rarest


# Label form → all rows → function from a row to its stratum.
STRATA: dict[LabelForm, Callable[[Sequence[TextExample]], Callable[[TextExample], Hashable]]] = {
    "class": lambda _: lambda row: row.label,
    "classes": _by_rarest,
    "score": lambda _: lambda _: None,
}


def _key(row: TextExample) -> str:
    return hashlib.sha256("\0".join((row.sentence1, row.sentence2)).encode()).hexdigest()


def _count(texts: int, share: float) -> int:
    return min(max(1, round(share * texts)), texts - 1)
