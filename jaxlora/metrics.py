"""What a dev set is judged by: accuracy and Pearson's correlation, in float64 on the host."""

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
