"""A bank's manifest, `bank.json`: its types, and reading and writing it.

Beside the fields of `Manifest` the file has `format`, a whole number (a newer jaxlora's is refused,
an older one's is upgraded when it is read), and `checksum`, the sha256 of all the rest.
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
from jaxlora.utils.errors import UserError

NAME = "bank.json"
ADAPTERS, HEADS = "adapters", "heads"
FORMAT = 5
_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")  # tasks joined by +, and a checksum
_CHANGED = "it was changed by hand or damaged; put back a copy"
Stamp = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class TaskEntry:
    """A task in a bank.

    Attributes:
      task: what it is.
      adapter: folder of its encoder tree; None: the frozen base.
      head: folder of its head; None: it needs none.
      pair_features: see `heads.pair_vector`.
      facts: where it comes from.
    """

    task: Task
    adapter: str | None
    head: str | None
    pair_features: PairFeatures
    facts: Facts


@dataclasses.dataclass(frozen=True)
class Size:
    """What a stored tree takes: its number of parameters, and bytes on disk."""

    parameters: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Manifest(BaseSpec):
    """What a bank holds.

    Attributes:
      tasks: by name.
      adapters: folder of an encoder tree → its configuration; None: a whole fine-tuned encoder.
      history: task → its earlier versions, the oldest first.
      sizes: folder of a tree, such as `heads/sst-…` → its size; a bank of format 2 has none.

    Raises:
      ValueError: for a name that cannot be one, or a task without the trees that it needs.
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
        """Yield all versions of all tasks, the present ones first."""
        yield from self.tasks.items()
        for name, earlier in self.history.items():
            yield from ((name, entry) for entry in earlier)

    @property
    def used(self) -> set[str]:
        """The adapters that the present versions need."""
        return {one.adapter for one in self.tasks.values() if one.adapter is not None}

    def folders(self) -> Iterator[tuple[str, str]]:
        """Yield the folders that it names, as (part, name), each once."""
        heads = {one.head: None for _, one in self.versions() if one.head is not None}
        yield from ((ADAPTERS, name) for name in self.adapters)
        yield from ((HEADS, name) for name in heads)

    def find(self, folder: Path, name: str) -> TaskEntry:
        """Return a task's entry.

        Raises:
          UserError: if there is none of that name.
        """
        if name not in self.tasks:
            raise UserError(f"{folder}: no task {name!r}; it has {', '.join(self.tasks)}")
        return self.tasks[name]


def exist(folder: Path) -> bool:
    """Return whether a folder has a manifest, sound or not."""
    return (folder / NAME).exists()


def stamp(folder: Path) -> Stamp:
    """Return what differs between any two manifests that a bank has had.

    Raises:
      UserError: if it has none.
    """
    try:
        found = (folder / NAME).stat()
    except OSError:
        raise UserError(f"{folder}: is no bank, it has no {NAME}; make one with bank add") from None
    return found.st_ino, found.st_mtime_ns


def empty(source: TaskModels) -> Manifest:
    """Return the manifest of a new bank, for tasks that were trained on a base."""
    return Manifest(**source.base_spec(), tasks={}, adapters={})


def read(folder: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
      UserError: naming what is wrong with it.
    """
    stamp(folder)
    path = folder / NAME
    values = files.read_json(path)
    if not isinstance(values, dict) or type(values.get("format")) is not int:
        raise UserError(f"{path}: not a bank's manifest; put back a copy")
    if values["format"] > FORMAT:
        raise UserError(
            f"{path}: format {values['format']} is newer than this jaxlora's {FORMAT}; update it"
        )
    try:
        sound = values == signed(values)
    except RecursionError:
        sound = False
    if not sound:
        raise UserError(f"{path}: has another checksum than it says; {_CHANGED}")
    return schema.parse(Manifest, _upgrade(values), path, _CHANGED)


def _upgrade(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a manifest, of this format or an older one."""
    fields = {key: value for key, value in values.items() if key not in ("format", "checksum")}
    if values["format"] == FORMAT:
        return fields
    tasks = fields.get("tasks")
    if isinstance(tasks, dict):
        fields["tasks"] = {k: upgrade(v) if isinstance(v, dict) else v for k, v in tasks.items()}
    return upgrade(fields)


def folder_name(name: str) -> str:
    """Return how the folder of a tree begins: the tree's name in ASCII, cut; a checksum follows.

    >>> folder_name("sst+sts"), folder_name("тема-2")
    ('sst+sts', 'x-2')
    """
    return re.sub(r"[^\x00-\x7f]+", "x", name)[:40]


def check_folder(name: str) -> None:
    """Refuse what is not the name of a folder, and of nothing above or below it.

    Raises:
      UserError: if it is not.
    """
    if not _FOLDER.fullmatch(name):
        raise UserError(f"{schema.shown(name)} is not the name of a folder in the bank")


def write(folder: Path, manifest: Manifest) -> None:
    """Put a signed manifest in the old one's place, at once."""
    files.write_json(folder / NAME, signed({"format": FORMAT, **schema.plain(Manifest, manifest)}))


def signed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest's plain values with the checksum of the rest of them."""
    rest = {key: value for key, value in values.items() if key != "checksum"}
    text = json.dumps(rest, sort_keys=True, ensure_ascii=False)
    return rest | {"checksum": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()}
