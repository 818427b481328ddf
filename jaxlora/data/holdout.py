"""A dev set taken out of a training table: by class, and the same at every reading."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence

from jaxlora.data.raw_examples import TextExample
from jaxlora.tasks.task import Task

Rows = list[TextExample]


def hold_out(rows: Sequence[TextExample], share: float, task: Task) -> tuple[Rows, Rows]:
    """Split rows into those to train on and a dev set.

    Each class gives its share (at least one text, and not all of them); scores are one class. The
    texts of a class are ordered by their sha256 and the first are taken. So the split depends on
    no order, no seed and no machine, equal texts never end on both sides, and when rows are
    appended to a table, few of the others change sides.

    Args:
      rows: all rows; those without a label stay with the training rows.
      share: of each class's texts, above 0 and below 1.
      task: whether labels are classes.

    Returns:
      The training rows and the dev rows, each in the order of `rows`.

    >>> row = TextExample("0", "a", "", 1.0)
    >>> rows = [row._replace(sentence1=str(n), label=n % 2) for n in range(10)]
    >>> train, dev = hold_out(rows, 0.2, Task("t", "binary"))
    >>> len(train), sorted(row.label for row in dev)
    (8, [0, 1])
    """
    strata: dict[float, set[str]] = defaultdict(set)
    taken_by: dict[str, float] = {}
    for row in rows:
        if not math.isnan(row.label):
            # A text with two labels belongs to the first, so that it is on one side.
            stratum = taken_by.setdefault(_key(row), row.label if task.integer else 0.0)
            strata[stratum].add(_key(row))
    held = {key for keys in strata.values() for key in sorted(keys)[: _count(len(keys), share)]}
    dev = [row for row in rows if not math.isnan(row.label) and _key(row) in held]
    train = [row for row in rows if math.isnan(row.label) or _key(row) not in held]
    return train, dev


def _key(row: TextExample) -> str:
    return hashlib.sha256("\0".join((row.sentence1, row.sentence2)).encode()).hexdigest()


def _count(texts: int, share: float) -> int:
    return min(max(1, round(share * texts)), texts - 1)
