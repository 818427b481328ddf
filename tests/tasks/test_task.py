"""Kinds of tasks: their losses, decodings, probabilities and metrics; F1 and rank correlation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxlora.tasks import metrics
from jaxlora.tasks import task as tasks
from jaxlora.tasks.kinds import KINDS
from jaxlora.tasks.task import PARA, SST, STS_COSINE, STS_MSE, Task
from jaxlora.utils import schema

TOPIC = Task("topic", "classification", classes=("sport", "science", "art"))
BINARY = Task("spam", "binary", classes=("ham", "spam"), metric="f1")
PRICE = Task("price", "regression", low=-10.0, high=90.0)


def test_defaults_follow_the_kind():
    assert (TOPIC.loss, TOPIC.metric, TOPIC.outputs, TOPIC.high) == (
        "cross_entropy", "accuracy", 3, 2.0,
    )  # fmt: skip
    assert (BINARY.loss, BINARY.outputs, BINARY.classes) == (
        "binary_cross_entropy", 1, ("ham", "spam"),
    )  # fmt: skip
    assert Task("x", "binary").classes == ("0", "1")
    assert (PRICE.loss, PRICE.metric_name) == ("squared_error", "Pearson r")
    assert STS_COSINE.outputs == 0
    assert STS_MSE.outputs == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "ranking"}, "kind 'ranking' is not one of"),
        ({"kind": "classification", "classes": ("a",)}, "at least two"),
        ({"kind": "classification", "classes": ("a", "b", "a")}, "twice"),
        ({"kind": "binary", "classes": ("a", "b", "c")}, "two"),
        ({"kind": "regression", "classes": ("a", "b")}, "do not go with"),
        ({"kind": "regression", "low": 2.0, "high": 2.0}, "is empty"),
        ({"kind": "regression", "high": float("inf")}, "is empty"),
        ({"kind": "regression", "loss": "cosine"}, "loss 'cosine' does not go with regression"),
        ({"kind": "binary", "metric": "pearson"}, "metric 'pearson' does not go with binary"),
        ({"kind": "similarity"}, "two text columns"),
        ({"kind": "regression", "pair": True, "head": "pooler"}, "reads one vector"),
    ],
)
def test_contradicting_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Task("x", **fields)


def test_the_head_pooler_is_that_of_berts_sequence_classifier():
    """Two layers with tanh between them; scores are on the labels' scale and not clipped."""
    task = Task("price", "regression", low=0.0, high=1.0, head="pooler")
    head = task.init_head(jax.random.key(0), 8, "concat")
    assert jax.tree.map(jnp.shape, head) == {
        "pooler": {"kernel": (8, 8), "bias": (8,)}, "out": {"kernel": (8, 1), "bias": (1,)},
    }  # fmt: skip
    x = jax.random.normal(jax.random.key(1), (3, 8))
    expected = jnp.tanh(x @ head["pooler"]["kernel"]) @ head["out"]["kernel"]
    found = task.apply_head(head, x, x, pair_features="concat")
    np.testing.assert_allclose(found, expected[:, 0], rtol=1e-5)
    np.testing.assert_array_equal(task.decode(jnp.array([-70.0, 9.5])), [-70, 9.5])
    loss = task.per_example_loss(jnp.array([3.0, 5.0]), jnp.array([3.0, 7.0]))
    np.testing.assert_allclose(loss, [0, 4])


def test_a_task_stored_by_an_earlier_version_gets_the_default_of_a_new_field():
    old = dataclasses.asdict(TOPIC)
    del old["head"]
    assert schema.build(Task, old) == TOPIC
    with pytest.raises(ValueError, match="kind: missing"):
        schema.build(Task, {name: value for name, value in old.items() if name != "kind"})


def test_scores_are_trained_from_0_to_5_and_decoded_to_the_labels_scale():
    labels = jnp.array([-10.0, 40.0, 90.0])
    inner = jnp.array([0.0, 2.5, 5.0])
    np.testing.assert_allclose(PRICE.per_example_loss(inner, labels), 0, atol=1e-6)
    np.testing.assert_allclose(PRICE.per_example_loss(inner + 1, labels), 1, rtol=1e-5)
    np.testing.assert_allclose(PRICE.decode(inner), labels, rtol=1e-6)
    np.testing.assert_allclose(PRICE.decode(jnp.array([-3.0, 7.0])), [-10, 90])  # clipped
    near = Task("near", "similarity", pair=True, low=1.0, high=3.0)
    cosines = jnp.array([0.0, 0.5, 1.0])
    np.testing.assert_allclose(near.decode(cosines), [1, 2, 3], rtol=1e-6)
    wrong = near.per_example_loss(cosines, jnp.array([1.0, 3.0, 1.0]))
    np.testing.assert_allclose(wrong, [0, 0.25, 1], atol=1e-6)


