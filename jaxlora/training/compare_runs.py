"""Compare runs: the settings in which they differ, and their scores."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlora.serving import finished_run
from jaxlora.training import setting_names
from jaxlora.training.inputs import DEV_SET, ORDER, data_of, dev_of
from jaxlora.training.setting_names import NamedSettings
from jaxlora.utils import files
from jaxlora.utils.errors import UserError

_NEEDED = {"metrics", "dev", "dev_mean", "test", "parameters", "train_seconds"}


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """Settings, inputs and result of a run, as read from its folder.

    Attributes:
      folder: the folder.
      settings: the settings by the names used on the command line.
      inputs: name → checksum of each input of the run.
      result: the content of `result.json`; empty if the run is not finished.
    """

    folder: Path
    settings: NamedSettings
    inputs: Mapping[str, str]
    result: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ScoreRow:
    """One score in all runs.

    Attributes:
      split: `dev` or `test`.
      task: name of the task, or `mean` for the mean over all tasks.
      metric: name of the metric; empty for the mean.
      values: the score of each run; None for runs without it.
      comparable: whether all runs with this score were scored on the same examples.
      greater: whether greater is better.
    """

    split: str
    task: str
    metric: str
    values: tuple[float | None, ...]
    comparable: bool
    greater: bool = True

    @property
    def best(self) -> tuple[bool, ...]:
        """Whether each run has the best score; all False if fewer than two can be compared."""
        known = [value for value in self.values if value is not None and math.isfinite(value)]
        if not self.comparable or len(known) < 2:
            return (False,) * len(self.values)
        best = max(known) if self.greater else min(known)
        return tuple(value == best for value in self.values)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A comparison of runs.

    Attributes:
      runs: the runs.
      settings: the settings in which they differ, see `setting_names.find_differences`.
      scores: their scores.
      notes: remarks, such as unfinished runs or inputs that differ.
    """

    runs: tuple[RunRecord, ...]
    settings: Mapping[str, tuple[Any, ...]]
    scores: tuple[ScoreRow, ...]
    notes: tuple[str, ...]


def compare(folders: Sequence[Path]) -> Comparison:
    """Compare runs, finished or not.

    Raises:
      UserError: if there are fewer than two folders, or one is not that of a run.
    """
    if len(folders) < 2:
        raise UserError("name two runs or more")
    runs = tuple(map(read_run, folders))
    differences = setting_names.find_differences([run.settings for run in runs])
    return Comparison(runs, differences, tuple(_score_rows(runs)), tuple(_notes(runs)))


def read_run(folder: Path) -> RunRecord:
    """Read the settings, the inputs and the result of a run.

    Raises:
      UserError: if it is not the folder of a run, or one of its files is damaged.
    """
    folder = files.local(folder)
    config = finished_run.read_config(folder)
    path = folder / finished_run.RESULT
    result = files.read_object(path) if path.exists() else {}
    if result and not result.keys() >= _NEEDED:
        raise UserError(
            f"{path}: has no {', '.join(sorted(_NEEDED - result.keys()))}; is it from a run?"
        )
    settings = setting_names.name_settings(setting_names.complete(config["settings"]))
    return RunRecord(folder, settings, config["inputs"], result)


def _same(values: Sequence[Any]) -> bool:
    return all(value == values[0] for value in values)


def _score_rows(runs: Sequence[RunRecord]) -> Iterator[ScoreRow]:
    finished = [run for run in runs if run.result]
    metrics = dict.fromkeys(
        (task, metric) for run in finished for task, metric in run.result["metrics"].items()
    )
    for split, input_of in (("dev", dev_of), ("test", data_of)):
        for task, metric in metrics:
            values = tuple(
                run.result[split].get(task) if _measures(run, task, metric) else None
                for run in runs
            )
            if any(value is not None for value in values):
                with_it = [run for run in finished if _measures(run, task, metric)]
                same = _same([run.inputs.get(input_of(task)) for run in with_it])
                greater = task not in with_it[0].result.get("lower_is_better", ())
                yield ScoreRow(split, task, metric, values, same, greater)
    dev = [dev_of(task) for task, _ in metrics]
    same = _same([[run.inputs.get(name) for name in dev] for run in finished])
    same &= _same([run.result["metrics"] for run in finished])
    means = tuple(run.result.get("dev_mean") for run in runs)
    if any(mean is not None for mean in means):
        yield ScoreRow("dev", "mean", "", means, same)


def _measures(run: RunRecord, task: str, metric: str) -> bool:
    return bool(run.result) and run.result["metrics"].get(task) == metric


def _notes(runs: Sequence[RunRecord]) -> Iterator[str]:
    for run in runs:
        if not run.result:
            yield f"{run.folder}: is not finished, so it has no scores; resume it"
    for name in dict.fromkeys(name for run in runs for name in run.inputs):
        known = [run.inputs[name] for run in runs if name in run.inputs]
        if name != ORDER and not _same(known):
            scores = ": its scores cannot be compared" if name.startswith(DEV_SET) else ""
            yield f"{name} is not the same in all runs{scores}"


def to_json(found: Comparison) -> dict[str, Any]:
    """Return a comparison as plain JSON values."""
    return {
        "runs": [{"folder": str(run.folder), "finished": bool(run.result)} for run in found.runs],
        "settings": {name: list(values) for name, values in found.settings.items()},
        "scores": [dataclasses.asdict(row) | {"best": list(row.best)} for row in found.scores],
        "notes": list(found.notes),
    }
