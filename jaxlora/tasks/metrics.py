"""Metrics: accuracy, F1, errors and correlations, in float64 on the host.

For degenerate input the results match scikit-learn and SciPy, with two exceptions. The correlation
with a constant is 0 (SciPy: NaN). Every metric is NaN if there is no example, or if any prediction
or label is NaN, so that such a score is never the best. Predictions and labels are vectors of equal
length. Accuracy, macro F1 and micro F1 also accept label sets, `[E, K]` of 0 and 1. Other shapes
raise ValueError.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Compute the fraction of predictions that equal their label, 0 … 1.

    A label set counts as correct only if all its classes match.

    >>> accuracy(np.array([1, 0, 4]), np.array([1, 0, 3]))
    0.6666666666666666
    """
    x, y = _arrays(predictions, labels, sets=True)
    equal = x == y if x.ndim == 1 else (x == y).all(-1)
    return float(np.mean(equal)) if _defined(x, y) else np.nan


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Compute the F1 score of class 1, 0 … 1: `2 TP / (2 TP + FP + FN)`.

    It is 0 if class 1 occurs in neither the predictions nor the labels.

    >>> f1(np.array([1, 1, 0, 0]), np.array([1, 0, 1, 0]))
    0.5
    """
    x, y = _arrays(predictions, labels)
    if not _defined(x, y):
        return np.nan
    total = np.sum(x == 1) + np.sum(y == 1)
    return float(2 * np.sum((x == 1) & (y == 1)) / total) if total else 0.0


def macro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Compute the mean F1 score, 0 … 1, over all classes in the predictions or the labels.

    For label sets it is the mean over all K classes; the F1 of a class that never occurs is 0.

    >>> macro_f1(np.array([0, 1, 1]), np.array([0, 1, 2]))
    0.5555555555555555
    """
    x, y = _arrays(predictions, labels, sets=True)
    if not _defined(x, y):
        return np.nan
    right, either = _count(x, y)
    return float(np.mean(2 * right / np.where(either > 0, either, 1)))


def micro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Compute the F1 score, 0 … 1, of the pooled decisions about all classes.

    `2 Σ TP / Σ (2 TP + FP + FN)` over the classes, and 0 if no class occurs. With one class per
    example it equals the accuracy.

    >>> micro_f1(np.array([[1, 0], [1, 1]]), np.array([[1, 0], [0, 1]]))
    0.8
    """
    x, y = _arrays(predictions, labels, sets=True)
    if not _defined(x, y):
        return np.nan
    right, either = _count(x, y)
    return float(2 * right.sum() / max(1, either.sum()))


def _count(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count the true positives of each class, and its predictions plus labels."""
    if x.ndim == 2:
        found = _count_by_row(x, y).sum(0)
        return found[: x.shape[1]], found[x.shape[1] :]
    classes = np.union1d(x, y)
    # `classes` is sorted, so `searchsorted` gives each value the index of its class.
    right, predicted, true = (
        np.bincount(np.searchsorted(classes, values), minlength=len(classes))
        for values in (x[x == y], x, y)
    )
    return right, predicted + true


def balanced_accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Compute the mean recall, 0 … 1, over all classes in the labels.

    >>> balanced_accuracy(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]))
    0.75
    """
    x, y = _arrays(predictions, labels)
    if not _defined(x, y):
        return np.nan
    _, numbers, support = np.unique(y, return_inverse=True, return_counts=True)
    return float(np.mean(np.bincount(numbers, x == y) / support))


def mean_absolute_error(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Compute the mean absolute error, on the labels' scale.

    >>> mean_absolute_error(np.array([1.0, 4.0]), np.array([2.0, 1.0]))
    2.0
    """
    x, y = _arrays(predictions, labels)
    return float(np.mean(np.abs(x - y))) if _defined(x, y) else np.nan


