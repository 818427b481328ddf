"""Evaluations against scikit-learn's definitions, and the promises of bootstrap intervals."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlora.tasks import evaluation, metrics
from jaxlora.tasks.evaluation import Evaluation, bootstrap
from jaxlora.tasks.task import Task

oracle = pytest.importorskip("sklearn.metrics")
calibration = pytest.importorskip("sklearn.calibration")
TOPIC = Task("t", "classification", classes=("a", "b", "c", "d"))
BINARY = Task("t", "binary", classes=("no", "yes"))
SEEDS = st.integers(0, 2**31)


def draw(seed, task=TOPIC, rows=None, digits=3):
    """Predictions that are right more often than not, with probabilities that repeat."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(1, 40) if rows is None else rows
    size = len(task.classes)
    labels = rng.integers(0, size, rows).astype(float)
    raw = rng.random((rows, size)) + np.eye(size)[labels.astype(int)] * rng.random()
    probabilities = np.round(raw / raw.sum(1, keepdims=True), digits)
    return Evaluation(task, probabilities.argmax(1).astype(float), labels, probabilities)


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS)
def test_classes_and_confusion_are_scikit_learns(seed):
    found = draw(seed)
    y, x, names = found.labels, found.predictions, range(len(TOPIC.classes))
    np.testing.assert_array_equal(found.confusion, oracle.confusion_matrix(y, x, labels=names))
    expected = oracle.precision_recall_fscore_support(y, x, labels=names, zero_division=0)
    rows = list(zip(*[row[1:] for row in found.classes], strict=True))
    np.testing.assert_allclose(rows, expected, atol=1e-12)
    assert [row.name for row in found.classes] == list(TOPIC.classes)


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS)
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.filterwarnings("ignore:A single label was found")
def test_scores_are_scikit_learns(seed):
    found = draw(seed)
    y, x = found.labels, found.predictions
    assert metrics.balanced_accuracy(x, y) == pytest.approx(oracle.balanced_accuracy_score(y, x))
    rng = np.random.default_rng(seed)
    y, x = rng.normal(0, 9, (2, len(y)))
    assert metrics.mean_absolute_error(x, y) == pytest.approx(oracle.mean_absolute_error(y, x))
    expected = oracle.root_mean_squared_error(y, x)
    assert metrics.root_mean_squared_error(x, y) == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS)
def test_the_best_threshold_is_the_best_of_scikit_learns_curve(seed):
    found = draw(seed, BINARY, digits=1)
    if found.labels.min() == found.labels.max():
        return
    threshold, f1 = found.best_threshold()
    predicted = found.probabilities[:, 1] > threshold
    assert oracle.f1_score(found.labels, predicted) == pytest.approx(f1)
    each = [
        oracle.f1_score(found.labels, found.probabilities[:, 1] >= cut, zero_division=0)
        for cut in np.unique(found.probabilities[:, 1])
        if cut > 0  # a threshold is
    ]
    assert f1 == pytest.approx(max([*each, 0]))


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS)
def test_bins_of_calibration_are_scikit_learns(seed):
    found = draw(seed, digits=9)
    error, bins = found.calibration()
    right = found.predictions == found.labels
    accuracy, confidence = calibration.calibration_curve(right, found.confidence, n_bins=10)
    kept = [one for one in bins if one.rows]
    np.testing.assert_allclose([one.accuracy for one in kept], accuracy)
    np.testing.assert_allclose([one.confidence for one in kept], confidence)
    weights = [one.rows / len(right) for one in kept]
    assert error == pytest.approx(np.dot(weights, np.abs(accuracy - confidence)))


def test_confidence_that_is_as_often_right_as_it_says_is_calibrated():
    right = np.arange(100) < 80
    probabilities = np.tile([0.2, 0.8], (100, 1))
    found = Evaluation(BINARY, np.ones(100), right.astype(float), probabilities)
    assert found.calibration()[0] == pytest.approx(0)
    sure = Evaluation(BINARY, np.ones(100), right.astype(float), np.tile([0.0, 1.0], (100, 1)))
    assert sure.calibration()[0] == pytest.approx(0.2)


def test_an_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = np.random.default_rng(1).normal(3, 2, 2000)
    found = bootstrap(lambda n: values[n].mean(-1), len(values), 4000)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert found.value == values.mean()
    np.testing.assert_allclose(
        [found.low, found.high], found.value + np.array([-half, half]), atol=0.1 * half
    )


def test_differences_are_paired():
    """Two models with nearly the same predictions: far narrower than intervals of each."""
    mine = draw(3, rows=500)
    other = Evaluation(TOPIC, mine.predictions.copy(), mine.labels, mine.probabilities)
    other.predictions[:5] = (other.labels[:5] + 1) % 4
    apart, scores = mine.differences(other, 200)["accuracy"], mine.scores(200)["accuracy"]
    assert (
        0
        <= apart.low
        <= apart.value
        == pytest.approx(
            metrics.accuracy(mine.predictions, mine.labels)
            - metrics.accuracy(other.predictions, mine.labels)
        )
    )
    assert apart.high - apart.low < (scores.high - scores.low) / 2
    assert set(mine.differences(mine, 5).values()) == {(0.0, 0.0, 0.0)}
    with pytest.raises(ValueError, match="labels"):
        mine.differences(draw(4, rows=500))


