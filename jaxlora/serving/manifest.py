"""A bank's manifest, `bank.json`: read, checked, signed and written.

format      a whole number; a newer jaxlora's is refused, an older one's is upgraded when read
base, fingerprint, pooling, max_length, dtype
            of the base model, and how sentences become vectors
tasks       name → the task, its adapter and its head (names of folders), scores and versions
adapters    name of a folder → the LoraConfig of what is in it
checksum    sha256 of all the rest
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlora.data.task_files import check_name
from jaxlora.lora import LoraConfig
from jaxlora.serving.task_models import OF_BASE, TaskModels, check_plain, of_base, upgrade_base
from jaxlora.tasks.task import Task
from jaxlora.utils import files
from jaxlora.utils.errors import UserError
from jaxlora.utils.schema import build

NAME = "bank.json"
ADAPTERS, HEADS = "adapters", "heads"
FORMAT = 2
_FIELDS = {"format", *OF_BASE, "tasks", "adapters", "checksum"}
_TASK_FIELDS = {"task", "adapter", "head", "pair_features", "facts"}
_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")  # tasks joined by +, and a checksum


def exist(folder: Path) -> bool:
    """Whether a folder has one, sound or not."""
    return (folder / NAME).exists()


def stamp(folder: Path) -> tuple[int, int]:
    """What differs between any two manifests that a bank has had.

    Raises:
      UserError: if it has none.
    """
    try:
        found = (folder / NAME).stat()
    except OSError:
        raise UserError(f"{folder}: is no bank, it has no {NAME}; make one with bank add") from None
    return found.st_ino, found.st_mtime_ns


def empty(source: TaskModels) -> dict[str, Any]:
    """That of a new bank, for what has been trained on a base."""
    return {"format": FORMAT, **of_base(source), "tasks": {}, "adapters": {}}


def read(folder: Path) -> dict[str, Any]:
    """The manifest, checked.

    Raises:
      UserError: naming what is wrong with it.
    """
    stamp(folder)
    path = folder / NAME
    manifest = files.read_json(path)
    if not isinstance(manifest, dict) or type(manifest.get("format")) is not int:
        raise UserError(f"{path}: not a bank's manifest; put back a copy")
    if manifest["format"] > FORMAT:
        raise UserError(
            f"{path}: format {manifest['format']} is newer than this jaxlora's {FORMAT}; update it"
        )
    try:
        if manifest != signed(manifest):
            raise ValueError("its checksum is another")
        manifest = _upgrade(manifest)
        _check_manifest(manifest)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: was changed by hand or damaged ({error}); put back a copy"
        ) from error
    return manifest


def _upgrade(manifest: dict[str, Any]) -> dict[str, Any]:
    """Bring an older format's manifest to the present one.

    Format 1 knew the base by its weights alone.
    """
    if manifest["format"] == 1:
        return upgrade_base(manifest) | {"format": FORMAT}
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    if manifest.keys() != _FIELDS:
        raise ValueError(f"fields {', '.join(sorted(manifest.keys() ^ _FIELDS))}")
    check_plain(manifest)
    for stored, plain in manifest["adapters"].items():
        check_folder(stored)
        build(LoraConfig, plain)
    for name, entry in manifest["tasks"].items():
        check_name(name, "tasks")
        if entry.keys() != _TASK_FIELDS:
            raise ValueError(f"fields of {name}: {', '.join(entry.keys() ^ _TASK_FIELDS)}")
        check_plain(entry)
        task = build(Task, entry["task"])
        if task.name != name:
            raise ValueError(f"task {name} is called {task.name}")
        if entry["adapter"] is not None and entry["adapter"] not in manifest["adapters"]:
            raise ValueError(f"adapter {entry['adapter']!r} of {name} is not described")
        if entry["head"] is not None:
            check_folder(entry["head"])
        elif task.outputs:
            raise ValueError(f"{name} needs a head and has none")


def check_folder(name: str) -> None:
    """Refuse what is not the name of a folder, and of nothing above or below it.

    Raises:
      UserError: if it is not.
    """
    if not _FOLDER.fullmatch(name):
        raise UserError(f"{name!r} is not the name of a folder in the bank")


def write(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Put a signed manifest in the old one's place, at once."""
    files.write_json(folder / NAME, signed(manifest))


def signed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with the checksum of the rest of it."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    text = json.dumps(rest, sort_keys=True, ensure_ascii=False)
    return rest | {"checksum": hashlib.sha256(text.encode()).hexdigest()}


def used(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The folders in use, as (part, name)."""
    heads = [entry["head"] for entry in manifest["tasks"].values() if entry["head"] is not None]
    return [*((ADAPTERS, name) for name in manifest["adapters"]), *((HEADS, h) for h in heads)]