def test_the_papers_similarities_are_not_rescaled():
    labels, outputs = jnp.array([0.0, 3.5, 5.0]), jnp.array([0.5, 2.0, 7.0])
    assert STS_MSE.per_example_loss(outputs, labels).tolist() == [0.25, 2.25, 4.0]
    assert STS_MSE.decode(outputs).tolist() == [0.5, 2.0, 5.0]


def test_probabilities_sum_to_one_and_their_log_ratios_are_the_logits_differences():
    logits = jnp.array([[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]])
    found = TOPIC.probabilities(logits)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(
        jnp.log(found[:, 1:] / found[:, :-1]), logits[:, 1:] - logits[:, :-1], rtol=1e-5, atol=1e-6
    )
    assert TOPIC.decode(logits).tolist() == found.argmax(-1).tolist() == [1, 2]
    one = BINARY.probabilities(jnp.array([0.0, 2.0]))
    np.testing.assert_allclose(one, [[0.5, 0.5], [1 - 0.8807971, 0.8807971]], rtol=1e-5)
    assert PRICE.probabilities(jnp.zeros(2)) is None
    assert STS_COSINE.probabilities(jnp.zeros(2)) is None


def test_every_metric_of_every_kind_is_best_for_perfect_predictions():
    truth = np.array([0.0, 1.0, 1.0, 0.0])
    for name, kind in KINDS.items():
        for metric in kind.metrics:
            classes = () if kind.form == "score" else ("a", "b")
            task = Task("x", name, pair=True, metric=metric, classes=classes)
            right = np.stack([truth, 1 - truth], 1) if task.label_shape else truth
            best = 1 if task.greater_is_better else 0
            assert task.score(right, right) == best
            assert task.gain(task.score(1 - right, right)) < task.gain(best)


def test_f1_equals_values_computed_by_hand():
    truth, found = np.array([0, 0, 1, 1, 1, 0]), np.array([1, 0, 1, 1, 0, 0])
    assert metrics.f1(found, truth) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert metrics.f1(np.zeros(6), truth) == 0
    # Three classes: F1 of 0 is 1, of 1 is 2/3, of 2 is 0 (never right).
    truth, found = np.array([0, 1, 2]), np.array([0, 1, 1])
    assert metrics.macro_f1(found, truth) == pytest.approx((1 + 2 / 3 + 0) / 3)


THREE = Task("x", "classification", classes=("a", "b", "c"), metric="f1")
TWO = Task("x", "classification", classes=("a", "b"), metric="f1")


def test_f1_is_chosen_by_the_tasks_classes_not_by_those_that_occur():
    zeros, one_wrong = np.zeros(10), np.arange(10) == 9
    assert THREE.score(zeros, zeros) == 1
    assert THREE.score(one_wrong, zeros) == pytest.approx((18 / 19 + 0) / 2)
    assert TWO.score(zeros, zeros) == 0  # no positive is found, nor there
    assert dataclasses.replace(TWO, metric="macro_f1").score(zeros, zeros) == 1
    assert THREE.metric_name == "macro F1" and TWO.metric_name == "F1"
    assert dataclasses.replace(THREE, metric="macro_f1").metric_name == "macro F1"


CLASSES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)
ORACLE = {"zero_division": 0.0}


@settings(max_examples=100, deadline=None)
@given(CLASSES)
def test_accuracy_and_f1_are_scikit_learns(pairs):
    oracle = pytest.importorskip("sklearn.metrics")
    found, truth = np.array(pairs, np.float32).T
    assert metrics.accuracy(found, truth) == pytest.approx(oracle.accuracy_score(truth, found))
    expected = oracle.f1_score(truth, found, average="macro", **ORACLE)
    assert metrics.macro_f1(found, truth) == pytest.approx(expected)
    found, truth = np.minimum(found, 1), np.minimum(truth, 1)
    expected = oracle.f1_score(truth, found, average="binary", pos_label=1, **ORACLE)
    assert metrics.f1(found, truth) == pytest.approx(expected)


