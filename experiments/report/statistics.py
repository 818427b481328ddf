"""Means over seeds, and paired bootstrap intervals over seeds and dev examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy import stats

RESAMPLES = 10_000
LEVEL = 0.95
EXAMPLES, SEEDS = 0, 1  # the two levels of the bootstrap, as keys of `stream`
_CHUNK = 500  # resamples per chunk, which has a few megabytes of counts


@dataclasses.dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation of `count` values; the latter None for fewer than two."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Compute mean and deviation of at least one value.

        >>> Summary.of([1.0, 3.0])
        Summary(mean=2.0, deviation=1.4142135623730951, count=2)
        """
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return cls(float(np.mean(values)), deviation, len(values))

    def scaled(self, factor: float) -> Summary:
        """Convert to another unit."""
        deviation = None if self.deviation is None else self.deviation * factor
        return Summary(self.mean * factor, deviation, self.count)


@dataclasses.dataclass(frozen=True)
class Interval:
    """A measured value and its interval."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> Interval:
        """Convert to another unit."""
        return Interval(self.value * factor, self.low * factor, self.high * factor)


class Range(Interval):
    """An interval of a quantity without a sign, such as a time."""


Seed = int | np.random.SeedSequence


def stream(seed: int, *key: int) -> np.random.SeedSequence:
    """Derive a seed for each key, independent of all others."""
    return np.random.SeedSequence(seed, spawn_key=key)


def draws(examples: int, resamples: int = RESAMPLES, seed: Seed = 0) -> Iterator[np.ndarray]:
    """Draw bootstrap resamples as counts of each example, `f64[chunk, examples]`.

    The same arguments give the same draws, which makes comparisons paired.
    """
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, _CHUNK):
        rows = min(_CHUNK, resamples - start)
        drawn = rng.integers(examples, size=(rows, examples))
        drawn += examples * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * examples)
        yield counts.reshape(rows, examples).astype(np.float64)


def resampled_accuracy(
    predictions: np.ndarray, labels: np.ndarray, resamples: int = RESAMPLES, seed: Seed = 0
) -> np.ndarray:
    """Compute each run's accuracy on each resample of the examples: `f64[resamples, runs]`.

    Args:
      predictions: `f64[runs, E]`.
      labels: `f64[E]`.
      resamples, seed: see `draws`.
    """
    right = (predictions == labels).T.astype(np.float64)
    sums = np.concatenate([counts @ right for counts in draws(len(labels), resamples, seed)])
    return sums / len(labels)


def resampled_pearson(
    predictions: np.ndarray, labels: np.ndarray, resamples: int = RESAMPLES, seed: Seed = 0
) -> np.ndarray:
    """Compute each run's Pearson r on each resample of the examples: `f64[resamples, runs]`.

    A resample's r needs only five weighted means, so all resamples are one matrix product. As in
    `jaxlora.tasks.metrics.pearson`, r is 0 if either side is constant. For the arguments see
    `resampled_accuracy`.
    """
    columns, y = _standard(predictions), _standard(labels)
    features = np.concatenate([columns, columns**2, columns * y, [y, y**2]]).T
    n = len(columns)
    parts = []
    for counts in draws(len(labels), resamples, seed):
        means = counts @ features / len(labels)
        x, xx, xy = means[:, :n], means[:, n : 2 * n], means[:, 2 * n : 3 * n]
        y_mean, yy = means[:, -2:-1], means[:, -1:]
        parts.append(_correlation(xy - x * y_mean, xx - x**2, yy - y_mean**2))
    return np.concatenate(parts)


def resample_seeds(drawn: np.ndarray, scores: Mapping[int, float], seed: int = 0) -> np.ndarray:
    """Resample the seeds of a study, the second level of the bootstrap.

    A resample's score is the mean over the seeds on its examples, plus the shift of that mean by a
    resample of the seeds. Seeds differ partly because the dev set is small. The first level already
    accounts for that, so the second level only gets the rest of their variance.

    Args:
      drawn: each seed's score on each resample of the examples, `f64[resamples, seeds]`.
      scores: seed → its score on all examples, in the order of `drawn`.
      seed: seed of the bootstrap; studies with the same seeds draw the same resamples.

    Returns:
      `f64[resamples]`.
    """
    mean = drawn.mean(axis=1)
    count, values = len(scores), np.array(list(scores.values()))
    spread = values.var(ddof=1) if count > 1 else 0.0
    if spread == 0:
        return mean
    of_examples = (drawn - mean[:, None]).var(axis=0).mean() * count / (count - 1)
    share = max(0.0, 1 - of_examples / spread) ** 0.5
    return mean + share * (_seed_weights(tuple(scores), len(drawn), seed) @ values)


def _seed_weights(seeds: tuple[int, ...], resamples: int, seed: int) -> np.ndarray:
    """Compute deviations of resampled seed weights from equal ones: `f64[resamples, seeds]`.

    With n seeds, the variance of a plain resample's mean is too small by (n - 1)/n, and its tails
    are normal instead of Student's t with n - 1 degrees of freedom. The factor corrects both.
    """
    count = len(seeds)
    rng = np.random.default_rng(stream(seed, SEEDS, *seeds))
    weights = rng.multinomial(count, np.full(count, 1 / count), resamples) / count
    upper = (1 + LEVEL) / 2
    tails = stats.t.ppf(upper, count - 1) / stats.norm.ppf(upper)
    return (weights - 1 / count) * tails * (count / (count - 1)) ** 0.5


def _standard(values: np.ndarray) -> np.ndarray:
    """Center and scale values, which keeps r and makes the sums well conditioned."""
    centred = values - values.mean(axis=-1, keepdims=True)
    scale = centred.std(axis=-1, keepdims=True)
    return centred / np.where(scale > 0, scale, 1.0)


def _correlation(
    covariance: np.ndarray, x_variance: np.ndarray, y_variance: np.ndarray
) -> np.ndarray:
    tiny = 1e-12  # rounding errors in the variance of a constant, relative to scale 1
    defined = (x_variance > tiny) & (y_variance > tiny)
    scale = np.sqrt(np.where(defined, x_variance * y_variance, 1.0))
    return np.where(defined, np.clip(covariance / scale, -1, 1), 0.0)


def interval(value: float, resampled: np.ndarray, level: float = LEVEL) -> Interval:
    """Compute the percentile interval around a measured value.

    >>> interval(0.5, np.linspace(0, 1, 101), level=0.5)
    Interval(value=0.5, low=0.25, high=0.75)
    """
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Reliability of a classifier: bins of equal width over the confidence 0 … 1.

    Attributes:
      confidence, accuracy: `f64[bins]`, means within each nonempty bin.
      share: `f64[bins]`, the fraction of all examples in each bin.
      error: the expected calibration error, Σ share · |accuracy − confidence| (Guo et al. 2017).
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    share: np.ndarray
    error: float


def calibration(confidence: np.ndarray, right: np.ndarray, bins: int = 10) -> Calibration:
    """Compare the confidence of a classifier with its accuracy.

    Args:
      confidence: `f64[E]`, the probability of the predicted class.
      right: `bool[E]`, whether the prediction is correct.
      bins: number of bins.

    >>> found = calibration(np.array([0.95, 0.95, 0.55, 0.55]), np.array([1, 1, 1, 0]))
    >>> found.accuracy.tolist(), round(found.error, 6)
    ([0.5, 1.0], 0.05)
    """
    numbers = np.minimum((confidence * bins).astype(int), bins - 1)
    counts = np.bincount(numbers, minlength=bins)
    used = counts > 0
    of_bin = [
        np.bincount(numbers, weights=x, minlength=bins)[used] / counts[used]
        for x in (confidence, right.astype(float))
    ]
    share = counts[used] / len(confidence)
    return Calibration(of_bin[0], of_bin[1], share, float(share @ np.abs(of_bin[1] - of_bin[0])))


def confusion(predictions: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Count examples by label (row) and prediction (column): `i64[classes, classes]`.

    >>> confusion(np.array([0, 1, 1]), np.array([0, 1, 0]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    pairs = labels.astype(int) * classes + predictions.astype(int)
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
