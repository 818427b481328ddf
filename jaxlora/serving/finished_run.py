"""The parts of a run folder that serving needs: its config and the bank in `model`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxlora.serving import manifest
from jaxlora.utils import files
from jaxlora.utils.errors import UserError

CONFIG, RESULT, MODEL = "config.json", "result.json", "model"
PARTS = ("settings", "inputs")  # required parts of the config


def exists(folder: Path) -> bool:
    """Return whether a folder is that of a run, finished or not."""
    return (folder / CONFIG).exists()


def find_bank(folder: Path) -> Path:
    """Return the folder of the bank: `folder` itself, or the `model` of a finished run.

    Raises:
      UserError: if there is no bank.
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
