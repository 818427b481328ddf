"""Metrics of sets of classes, and the table of metrics, against scikit-learn and scipy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxlora.tasks import metrics
from jaxlora.tasks.metrics import METRICS

oracle = pytest.importorskip("sklearn.metrics")
SETS = st.integers(1, 5).flatmap(
    lambda k: st.lists(st.tuples(*[st.integers(0, 1)] * (2 * k)), min_size=1, max_size=20)
)


@settings(max_examples=100, deadline=None)
@given(SETS)
def test_scores_of_sets_are_scikit_learns(rows):
    x, y = np.split(np.array(rows), 2, axis=1)
    if x.shape[1] > 1:  # scikit-learn takes one column for classes
        for name in ("micro", "macro"):
            expected = oracle.f1_score(y, x, average=name, zero_division=0)
            assert METRICS[f"{name}_f1"].compute(x, y) == pytest.approx(expected)
        assert metrics.accuracy(x, y) == pytest.approx(oracle.accuracy_score(y, x))


def test_the_micro_average_of_classes_is_their_accuracy():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 4, (2, 90))
    assert metrics.micro_f1(x, y) == pytest.approx(oracle.f1_score(y, x, average="micro"))
    assert metrics.micro_f1(x, y) == pytest.approx(metrics.accuracy(x, y))


def test_sets_are_for_metrics_of_sets_and_a_nan_gives_nan():
    sets = np.ones((3, 2))
    for name in ("f1", "balanced_accuracy", "mae", "pearson"):
        with pytest.raises(ValueError, match="vectors of equal length"):
            METRICS[name].compute(sets, sets)
    for name in ("micro_f1", "macro_f1", "accuracy"):
        assert np.isnan(METRICS[name].compute(np.full((3, 2), np.nan), sets))
        assert np.isnan(METRICS[name].compute(sets[:0], sets[:0]))


def test_greater_is_better_except_for_errors():
    """By the metrics themselves: right predictions are not worse than those that are half wrong."""
    rng = np.random.default_rng(1)
    y = rng.integers(0, 2, 200).astype(float)
    near, far = np.where(rng.random(200) < 0.1, 1 - y, y), np.where(rng.random(200) < 0.5, 1 - y, y)
    for metric in METRICS.values():
        assert (metric.compute(near, y) > metric.compute(far, y)) == metric.greater


def test_the_metrics_of_scores_are_the_libraries():
    x, y = np.random.default_rng(2).normal(0, 3, (2, 50))
    expected = {
        "mae": oracle.mean_absolute_error(y, x),
        "rmse": oracle.root_mean_squared_error(y, x),
        "pearson": stats.pearsonr(x, y).statistic,
        "spearman": stats.spearmanr(x, y).statistic,
    }
    for name, value in expected.items():
        assert METRICS[name].compute(x, y) == pytest.approx(value)
