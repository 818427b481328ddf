import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxlora.data.tokenized import Examples
from jaxlora.lora import LoraConfig
from jaxlora.nn import bert
from jaxlora.nn.encode import encoder, make_encode
from jaxlora.serving import inference
from jaxlora.tasks.task import PARA, SST, STS_COSINE, Task


def examples(lengths, labels, sentences):
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 150, sum(lengths)).astype(np.int32)
    offsets = np.cumsum([0, *lengths])
    ids = np.arange(len(labels)).astype(str)
    return Examples(ids, tokens, offsets, np.array(labels, np.float32), sentences)


def test_encode_gives_each_sentence_its_own_vector_in_order(tiny):
    data = examples([5, 31, 3, 17, 8, 4] * 40, [0] * 240, 1)
    encode = encoder(tiny.config, jnp.float32, LoraConfig(), "mean")
    frozen = {"params": bert.matmul_ready(tiny.params, jnp.float32)}
    encode_rows = make_encode(encode)
    vectors = inference.encode(encode_rows, frozen, {}, data, 32, few_programs=True)
    assert encode_rows._cache_size() == 1
    assert vectors.shape == (240, tiny.config.hidden_size)
    for n in (0, 1, 119, 239):
        alone = examples([1], [0], 1)
        alone = Examples(
            alone.ids, data.sentence(n), np.array([0, len(data.sentence(n))]), alone.labels, 1
        )
        expected = inference.encode(encode_rows, frozen, {}, alone, 32)[0]
        np.testing.assert_allclose(vectors[n], expected, atol=1e-5)


def test_sentences_of_nothing_but_cls_and_sep(tiny):
    data = examples([2] * 600, [0] * 600, 1)
    encode_rows = make_encode(encoder(tiny.config, jnp.float32, LoraConfig(), "cls"))
    frozen = {"params": bert.matmul_ready(tiny.params, jnp.float32)}
    assert inference.encode(encode_rows, frozen, {}, data, 32).shape == (600, 32)


def test_outputs_take_first_and_second_sentences_apart():
    vectors = np.array([[1.0, 0], [1, 0], [1, 0], [0, 1]], np.float32)
    outputs = inference.outputs(STS_COSINE, {}, vectors, "concat")
    np.testing.assert_allclose(outputs, [1, 0], atol=1e-6)
    np.testing.assert_allclose(inference.decode(STS_COSINE, outputs), [5, 0], atol=1e-6)


def test_floor_of_a_single_task_is_its_commonest_class():
    data = examples([3] * 5, [4, 4, 4, 0, 1], 1)
    assert inference.untrained(SST, data, np.zeros((5, 2), np.float32)) == 3 / 5


def test_floor_of_pairs_is_the_best_threshold_on_the_cosine():
    def pair(angle):
        return [[1.0, 0.0], [np.cos(angle), np.sin(angle)]]

    vectors = np.array([v for angle in (0.1, 0.2, 0.3, 0.4) for v in pair(angle)], np.float32)
    # Cosines fall from left to right: a cut after the first is right about all but the last.
    data = examples([3] * 8, [1, 0, 0, 1], 2)
    assert inference.untrained(PARA, data, vectors) == 3 / 4
    # With no positive at all the best threshold is above everything.
    assert inference.untrained(PARA, examples([3] * 8, [0, 0, 0, 0], 2), vectors) == 1
    score = inference.untrained(STS_COSINE, examples([3] * 8, [5, 4, 2, 1], 2), vectors)
    assert 0.9 < score <= 1


def pairs_of(cosines):
    return np.array([v for c in cosines for v in ([1, 0], [c, np.sqrt(1 - c * c)])], np.float32)


def test_equal_cosines_are_on_one_side_of_any_threshold():
    data, same = examples([3] * 8, [1, 1, 0, 0], 2), pairs_of([0.5] * 4)
    assert inference.untrained(PARA, data, same) == 0.5
    two = pairs_of([0.9, 0.9, 0.9, 0.1])  # right above 0.9: 2 of 4; above 0.1: 3 of 4
    assert inference.untrained(PARA, data, two) == 0.75


