"""Evaluation of predictions on labelled examples: scores, tables, calibration, intervals.

Definitions follow scikit-learn. Everything is computed in float64 on the host.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxlora.tasks import thresholds
from jaxlora.tasks.metrics import Metric
from jaxlora.tasks.task import Task

RESAMPLES = 1000
AT_ONCE = 1_000_000  # row indices drawn at a time: 8 MB
BINS = 10
Statistic = Callable[[np.ndarray], np.ndarray]
"""Maps the row indices of R resamples, `i64[R, E]`, to one value per resample, `f64[R]`."""


class Interval(NamedTuple):
    """A score and the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


class ClassRow(NamedTuple):
    """Precision, recall and F1 of one class.

    Attributes:
      name: name of the class.
      precision: fraction of its predictions that are right; 0 if it is never predicted.
      recall: fraction of its examples that are predicted; 0 if it has no example.
      f1: harmonic mean of precision and recall.
      support: number of examples of the class.
    """

    name: str
    precision: float
    recall: float
    f1: float
    support: int


class Bin(NamedTuple):
    """Calibration bin: number of predictions, their mean confidence and their accuracy."""

    rows: int
    confidence: float
    accuracy: float


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """Predictions of E examples with their labels.

    Attributes:
      task: the task.
      predictions, labels: `f64[E]`, class indices or scores; for multilabel tasks
        `f64[E, classes]` of 0 and 1. Predictions may be NaN: they count for no class, and make the
        scores NaN.
      probabilities: `f64[E, classes]`; None for tasks with scores.
    """

    task: Task
    predictions: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray | None

    @property
    def metrics(self) -> dict[str, Metric]:
        """Metrics that fit the task, by title."""
        named = {name: metric.title for name, metric in self.task.metrics.items()}
        named |= {"f1": f"F1 of {self.task.classes[1]}"} if "f1" in named else {}
        return {named[name]: metric for name, metric in self.task.metrics.items()}

    def scores(self, resamples: int = RESAMPLES) -> dict[str, Interval]:
        """Compute each metric with a bootstrap interval."""
        return {
            name: bootstrap(self._on(metric), len(self.labels), resamples)
            for name, metric in self.metrics.items()
        }

    def _on(self, metric: Metric) -> Statistic:
        """Return a metric as a function of resamples of the examples.

        Multilabel metrics are computed from sums over the rows of each resample. These are a matrix
        product of row counts and per-row contributions, which is exact since both are integers.
        """
        x, y, totals = self.predictions, self.labels, metric.totals
        if x.ndim == 2 and totals is not None and np.isfinite(x).all() and np.isfinite(y).all():
            by_row = totals.by_row(x, y)
            return lambda numbers: totals.score(count_rows(numbers) @ by_row, len(y))
        return lambda numbers: np.array([metric.compute(x[one], y[one]) for one in numbers])

    def differences(self, other: Evaluation, resamples: int = RESAMPLES) -> dict[str, Interval]:
        """Compute the difference of each metric to another model's on the same examples.

        Both are scored on the same resamples, so the interval is that of the paired difference.

        Raises:
          ValueError: if the labels differ.
        """
        if not np.array_equal(self.labels, other.labels):
            raise ValueError("the labels of two evaluations differ")

        def difference(metric: Metric) -> Statistic:
            mine, theirs = self._on(metric), other._on(metric)
            return lambda numbers: mine(numbers) - theirs(numbers)

        return {
            name: bootstrap(difference(metric), len(self.labels), resamples)
            for name, metric in self.metrics.items()
        }

    @property
    def confusion(self) -> np.ndarray:
        """Confusion matrix `i64[classes, classes]`: rows are labels, columns predictions.

        It is empty, `i64[0, 0]`, for multilabel tasks and for scores.
        """
        if self.task.form != "class":
            return np.zeros((0, 0), np.int64)
        size, known = len(self.task.classes), ~np.isnan(self.predictions)
        cells = self.labels[known].astype(int) * size + self.predictions[known].astype(int)
        return np.bincount(cells, minlength=size * size).reshape(size, size)

    def _members(self, values: np.ndarray) -> np.ndarray:
        """Convert class indices or label sets to `bool[E, classes]`."""
        if values.ndim == 2:
            return values > 0
        return np.equal.outer(values, np.arange(len(self.task.classes)))

    @property
    def classes(self) -> list[ClassRow]:
        """Precision, recall and F1 of each class; empty for scores."""
        predicted, true = self._members(self.predictions), self._members(self.labels)
        right, support, found = (x.sum(0) for x in (predicted & true, true, predicted))
        precision, recall = thresholds.share(right, found), thresholds.share(right, support)
        f1 = thresholds.share(2 * right, support + found)
        rows = zip(self.task.classes, precision, recall, f1, support, strict=True)
        return [ClassRow(n, float(p), float(r), float(f), int(s)) for n, p, r, f, s in rows]

    @property
    def confidence(self) -> np.ndarray:
        """Probability of each prediction, `f64[E]`; for multilabel tasks `f64[E, classes]`.

        It is NaN where the prediction is.

        Raises:
          ValueError: if the task has scores.
        """
        if self.probabilities is None:
            raise ValueError("scores have no probabilities")
        chosen = np.nan_to_num(self.predictions)
        if chosen.ndim == 2:
            sure = np.where(chosen > 0, self.probabilities, 1 - self.probabilities)
        else:
            sure = self.probabilities[np.arange(len(chosen)), chosen.astype(int)]
        return np.where(np.isnan(self.predictions), np.nan, sure)

    def calibration(self, bins: int = BINS) -> tuple[float, list[Bin]]:
        """Compare confidence with accuracy in bins of equal width.

        For multilabel tasks, the decision about each class counts as a prediction.

        Returns:
          The expected calibration error, `Σ n_b / E · |accuracy_b - confidence_b|` (Guo et al.
          2017, "On Calibration of Modern Neural Networks", section 2), and the bins.
        """
        confidence = self.confidence.ravel()
        known = ~np.isnan(confidence)
        confidence = confidence[known]
        right = (self.predictions == self.labels).ravel()[known]
        numbers = np.minimum((confidence * bins).astype(int), bins - 1)
        counts = np.bincount(numbers, minlength=bins)
        mean = thresholds.share(np.bincount(numbers, confidence, bins), counts)
        accuracy = thresholds.share(np.bincount(numbers, right, bins), counts)
        error = float(np.sum(counts * np.abs(accuracy - mean)) / max(1, counts.sum()))
        rows = zip(counts.tolist(), mean.tolist(), accuracy.tolist(), strict=True)
        return error, [Bin(*row) for row in rows]

    def best_threshold(self) -> tuple[float, float]:
        """Return the threshold on the positive class's probability with the best F1, and that F1.

        This F1 is optimistic, since the threshold is chosen on the same examples.
        """
        assert self.probabilities is not None
        return thresholds.choose(self.probabilities[:, 1], self.labels)

    @functools.cached_property
    def badness(self) -> np.ndarray:
        """Confidence of each wrong prediction, or absolute error of each score, `f64[E]`; else 0.

        For multilabel tasks it is that of the most confident wrong decision.
        """
        if self.probabilities is None:
            return np.abs(self.predictions - self.labels)
        wrong = np.where(self.predictions != self.labels, self.confidence, 0.0)
        return wrong if wrong.ndim == 1 else wrong.max(-1)

    def worst(self, most: int = 20) -> np.ndarray:
        """Return the indices of the worst mistakes, worst first; see `badness`."""
        order = np.argsort(-self.badness, kind="stable")[:most]
        return order[self.badness[order] > 0]