# Few values, so that there are ties and constants; and such as differ in the last bits alone.
NUMBERS = st.one_of(
    st.integers(-2, 2).map(float),
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.sampled_from([5.0, 5.0 + 1e-12, 1e-30]),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=20))
@pytest.mark.filterwarnings("ignore::scipy.stats.DegenerateDataWarning")
def test_correlations_are_scipys(pairs):
    x, y = np.array(pairs).T
    constant = len(set(x)) == 1 or len(set(y)) == 1
    for ours, theirs in ((metrics.pearson, stats.pearsonr), (metrics.spearman, stats.spearmanr)):
        expected = 0.0 if constant else theirs(x, y).statistic
        assert ours(x, y) == pytest.approx(expected, nan_ok=True)


def test_correlations_of_float32_are_computed_in_float64():
    x = np.float32(4) + np.arange(100, dtype=np.float32) / 2**20
    y = np.sin(np.arange(100)).astype(np.float32)
    expected = stats.pearsonr(x.astype(np.float64), y.astype(np.float64)).statistic
    assert metrics.pearson(x, y) == pytest.approx(expected, rel=1e-12)


ALL = (metrics.accuracy, metrics.f1, metrics.macro_f1, metrics.pearson, metrics.spearman)


@pytest.mark.parametrize("metric", ALL)
def test_metrics_of_degenerate_input(metric):
    """One example, constant values, no examples; any NaN in either argument gives NaN."""
    correlation = metric in (metrics.pearson, metrics.spearman)
    for count in (1, 5):
        assert metric(np.ones(count), np.ones(count)) == (0 if correlation else 1)
    if correlation:
        assert metric(np.arange(3), np.ones(3)) == metric(np.ones(3), np.arange(3)) == 0
    assert np.isnan(metric(np.zeros(0), np.zeros(0)))
    good, bad = np.array([0.0, 1, 1, 0]), np.array([0.0, 1, np.nan, 0])
    for found, truth in ((bad, good), (good, bad), (np.full(4, np.nan), good)):
        assert np.isnan(metric(found, truth))


@pytest.mark.parametrize("task", [SST, PARA, TOPIC, BINARY, PRICE, STS_COSINE, STS_MSE])
def test_a_nan_output_gives_a_nan_prediction(task):
    shape = (3, task.outputs) if task.outputs > 1 else (3,)
    found = task.decode(jnp.zeros(shape).at[1].set(jnp.nan))
    assert jnp.isnan(found).tolist() == [False, True, False] and found.dtype == jnp.float32


def test_spearman_depends_on_the_order_only_and_averages_the_ranks_of_ties():
    x = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    assert metrics.spearman(np.exp(3 * x), x) == pytest.approx(1)
    assert metrics.spearman(-x, x) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4: by Pearson's formula 4.5 / sqrt(4.5 · 5).
    tied = metrics.spearman(np.array([10, 20, 20, 30]), np.array([1, 3, 2, 4]))
    assert tied == pytest.approx(4.5 / np.sqrt(4.5 * 5))


def test_head_kernels_have_variance_one_over_inputs():
    """As Flax's lecun_normal; torch.nn.Linear's variance is a third of that."""
    drawn = tasks.SST.init_head(jax.random.key(0), 768, "concat")["hidden"]
    assert 768 * float(jnp.var(drawn["kernel"])) == pytest.approx(1.0, rel=0.02)
    assert not drawn["bias"].any()
    linear = torch.nn.Linear(768, 768)
    assert 768 * linear.weight.var().item() == pytest.approx(1 / 3, rel=0.02)


@pytest.mark.parametrize("metric", ALL)
@pytest.mark.parametrize(
    ("found", "truth"), [([1, 2, 3], [1]), ([[1], [2]], [1, 2]), ([1, 2], [1, 2, 3]), (1, 1)]
)
def test_predictions_that_do_not_match_the_labels_are_refused(metric, found, truth):
    """NumPy would broadcast three answers to one label."""
    with pytest.raises(ValueError, match="vectors of equal length"):
        metric(np.array(found), np.array(truth))


@pytest.mark.parametrize("found", [[np.inf, 1, 2], [np.inf, -np.inf, 0], [-np.inf, 3, 3]])
def test_correlations_of_infinite_predictions_are_scipys(found):
    truth = np.array([1.0, 2.0, 3.0])
    with np.errstate(invalid="ignore"):
        r, rho = (f(found, truth).statistic for f in (stats.pearsonr, stats.spearmanr))
    assert np.isnan(r) and np.isnan(metrics.pearson(np.array(found), truth))
    assert metrics.spearman(np.array(found), truth) == pytest.approx(rho)
    for constant in (metrics.pearson, metrics.spearman):
        assert constant(np.full(3, np.inf), truth) == 0
