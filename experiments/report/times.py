"""Training times: per step, in total, and until the best dev score."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import timing
from experiments.report.collect import TIMING, Collection, Run
from experiments.report.statistics import Interval, Range, Summary
from jaxlora.lora import LoraConfig
from jaxlora.training.adaptation import cohorts, make_adaptation

OWN = "the runs' own logs"
QUANTILES = (0.05, 0.5, 0.95)


@dataclasses.dataclass(frozen=True)
class Time:
    """The training time of a study.

    Attributes:
      step: milliseconds per step: median and range.
      steps: steps of a run; adapters of several groups take theirs together.
      total, best: seconds of training, to the end and to the best dev score, over seeds.
      source: where `step` was measured.
    """

    step: Range
    steps: int
    total: Summary
    best: Summary
    source: str

    @property
    def all_steps(self) -> Range:
        """Milliseconds of all steps of a run: median and range."""
        return Range(*(self.steps * ms for ms in dataclasses.astuple(self.step)))


def measure(collection: Collection) -> dict[str, Time]:
    """Measure the times of every study."""
    timed = collection.timing.get("studies", {})
    return {
        study: Time(
            step=_timed(timed[study]) if study in timed else _own(runs),
            steps=count_steps(runs[0]),
            total=Summary.of([run.result["train_seconds"] for run in runs]),
            best=Summary.of([to_best(run) for run in runs]),
            source=TIMING if study in timed else OWN,
        )
        for study, runs in collection.studies.items()
    }


def count_steps(run: Run) -> int:
    """Count the steps of a run; a step of several groups that train together is one."""
    adaptation = make_adaptation(run.settings["adapt"], LoraConfig())
    taken = {name: group["step"] for name, group in run.result["groups"].items()}
    return sum(timing.count_steps(cohorts(run.settings["groups"], adaptation), taken))


def to_best(run: Run) -> float:
    """Compute the seconds until each group's best dev score, summed over the groups.

    Runs of earlier versions recorded only the step; the seconds then follow from the run's rate.
    """
    return sum(
        group.get("best_seconds", group["seconds"] * group["best_step"] / max(group["step"], 1))
        for group in run.result["groups"].values()
    )


def ratio(first: Interval, second: Interval) -> Interval:
    """Divide first by second with interval arithmetic, the widest that the ranges allow.

    >>> ratio(Interval(2.0, 1.0, 3.0), Interval(4.0, 2.0, 4.0))
    Interval(value=0.5, low=0.25, high=1.5)
    """
    return Interval(first.value / second.value, first.low / second.high, first.high / second.low)


def _timed(study: Mapping[str, Any]) -> Range:
    ms = study["ms_per_step"]
    return Range(ms["median"], ms["low"], ms["high"])


def _own(runs: tuple[Run, ...]) -> Range:
    """Compute quantiles of the logged windows by group, averaged over groups by their steps."""
    windows: dict[str, list[float]] = {}
    for run in runs:
        for record in run.records:
            if record["kind"] == "train":
                windows.setdefault(record["group"], []).append(1e3 / record["steps_per_second"])
    steps = {name: group["step"] for name, group in runs[0].result["groups"].items()}
    known = [name for name in steps if name in windows]
    if not known:
        rate = sum(run.result["train_seconds"] for run in runs) / len(runs) / count_steps(runs[0])
        return Range(1e3 * rate, 1e3 * rate, 1e3 * rate)
    weights = [steps[name] for name in known]
    low, median, high = np.average(
        [np.quantile(windows[name], QUANTILES) for name in known], axis=0, weights=weights
    )
    return Range(float(median), float(low), float(high))
