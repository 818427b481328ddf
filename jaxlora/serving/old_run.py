"""Finished runs of an earlier jaxlora: one Orbax checkpoint, described by the settings.

config.json   settings (flat), inputs (checksums of the base and the data), versions
result.json   dev scores, and `model`, the checksum of the tree
model/        {"adapters": {group: tree}, "heads": {task: tree}}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlora.data.task_files import check_name
from jaxlora.formats.fingerprint import INPUTS
from jaxlora.lora import LoraConfig
from jaxlora.serving import manifest, tree_files
from jaxlora.serving.finished_run import CONFIG, MODEL, RESULT, read_config
from jaxlora.serving.task_models import BaseSpec, Facts, PairFeatures, TaskModel, TaskModels
from jaxlora.tasks.sharing import Adapt, Groups, group_name
from jaxlora.tasks.task import Task
from jaxlora.utils import files, schema, trees
from jaxlora.utils.errors import UserError

_CHANGED = "it was changed, or written by another version of jaxlora"
# Setting → field of `LoraConfig`, where the names differ.
_LORA = {"lora_dropout": "dropout"}


@dataclasses.dataclass(frozen=True)
class OldSettings(BaseSpec):
    """The settings and inputs that are read from such a run.

    Attributes:
      variant: the variant, for the facts of the tasks.
      adapt, groups: what was trained, and which tasks share it.
      pair_features: see `heads.pair_vector`.
      tasks: the tasks, in order.
      lora: the configuration of all adapters.

    Raises:
      ValueError: if the groups are not a partition of the tasks.
    """

    variant: str
    adapt: Adapt
    groups: Groups
    pair_features: PairFeatures
    tasks: tuple[Task, ...]
    lora: LoraConfig

    def __post_init__(self) -> None:
        names = [check_name(task.name, "tasks") for task in self.tasks]
        grouped = [name for group in self.groups for name in group]
        if sorted(grouped) != sorted(set(names)) or () in self.groups:
            raise ValueError("the groups are not a partition of the tasks")


def exists(folder: Path) -> bool:
    """Return whether a folder is a finished run whose `model` is not a bank."""
    there = all((folder / name).exists() for name in (CONFIG, RESULT, MODEL))
    return there and not manifest.exist(folder / MODEL)


def load(folder: Path) -> TaskModels:
    """Read the tasks of a finished run.

    Raises:
      UserError: naming what is damaged or unknown.
    """
    result = files.read_object(folder / RESULT)
    if "model" not in result:
        raise UserError(f"{folder / MODEL}: has lost its {manifest.NAME}; restore a backup")
    config = read_config(folder)
    settings = schema.parse(OldSettings, _nested(config), folder / CONFIG, _CHANGED)
    tree = tree_files.load(folder / MODEL)
    scores = _scores(folder, settings, result, trees.checksum(tree))
    owners = {name: group_name(group) for group in settings.groups for name in group}
    models = {}
    for task in settings.tasks:
        facts = {
            "dev": {task.metric: scores[task.name]},
            "data": config["inputs"].get(f"the data of {task.name}"),
            "variant": settings.variant,
            "versions": config.get("versions", {}),
        }
        # Orbax does not store empty trees.
        head = (tree.get("heads") or {}).get(task.name) or {}
        found = schema.parse(Facts, facts, folder / CONFIG, _CHANGED)
        models[task.name] = TaskModel(task, owners[task.name], head, settings.pair_features, found)
    kept = {name: (tree.get("adapters") or {}).get(name) or {} for name in owners.values()}
    if settings.adapt != "frozen" and not all(kept.values()):
        lost = ", ".join(name for name, one in kept.items() if not one)
        raise UserError(f"{folder / MODEL}: has nothing trained for {lost}; train it again")
    configs = {name: settings.lora for name, one in kept.items() if "lora" in one}
    return TaskModels(
        **settings.base_spec(), models=models, trees=kept, configs=configs, origin=str(folder)
    )


def _nested(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `OldSettings` that the flat settings have."""
    settings, inputs = config["settings"], config["inputs"]
    found = {name: settings[name] for name in _names(OldSettings) if name in settings}
    specs = settings.get("tasks") if isinstance(settings.get("tasks"), list) else []
    adapter = {_LORA.get(name, name): value for name, value in settings.items()}
    lora = {name: adapter[name] for name in _names(LoraConfig) if name in adapter}
    # A missing setting must not be replaced by a default of `LoraConfig`.
    found |= {"lora": lora} if lora.keys() == set(_names(LoraConfig)) else {}
    return found | {
        "fingerprint": {part: inputs.get(name) for part, name in INPUTS.items()},
        "tasks": [one.get("task") if isinstance(one, dict) else one for one in specs],
    }


def _names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _scores(
    folder: Path, settings: OldSettings, result: Mapping[str, Any], model: str
) -> dict[str, float]:
    """Return the dev scores of a run, after comparing the tree's checksum with its result."""
    if result["model"] != model:
        raise UserError(f"{folder / MODEL}: damaged, its checksum does not match")
    scores = schema.parse(dict[str, float], result.get("dev"), f"{folder / RESULT}: dev", _CHANGED)
    if lost := [task.name for task in settings.tasks if task.name not in scores]:
        raise UserError(f"{folder / RESULT}: lacks the scores of {', '.join(lost)}; {_CHANGED}")
    return scores
