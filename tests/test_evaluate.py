import jax.numpy as jnp
import numpy as np

from jaxlora import bert, evaluate, step
from jaxlora.data.examples import Examples
from jaxlora.lora import LoraConfig
from jaxlora.tasks import PARA, SST, STS_COSINE


def examples(lengths, labels, sentences):
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 150, sum(lengths)).astype(np.int32)
    offsets = np.cumsum([0, *lengths])
    ids = np.arange(len(labels)).astype(str)
    return Examples(ids, tokens, offsets, np.array(labels, np.float32), sentences)


def test_encode_gives_each_sentence_its_own_vector_in_order(tiny):
    data = examples([5, 31, 3, 17, 8, 4] * 40, [0] * 240, 1)
    encode = step.encoder(tiny.config, jnp.float32, LoraConfig(), "mean")
    frozen = {"params": bert.matmul_ready(tiny.params, jnp.float32)}
    encode_rows = step.make_encode(encode)
    vectors = evaluate.encode(encode_rows, frozen, {}, data, 32)
    assert encode_rows._cache_size() == 1
    assert vectors.shape == (240, tiny.config.hidden_size)
    for n in (0, 1, 119, 239):
        alone = examples([1], [0], 1)
        alone = Examples(
            alone.ids, data.sentence(n), np.array([0, len(data.sentence(n))]), alone.labels, 1
        )
        expected = evaluate.encode(encode_rows, frozen, {}, alone, 32)[0]
        np.testing.assert_allclose(vectors[n], expected, atol=1e-5)


def test_sentences_of_nothing_but_cls_and_sep(tiny):
    data = examples([2] * 600, [0] * 600, 1)
    encode_rows = step.make_encode(step.encoder(tiny.config, jnp.float32, LoraConfig(), "cls"))
    frozen = {"params": bert.matmul_ready(tiny.params, jnp.float32)}
    assert evaluate.encode(encode_rows, frozen, {}, data, 32).shape == (600, 32)


def test_outputs_take_first_and_second_sentences_apart():
    vectors = np.array([[1.0, 0], [1, 0], [1, 0], [0, 1]], np.float32)
    outputs = evaluate.outputs(STS_COSINE, {}, vectors, 2, "concat")
    np.testing.assert_allclose(outputs, [1, 0], atol=1e-6)
    np.testing.assert_allclose(evaluate.decode(STS_COSINE, outputs), [5, 0], atol=1e-6)


def test_floor_of_a_single_task_is_its_commonest_class():
    data = examples([3] * 5, [4, 4, 4, 0, 1], 1)
    assert evaluate.untrained(SST, data, np.zeros((5, 2), np.float32)) == 3 / 5


def test_floor_of_pairs_is_the_best_threshold_on_the_cosine():
    def pair(angle):
        return [[1.0, 0.0], [np.cos(angle), np.sin(angle)]]

    vectors = np.array([v for angle in (0.1, 0.2, 0.3, 0.4) for v in pair(angle)], np.float32)
    # Cosines fall from left to right: a cut after the first is right about all but the last.
    data = examples([3] * 8, [1, 0, 0, 1], 2)
    assert evaluate.untrained(PARA, data, vectors) == 3 / 4
    # With no positive at all the best threshold is above everything.
    assert evaluate.untrained(PARA, examples([3] * 8, [0, 0, 0, 0], 2), vectors) == 1
    score = evaluate.untrained(STS_COSINE, examples([3] * 8, [5, 4, 2, 1], 2), vectors)
    assert 0.9 < score <= 1
