"""The runs of a reproduction: their settings, whether they can be started or resumed, progress."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.studies import Study, arguments
from jaxlora.formats import huggingface
from jaxlora.formats.huggingface import Pretrained
from jaxlora.serving import finished_run
from jaxlora.tasks.sharing import group_name
from jaxlora.training import inputs as run_inputs
from jaxlora.training import metrics_log, run_folder
from jaxlora.training.config import Settings
from jaxlora.training.inputs import Data
from jaxlora.training.presets import make_settings
from jaxlora.utils.errors import UserError

SCRIPT = Path(__file__).with_name("run.py")
LOGS = "logs"
_LAST_RECORD = 1 << 14  # bytes; more than the longest record of metrics.jsonl


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One study with one seed.

    Attributes:
      study: the study.
      asked: the values that are requested, by setting name.
      settings: all resolved settings.
      root: the folder of the reproduction.
      steps: number of steps of each group, in the order in which groups are trained.
    """

    study: Study
    asked: Mapping[str, Any]
    settings: Settings
    root: Path
    steps: dict[str, int]

    @property
    def name(self) -> str:
        """The name to display."""
        return f"{self.study.name} seed {self.settings.loop.seed}"

    @property
    def out(self) -> Path:
        """The run's folder."""
        return self.root / self.study.name / f"seed{self.settings.loop.seed}"

    @property
    def log(self) -> Path:
        """The file for its process's output."""
        return self.root / LOGS / f"{self.study.name}-seed{self.settings.loop.seed}.log"

    @property
    def command(self) -> Sequence[str]:
        """The command of its process, which resumes the run if it was started before."""
        asked = {**self.asked, "out": self.out, "resume": True}
        return [sys.executable, str(SCRIPT), *arguments(asked)]

    @property
    def finished(self) -> bool:
        """Whether the run has a result."""
        return (self.out / finished_run.RESULT).exists()

    @property
    def is_lost(self) -> bool:
        """Whether its folder is a link to another run's that was deleted."""
        return self.out.is_symlink() and not self.out.exists()

    @property
    def total(self) -> int:
        """The number of steps of all groups."""
        return sum(self.steps.values())

    def done(self) -> int:
        """Return the number of steps taken so far, by the last record of its log."""
        if self.finished:
            return self.total
        last, done = _last_record(self.out / metrics_log.METRICS), 0
        if last is None or last["group"] not in self.steps:
            return 0
        for groups in self.settings.cohorts:
            steps = {name: self.steps[name] for name in map(group_name, groups)}
            if last["group"] in steps:
                return done + sum(min(int(last["step"]), planned) for planned in steps.values())
            done += sum(steps.values())
        return done

    def result(self) -> dict[str, Any]:
        """Return the content of `result.json`."""
        content: dict[str, Any] = run_folder.read_json(self.out / finished_run.RESULT)
        return content


def _last_record(path: Path) -> dict[str, Any] | None:
    """Return the last complete line of a file that another process may be writing to."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LAST_RECORD))
            *lines, _ = file.read().split(b"\n")
        record: dict[str, Any] = json.loads(lines[-1])
    except (OSError, IndexError, ValueError):
        return None
    return record


class Inputs:
    """Bases and data, each loaded once for all runs that use it."""

    def __init__(self) -> None:
        self._base = functools.cache(huggingface.load)
        self._data: dict[tuple[Any, ...], Data] = {}

    def of(self, settings: Settings) -> tuple[Pretrained, Data]:
        """Return the base and the data of a run.

        Raises:
          UserError: if they cannot be loaded or do not fit the settings.
        """
        s = settings
        base = self._base(s.model.base)
        run_inputs.check_base(s, base)
        key = (s.data, s.model.base, s.model.max_length)
        if key not in self._data:
            self._data[key] = run_inputs.load_data(s, base)
        return base, self._data[key]


def make_run(study: Study, asked: Mapping[str, Any], root: Path, inputs: Inputs) -> Run:
    """Resolve and check a run; nothing is written.

    Raises:
      UserError: for invalid settings or data, or if the folder has a different run.
    """
    try:
        settings = make_settings(**asked)
        base, data = inputs.of(settings)
        run = Run(study, asked, settings, root, run_inputs.count_steps(settings, data))
        if not run.is_lost:
            run_folder.check(run.out, settings.to_json(), resume=True)
            run_folder.check_same_inputs(
                run.out, run_inputs.fingerprints(base, data, settings.loop.seed)
            )
    except UserError as error:
        raise UserError(f"{study.name}: {error}") from error
    return run


def twins(runs: Iterable[Run]) -> dict[Run, Run]:
    """Return the runs that would repeat another run, each with that run.

    A study may request a preset's default, such as lora4 with rank 15. Of equal runs, one that has
    begun is kept, else the first.
    """
    first: dict[Settings, Run] = {}
    found = {}
    for run in sorted(runs, key=lambda r: r.out.is_symlink() or not r.out.exists()):
        same = first.setdefault(run.settings, run)
        if same is not run and not run.out.exists():
            found[run] = same
    return found


def link(run: Run, same: Run) -> None:
    """Make a run's folder a symbolic link to another's."""
    run.out.parent.mkdir(parents=True, exist_ok=True)
    run.out.unlink(missing_ok=True)
    run.out.symlink_to(os.path.relpath(same.out, run.out.parent))
