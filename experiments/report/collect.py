"""Read the runs that `experiments/reproduce.py` wrote, by study and seed, and find missing ones.

root/<study>/seed<k>/     run folders, see `jaxlora.training.run`
root/plan.json            the requested studies and seeds
root/timing.json          step times, measured in turn; optional
"""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from experiments.report import files
from jaxlora.serving import finished_run
from jaxlora.tasks.sharing import VARIANTS
from jaxlora.tasks.task import NAMES
from jaxlora.training import metrics_log
from jaxlora.utils.errors import UserError

PLAN, TIMING = "plan.json", "timing.json"
NOT_BEGUN = "not begun"
WHOLE = "complete"  # the state of a study whose runs were all completed as requested
SEED_FOLDER = re.compile(r"seed(\d+)")


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """The predictions of a run for the E dev examples of a task.

    Attributes:
      ids: `str[E]`.
      predictions, labels: `f64[E]`.
      confidence: `f64[E]`, the probability of the predicted class; NaN for scores.
    """

    ids: np.ndarray
    predictions: np.ndarray
    labels: np.ndarray
    confidence: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A finished run.

    Attributes:
      study, seed: identify the run.
      folder: its folder.
      settings, versions: from `config.json`.
      result: `result.json`.
      records: the lines of `metrics.jsonl`.
      answers: task → its dev predictions; empty if they have no labels.
      disk_bytes: size of the trained model on disk.
    """

    study: str
    seed: int
    folder: Path
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    result: Mapping[str, Any]
    records: tuple[Mapping[str, Any], ...]
    answers: Mapping[str, Predictions]
    disk_bytes: int

    @property
    def faults(self) -> list[str]:
        """Why the run deviates from its study: it was capped, or skipped steps."""
        cap, groups = self.settings.get("max_steps"), self.result["groups"].values()
        found = []
        if cap is not None and any(group["step"] >= cap for group in groups):
            found.append(f"capped at {cap:,} steps")
        skipped = sum(group.get("skipped", 0) for group in groups)
        if skipped:
            found.append(f"{skipped:,} steps left out as not finite")
        return found


@dataclasses.dataclass(frozen=True)
class Missing:
    """A run that was requested or begun but is not finished; `failed` if it ended by an error."""

    study: str
    seed: int
    why: str
    failed: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Collection:
    """All data of a report.

    Attributes:
      root: the folder.
      plan, timing: the content of `plan.json` and `timing.json`; empty if there is no file.
      runs: the finished runs, by study in the order of the plan, then by seed.
      missing: the runs that are not finished.
    """

    root: Path
    plan: Mapping[str, Any]
    timing: Mapping[str, Any]
    runs: tuple[Run, ...]
    missing: tuple[Missing, ...]

    @cached_property
    def studies(self) -> dict[str, tuple[Run, ...]]:
        """Study → its finished runs."""
        found: dict[str, list[Run]] = {}
        for run in self.runs:
            found.setdefault(run.study, []).append(run)
        return {study: tuple(runs) for study, runs in found.items()}

    @property
    def variants(self) -> dict[str, tuple[Run, ...]]:
        """The studies that are variants of the paper."""
        return {name: self.studies[name] for name in VARIANTS if name in self.studies}

    @property
    def extras(self) -> dict[str, tuple[Run, ...]]:
        """The other studies."""
        return {name: runs for name, runs in self.studies.items() if name not in VARIANTS}

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the finished runs."""
        return tuple(sorted({run.seed for run in self.runs}))

    @property
    def made_up(self) -> bool:
        """Whether the data is the built-in made-up data."""
        return any(run.settings["source"] == "demo" for run in self.runs)

    def faults(self, study: str) -> str:
        """Return why a study's runs are no evidence (capped, failed, …); empty if they are."""
        found = [(run.seed, why) for run in self.studies.get(study, ()) for why in run.faults]
        return _by_seeds(found + [(m.seed, "failed") for m in self._missing(study) if m.failed])

    def state(self, study: str) -> str:
        """Return the state of a study for the tables: whole, not run, or its faults."""
        missing = self._missing(study)
        if study not in self.studies and all(m.why == NOT_BEGUN for m in missing):
            return "not run"
        unfinished = [
            (m.seed, NOT_BEGUN if m.why == NOT_BEGUN else "not finished")
            for m in missing
            if not m.failed
        ]
        said = (self.faults(study), _by_seeds(unfinished))
        return "; ".join(part for part in said if part) or WHOLE

    def _missing(self, study: str) -> list[Missing]:
        return [missing for missing in self.missing if missing.study == study]

    @property
    def machine(self) -> Mapping[str, Any]:
        """The machine on which steps were timed, if they were."""
        machine: Mapping[str, Any] = self.timing.get("machine") or {}
        return machine


