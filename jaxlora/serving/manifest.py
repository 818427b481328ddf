"""A bank's manifest, `bank.json`: its types, reader and writer.

Besides the fields of `Manifest`, the file has `format`, an integer (newer formats are refused,
older ones are upgraded on reading), and `checksum`, the sha256 of everything else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxlora.data.task_files import check_name
from jaxlora.lora import LoraConfig
from jaxlora.serving.task_models import BaseSpec, Facts, PairFeatures, TaskModels, upgrade
from jaxlora.tasks.task import Task
from jaxlora.utils import files, schema
from jaxlora.utils.errors import UserError, list_some, suggestion

NAME = "bank.json"
ADAPTERS, HEADS = "adapters", "heads"
FORMAT = 6
_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")  # task names joined by +, and a checksum
_CHANGED = "it was changed by hand or damaged; restore a backup"
Stamp = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class TaskEntry:
    """A task in a bank.

    Attributes:
      task: its definition.
      adapter: folder of its encoder tree; None: the frozen base.
      head: folder of its head; None: the task has none.
      pair_features: see `heads.pair_vector`.
      facts: its origin and scores.
    """

    task: Task
    adapter: str | None
    head: str | None
    pair_features: PairFeatures
    facts: Facts


@dataclasses.dataclass(frozen=True)
class Size:
    """The size of a stored tree: number of parameters, and bytes on disk."""

    parameters: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Manifest(BaseSpec):
    """The contents of a bank.

    Attributes:
      tasks: task name → entry.
      adapters: folder of an encoder tree → its LoRA configuration; None: a full encoder.
      history: task name → its earlier versions, the oldest first.
      sizes: folder of a tree, such as `heads/sst-…` → its size; empty in format 2 and older.

    Raises:
      ValueError: for an invalid name, or a task without the trees that it needs.
    """

    tasks: dict[str, TaskEntry]
    adapters: dict[str, LoraConfig | None]
    history: dict[str, tuple[TaskEntry, ...]] = dataclasses.field(default_factory=dict)
    sizes: dict[str, Size] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for _, folder in self.folders():
            check_folder(folder)
        for name, entry in self.versions():
            if check_name(name, "tasks") != entry.task.name:
                raise ValueError(f"task {name} is called {entry.task.name!r}")
            if entry.adapter is not None and entry.adapter not in self.adapters:
                raise ValueError(f"adapter {entry.adapter!r} of {name} is not described")
            if entry.head is None and entry.task.outputs:
                raise ValueError(f"{name} needs a head and has none")

    def versions(self) -> Iterator[tuple[str, TaskEntry]]:
        """Yield the name and entry of all versions of all tasks, the current ones first."""
        yield from self.tasks.items()
        for name, earlier in self.history.items():
            yield from ((name, entry) for entry in earlier)

    @property
    def used(self) -> set[str]:
        """The adapters of the current versions."""
        return {one.adapter for one in self.tasks.values() if one.adapter is not None}

    def folders(self) -> Iterator[tuple[str, str]]:
        """Yield each folder of the bank once, as (part, name)."""
        heads = {one.head: None for _, one in self.versions() if one.head is not None}
        yield from ((ADAPTERS, name) for name in self.adapters)
        yield from ((HEADS, name) for name in heads)

    def find(self, folder: Path, name: str) -> TaskEntry:
        """Return a task's entry.

        Raises:
          UserError: if no task has that name.
        """
        if name not in self.tasks:
            raise UserError(
                f"{folder}: no task {name!r}; it has {list_some(self.tasks) or 'none'}"
                f"{suggestion(name, self.tasks)}"
            )
        return self.tasks[name]


def exist(folder: Path) -> bool:
    """Return whether a folder has a manifest, valid or not."""
    return (folder / NAME).exists()


def stamp(folder: Path) -> Stamp:
    """Return the inode and mtime of a bank's manifest, which change with every write.

    Raises:
      UserError: if there is no manifest.
    """
    try:
        found = (folder / NAME).stat()
    except OSError:
        raise UserError(f"{folder}: not a bank, it has no {NAME}; make one with bank add") from None
    return found.st_ino, found.st_mtime_ns


def empty(source: TaskModels) -> Manifest:
    """Return the manifest of a new bank for the base of `source`, without tasks."""
    return Manifest(**source.base_spec(), tasks={}, adapters={})


def read(folder: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
      UserError: if it is missing, damaged or of a newer format.
    """
    stamp(folder)
    path = folder / NAME
    values = files.read_json(path)
    if not isinstance(values, dict) or type(values.get("format")) is not int:
        raise UserError(f"{path}: not a bank's manifest; restore a backup")
    if values["format"] > FORMAT:
        raise UserError(
            f"{path}: format {values['format']} is newer than this jaxlora's {FORMAT}; update it"
        )
    try:
        sound = values == signed(values)
    except RecursionError:
        sound = False
    if not sound:
        raise UserError(f"{path}: does not match its own checksum; {_CHANGED}")
    return schema.parse(Manifest, _upgrade(values), path, _CHANGED)


def _upgrade(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a manifest, upgraded from older formats."""
    fields = {key: value for key, value in values.items() if key not in ("format", "checksum")}
    if values["format"] == FORMAT:
        return fields
    tasks = fields.get("tasks")
    if isinstance(tasks, dict):
        fields["tasks"] = {k: upgrade(v) if isinstance(v, dict) else v for k, v in tasks.items()}
    return upgrade(fields)


def folder_name(name: str) -> str:
    """Return the folder name of a tree before its checksum: ASCII, at most 40 characters.

    >>> folder_name("sst+sts"), folder_name("тема-2")
    ('sst+sts', 'x-2')
    """
    return re.sub(r"[^\x00-\x7f]+", "x", name)[:40]


def check_folder(name: str) -> None:
    """Refuse what is not a plain folder name, such as a path.

    Raises:
      UserError: if it is not one.
    """
    if not _FOLDER.fullmatch(name):
        raise UserError(f"{schema.shown(name)} is not the name of a folder in the bank")


def write(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest atomically, with its checksum."""
    files.write_json(folder / NAME, signed({"format": FORMAT, **schema.plain(Manifest, manifest)}))


def signed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain values of a manifest with their checksum."""
    rest = {key: value for key, value in values.items() if key != "checksum"}
    text = json.dumps(rest, sort_keys=True, ensure_ascii=False)
    return rest | {"checksum": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()}
