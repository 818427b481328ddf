"""Reads the tab-separated files of the Stanford CS224N default project."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

from jaxlora.data.rows import UNLABELLED, Row, check, parse_label
from jaxlora.errors import UserError
from jaxlora.tasks import Task


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a task's files are named and which columns they have."""

    stem: str
    sentences: tuple[str, ...]
    label: str


LAYOUTS = {
    "sst": Layout("ids-sst", ("sentence",), "sentiment"),
    "para": Layout("quora", ("sentence1", "sentence2"), "is_duplicate"),
    "sts": Layout("sts", ("sentence1", "sentence2"), "similarity"),
}
SUFFIXES = {"train": "train", "dev": "dev", "test": "test-student"}


def files(task: Task, folder: Path | None) -> dict[str, Path]:
    """Paths of a task's files by split: `train`, `dev` and the unlabelled `test`.

    Raises:
      UserError: no folder given, or the folder or a file is missing.
    """
    if folder is None:
        raise UserError(
            "--data-dir is missing: the source 'cs224n' reads its files from a folder. "
            "Pass --data-dir, or use the source 'demo', which needs no files."
        )
    if not folder.is_dir():
        raise UserError(f"--data-dir: {folder} is not a folder; check the path.")
    stem = LAYOUTS[task.name].stem
    paths = {split: folder / f"{stem}-{suffix}.csv" for split, suffix in SUFFIXES.items()}
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        raise UserError(
            f"--data-dir: {folder} has no {', '.join(missing)} (needed for {task.title}); "
            "put the file there or point --data-dir at the folder that has it."
        )
    return paths


def read(task: Task, path: Path, *, labelled: bool = True) -> list[Row]:
    """Read one file: tab-separated, standard csv quoting, UTF-8, columns found by name.

    Args:
      task: decides the columns and the range of the labels.
      path: the file.
      labelled: whether to read labels; without, every label is NaN.

    Raises:
      UserError: anything wrong with the file; the message names the line and the remedy.
    """
    lines = _lines(path)
    _, header = next(lines, (0, []))
    columns = _columns(task, header, path, labelled=labelled)
    rows = []
    for line, fields in lines:
        where = f"{path}:{line}"
        if len(fields) != len(header):
            raise UserError(
                f"{where}: {len(fields)} fields where the header has {len(header)}; "
                "separate the fields by single tabs and put a field that contains "
                'a tab or a line break in "double quotes".'
            )
        rows.append(_row(fields, columns, task, where))
    if not rows:
        raise UserError(f"{path} is empty: there is no example in it; replace the file.")
    return rows


def _text(path: Path) -> str:
    """The file's text; a byte order mark, as Excel writes it, is dropped."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8; save the file as UTF-8.") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(
            f"{path}:{line}: a NUL character; the file is damaged or not UTF-8 text: "
            "copy it again or save it as UTF-8."
        )
    return text


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the file's rows, blank lines left out, each with its last physical line."""
    # Strict: a quote in the wrong place is an error instead of swallowing the lines after it.
    reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter="\t", strict=True)
    while True:
        first = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # An open quote runs on until the next one: the mistake is where the row starts.
            raise UserError(
                f"{path}:{first}: {error} (reached line {reader.line_num}); "
                "look for a quote that is not closed: a field that starts with a double quote "
                "must end with one, and a double quote inside it is written twice."
            ) from None
        if fields:
            yield reader.line_num, fields


def _columns(task: Task, header: list[str], path: Path, *, labelled: bool) -> dict[str, int]:
    """Where each column stands: `id`, the sentences and, if labelled, the label."""
    layout = LAYOUTS[task.name]
    needed = ("id", *layout.sentences, *([layout.label] if labelled else []))
    missing = [name for name in needed if name not in header]
    if not header:
        raise UserError(f"{path} is empty: not even a header line; replace the file.")
    if missing:
        raise UserError(
            f"{path}:1: no column {', '.join(missing)}; found {', '.join(filter(None, header))}. "
            f"{task.title} needs a tab-separated header with {', '.join(needed)}."
        )
    return {name: header.index(name) for name in needed}


def _row(fields: list[str], columns: dict[str, int], task: Task, where: str) -> Row:
    layout = LAYOUTS[task.name]
    texts = [fields[columns[name]] for name in layout.sentences]
    written = columns.get(layout.label)
    label = UNLABELLED if written is None else parse_label(fields[written], task, where)
    second = texts[1] if task.pair else ""
    return check(Row(fields[columns["id"]], texts[0], second, label), task, where)