def test_worst_mistakes_are_the_most_confident_or_the_farthest():
    found = draw(5, rows=60)
    worst = found.worst(7)
    assert (found.predictions != found.labels)[worst].all()
    assert (np.diff(found.confidence[worst]) <= 0).all()
    others = np.setdiff1d(np.flatnonzero(found.predictions != found.labels), worst)
    assert len(others) and found.confidence[others].max() <= found.confidence[worst].min()
    scores = Evaluation(
        Task("p", "regression", high=9.0), np.array([1.0, 9, 3]), np.array([2.0, 2, 3]), None
    )
    assert scores.worst().tolist() == [1, 0]


def test_metrics_follow_the_kind():
    assert set(draw(0, rows=9).scores(3)) == {"accuracy", "balanced accuracy", "macro F1"}
    assert "F1 of yes" in draw(0, BINARY).scores(3)
    scores = Evaluation(Task("p", "regression", high=9.0), np.ones(3), np.arange(3.0), None)
    found = scores.scores(9)
    assert found["Pearson r"].value == 0
    assert found["mean absolute error"].value == pytest.approx(2 / 3)


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS)
def test_the_table_of_sets_is_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (rng.integers(1, 30), 3)).astype(float)
    p = np.clip(rng.random(labels.shape) * 0.7 + 0.3 * labels, 0, 1)
    task = Task("t", "multilabel", classes=("a", "b", "c"))
    found = Evaluation(task, (p > 0.5).astype(float), labels, p)
    expected = oracle.precision_recall_fscore_support(labels, p > 0.5, zero_division=0)
    rows = list(zip(*[row[1:] for row in found.classes], strict=True))
    np.testing.assert_allclose(rows, expected, atol=1e-12)
    scores = found.scores(3)
    assert set(scores) == {"micro F1", "macro F1", "accuracy"}
    assert scores["micro F1"].value == pytest.approx(
        oracle.f1_score(labels, p > 0.5, average="micro", zero_division=0)
    )
    assert found.confusion.size == 0
    _, bins = found.calibration()
    assert sum(one.rows for one in bins) == labels.size
    wrong = (found.predictions != labels).any(-1)
    worst = found.worst(99)
    assert sorted(worst) == np.flatnonzero(wrong).tolist()
    assert (np.diff(found.badness[worst]) <= 0).all()


def draw_sets(seed, rows, classes=4):
    """Sets of classes: the last class occurs nowhere, and some rows have none."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((rows, classes)) < np.linspace(0.6, 0, classes)).astype(float)
    probabilities = np.clip(0.6 * labels + 0.5 * rng.random((rows, classes)), 0, 1)
    task = Task("t", "multilabel", classes=tuple(map(str, range(classes))))
    return Evaluation(task, (probabilities > 0.5).astype(float), labels, probabilities)


SETS = {
    "micro F1": lambda y, x: oracle.f1_score(y, x, average="micro", zero_division=0),
    "macro F1": lambda y, x: oracle.f1_score(y, x, average="macro", zero_division=0),
    "accuracy": oracle.accuracy_score,
}


@settings(max_examples=6, deadline=None)
@given(seed=SEEDS, rows=st.integers(1, 30), part=st.sampled_from([1, 70, 10**6]))
def test_resampled_sets_are_a_plain_loop_over_scikit_learn(seed, rows, part):
    mine, other = draw_sets(seed, rows), draw_sets(seed + 1, rows)
    other = Evaluation(mine.task, other.predictions, mine.labels, other.probabilities)
    rng = np.random.default_rng(0)
    draws = [rng.integers(rows, size=rows) for _ in range(9)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "AT_ONCE", part)
        scores, apart = mine.scores(9), mine.differences(other, 9)
    for name, score in SETS.items():
        a, b = (
            np.array([score(mine.labels[n], one.predictions[n]) for n in draws])
            for one in (mine, other)
        )
        whole = score(mine.labels, mine.predictions)
        for found, value, values in (
            (scores[name], whole, a),
            (apart[name], whole - score(mine.labels, other.predictions), a - b),
        ):
            low, high = np.quantile(values, [0.025, 0.975])
            np.testing.assert_allclose(found, (value, low, high), atol=1e-12)


def test_two_hundred_classes_are_resampled_without_a_loop():
    """Each resample on its own takes over a minute for these sizes."""
    found = draw_sets(0, rows=2000, classes=200)
    begun = time.process_time()
    scores = found.scores()
    assert time.process_time() - begun < 10
    for name, metric in found.metrics.items():
        assert scores[name].value == metric.compute(found.predictions, found.labels)


def test_predictions_that_are_not_numbers_have_no_score():
    found = draw_sets(0, rows=5)
    found.predictions[2, 1] = np.nan
    assert np.isnan(found.scores(9)["micro F1"].value)


@pytest.mark.parametrize("rows", [1, 6])
def test_a_prediction_that_is_not_a_number_counts_for_no_class(rows):
    found = draw(0, rows=rows)
    found.predictions[0] = np.nan
    rest = Evaluation(TOPIC, found.predictions[1:], found.labels[1:], found.probabilities[1:])
    np.testing.assert_array_equal(found.confusion, rest.confusion)
    assert np.isnan(found.confidence[0]) and found.calibration() == rest.calibration()
    assert all(np.isnan(one).all() for one in found.scores(20).values())


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="no rows to resample"):
        bootstrap(lambda numbers: np.ones(len(numbers)), rows=0)
