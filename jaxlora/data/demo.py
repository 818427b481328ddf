"""Built-in demo data, written by small grammars: no files, no download, the same everywhere.

The three tasks have the label spaces of SST-5, Quora and STS-B, but their labels follow from
rules of composition (see `grammars/`): negation and contrast, who does what to whom, agreement
of meaning. Words alone do not tell them, so adapting the encoder pays. Part of the vocabulary is
held out of training, no sentence of dev or test occurs in train, and no example occurs twice in
a split.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

from jaxlora.data.grammars.questions import question_pair
from jaxlora.data.grammars.reviews import review
from jaxlora.data.grammars.scenes import scene_pair
from jaxlora.data.raw_examples import TextExample

GRAMMARS: dict[str, Callable[[random.Random, bool], tuple[str, str, float]]] = {
    "sst": review,
    "para": question_pair,
    "sts": scene_pair,
}
SIZES = {"train": 2000, "dev": 400, "test": 400}


def read(task_name: str) -> dict[str, list[TextExample]]:
    """The demo examples of a task by split, test labels included.

    Args:
      task_name: `sst`, `para` or `sts`.

    >>> {split: len(rows) for split, rows in read("sst").items()}
    {'train': 2000, 'dev': 400, 'test': 400}
    """
    return {split: list(rows) for split, rows in _read(task_name).items()}


@functools.cache
def _read(task_name: str) -> dict[str, tuple[TextExample, ...]]:
    train = _split(task_name, "train", frozenset())
    seen = frozenset(text for row in train for text in (row.sentence1, row.sentence2) if text)
    return {"train": train} | {s: _split(task_name, s, seen) for s in ("dev", "test")}


def _split(task_name: str, split: str, seen: frozenset[str]) -> tuple[TextExample, ...]:
    """Draw until there are enough examples that are new and share no sentence with `seen`."""
    rng = random.Random(f"jaxlora demo {task_name} {split}")  # text seeds are stable
    grammar = GRAMMARS[task_name]
    rows: dict[tuple[str, str], TextExample] = {}
    while len(rows) < SIZES[split]:
        first, second, label = grammar(rng, split == "train")
        if (first, second) in rows or first in seen or second in seen:
            continue
        rows[first, second] = TextExample(f"{split}-{len(rows)}", first, second, label)
    return tuple(rows.values())
