"""Settings by the names used on the command line, to show how runs differ."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxlora.tasks.task import NAMES
from jaxlora.training.config import Settings
from jaxlora.utils.errors import UserError

_TYPED = {"pair_encoding": "pair"}  # field of a task → its name in a task file
# Fields that are left out, since they follow from other fields or are shown under other names.
_SHOWN = ("name", "pair", "low", "high", "thresholds", "tune_thresholds")


class NamedSettings(NamedTuple):
    """Settings by the names used on the command line.

    Attributes:
      run: name → value, with names such as `learning_rate`.
      tasks: task → field → value; the field `epochs` of `topic` is typed as `topic.epochs`.
    """

    run: dict[str, Any]
    tasks: dict[str, dict[str, Any]]


def complete(plain: Mapping[str, Any]) -> Mapping[str, Any]:
    """Add fields that earlier versions did not have to the settings of a run.

    Settings that cannot be parsed are returned unchanged.
    """
    with contextlib.suppress(UserError):
        return Settings.from_json(plain).to_json()
    return plain


def name_settings(plain: Mapping[str, Any]) -> NamedSettings:
    """Convert the output of `Settings.to_json` to the names used on the command line.

    >>> task = {"task": {"name": "topic", "kind": "binary"}, "own": [["epochs", 3]]}
    >>> found = name_settings({"rank": 4, "adapt": "lora", "groups": [["topic"]], "tasks": [task]})
    >>> found.run, found.tasks
    ({'rank': 4, 'groups': 'topic'}, {'topic': {'kind': 'binary', 'epochs': 3}})
    """
    run = {name: value for name, value in plain.items() if name not in ("tasks", "adapt")}
    if isinstance(groups := run.get("groups"), list):
        run["groups"] = "|".join(",".join(map(str, names)) for names in groups)
    tasks = {}
    for spec in map(_mapping, _items(plain.get("tasks"))):
        task, fields = _mapping(spec.get("task")), _fields(spec)
        name = str(task.get("name"))
        if spec.get("table") is None and name in NAMES:  # flags set these for the paper's tasks
            joint, weight = fields.pop("pair", None), fields.pop("weight", None)
            run |= {"pair_encoding": joint} if task.get("pair") else {}
            run |= {"sts_weight": weight} if name == "sts" else {}
        tasks[name] = fields
    return NamedSettings(run, tasks)


def _mapping(value: Any) -> dict[str, Any]:
    """Return a JSON object unchanged, and an empty one for any other value."""
    return value if isinstance(value, dict) else {}


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _fields(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a task by their names in a task file."""
    task, table = _mapping(spec.get("task")), _mapping(spec.get("table"))
    found = {_TYPED.get(name, name): one for name, one in task.items() if name not in _SHOWN}
    if not task.get("classes") and "low" in task:
        found["range"] = [task["low"], task.get("high")]
    if "thresholds" in task:
        found["threshold"] = "dev" if task.get("tune_thresholds") else task["thresholds"] or None
    files = {name: one for name, one in table.items() if name != "columns"}
    weight = {"weight": spec["weight"]} if "weight" in spec else {}
    own = {str(one[0]): one[1] for one in _items(spec.get("own")) if len(_items(one)) == 2}
    return found | files | _mapping(table.get("columns")) | weight | own


def find_differences(runs: Sequence[NamedSettings]) -> dict[str, tuple[Any, ...]]:
    """Return the settings that differ between runs, with the value in each run.

    The value is None for a run without the setting. A task that only some runs have gets a single
    entry, `[task]`.

    >>> one = NamedSettings({"rank": 4, "seed": 0}, {"topic": {"epochs": 3}})
    >>> find_differences([one, NamedSettings({"rank": 8, "seed": 0}, {"topic": {}})])
    {'rank': (4, 8), 'topic.epochs': (3, None)}
    """
    every = _side_by_side([run.run for run in runs])
    for task in dict.fromkeys(task for run in runs for task in run.tasks):
        if all(task in run.tasks for run in runs):
            fields = _side_by_side([run.tasks[task] for run in runs])
            every |= {f"{task}.{field}": values for field, values in fields.items()}
        else:
            every[f"[{task}]"] = tuple("trained" if task in run.tasks else None for run in runs)
    return {
        name: values for name, values in every.items() if any(one != values[0] for one in values)
    }


def _side_by_side(parts: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: tuple(part.get(name) for part in parts) for name in names}


def show(value: Any) -> str:
    """Format the value of a setting; None becomes an empty string.

    >>> show(["query", "value"]), show([["query", 8]]), show(1e-05), show({"spam": 2.0})
    ('query, value', 'query 8', '1e-05', 'spam 2')
    """
    if isinstance(value, Mapping):
        value = list(map(list, value.items()))
    if isinstance(value, list | tuple):
        nested = any(isinstance(one, list | tuple) for one in value)
        return ", ".join(" ".join(map(show, one)) if nested else show(one) for one in value)
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
