"""Where rows come from: the demo grammar, a folder of TSV files, or the public releases."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from jaxlora.data import cs224n, demo, official
from jaxlora.data.rows import Row
from jaxlora.errors import UserError
from jaxlora.tasks import Task

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

Splits = dict[str, list[Row]]


@dataclasses.dataclass(frozen=True)
class Source:
    """A source as data.

    Attributes:
      content: `(task, data_dir) -> bytes` that change whenever the rows would.
      read: `(task, data_dir, download manager) -> rows by split`.
    """

    content: Callable[[Task, Path | None], bytes]
    read: Callable[[Task, Path | None, tfds.download.DownloadManager], Splits]


def _file_bytes(task: Task, data_dir: Path | None) -> bytes:
    paths = cs224n.files(task, data_dir).values()
    return b"".join(hashlib.sha256(path.read_bytes()).digest() for path in paths)


def _read_files(task: Task, data_dir: Path | None, _: tfds.download.DownloadManager) -> Splits:
    paths = cs224n.files(task, data_dir)
    return {s: cs224n.read(task, path, labelled=s != "test") for s, path in paths.items()}


SOURCES = {
    "demo": Source(
        lambda task, _: json.dumps(demo.read(task.name)).encode(),
        lambda task, _, __: demo.read(task.name),
    ),
    "cs224n": Source(_file_bytes, _read_files),
    "official": Source(
        lambda task, _: official.key(task).encode(),
        lambda task, _, manager: official.read(task, manager),
    ),
}
# Raise this when a reader gives other rows for the same bytes.
READERS = "1"


def fingerprint(task: Task, source: str, data_dir: Path | None) -> str:
    """Name of the content, `<source>-<sha256 prefix>`, found without importing TFDS.

    Args:
      task: one of the three tasks.
      source: `demo`, `cs224n` or `official`.
      data_dir: the folder of `cs224n`; others ignore it.

    Raises:
      UserError: unknown source, or files missing.
    """
    if source not in SOURCES:
        raise UserError(f"--source: no source {source!r}; choose from {', '.join(SOURCES)}.")
    content = SOURCES[source].content(task, data_dir)
    return f"{source}-{hashlib.sha256(READERS.encode() + content).hexdigest()[:16]}"


def load_rows(task: Task, source: str, data_dir: Path | None, cache: Path) -> tuple[Splits, str]:
    """Rows by split (`train`, `dev`, `test`) and the content's fingerprint.

    The TFDS dataset is prepared on the first call and read from the cache after that.

    Args:
      task: one of the three tasks.
      source: `demo`, `cs224n` or `official`.
      data_dir: the folder of `cs224n`; others ignore it.
      cache: the folder under which TFDS keeps its files.

    Raises:
      UserError: anything wrong with the source.
    """
    name = fingerprint(task, source, data_dir)
    from jaxlora.data.builders import BUILDERS, SourceConfig, load

    read = functools.partial(SOURCES[source].read, task, data_dir)
    splits = load(BUILDERS[task.name], SourceConfig(name=name, read=read), cache / "tfds")
    return {split: list(splits[split]) for split in ("train", "dev", "test")}, name
