"""What the predictions of labelled examples say of a task: tables, calibration and intervals.

Definitions are scikit-learn's; all is computed in float64 on the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxlora.tasks import metrics
from jaxlora.tasks.task import Task

RESAMPLES = 1000
BINS = 10

Metric = Callable[[np.ndarray, np.ndarray], float]

CLASS_METRICS: dict[str, Metric] = {
    "accuracy": metrics.accuracy,
    "balanced accuracy": metrics.balanced_accuracy,
    "macro F1": metrics.macro_f1,
}
SCORE_METRICS: dict[str, Metric] = {
    "Pearson r": metrics.pearson,
    "Spearman ρ": metrics.spearman,
    "mean absolute error": metrics.mean_absolute_error,
    "root mean squared error": metrics.root_mean_squared_error,
}


class Interval(NamedTuple):
    """A score and the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


class ClassRow(NamedTuple):
    """How well one class is found.

    Attributes:
      name: of the class.
      precision: share of its predictions that are right; 0 if there is none.
      recall: share of its examples that are found; 0 if there is none.
      f1: their harmonic mean.
      support: number of its examples.
    """

    name: str
    precision: float
    recall: float
    f1: float
    support: int


class Bin(NamedTuple):
    """Predictions of similar confidence: the number of rows, their mean confidence and accuracy."""

    rows: int
    confidence: float
    accuracy: float


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """Predictions beside their labels.

    Attributes:
      task: the task.
      predictions, labels: `f64[E]`, numbers of classes or scores.
      probabilities: `f64[E, classes]`; None for scores.
    """

    task: Task
    predictions: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray | None

    @property
    def metrics(self) -> dict[str, Metric]:
        """The metrics that fit the task, by name."""
        if not self.task.integer:
            return SCORE_METRICS
        positive = (
            {f"F1 of {self.task.classes[1]}": metrics.f1} if self.task.kind == "binary" else {}
        )
        return CLASS_METRICS | positive

    def scores(self, resamples: int = RESAMPLES) -> dict[str, Interval]:
        """Compute each metric with a bootstrap interval."""
        return {
            name: bootstrap(self._on(metric), len(self.labels), resamples)
            for name, metric in self.metrics.items()
        }

    def _on(self, metric: Metric) -> Callable[[np.ndarray], float]:
        """Return a metric as a function of the numbers of some examples."""
        return lambda numbers: metric(self.predictions[numbers], self.labels[numbers])

    def differences(self, other: Evaluation, resamples: int = RESAMPLES) -> dict[str, Interval]:
        """Compute how much higher each metric is than another model's on the same examples.

        Both are scored on the same resamples, so the interval is that of the paired difference.

        Raises:
          ValueError: if the labels differ.
        """
        if not np.array_equal(self.labels, other.labels):
            raise ValueError("the labels of two evaluations differ")

        def difference(metric: Metric) -> Callable[[np.ndarray], float]:
            mine, theirs = self._on(metric), other._on(metric)
            return lambda numbers: mine(numbers) - theirs(numbers)

        return {
            name: bootstrap(difference(metric), len(self.labels), resamples)
            for name, metric in self.metrics.items()
        }

    @property
    def confusion(self) -> np.ndarray:
        """Numbers of examples `i64[classes, classes]`: rows are labels, columns predictions."""
        size = len(self.task.classes)
        cells = self.labels.astype(int) * size + self.predictions.astype(int)
        return np.bincount(cells, minlength=size * size).reshape(size, size)

    @property
    def classes(self) -> list[ClassRow]:
        """Precision, recall and F1 of each class."""
        matrix = self.confusion
        right, support, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        precision, recall = _share(right, predicted), _share(right, support)
        f1 = _share(2 * right, support + predicted)
        rows = zip(self.task.classes, precision, recall, f1, support, strict=True)
        return [ClassRow(n, float(p), float(r), float(f), int(s)) for n, p, r, f, s in rows]

    @property
    def confidence(self) -> np.ndarray:
        """The probability of each prediction, `f64[E]`.

        Raises:
          ValueError: for a task with scores.
        """
        if self.probabilities is None:
            raise ValueError("scores have no probabilities")
        return self.probabilities[np.arange(len(self.labels)), self.predictions.astype(int)]

    def calibration(self, bins: int = BINS) -> tuple[float, list[Bin]]:
        """Compare confidence with accuracy in bins of equal width.

        Returns:
          The expected calibration error, `Σ n_b / E · |accuracy_b - confidence_b|` (Guo et al.
          2017, "On Calibration of Modern Neural Networks", section 2), and the bins.
        """
        confidence, right = self.confidence, self.predictions == self.labels
        numbers = np.minimum((confidence * bins).astype(int), bins - 1)
        counts = np.bincount(numbers, minlength=bins)
        mean = _share(np.bincount(numbers, confidence, bins), counts)
        accuracy = _share(np.bincount(numbers, right, bins), counts)
        error = float(np.sum(counts * np.abs(accuracy - mean)) / max(1, counts.sum()))
        rows = zip(counts.tolist(), mean.tolist(), accuracy.tolist(), strict=True)
        return error, [Bin(*row) for row in rows]

    def best_threshold(self) -> tuple[float, float]:
        """Return the threshold on the positive class's probability with the best F1, and that F1.

        An example is positive if its probability is at least the threshold. The threshold is chosen
        on these examples, so that F1 is higher than on others.
        """
        assert self.probabilities is not None
        positive = self.probabilities[:, 1]
        order = np.argsort(-positive, kind="stable")
        found = np.cumsum(self.labels[order] == 1)
        f1 = 2 * found / (np.arange(1, len(order) + 1) + max(1, found[-1]))
        last = np.append(np.diff(positive[order]) != 0, True)  # equal probabilities stay together
        best = int(np.argmax(np.where(last, f1, -1)))
        return float(positive[order][best]), float(f1[best])

    def worst(self, most: int = 20) -> np.ndarray:
        """Return the numbers of the worst mistakes: the most confident, or the farthest."""
        if self.task.integer:
            badness = np.where(self.predictions != self.labels, self.confidence, 0.0)
        else:
            badness = np.abs(self.predictions - self.labels)
        order = np.argsort(-badness, kind="stable")[:most]
        return order[badness[order] > 0]


def bootstrap(
    statistic: Callable[[np.ndarray], float], rows: int, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Compute a statistic and its 95 % percentile interval by resampling rows with replacement.

    Args:
      statistic: of the rows with the given numbers `i64[rows]`.
      rows: how many there are.
      resamples: number of resamples.
      seed: of the resamples.

    >>> bootstrap(lambda n: 1.0, rows=5)
    Interval(value=1.0, low=1.0, high=1.0)
    """
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(rows, size=rows)) for _ in range(resamples)]
    low, high = np.nanquantile(values, [0.025, 0.975])
    return Interval(statistic(np.arange(rows)), float(low), float(high))


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Divide, with 0 where there is nothing to divide by."""
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)