@pytest.mark.parametrize("metric", ["accuracy", "f1", "macro_f1"])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_the_best_threshold_is_the_best_of_all(metric, data):
    cells = st.tuples(st.sampled_from([-0.5, 0.0, 0.25, 0.5, 1.0]), st.integers(0, 1))
    cosines, labels = zip(*data.draw(st.lists(cells, min_size=1, max_size=9)), strict=True)
    task, truth = dataclasses.replace(PARA, metric=metric), np.array(labels)
    wanted = max(
        task.score(np.array(cosines) >= cut, truth) for cut in (-1, -0.25, 0.1, 0.3, 0.7, 2)
    )
    split = examples([3] * 2 * len(labels), list(labels), 2)
    assert inference.untrained(task, split, pairs_of(cosines)) == pytest.approx(wanted)


def test_an_untrained_cosine_is_judged_as_a_trained_ones_predictions_are():
    """Scores below the range are cut to it: the first two pairs are equal then."""
    vectors, labels = pairs_of([-0.9, -0.1, 0.5, 1.0]), [1.0, 0, 3, 5]
    data, clipped = examples([3] * 8, labels, 2), [0, 0, 2.5, 5]
    price = Task("price", "regression", pair=True, low=-10, high=10)
    for metric, expected in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        wanted = pytest.approx(expected(clipped, labels).statistic, abs=1e-6)
        task = dataclasses.replace(STS_COSINE, metric=metric)
        assert inference.untrained(task, data, vectors) == wanted
        assert (
            inference.untrained(dataclasses.replace(price, metric=metric), data, vectors) == wanted
        )


def test_the_best_constant_answer_by_each_metric():
    negative = examples([3] * 5, [0, 0, 0, 0, 1], 1)
    for metric, expected in (
        ("accuracy", 4 / 5), ("f1", 2 / 6), ("macro_f1", (8 / 9 + 0) / 2)
    ):  # fmt: skip
        task = Task("x", "binary", metric=metric)
        found = inference.untrained(task, negative, np.zeros((5, 2), np.float32))
        assert found == pytest.approx(expected)
    price = Task("price", "regression")
    assert inference.untrained(price, examples([3] * 3, [0, 0.5, 1], 1), np.zeros((3, 2))) == 0


def test_a_vector_that_is_no_number_has_no_untrained_score():
    vectors = pairs_of([0.5, 0.1])
    vectors[0] = np.nan
    for task in (PARA, STS_COSINE):
        assert np.isnan(inference.untrained(task, examples([3] * 4, [1, 0], 2), vectors))


def test_tasks_that_differ_in_names_alone_share_their_programs():
    head = SST.init_head(jax.random.key(0), 8, "concat")
    vectors = np.ones((3, 8), np.float32)

    def programs(name):
        task = dataclasses.replace(
            SST, name=name, title=name, classes=tuple(name + c for c in SST.classes)
        )
        found = inference.outputs(task, head, vectors, "concat")
        inference.decode(task, found), inference.probabilities(task, found)
        compiled = (inference._apply_head, inference._decode, inference._probabilities)
        return [one._cache_size() for one in compiled]

    assert programs("one") == programs("another")


def test_constant_answers_are_the_baseline_of_sets_and_errors():
    oracle = pytest.importorskip("sklearn.metrics")
    sets = [[1, 0, 0], [1, 1, 0], [1, 0, 0], [0, 0, 1]]
    task = Task("t", "multilabel", classes=("a", "b", "c"))
    every = [np.tile([n & 1, n >> 1 & 1, n >> 2], (4, 1)) for n in range(8)]
    best = max(oracle.f1_score(sets, one, average="micro", zero_division=0) for one in every)
    found = inference.untrained(task, examples([3] * 4, sets, 1), np.zeros((4, 2)))
    assert found == pytest.approx(best)
    for metric, value in (("mae", 2), ("rmse", np.sqrt(12))):
        task = Task("t", "regression", high=8.0, metric=metric)
        found = inference.untrained(task, examples([3] * 4, [0, 0, 0, 8], 1), np.zeros((4, 2)))
        assert found == pytest.approx(value)
