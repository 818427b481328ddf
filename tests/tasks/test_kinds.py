"""Kinds as tables: sets of classes, ordinal classes, class weights and thresholds of a task."""

import dataclasses
import typing

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from jaxlora.data import holdout, labels, raw_examples
from jaxlora.serving import answers, inference
from jaxlora.tasks import kinds, metrics
from jaxlora.tasks.kinds import KINDS, LOSSES
from jaxlora.tasks.task import Task

TAGS = Task("tags", "multilabel", classes=("a", "b", "c"))
SPAM = Task("spam", "binary", classes=("ham", "spam"))
STARS = Task("stars", "ordinal", classes=("1", "2", "3", "4", "5"))
SEEDS = st.integers(0, 2**31)


def draw(seed, rows=None):
    """Logits and sets of three classes."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(1, 30) if rows is None else rows
    return rng.normal(0, 2, (rows, 3)).astype(np.float32), rng.integers(0, 2, (rows, 3)) * 1.0


def test_every_kind_has_its_losses_and_metrics_and_every_form_of_label_is_handled():
    assert set(typing.get_args(kinds.KindName)) == set(KINDS)
    for kind in KINDS.values():
        assert kind.losses and set(kind.losses) <= set(LOSSES)
        assert kind.metrics and set(kind.metrics) <= set(metrics.METRICS)
    forms = set(typing.get_args(kinds.LabelForm))
    for table in (raw_examples.PARSERS, labels.FINDERS, holdout.STRATA, inference.CONSTANTS):
        assert set(table) == forms
    assert set(answers.VALUES) == forms


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS)
def test_the_loss_of_a_set_is_torchs(seed):
    logits, sets = draw(seed, 20)
    expected = functional.binary_cross_entropy_with_logits(
        torch.tensor(logits), torch.tensor(sets, dtype=torch.float32), reduction="none"
    ).mean(-1)
    found = TAGS.per_example_loss(jnp.array(logits), jnp.array(sets, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_set_has_an_output_and_a_probability_of_its_own_for_each_class():
    assert (TAGS.outputs, TAGS.label_shape, TAGS.loss) == (3, (3,), "multilabel_cross_entropy")
    logits = jnp.array([[0.5, -1.0, 3.0], [-1.0, -2.0, jnp.nan]])
    np.testing.assert_allclose(
        TAGS.probabilities(logits), torch.sigmoid(torch.tensor(np.array(logits))), rtol=1e-6
    )
    np.testing.assert_array_equal(TAGS.decode(logits), [[1, 0, 1], [0, 0, np.nan]])
    np.testing.assert_array_equal(inference.decode(TAGS, np.array(logits)), TAGS.decode(logits))


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, cuts=st.tuples(*[st.floats(0.05, 0.95)] * 3))
def test_a_class_is_predicted_above_its_threshold(seed, cuts):
    logits, _ = draw(seed, 20)
    task = dataclasses.replace(TAGS, thresholds=cuts)
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    sure = np.abs(probabilities - cuts) > 1e-6
    for found in (task.decode(jnp.array(logits)), inference.decode(task, logits)):
        np.testing.assert_array_equal(found[sure], (probabilities > cuts)[sure])
    one = dataclasses.replace(SPAM, thresholds=cuts[:1])
    found = inference.decode(one, logits[:, 0])
    np.testing.assert_array_equal(found, one.decode(jnp.array(logits[:, 0])))
    np.testing.assert_array_equal(found[sure[:, 0]], (probabilities[:, 0] > cuts[0])[sure[:, 0]])
    np.testing.assert_array_equal(  # probabilities stay as they are
        inference.probabilities(one, logits[:, 0]), inference.probabilities(SPAM, logits[:, 0])
    )


def test_tasks_that_differ_in_thresholds_share_their_programs():
    logits = draw(3, 5)[0]
    inference.decode(TAGS, logits)
    before = inference._decode._cache_size()
    for cut in (0.2, 0.3, 0.7):
        inference.decode(dataclasses.replace(TAGS, thresholds=(cut,) * 3), logits)
    assert inference._decode._cache_size() == before


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS)
def test_tuned_thresholds_are_the_best_for_each_class_by_scikit_learn(seed):
    oracle = pytest.importorskip("sklearn.metrics")
    logits, sets = draw(seed)
    task = TAGS.tuned(logits, sets)
    assert TAGS.tune_thresholds and len(task.thresholds) == 3
    found = inference.decode(task, logits)
    for k in range(3):
        best = max(
            oracle.f1_score(sets[:, k], logits[:, k] > cut, zero_division=0)
            for cut in [-np.inf, *logits[:, k]]
        )
        mine = oracle.f1_score(sets[:, k], found[:, k], zero_division=0)
        assert mine == pytest.approx(best if 0 < sets[:, k].mean() < 1 else mine)
    for k in np.flatnonzero(sets.mean(0) == 0):
        assert task.thresholds[k] == 0.5


def test_two_classes_keep_one_half_unless_asked_and_are_tuned_by_their_metric():
    rng = np.random.default_rng(1)
    truth = (rng.random(300) < 0.1).astype(float)
    logits = (truth + rng.normal(0, 1, 300) - 4).astype(np.float32)
    assert SPAM.tuned(logits, truth) is SPAM and SPAM.thresholds == ()
    for metric in KINDS["binary"].metrics:
        plain = dataclasses.replace(SPAM, metric=metric)
        task = dataclasses.replace(plain, tune_thresholds=True).tuned(logits, truth)
        mine, usual = (t.score(inference.decode(t, logits), truth) for t in (task, plain))
        best = max(plain.score(logits > cut, truth) for cut in [-np.inf, *logits])
        assert mine == pytest.approx(best) and mine >= usual


def test_ordinal_classes_are_decoded_by_their_expectation():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (200, 5)).astype(np.float32)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.round((p * np.arange(5)).sum(-1))
    np.testing.assert_array_equal(STARS.decode(jnp.array(logits)), expected)
    assert (expected != logits.argmax(-1)).mean() > 0.2  # not the most probable class
    assert np.isnan(STARS.decode(jnp.full((1, 5), jnp.nan))).all()
    assert (STARS.metric_name, STARS.greater_is_better) == ("mean absolute error", False)
    assert STARS.gain(0.25) == -0.25


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS)
def test_balanced_weights_are_scikit_learns(seed):
    oracle = pytest.importorskip("sklearn.utils.class_weight")
    rng = np.random.default_rng(seed)
    truth = np.concatenate([np.arange(5), rng.choice(5, 50, p=[0.6, 0.2, 0.1, 0.06, 0.04])])
    task = dataclasses.replace(STARS, class_weights="balanced").weighted(truth.astype(np.float32))
    expected = oracle.compute_class_weight("balanced", classes=np.arange(5), y=truth)
    np.testing.assert_allclose(task.class_weights, expected)
    assert np.mean(np.array(task.class_weights)[truth]) == pytest.approx(1)


def test_weighted_losses_are_torchs():
    rng = np.random.default_rng(2)
    logits, truth = rng.normal(0, 2, (40, 5)).astype(np.float32), rng.integers(0, 5, 40)
    weights = (0.5, 1.0, 2.0, 3.0, 0.25)
    task = Task("x", "classification", classes=STARS.classes, class_weights=weights)
    expected = functional.cross_entropy(
        torch.tensor(logits), torch.tensor(truth), torch.tensor(weights), reduction="none"
    )
    found = task.per_example_loss(jnp.array(logits), jnp.array(truth, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    one, truth = logits[:, 0], truth > 2
    task = dataclasses.replace(SPAM, class_weights=(1.0, 4.0))
    expected = functional.binary_cross_entropy_with_logits(
        torch.tensor(one), torch.tensor(truth, dtype=torch.float32),
        pos_weight=torch.tensor(4.0), reduction="none",
    )  # fmt: skip
    found = task.per_example_loss(jnp.array(one), jnp.array(truth, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"thresholds": (0.5, 0.0, 0.5)}, "threshold: must be above 0 and below 1"),
        ({"thresholds": (0.5,)}, "1 are given for 3"),
        ({"kind": "classification", "thresholds": (0.5,) * 3}, "classification has none"),
        ({"kind": "ordinal", "tune_thresholds": True}, "ordinal has none"),
        ({"class_weights": "balanced"}, "multilabel has no single class per example"),
        ({"kind": "classification", "class_weights": (1.0, 2.0)}, "one for each of a, b, c"),
        ({"kind": "classification", "class_weights": (1.0, 2.0, 0.0)}, "must be above 0"),
        ({"classes": ("a|b", "c")}, r"'\|' is in the name 'a\|b'; choose another"),
        ({"classes": ("a",)}, "at least two"),
        ({"label_delimiter": ""}, "cannot separate names"),
        ({"metric": "pearson"}, "metric 'pearson' does not go with multilabel"),
    ],
)
def test_decisions_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Task(**{"name": "x", "kind": "multilabel", "classes": ("a", "b", "c")} | fields)
