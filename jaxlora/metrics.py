"""What a dev set is judged by: accuracy, F1 and correlations, in float64 on the host."""

from __future__ import annotations

import numpy as np


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The share of predictions that equal their label, 0 … 1.

    >>> accuracy(np.array([1, 0, 4]), np.array([1, 0, 3]))
    0.6666666666666666
    """
    return float(np.mean(np.asarray(predictions) == np.asarray(labels)))


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's correlation r, -1 … 1; 0 where either side is constant (r is undefined there).

    >>> pearson(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
    1.0
    >>> pearson(np.array([1.0, 1.0]), np.array([0.0, 5.0]))
    0.0
    """
    x = np.asarray(predictions, np.float64)
    y = np.asarray(labels, np.float64)
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt(np.sum(x * x) * np.sum(y * y))
    return float(np.clip(np.sum(x * y) / scale, -1, 1)) if scale > 0 else 0.0


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """F1, 0 … 1: of class 1 where there are only 0 and 1, else the mean over all classes (macro).

    `2 TP / (2 TP + FP + FN)`; 0 for a class that is neither predicted nor there.

    >>> f1(np.array([1, 1, 0, 0]), np.array([1, 0, 1, 0]))
    0.5
    """
    x, y = np.asarray(predictions), np.asarray(labels)
    classes = np.union1d(x, y)
    if set(classes.tolist()) <= {0, 1}:
        classes = np.array([1])
    return float(np.mean([_f1_of(x == c, y == c) for c in classes]))


def _f1_of(found: np.ndarray, true: np.ndarray) -> float:
    total = found.sum() + true.sum()
    return float(2 * (found & true).sum() / total) if total else 0.0


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Spearman's rank correlation ρ, -1 … 1: Pearson's r of the ranks, ties sharing their mean.

    >>> spearman(np.array([1.0, 2.0, 9.0]), np.array([0.1, 0.2, 0.3]))
    1.0
    """
    return pearson(_ranks(predictions), _ranks(labels))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
