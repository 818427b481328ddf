"""The folder of a finished run, read without anything of training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlora.data.task_files import check_name
from jaxlora.formats.fingerprint import Fingerprint
from jaxlora.lora import LoraConfig
from jaxlora.serving import tree_files
from jaxlora.serving.task_models import TaskModel, TaskModels, check_plain
from jaxlora.tasks.sharing import Adapt, Groups, group_name
from jaxlora.tasks.task import Task
from jaxlora.utils import files, schema
from jaxlora.utils.errors import UserError
from jaxlora.utils.trees import Tree, checksum

CONFIG, RESULT, MODEL = "config.json", "result.json", "model"
PARTS = ("settings", "inputs")  # of the config
_LORA = {field.name: field.name for field in dataclasses.fields(LoraConfig)} | {
    "dropout": "lora_dropout"
}  # ours → the setting's name


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """What is read of a run's settings.

    Attributes:
      variant: for the facts of its tasks.
      adapt, groups: what was trained, and who shares it.
      base, pooling, pair_features, max_length, dtype: how sentences become vectors.
    """

    variant: str
    adapt: Adapt
    groups: Groups
    base: str
    pooling: str
    pair_features: str
    max_length: int
    dtype: str


def exists(folder: Path) -> bool:
    """Return whether a folder is a run's, finished or not."""
    return (folder / CONFIG).exists()


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


def load_run(folder: Path) -> TaskModels:
    """Read a finished run's tasks.

    Args:
      folder: where the run was written to.

    Raises:
      UserError: if it is no finished run, or damaged.
    """
    folder = files.local(folder)
    config = read_config(folder)
    try:
        settings, tasks, adapter = _settings(config["settings"])
        fingerprint = Fingerprint.from_inputs(config["inputs"])
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{folder / CONFIG}: was changed, or another version of jaxlora wrote it ({error})"
        ) from error
    trained = tree_files.load(folder / MODEL)
    scores = _scores(folder, list(tasks), checksum(trained))
    owners = {name: group_name(group) for group in settings.groups for name in group}
    models = {}
    for name, task in tasks.items():
        facts = {
            "dev": {task.metric: scores[name]},
            "data": config["inputs"].get(f"the data of {name}"),
            "variant": settings.variant,
            "versions": config.get("versions", {}),
        }
        # Empty trees are not kept in a checkpoint.
        head = (trained.get("heads") or {}).get(name) or {}
        models[name] = TaskModel(task, owners[name], head, settings.pair_features, facts)
    trees = _trees(folder, settings, trained.get("adapters") or {}, owners)
    return TaskModels(
        settings.base,
        fingerprint,
        models,
        trees,
        {name: adapter for name, tree in trees.items() if "lora" in tree},
        settings.pooling,
        settings.max_length,
        settings.dtype,
        str(folder),
    )


def _settings(raw: Mapping[str, Any]) -> tuple[RunSettings, dict[str, Task], LoraConfig]:
    """Read what is needed of a run's settings.

    Raises:
      ValueError: naming what is missing or wrong.
    """
    needed = [field.name for field in dataclasses.fields(RunSettings)]
    if missing := [name for name in (*needed, *_LORA.values(), "tasks") if name not in raw]:
        raise ValueError(f"fields missing: {', '.join(missing)}")
    settings = schema.build(RunSettings, {name: raw[name] for name in needed})
    check_plain(dataclasses.asdict(settings))
    adapter = schema.build(LoraConfig, {ours: raw[name] for ours, name in _LORA.items()})
    specs = raw["tasks"] if isinstance(raw["tasks"], list) else []
    found = [schema.build(Task, s.get("task") if isinstance(s, dict) else s) for s in specs]
    tasks = {check_name(task.name, "tasks"): task for task in found}
    grouped = [name for group in settings.groups for name in group]
    if sorted(grouped) != sorted(tasks) or () in settings.groups:
        raise ValueError("the groups are not a partition of the tasks")
    return settings, tasks, adapter


def _trees(
    folder: Path, settings: RunSettings, adapters: Mapping[str, Tree], owners: Mapping[str, str]
) -> dict[str, Tree]:
    trees = {name: adapters.get(name) or {} for name in owners.values()}
    if settings.adapt != "frozen" and not all(trees.values()):
        lost = ", ".join(name for name, tree in trees.items() if not tree)
        raise UserError(f"{folder / MODEL}: has nothing trained for {lost}; train it again")
    return trees


def _scores(folder: Path, names: list[str], model: str) -> dict[str, float]:
    """Return the scores of a finished run whose trained tree has this checksum."""
    result = files.read_object(folder / RESULT)
    if result.get("model") != model:
        raise UserError(f"{folder / MODEL}: damaged, its content has another checksum")
    scores = result.get("dev")
    if not isinstance(scores, dict) or not all(
        type(scores.get(name)) in (int, float) for name in names
    ):
        raise UserError(f"{folder / RESULT}: lacks the scores of {', '.join(names)}")
    return scores
