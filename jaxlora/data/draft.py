"""Draft of a task file: the findings of a survey as commented TOML."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from jaxlora.data import hub
from jaxlora.data.labels import DELIMITER
from jaxlora.data.survey import Survey
from jaxlora.data.task_files import DEV_SHARE
from jaxlora.tasks.kinds import KINDS
from jaxlora.utils.errors import list_some

HEAD = "# Drafted from the data: read each line, then run `jaxlora train` on this file."
PAIR = (
    'one vector per text; "joint" reads both texts together, for bases not trained for sentence '
    "vectors and for relations such as entailment"
)
UNEVEN = 3  # ratio of the largest to the smallest class from which a remark is made
FEW = 10  # classes with fewer rows than this get a remark
_BARE = re.compile(r"[A-Za-z0-9_-]+")  # the names that TOML allows without quotes


def draft(found: Mapping[str, Survey], folder: Path, max_length: int) -> str:
    """Return the text of a task file.

    Args:
      found: task name → survey of its tables.
      folder: folder of the task file; paths in it are relative to this. Addresses of Hub datasets
        are kept unchanged.
      max_length: maximum number of tokens of a sentence in training.
    """
    tasks = ("\n".join(_lines(name, one, folder, max_length)) for name, one in found.items())
    return "\n\n".join((HEAD, *tasks)) + "\n"


def _lines(name: str, found: Survey, folder: Path, max_length: int) -> Iterator[str]:
    yield f"[{name if _BARE.fullmatch(name) else _text(name)}]"
    yield _comment(f"Columns: {', '.join(found.header)}.")
    yield from map(_comment, remarks(found, max_length))
    text = found.text[0] if len(found.text) == 1 else found.text
    yield f"text = {_text(text)}  {_comment(_describe_lengths(found, max_length))}"
    if len(found.text) == 2:
        yield f"pair = {_text('separate')}  {_comment(PAIR)}"
    yield f"label = {_text(found.label)}"
    yield from _describe_labels(found)
    for split, path in found.files.items():
        yield f"{split} = {_text(_location(path, folder))}  # rows: {len(found.rows[split]):,}"
    if "dev" not in found.files:
        of = "of each class" if found.labels.counts else "of the rows"
        yield f"dev = {DEV_SHARE}  # this share {of} is held out of train, the same at every run"


def _location(path: Path, folder: Path) -> str:
    """Return the address of a Hub dataset unchanged, any other path relative to a folder."""
    if str(path).startswith(hub.PREFIX):
        return str(path)
    return os.path.relpath(path.absolute(), folder.absolute())


def remarks(found: Survey, max_length: int) -> Iterator[str]:
    """Yield remarks on the data: other columns, gaps, duplicates, uneven classes, long texts."""
    counts = found.labels.counts
    for what, names in (
        ("Other columns of text", found.other_texts),
        ("Other columns that may be labels", found.other_labels),
        ("Labels that are not numbers in a column of numbers", found.labels.odd),
    ):
        if names:
            yield f"{what}: {list_some(names)}."
    if found.labels.missing and found.lists:
        yield (
            f"Rows with null for a list: {found.labels.missing:,}; write [] where there is no "
            "label (training refuses null)."
        )
    elif found.labels.missing:
        yield f"Rows without a label, which are left out: {found.labels.missing:,}."
    if found.blank:
        yield f"Rows with a blank text, which are left out: {found.blank:,}."
    if found.repeated:
        yield f"Training rows that repeat the text of an earlier row: {found.repeated:,}."
    if found.contradicted:
        yield f"Training texts with more than one label: {found.contradicted:,}."
    for split in ("dev", "test"):
        if split in found.files and (leaked := found.leaked(split)):
            yield f"Rows of {split} whose text is also in train: {leaked:,}; scores mislead."
    if counts and max(counts.values()) >= UNEVEN * min(counts.values()):
        weighted = KINDS[found.labels.kind].form == "class"
        yield (
            f"Classes are uneven, {max(counts.values()):,} to {min(counts.values()):,} rows: "
            'metric = "macro_f1" weights all classes equally'
            + (', class_weights = "balanced" does so in training.' if weighted else ".")
        )
    if rare := [name for name, count in counts.items() if count < FEW]:
        yield f"Fewer than {FEW} rows: {', '.join(rare[:10])}."
    if found.cut(max_length) > 0:
        yield f"{found.cut(max_length):.1%} of the texts are cut; for more, raise max_length."


def _describe_labels(found: Survey) -> Iterator[str]:
    labels = found.labels
    if labels.range is not None:
        other = ', or "similarity": the cosine of two vectors' if len(found.text) == 2 else ""
        yield f"kind = {_text(labels.kind)}  # scores{other}"
        yield f"range = {list(labels.range)}  # lowest and highest in the data"
        return
    if KINDS[labels.kind].form == "classes":
        yield from _describe_sets(found)
        return
    positive = f"; {labels.classes[1]} is the positive class" if KINDS[labels.kind].positive else ""
    counts = ", ".join(f"{name} {count:,}" for name, count in labels.counts.items())
    yield f"kind = {_text(labels.kind)}  {_comment(f'{len(labels.counts)} classes{positive}')}"
    yield _comment(f"Rows of all files: {counts}.")
    yield f"classes = {_text(labels.classes)}"


def _describe_sets(found: Survey) -> Iterator[str]:
    labels, several = found.labels, not isinstance(found.label, str)
    if found.lists:
        yield "# Each label is a list of names."
    yield f"kind = {_text(labels.kind)}  # any number of {len(labels.counts)} classes"
    counts = ", ".join(f"{name} {count:,}" for name, count in labels.counts.items())
    yield _comment(f"Rows of all files: {counts}; without any {labels.empty:,}.")
    if not several and not found.lists:
        yield f"label_delimiter = {_text(DELIMITER)}"
    if not several:
        yield f"classes = {_text(labels.classes)}"
    yield 'threshold = "dev"  # for each class, chosen on the dev set; or a probability'


def _describe_lengths(found: Survey, max_length: int) -> str:
    if not len(found.lengths):
        return "no text"
    middle, longest = np.median(found.lengths), found.lengths.max()
    return (
        f"{middle:.0f} tokens (median), {longest:,} at most; "
        f"{found.cut(max_length):.1%} are longer than {max_length}"
    )


def _comment(text: str) -> str:
    """Return a one-line comment; TOML does not allow control characters in comments."""
    return "# " + "".join(c if c.isprintable() else " " for c in text)


def _text(value: str | tuple[str, ...]) -> str:
    """Return a string or a list of strings as TOML, whose syntax is the same as JSON's here."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
