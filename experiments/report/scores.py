"""Dev scores of all studies, as measured and on each bootstrap resample."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from experiments.report import statistics
from experiments.report.collect import Collection, Predictions, Run
from experiments.report.statistics import Interval, Summary
from jaxlora.tasks.task import MADE_UP_TITLES, NAMES, Task, paper_tasks

MEAN = "mean"
SCORES = (*NAMES, MEAN)
TITLES = {task.name: task.title for task in paper_tasks()} | {MEAN: "mean"}
MADE_UP = MADE_UP_TITLES | {MEAN: "mean"}
RESAMPLED: dict[str, Callable[..., np.ndarray]] = {
    "accuracy": statistics.resampled_accuracy,
    "pearson": statistics.resampled_pearson,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """Scores from -1 to 1, for each task and their `mean`.

    Attributes:
      by_seed: study → score → seed → value.
      resampled: study → score → `f64[resamples]`, over resampled seeds and examples; scores
        without labels are missing.
    """

    by_seed: Mapping[str, Mapping[str, Mapping[int, float]]]
    resampled: Mapping[str, Mapping[str, np.ndarray]]

    def __contains__(self, study: str) -> bool:
        return study in self.by_seed

    def summary(self, study: str, score: str) -> Summary:
        """Return mean and deviation over the seeds of a study."""
        return Summary.of(list(self.by_seed[study][score].values()))

    def interval(self, study: str, score: str) -> Interval | None:
        """Return the interval of a score; None without labels."""
        drawn = self.resampled.get(study, {}).get(score)
        if drawn is None:
            return None
        return statistics.interval(self.summary(study, score).mean, drawn)

    def difference(self, first: str, second: str, score: str) -> Interval | None:
        """Return first minus second, paired by example."""
        drawn = [self.resampled.get(study, {}).get(score) for study in (first, second)]
        if drawn[0] is None or drawn[1] is None:
            return None
        value = self.summary(first, score).mean - self.summary(second, score).mean
        return statistics.interval(value, drawn[0] - drawn[1])

    def difference_over_seeds(self, first: str, second: str, score: str) -> Summary | None:
        """Return first minus second over their common seeds; None if there are none."""
        one, other = (self.by_seed[study][score] for study in (first, second))
        common = sorted(one.keys() & other.keys())
        return Summary.of([one[seed] - other[seed] for seed in common]) if common else None

    def best(self, studies: list[str]) -> str | None:
        """Return the study with the highest mean; None if there are no studies."""
        there = [study for study in studies if study in self]
        return max(there, key=lambda study: self.summary(study, MEAN).mean, default=None)


def score(collection: Collection, resamples: int, seed: int) -> Scores:
    """Score all finished runs.

    Args:
      collection: from `collect.collect`.
      resamples, seed: number of resamples and seed of the bootstrap.
    """
    by_seed = {
        study: {
            name: {run.seed: _measured(run, name) for run in runs} for name in SCORES
        }
        for study, runs in collection.studies.items()
    }  # fmt: skip
    resampled: dict[str, dict[str, np.ndarray]] = {study: {} for study in collection.studies}
    for number, task in enumerate(paper_tasks()):
        examples = statistics.stream(seed, statistics.EXAMPLES, number)
        drawn = _resampled(task, _answers(collection, task.name), resamples, examples)
        for study, of_runs in drawn.items():
            of_seeds = by_seed[study][task.name]
            resampled[study][task.name] = statistics.resample_seeds(of_runs, of_seeds, seed)
    for of_study in resampled.values():
        if set(NAMES) <= of_study.keys():
            of_study[MEAN] = np.mean([of_study[name] for name in NAMES], axis=0)
    return Scores(by_seed, resampled)


def _resampled(
    task: Task,
    answers: Mapping[str, Sequence[Predictions]],
    resamples: int,
    seed: statistics.Seed,
) -> dict[str, np.ndarray]:
    """Compute each run's score on each resample of examples: study → `f64[resamples, runs]`."""
    every = [found for runs in answers.values() for found in runs]
    if not every:
        return {}
    predictions = np.stack([found.predictions for found in every])
    drawn = RESAMPLED[task.metric](predictions, every[0].labels, resamples, seed)
    ends = np.cumsum([len(runs) for runs in answers.values()])[:-1]
    return dict(zip(answers, np.split(drawn, ends, axis=1), strict=True))


def _measured(run: Run, name: str) -> float:
    return float(run.result["dev_mean"] if name == MEAN else run.result["dev"][name])


def _answers(collection: Collection, task: str) -> dict[str, list[Predictions]]:
    """Select the studies whose runs all have labelled predictions."""
    return {
        study: [run.answers[task] for run in runs]
        for study, runs in collection.studies.items()
        if all(task in run.answers for run in runs)
    }
