"""Kinds of tasks: their losses, decodings, probabilities and metrics; F1 and rank correlation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxlora import metrics, tasks
from jaxlora.tasks import KINDS, STS_COSINE, STS_MSE, Task

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
        ({"kind": "similarity"}, "two columns"),
    ],
)
def test_what_does_not_go_together_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Task("x", **fields)


def test_scores_are_trained_on_a_scale_of_0_to_5_and_come_back_on_the_labels():
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


def test_the_papers_similarities_are_left_as_they_are():
    labels, outputs = jnp.array([0.0, 3.7, 5.0]), jnp.array([0.3, 1.9, 6.2])
    np.testing.assert_array_equal(
        STS_MSE.per_example_loss(outputs, labels), jnp.square(outputs - labels)
    )
    np.testing.assert_array_equal(STS_MSE.decode(outputs), jnp.clip(outputs, 0, 5))


def test_probabilities():
    logits = jnp.array([[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]])
    found = TOPIC.probabilities(logits)
    np.testing.assert_allclose(found, jax.nn.softmax(logits), rtol=1e-6)
    assert TOPIC.decode(logits).tolist() == found.argmax(-1).tolist() == [1, 2]
    one = BINARY.probabilities(jnp.array([0.0, 2.0]))
    np.testing.assert_allclose(one, [[0.5, 0.5], [1 - 0.8807971, 0.8807971]], rtol=1e-5)
    assert PRICE.probabilities(jnp.zeros(2)) is None
    assert STS_COSINE.probabilities(jnp.zeros(2)) is None


def test_every_kinds_metrics_can_be_computed():
    truth = np.array([0.0, 1.0, 1.0, 0.0])
    for name, kind in KINDS.items():
        for metric in kind.metrics:
            task = Task(
                "x", name, pair=True, metric=metric, classes=("a", "b") if kind.integer else ()
            )
            assert task.score(truth, truth) == 1


def test_f1():
    truth, found = np.array([0, 0, 1, 1, 1, 0]), np.array([1, 0, 1, 1, 0, 0])
    assert metrics.f1(found, truth) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert metrics.f1(np.zeros(6), truth) == 0
    # Three classes by hand: F1 of 0 is 1, of 1 is 2/3, of 2 is 0 (never right).
    truth, found = np.array([0, 1, 2]), np.array([0, 1, 1])
    assert metrics.f1(found, truth) == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_spearman_sees_the_order_alone_and_shares_ranks_among_ties():
    x = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    assert metrics.spearman(np.exp(3 * x), x) == pytest.approx(1)
    assert metrics.spearman(-x, x) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4: by Pearson's formula 4.5 / sqrt(4.5 · 5).
    tied = metrics.spearman(np.array([10, 20, 20, 30]), np.array([1, 3, 2, 4]))
    assert tied == pytest.approx(4.5 / np.sqrt(4.5 * 5))


def test_heads_are_drawn_as_is_said():
    """flax's lecun_normal: variance 1/inputs. torch.nn.Linear's would be a third of that."""
    drawn = tasks.SST.init_head(jax.random.key(0), 768, "concat")["hidden"]
    assert 768 * float(jnp.var(drawn["kernel"])) == pytest.approx(1.0, rel=0.02)
    assert not drawn["bias"].any()
    linear = torch.nn.Linear(768, 768)
    assert 768 * linear.weight.var().item() == pytest.approx(1 / 3, rel=0.02)