def root_mean_squared_error(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Compute the root mean squared error, on the labels' scale.

    >>> root_mean_squared_error(np.array([3.0, 3.0]), np.array([0.0, 0.0]))
    3.0
    """
    x, y = _arrays(predictions, labels)
    return float(np.sqrt(np.mean((x - y) ** 2))) if _defined(x, y) else np.nan


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Compute Pearson's correlation r, -1 … 1; 0 if either argument is constant.

    >>> round(pearson(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0])), 12)
    1.0
    >>> pearson(np.array([1.0, 1.0]), np.array([0.0, 5.0]))
    0.0
    """
    return _correlation("pearsonr", predictions, labels)


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Compute Spearman's rank correlation ρ, -1 … 1; 0 if either argument is constant.

    >>> round(spearman(np.array([1.0, 2.0, 9.0]), np.array([0.1, 0.2, 0.3])), 12)
    1.0
    """
    return _correlation("spearmanr", predictions, labels)


def _correlation(
    name: Literal["pearsonr", "spearmanr"], predictions: np.ndarray, labels: np.ndarray
) -> float:
    from scipy import stats  # imported here because the import takes most of a second

    x, y = _arrays(predictions, labels)
    if not _defined(x, y):
        return np.nan
    if (x == x[0]).all() or (y == y[0]).all():
        return 0.0
    # With an infinite value SciPy's r is NaN; ρ depends on ranks only.
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        # Nearly constant input makes the value less accurate, not undefined.
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        return float(getattr(stats, name)(x, y).statistic)


def _arrays(*values: np.ndarray, sets: bool = False) -> tuple[np.ndarray, ...]:
    arrays = tuple(np.asarray(x, np.float64) for x in values)
    if arrays[0].ndim not in (1, 1 + sets) or arrays[0].shape != arrays[1].shape:
        shapes = " and ".join(str(x.shape) for x in arrays)
        raise ValueError(
            f"predictions and labels must be vectors of equal length, got shapes {shapes}"
        )
    return arrays


def _defined(*arrays: np.ndarray) -> bool:
    return all(x.size > 0 and not np.isnan(x).any() for x in arrays)


class Totals(NamedTuple):
    """A multilabel metric as a function of sums over rows, for fast resampling.

    Attributes:
      by_row: `(predictions, labels: f64[E, K]) → f64[E, N]`, the contribution of each row.
      score: `(sums: f64[R, N], E) → f64[R]`, the metric of R resamples of E rows each.
    """

    by_row: Callable[[np.ndarray, np.ndarray], np.ndarray]
    score: Callable[[np.ndarray, int], np.ndarray]


def _count_by_row(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return `f64[E, 2 K]`: true positives, then predictions plus labels."""
    return np.concatenate([x * y, x + y], axis=1)


def _sum_by_row(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return `f64[E, 2]`: the counts of `_count_by_row` summed over all classes."""
    return _count_by_row(x, y).reshape(len(x), 2, -1).sum(-1)


def _equal_by_row(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return `f64[E, 1]`: 1 if a label set matches exactly, else 0."""
    return (x == y).all(-1, keepdims=True).astype(np.float64)


def _mean_f1(sums: np.ndarray, rows: int) -> np.ndarray:
    """Average `2 TP / (2 TP + FP + FN)` over the classes; a class in no row counts as 0."""
    right, either = np.split(sums, 2, axis=1)
    return np.asarray(np.mean(2 * right / np.where(either > 0, either, 1), 1))


class Metric(NamedTuple):
    """A metric.

    Attributes:
      title: name in tables and messages.
      compute: `(predictions, labels) → score`.
      greater: whether greater is better.
      totals: the metric for label sets, from sums over rows; None: not for multilabel tasks.
    """

    title: str
    compute: Callable[[np.ndarray, np.ndarray], float]
    greater: bool = True
    totals: Totals | None = None


METRICS: dict[str, Metric] = {
    "accuracy": Metric(
        "accuracy", accuracy, totals=Totals(_equal_by_row, lambda sums, rows: sums[:, 0] / rows)
    ),
    "balanced_accuracy": Metric("balanced accuracy", balanced_accuracy),
    "f1": Metric("F1", f1),
    "macro_f1": Metric("macro F1", macro_f1, totals=Totals(_count_by_row, _mean_f1)),
    "micro_f1": Metric("micro F1", micro_f1, totals=Totals(_sum_by_row, _mean_f1)),
    "mae": Metric("mean absolute error", mean_absolute_error, greater=False),
    "rmse": Metric("root mean squared error", root_mean_squared_error, greater=False),
    "pearson": Metric("Pearson r", pearson),
    "spearman": Metric("Spearman ρ", spearman),
}
