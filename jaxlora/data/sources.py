"""Where rows come from: the demo grammar, a folder of TSV files, the public releases, or tables."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlora.data import cs224n, demo, official, tables
from jaxlora.data.raw_examples import TextExample
from jaxlora.data.tables import Table
from jaxlora.tasks.task import Task
from jaxlora.utils.errors import UserError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

Splits = dict[str, list[TextExample]]
Location = Path | Table | None  # the folder of `cs224n`, the table of `files`; others need none


@dataclasses.dataclass(frozen=True)
class Source:
    """A source as data.

    Attributes:
      content: `(task, place) -> bytes` that change whenever the rows would.
      read: `(task, place, download manager) -> rows by split`.
      sheets: `(task, place) -> files by split`; none where there are no files of the user's.
      prepared: whether TFDS prepares and keeps the rows.
    """

    content: Callable[[Task, Any], bytes]
    read: Callable[[Task, Any, tfds.download.DownloadManager | None], Splits]
    sheets: Callable[[Task, Any], dict[str, tables.Sheet]] = lambda *_: {}
    prepared: bool = True


def _digest(paths: Iterable[Path]) -> bytes:
    return b"".join(hashlib.sha256(path.read_bytes()).digest() for path in paths)


def _table_content(task: Task, table: Table) -> bytes:
    for path in table.files.values():
        tables.read_text(path)  # an error that names it, if it cannot be read
    read_as = (task.kind, task.pair, task.low, task.high, task.classes, table.columns)
    return repr((*read_as, table.delimiter, table.quoting)).encode() + _digest(table.files.values())


SOURCES = {
    "demo": Source(
        lambda task, _: json.dumps(demo.read(task.name)).encode(),
        lambda task, _, __: demo.read(task.name),
    ),
    "cs224n": Source(
        lambda task, folder: _digest(cs224n.files(task, folder).values()),
        lambda task, folder, _: cs224n.read_splits(task, folder),
        cs224n.sheets,
    ),
    "official": Source(
        lambda task, _: official.key(task).encode(),
        lambda task, _, manager: official.read(task, manager),
    ),
    "files": Source(
        _table_content,
        lambda task, table, _: tables.read_splits(task, table),
        lambda _, table: tables.load_sheets(table.files, table.delimiter, table.quoting),
        prepared=False,
    ),
}
# Raise this when a reader gives other rows for the same bytes.
READERS = "3"


def fingerprint(task: Task, source: str, place: Location) -> str:
    """Name of the content, `<source>-<sha256 prefix>`, found without importing TFDS.

    Args:
      task: whose rows.
      source: `demo`, `cs224n`, `official` or `files`.
      place: see `Location`; what a source does not need, it ignores.

    Raises:
      UserError: unknown source, or files missing.
    """
    if source not in SOURCES:
        raise UserError(f"--source: no source {source!r}; choose from {', '.join(SOURCES)}.")
    content = SOURCES[source].content(task, place)
    return f"{source}-{hashlib.sha256(READERS.encode() + content).hexdigest()[:16]}"


def notes(task: Task, source: str, place: Location) -> dict[str, list[str]]:
    """What must be known of how a task's files are read, by split.

    Raises:
      UserError: if one cannot be read.
    """
    return tables.notes(SOURCES[source].sheets(task, place))


def where(task: Task, source: str, place: Location, split: str) -> str:
    """What to call a split in a message: its file, or its name."""
    files = place.files if isinstance(place, Table) else {}
    if source == "cs224n":
        files = cs224n.files(task, place)  # type: ignore[arg-type]  # its place is a folder
    return str(files.get(split, f"{source} {task.name} {split}"))


def load_rows(task: Task, source: str, place: Location, cache: Path) -> tuple[Splits, str]:
    """Rows by split (`train`, `dev`, `test`) and the content's fingerprint.

    The TFDS dataset is prepared on the first call and read from the cache after that.

    Args:
      task: whose rows.
      source: `demo`, `cs224n`, `official` or `files`.
      place: see `Location`; what a source does not need, it ignores.
      cache: the folder under which TFDS keeps its files.

    Raises:
      UserError: anything wrong with the source.
    """
    name, chosen = fingerprint(task, source, place), SOURCES[source]
    if not chosen.prepared:
        return chosen.read(task, place, None), name
    from jaxlora.data.builders import BUILDERS, SourceConfig, load

    read = functools.partial(chosen.read, task, place)
    splits = load(BUILDERS[task.name], SourceConfig(name=name, read=read), cache / "tfds")
    return {split: list(splits[split]) for split in ("train", "dev", "test")}, name
