"""The folder of a run, as far as prediction knows it: a run keeps what it trained as a bank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxlora.serving import manifest
from jaxlora.utils import files
from jaxlora.utils.errors import UserError

CONFIG, RESULT, MODEL = "config.json", "result.json", "model"
PARTS = ("settings", "inputs")  # of the config


def exists(folder: Path) -> bool:
    """Return whether a folder is a run's, finished or not."""
    return (folder / CONFIG).exists()


def find_bank(folder: Path) -> Path:
    """Return the bank in a folder: the folder itself, or a finished run's `model`.

    Raises:
      UserError: if there is none.
    """
    if manifest.exist(folder):
        return folder
    if manifest.exist(folder / MODEL):
        return folder / MODEL
    if not exists(folder):
        raise UserError(f"{folder}: neither a bank nor a finished run; name one")
    if (folder / RESULT).exists():
        raise UserError(f"{folder}: is a run of an older jaxlora; put it into a bank with bank add")
    raise UserError(
        f"{folder}: the run is not finished, it has no {MODEL}/{manifest.NAME} yet; resume it"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Read a run's `config.json`.

    Raises:
      UserError: if it is missing, broken, or not a run's.
    """
    path = folder / CONFIG
    if not path.exists():
        raise UserError(f"{path}: missing; is {folder} the folder of a run?")
    config = files.read_json(path)
    parts = [config.get(part) for part in PARTS] if isinstance(config, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{path}: not the config of a jaxlora run; name another folder")
    return dict(config)
