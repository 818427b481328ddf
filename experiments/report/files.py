"""Readers and validators of the JSON files of a root folder and its runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlora.serving import finished_run
from jaxlora.tasks.sharing import Adapt, Groups, group_name
from jaxlora.tasks.task import NAMES
from jaxlora.training import run_folder
from jaxlora.utils import files, schema
from jaxlora.utils.errors import UserError

RETRAIN = "train the run again"
ASIDE = "repair it, or move it away"
# Field → type, see `schema.build`.
_PLAN = {"studies": tuple[str, ...], "seeds": tuple[int, ...]}
_STEP = dict.fromkeys(("low", "median", "high"), float)
_SETTINGS = {
    "variant": str, "adapt": Adapt, "groups": Groups, "preset": str, "source": str, "base": str,
    "dtype": str, "rank": int, "batch_size": int, "learning_rate": float,
    "head_learning_rate": float,
}  # fmt: skip
_RESULT = {"dev_mean": float, "train_seconds": float}
_DEV = dict.fromkeys(NAMES, float)
_PARAMETERS = dict.fromkeys(("base", "encoder", "heads", "incremental", "bundled"), int)
_GROUP = {"step": int, "best_step": int, "seconds": float}


def read_plan(path: Path) -> dict[str, Any]:
    """Read `plan.json`, see `reproduce.write_plan`; an empty plan if there is none.

    Raises:
      UserError: if it is broken.
    """
    if not path.exists():
        return {"studies": [], "seeds": [], "commands": {}, "failed": {}}
    plan = files.read_object(path)
    _check(plan, _PLAN, path, remedy=ASIDE)
    for part in ("commands", "failed"):
        texts = plan.setdefault(part, {})
        _check(texts, {}, path, part, ASIDE)
        _check(texts, dict.fromkeys(texts, str), path, part, ASIDE)
    return plan


def read_timing(path: Path) -> dict[str, Any]:
    """Read `timing.json`, see `timing.measure`; `{}` if there is none.

    Raises:
      UserError: if it is broken.
    """
    if not path.exists():
        return {}
    timing = files.read_object(path)
    _check(timing.get("machine", {}), {}, path, "machine", ASIDE)
    _check(timing.get("studies"), {}, path, "studies", ASIDE)
    for name, study in timing["studies"].items():
        _check(study, {}, path, name, ASIDE)
        _check(study.get("ms_per_step"), _STEP, path, f"{name}: ms_per_step", ASIDE)
    return timing


def read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the settings and versions of a run.

    Raises:
      UserError: if its `config.json` is missing or broken.
    """
    path, config = folder / finished_run.CONFIG, finished_run.read_config(folder)
    settings, versions = config["settings"], config.get("versions", {})
    _check(settings, _SETTINGS, path, "settings")
    _check(versions, {}, path, "versions")
    if sorted(name for group in settings["groups"] for name in group) != sorted(NAMES):
        raise UserError(
            f"{path}: its tasks are not {', '.join(NAMES)}; the report compares runs of all three, "
            "so keep it in a root of its own"
        )
    return settings, versions


def read_result(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Read a run's `result.json`.

    Raises:
      UserError: if it is missing or broken.
    """
    path = folder / finished_run.RESULT
    result: dict[str, Any] = run_folder.read_json(path)
    _check(result, _RESULT, path)
    for part, fields in (("dev", _DEV), ("parameters", _PARAMETERS), ("groups", {})):
        _check(result.get(part), fields, path, part)
    for name in map(group_name, settings["groups"]):
        _check(result["groups"].get(name), _GROUP, path, f"groups: {name}")
    return result


def model_bytes(folder: Path) -> int:
    """Return the bytes on disk of a run's trained model.

    Raises:
      UserError: if it is not there.
    """
    model = folder / finished_run.MODEL
    size = sum(path.stat().st_size for path in model.rglob("*") if path.is_file())
    if not size:
        raise UserError(f"{model}: missing or empty, so its size is unknown; {RETRAIN}")
    return size


def _check(
    value: Any, fields: Mapping[str, Any], path: Path, part: str = "", remedy: str = RETRAIN
) -> None:
    """Refuse a value that is not an object with these fields; others are allowed."""
    where = f"{path}: {part}: " if part else f"{path}: "
    if not isinstance(value, Mapping):
        raise UserError(f"{where}not a JSON object; {remedy}")
    for name, hint in fields.items():
        try:
            schema.build(hint, value.get(name))
        except ValueError as error:
            raise UserError(f"{where}{name}: {error}; {remedy}") from error
