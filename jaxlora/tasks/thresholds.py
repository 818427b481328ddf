"""Decision thresholds on probabilities, chosen on labelled examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Counts(NamedTuple):
    """True and false positives and negatives, `f64[candidates]` each."""

    tp: np.ndarray
    fp: np.ndarray
    fn: np.ndarray
    tn: np.ndarray


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Divide elementwise; 0 where `whole` is not positive."""
    return np.divide(part, whole, out=np.zeros(np.shape(part)), where=whole > 0)


def _accuracy(c: Counts) -> np.ndarray:
    return share(c.tp + c.tn, c.tp + c.fp + c.fn + c.tn)


def _balanced_accuracy(c: Counts) -> np.ndarray:
    return (share(c.tp, c.tp + c.fn) + share(c.tn, c.tn + c.fp)) / 2


def _f1(c: Counts) -> np.ndarray:
    return share(2 * c.tp, 2 * c.tp + c.fp + c.fn)


def _macro_f1(c: Counts) -> np.ndarray:
    return (_f1(c) + share(2 * c.tn, 2 * c.tn + c.fp + c.fn)) / 2


# Binary metrics that a threshold can be chosen by; for any other metric, F1 is used.
MEASURES: dict[str, Callable[[Counts], np.ndarray]] = {
    "accuracy": _accuracy,
    "balanced_accuracy": _balanced_accuracy,
    "f1": _f1,
    "macro_f1": _macro_f1,
}


def choose(
    probabilities: np.ndarray, labels: np.ndarray, measure: str = "f1"
) -> tuple[float, float]:
    """Choose the threshold above which a probability counts as positive.

    Candidates are the midpoints between adjacent distinct probabilities, and thresholds below the
    lowest and above the highest unless these are 0 and 1. The candidate nearest to 0.5 wins among
    those with the best score. If all examples have the same label, the threshold is 0.5. The score
    is optimistic, since the threshold is chosen on the same examples.

    Args:
      probabilities: `f64[E]`, 0 … 1.
      labels: `f64[E]`, 0 or 1.
      measure: see `MEASURES`.

    Returns:
      The threshold, strictly between 0 and 1, and its score.

    >>> choose(np.array([0.1, 0.2, 0.4, 0.9]), np.array([0, 0, 1, 1]))
    (0.30000000000000004, 1.0)
    """
    values, group = np.unique(np.asarray(probabilities, np.float64), return_inverse=True)
    total = np.bincount(group, minlength=len(values))
    true = np.bincount(group, labels, minlength=len(values))
    # Candidate k has the k lowest values below it.
    fn, below = (np.concatenate([[0], np.cumsum(x)]) for x in (true, total))
    tp, tn = true.sum() - fn, below - fn
    score = MEASURES[measure](Counts(tp, (total.sum() - below) - tp, fn, tn))
    edges = np.concatenate([[0], values, [1]])
    cuts = np.clip((edges[1:] + edges[:-1]) / 2, np.finfo(np.float32).tiny, 1 - 2.0**-53)
    usual = int(np.searchsorted(values, 0.5, side="right"))
    cuts[usual] = 0.5  # equivalent to any other threshold in this gap
    # A threshold strictly between 0 and 1 cannot put 0 above it or 1 below it.
    possible = (np.append(-np.inf, values) <= cuts) & (cuts < np.append(values, np.inf))
    score = np.where(possible, score, -np.inf)
    best = np.flatnonzero(score == score.max())
    chosen = best[np.argmin(np.abs(cuts[best] - 0.5))]
    if true.sum() in (0, total.sum()):
        chosen = usual
    return float(cuts[chosen]), float(score[chosen])