def bootstrap(
    statistic: Statistic, rows: int, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Compute a statistic and its 95 % percentile interval by resampling rows with replacement.

    Args:
      statistic: see `Statistic`.
      rows: number of rows.
      resamples: number of resamples; about `AT_ONCE` row indices are drawn at a time.
      seed: seed of the resamples.

    Returns:
      The statistic and its interval; three NaN if the statistic of all rows is NaN.

    Raises:
      ValueError: if there are no rows.

    >>> bootstrap(lambda numbers: np.ones(len(numbers)), rows=5)
    Interval(value=1.0, low=1.0, high=1.0)
    """
    if rows < 1:
        raise ValueError("there are no rows to resample")
    value = float(statistic(np.arange(rows)[None])[0])
    if np.isnan(value):
        return Interval(value, value, value)
    rng, part = np.random.default_rng(seed), max(1, AT_ONCE // rows)
    sizes = [min(part, resamples - done) for done in range(0, resamples, part)]
    values = [statistic(rng.integers(rows, size=(size, rows))) for size in sizes]
    low, high = np.nanquantile(np.concatenate(values), [0.025, 0.975])
    return Interval(value, float(low), float(high))


def count_rows(numbers: np.ndarray) -> np.ndarray:
    """Count how often each resample contains each row, `i64[R, E]` → `f64[R, E]`.

    >>> count_rows(np.array([[0, 2, 2], [1, 1, 1]])).tolist()
    [[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]]
    """
    resamples, rows = numbers.shape
    cells = numbers + rows * np.arange(resamples)[:, None]
    counts = np.bincount(cells.ravel(), minlength=resamples * rows)
    return counts.reshape(resamples, rows).astype(np.float64)
