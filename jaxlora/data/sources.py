"""Sources of examples: the demo grammars, CS224N files, public releases, and the user's tables."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlora.data import cs224n, demo, official, tables
from jaxlora.data.raw_examples import TextExample
from jaxlora.data.sheet import Sheet
from jaxlora.data.tables import Table
from jaxlora.tasks.task import Task
from jaxlora.utils.errors import ConfigError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

Splits = dict[str, list[TextExample]]
Location = Path | Table | None  # a folder for `cs224n`, a table for `files`, None for the others


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of examples.

    Attributes:
      content: `(task, location) → bytes` that identify the rows, for the cache key.
      read: `(task, location, download manager) → rows by split`.
      sheets: `(task, location) → files by split`; empty for sources without user files.
      prepared: whether TFDS prepares and caches the rows.
    """

    content: Callable[[Task, Any], bytes]
    read: Callable[[Task, Any, tfds.download.DownloadManager | None], Splits]
    sheets: Callable[[Task, Any], dict[str, Sheet]] = lambda *_: {}
    prepared: bool = True


def _digest(paths: Iterable[Path]) -> bytes:
    """Return the concatenated SHA-256 digests of files, and of the files in folders."""
    parts = [sorted(path.rglob("*")) if path.is_dir() else [path] for path in paths]
    each = [path for part in parts for path in part if not path.is_dir()]
    return b"".join(map(_digest_of, each))


def _digest_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _table_content(task: Task, table: Table) -> bytes:
    for sheet in table.open().values():
        next(sheet.rows(), None)  # raises a UserError with the path if the file cannot be read
    read_as = (task.kind, task.pair, task.low, task.high, task.classes, table.columns)
    separated = (task.label_delimiter,) if task.form == "classes" else ()
    held_out = (table.dev,) if isinstance(table.dev, float) else ()
    parts = (*read_as, *separated, table.delimiter, table.quoting, *held_out)
    return repr(parts).encode() + _digest(table.files.values())


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
        lambda _, table: table.open(),
        prepared=False,
    ),
}
# Increase this when a reader changes the rows that it returns for the same bytes.
READERS = "3"


def fingerprint(task: Task, source: str, location: Location) -> str:
    """Return the key of a task's rows, `<source>-<sha256 prefix>`, without importing TFDS.

    Args:
      task: the task.
      source: `demo`, `cs224n`, `official` or `files`.
      location: see `Location`; ignored by sources that need none.

    Raises:
      UserError: if the source is unknown, or files are missing.
    """
    if source not in SOURCES:
        raise ConfigError("source", f"unknown; choose from {', '.join(SOURCES)}.", source)
    content = SOURCES[source].content(task, location)
    return f"{source}-{hashlib.sha256(READERS.encode() + content).hexdigest()[:16]}"


def notes(task: Task, source: str, location: Location) -> dict[str, list[str]]:
    """Return notes on how a task's files are read, by split.

    Raises:
      UserError: if a file cannot be read.
    """
    return tables.notes(SOURCES[source].sheets(task, location))


def where(task: Task, source: str, location: Location, split: str) -> str:
    """Return the name of a split for messages: its file, else its source, task and split."""
    files: Mapping[str, str | Path] = {}
    if isinstance(location, Table):
        files = {"dev": location.train, **location.files}  # dev may be held out from train
    elif source == "cs224n":
        files = cs224n.files(task, location)  # a folder here
    return str(files.get(split, f"{source} {task.name} {split}"))


def load_rows(task: Task, source: str, location: Location, cache: Path) -> tuple[Splits, str]:
    """Load the rows by split (`train`, `dev`, `test`) and the fingerprint of the content.

    Rows of a source with `prepared` are cached as a TFDS dataset by the first call.

    Args:
      task: the task.
      source: `demo`, `cs224n`, `official` or `files`.
      location: see `Location`; ignored by sources that need none.
      cache: cache folder; TFDS uses its subfolder `tfds`.

    Raises:
      UserError: if the source is invalid.
    """
    name, chosen = fingerprint(task, source, location), SOURCES[source]
    if not chosen.prepared:
        return chosen.read(task, location, None), name
    from jaxlora.data.builders import BUILDERS, SourceConfig, load

    read = functools.partial(chosen.read, task, location)
    splits = load(BUILDERS[task.name], SourceConfig(name=name, read=read), cache / "tfds")
    return {split: list(splits[split]) for split in ("train", "dev", "test")}, name