def _by_seeds(reasons: Iterable[tuple[int, str]]) -> str:
    """Format each reason once, after the seeds that have it."""
    seeds: dict[str, list[str]] = {}
    for seed, why in reasons:
        seeds.setdefault(why, []).append(str(seed))
    return "; ".join(f"seed {', '.join(named)}: {why}" for why, named in seeds.items())


def collect(root: Path) -> Collection:
    """Read the runs of a root.

    Raises:
      UserError: if it is not a folder, contains no runs, or a file in it is invalid.
    """
    if not root.is_dir():
        raise UserError(
            f"--from {root}: no such folder; name the --out of experiments/reproduce.py"
        )
    plan, timing = files.read_plan(root / PLAN), files.read_timing(root / TIMING)
    wanted = {(s, k) for s in plan["studies"] for k in plan["seeds"]}
    folders = {
        (path.parent.name, int(match[1])): path
        for path in root.glob("*/seed*")
        if (match := SEED_FOLDER.fullmatch(path.name)) and path.is_dir()
    }
    if not wanted and not folders:
        raise UserError(
            f"--from {root}: holds no runs (<study>/seed<k>); train some with "
            "python experiments/reproduce.py"
        )
    order = _order(plan["studies"])
    places = sorted(wanted | folders.keys(), key=lambda place: (order(place[0]), place))
    runs, missing = [], []
    for study, seed in places:
        folder = folders.get((study, seed), root / study / f"seed{seed}")
        why = _unfinished(folder)
        failure = plan["failed"].get(f"{study}/seed{seed}")
        if why and failure:
            missing.append(Missing(study, seed, f"failed: {failure}", failed=True))
        elif why:
            missing.append(Missing(study, seed, why))
        else:
            runs.append(read_run(folder, study, seed))
    _check_same_examples(runs)
    return Collection(root, plan, timing, tuple(runs), tuple(missing))


def read_run(folder: Path, study: str, seed: int) -> Run:
    """Read a finished run.

    Raises:
      UserError: for a missing or invalid file.
    """
    settings, versions = files.read_config(folder)
    answers = {
        task: read_predictions(path)
        for task in NAMES
        if (path := folder / "predictions" / f"{task}-dev.csv").exists()
    }
    return Run(
        study=study,
        seed=seed,
        folder=folder,
        settings=settings,
        versions=versions,
        result=files.read_result(folder, settings),
        records=tuple(metrics_log.read_records(folder)),
        answers={task: found for task, found in answers.items() if len(found.labels)},
        disk_bytes=files.model_bytes(folder),
    )


def read_predictions(path: Path) -> Predictions:
    """Read `id,prediction,label,confidence`; no rows if the file has no labels.

    Raises:
      UserError: for a line that cannot be read, with its number, or if the file is not UTF-8.
    """
    rows = csv.DictReader(io.StringIO(_text(path), newline=""))
    ids, numbers = [], []
    try:
        for row in rows:
            if "label" not in row:
                break
            confidence = float(row.get("confidence") or "nan")
            numbers.append((float(row["prediction"]), float(row["label"]), confidence))
            ids.append(row["id"])
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(
            f"{path}, line {rows.line_num}: not id,prediction,label,confidence ({error}); "
            f"{files.RETRAIN}"
        ) from error
    columns = np.array(numbers, np.float64).reshape(-1, 3).T
    return Predictions(np.array(ids, str), *columns)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}); {files.RETRAIN}") from error


def _order(planned: Iterable[str]) -> Any:
    """Return the sort key of studies: the paper's variants, then the plan's order, then others."""
    names = list(dict.fromkeys([*VARIANTS, *planned]))
    return lambda study: names.index(study) if study in names else len(names)


def _unfinished(folder: Path) -> str:
    """Return why a run cannot be reported; empty if it can."""
    if (folder / finished_run.RESULT).exists():
        return ""
    if not finished_run.exists(folder):
        return NOT_BEGUN
    last = {record["group"]: record["step"] for record in metrics_log.read_records(folder)}
    reached = ", ".join(f"{group} at step {step:,}" for group, step in last.items())
    return f"not finished: {reached}" if reached else "begun, no step logged yet"


def _check_same_examples(runs: Iterable[Run]) -> None:
    """Refuse runs with different dev examples, since runs are compared example by example.

    Raises:
      UserError: names two runs that differ.
    """
    first: dict[str, Run] = {}
    for run in runs:
        for task, found in run.answers.items():
            other = first.setdefault(task, run)
            same = other.answers[task]
            if not (
                np.array_equal(found.ids, same.ids) and np.array_equal(found.labels, same.labels)
            ):
                raise UserError(
                    f"{run.folder}: its dev examples of {task} are not those of {other.folder}; "
                    "keep runs over other data in a root of their own"
                )
