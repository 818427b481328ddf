"""The encoder: torch's BertModel on real weights, packing that leaks nothing, dropout, matmul."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.data.packing import Shape, fill
from jaxlora.lora import LoraConfig
from jaxlora.nn import bert, ops
from jaxlora.nn.bert import Encoder, pool
from jaxlora.nn.encode import PackedTokens, encoder
from jaxlora.nn.modernbert import ModernBertConfig
from jaxlora.nn.ops import matmul
from jaxlora.utils import trees

SENTENCES = (
    "A film.",
    "The plot is thin, but the two leads carry it with charm and a good deal of wit.",
    "How do I learn to play the guitar?",
    "What is the best way to learn the guitar by myself?",
    "A man is slicing an onion in the kitchen.",
    "Unbelievably dull!",
    "Two dogs run along the beach while a third one, wet and tired, sleeps beside an umbrella.",
    "Nobody who saw it on the opening night could say afterwards what it had been about, or why "
    "the second act took place on a train that never left the station it had been built in.",
)
ONE = Shape(1, 64)


def tokenized(base):
    return [np.array(base.tokenizer.encode(s).ids) for s in SENTENCES]


def encode(base, rows, **changes):
    config = dataclasses.replace(base.config, **changes)
    run = jax.jit(Encoder(config).apply)
    return np.asarray(run({"params": base.params}, *rows[:3]))


def tokens_of(hidden, rows, slot):
    """The vectors of one sentence's tokens, in order."""
    return hidden[rows.segment_ids == slot + 1]


@pytest.fixture(scope="module")
def alone(minilm):
    """The real sentences, one a row."""
    ids = tokenized(minilm)
    parts = [fill([s], [n], len(ids), ONE) for n, s in enumerate(ids)]
    stacked = [np.concatenate(x) for x in zip(*(p[:3] for p in parts), strict=True)]
    return PackedTokens(*stacked, np.arange(len(ids)) * 64)


@pytest.fixture(scope="module")
def together(minilm):
    """The same sentences, several in a row."""
    ids = tokenized(minilm)
    return fill(ids, range(len(ids)), len(ids), Shape(3, 64))


# ---- against torch


@pytest.fixture(scope="module")
def torch_hidden(minilm, alone):
    """The last layer by transformers' BertModel."""
    torch = pytest.importorskip("torch")
    from transformers import BertModel

    from jaxlora.formats import huggingface

    model = BertModel.from_pretrained(
        huggingface.find("minilm"), attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(alone.tokens).long(),
            attention_mask=torch.tensor(alone.segment_ids > 0).long(),
        )
    return out.last_hidden_state.numpy()


def error(base, rows, expected, **changes):
    real = rows.segment_ids > 0
    return np.abs(encode(base, rows, **changes) - expected)[real].max()


def test_equals_torch_on_real_weights(minilm, alone, torch_hidden):
    assert np.abs(torch_hidden).max() > 1
    assert error(minilm, alone, torch_hidden) <= 5e-5


@pytest.mark.parametrize("wrong", [{"hidden_act": "gelu_new"}, {"layer_norm_eps": 1e-6}])
def test_that_tolerance_tells_right_from_wrong(wrong, minilm, alone, torch_hidden):
    assert error(minilm, alone, torch_hidden, **wrong) > 5e-5


# ---- packing


def test_packed_equals_one_sentence_a_row(minilm, alone, together):
    assert len(together.tokens) < len(alone.tokens)
    a, b = encode(minilm, alone), encode(minilm, together)
    for slot in range(len(SENTENCES)):
        np.testing.assert_allclose(
            tokens_of(b, together, slot), tokens_of(a, alone, slot), atol=1e-5
        )
    for kind in ("cls", "mean"):
        np.testing.assert_allclose(
            pool(b, together.segment_ids, together.cls_index, kind),
            pool(a, alone.segment_ids, alone.cls_index, kind),
            atol=1e-5,
        )


def test_a_neighbour_changes_nothing(tiny):
    mine, neighbour, other = np.arange(10, 20), np.arange(20, 30), np.arange(30, 40)
    a, b = (fill([mine, n], [0, 1], 2, Shape(1, 24)) for n in (neighbour, other))
    x, y = encode(tiny, a), encode(tiny, b)
    np.testing.assert_array_equal(tokens_of(x, a, 0), tokens_of(y, b, 0))
    assert (tokens_of(x, a, 1) != tokens_of(y, b, 1)).any()


def test_no_gradient_reaches_a_neighbour(tiny):
    mine, neighbour = np.arange(10, 20), np.arange(20, 30)
    rows = fill([mine, neighbour], [0, 1], 2, Shape(1, 24))

    def loss(table):
        params = tiny.params | {
            "embeddings": tiny.params["embeddings"] | {"word_embeddings": table}
        }
        hidden = Encoder(tiny.config).apply({"params": params}, *rows[:3])
        return jnp.sum(jnp.sin(hidden[0, :10]))

    g = jax.grad(loss)(jnp.asarray(tiny.params["embeddings"]["word_embeddings"]))
    touched = np.abs(g).max(1) > 0
    assert np.flatnonzero(touched).tolist() == mine.tolist()  # not 20…29, not padding's 0


SMALL = {
    "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 12,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        bert.BertConfig(**SMALL),
        bert.BertConfig(**SMALL, embedding_size=8, padding_idx=0),
        bert.BertConfig(**SMALL, relative_attention_num_buckets=32, type_vocab_size=0),
        ModernBertConfig(**SMALL),
    ],
    ids=("bert", "projected", "relative", "modernbert"),
)
def test_each_copy_has_the_gradient_of_its_own_rows(config):
    encode_rows = encoder(config, jnp.float32, LoraConfig(), "mean")
    shape = bert.param_shapes(config)
    leaves, structure = jax.tree.flatten(shape)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    params = structure.unflatten(
        0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)
    )
    tasks = [fill([np.arange(a, a + 5), np.arange(3, 9)], [0, 1], 2, Shape(1, 12)) for a in (5, 15)]
    rows = jax.tree.map(lambda *x: jnp.stack(x), *(PackedTokens(*task) for task in tasks))

    def loss(collections, rows):
        return jnp.sum(jnp.sin(encode_rows({}, collections, rows, None)))

    def loss_of_copy(copies, rows):
        return loss(bert.with_copies(params, copies), rows)

    copies = jax.tree.map(lambda x: jnp.zeros((2, *x.shape)), params)
    found = jax.jit(jax.grad(lambda own: jnp.sum(jax.vmap(loss_of_copy)(own, rows))))(copies)
    alone = jax.jit(jax.grad(lambda params, rows: loss({"params": params}, rows)))
    expected = [alone(params, PackedTokens(*task)) for task in tasks]
    for path, x in jax.tree.leaves_with_path(found):
        y = np.stack([trees.flatten(one)[tuple(key.key for key in path)] for one in expected])
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5, err_msg=str(path))
        assert np.abs(y).max() > 1e-7 or "key" in str(path), path


def test_positions_count_within_the_sentence(tiny):
    sentence = np.arange(10, 18)
    rows = fill([sentence, sentence], [0, 1], 2, Shape(1, 16))
    hidden = encode(tiny, rows)
    np.testing.assert_allclose(tokens_of(hidden, rows, 0), tokens_of(hidden, rows, 1), atol=1e-6)


@pytest.mark.parametrize("kind", ["cls", "mean"])
def test_pooling_by_numpy(kind):
    rng = np.random.default_rng(0)
    sentences = [rng.integers(5, 200, n) for n in (9, 1, 14, 5, 7)]
    slots = [3, 0, 1, 5, 2]  # slot 4 is empty
    rows = fill(sentences, slots, 6, Shape(3, 16))
    hidden = rng.normal(size=(3, 16, 4)).astype(np.float32)
    pooled = pool(hidden, rows.segment_ids, rows.cls_index, kind)
    assert pooled.shape == (6, 4)
    for slot in slots:
        own = tokens_of(hidden, rows, slot)
        expected = own[0] if kind == "cls" else own.mean(0)
        np.testing.assert_allclose(pooled[slot], expected, rtol=1e-5, atol=1e-6)
    if kind == "mean":
        np.testing.assert_array_equal(pooled[4], np.zeros(4))


# ---- dropout


def test_dropout_is_on_with_a_key_only(tiny):
    rows = fill([np.arange(10, 30)], [0], 1, Shape(1, 24))
    run = jax.jit(encoder(tiny.config, jnp.float32, LoraConfig(), "cls"))
    variables = {"params": tiny.params}
    off = run(variables, {}, rows, None)
    on = [run(variables, {}, rows, jax.random.key(k)) for k in (0, 0, 1)]
    np.testing.assert_array_equal(off, run(variables, {}, rows, None))
    np.testing.assert_allclose(off[0], encode(tiny, rows)[0, 0], atol=1e-5)
    np.testing.assert_array_equal(on[0], on[1])
    assert (on[0] != off).any() and (on[0] != on[2]).any()


@pytest.mark.parametrize("field", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_each_dropout_rate_is_used(field, tiny):
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    rows = fill([np.arange(10, 30)], [0], 1, Shape(1, 24))

    def run(**rates):
        config = dataclasses.replace(tiny.config, **rates)
        encode = encoder(config, jnp.float32, LoraConfig(), "cls")
        return encode({"params": tiny.params}, {}, rows, jax.random.key(0))

    off = run(**rates)
    np.testing.assert_allclose(off[0], encode(tiny, rows)[0, 0], atol=1e-5)
    assert (run(**rates | {field: 0.5}) != off).any()


# ---- matmul's own derivative


def matmul_gradients(multiply, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((3, 5, 16), (16, 8), (3, 5, 8))
    x, w, weight = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    return jax.grad(lambda x, w: jnp.sum(weight * multiply(x, w)), (0, 1))(x, w.astype(dtype))


def test_matmul_gradient_in_float32():
    found = matmul_gradients(lambda x, w: matmul(x, w, jnp.float32))
    with jax.default_matmul_precision("highest"):  # of the reference
        expected = matmul_gradients(jnp.matmul)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [jnp.float32, jnp.bfloat16])
def test_matmul_gradient_in_bfloat16(kernel):
    expected = matmul_gradients(jnp.matmul)
    found = matmul_gradients(lambda x, w: matmul(x, w, jnp.bfloat16), kernel)
    assert [g.dtype for g in found] == [jnp.float32, kernel]  # as the inputs
    for a, b in zip(found, expected, strict=True):
        error = a.astype(jnp.float32) - b
        assert 0 < jnp.linalg.norm(error) / jnp.linalg.norm(b) < 2**-7


def dot_inputs(jaxpr):
    """Dtypes of the inputs of every dot_general, also in nested jaxprs."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield tuple(v.aval.dtype for v in equation.invars)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from dot_inputs(inner)


def test_backward_matmuls_are_bfloat16_too():
    def loss(x, w):
        return jnp.sum(matmul(x, w, jnp.bfloat16) ** 2)

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(jnp.ones((4, 8)), jnp.ones((8, 2)))
    found = list(dot_inputs(jaxpr.jaxpr))
    assert found == [(jnp.bfloat16, jnp.bfloat16)] * 3


def test_bfloat16_encoder_stays_close_and_float32_outside(tiny):
    rows = fill([np.arange(10, 30)], [0], 1, Shape(1, 24))
    params = bert.stack_layers(bert.matmul_ready(tiny.params, jnp.bfloat16))
    hidden = Encoder(tiny.config, jnp.bfloat16).apply({"params": params}, *rows[:3])
    assert hidden.dtype == jnp.float32
    expected = encode(tiny, rows)
    assert 0 < np.abs(hidden - expected).max() < 0.1
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="."): x.dtype
        for path, x in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    assert {n for n, d in flat.items() if d == jnp.bfloat16} == {
        n for n in flat if n.endswith(".kernel")
    }


@pytest.mark.parametrize("count", [2, bert.MOST_UNROLLED + 1])
def test_layers_apart_are_stacked_again_as_they_were(count):
    shapes = bert.param_shapes(bert.BertConfig(20, 8, count, 2, 16, 16))
    keys = iter(jax.random.split(jax.random.key(0), 100))
    params = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), shapes)
    ready = bert.matmul_ready(params, jnp.float32)
    assert isinstance(ready["layers"], list) == (count == 2)
    jax.tree.map(np.testing.assert_array_equal, bert.stack_layers(ready), params)


# ---- dropout


def test_dropout_keeps_the_rate_and_the_mean():
    x = jnp.full((257, 1001), 2.0)  # no multiple of four elements
    y = np.asarray(ops.dropout(x, 0.1, jax.random.key(0)))
    kept = y != 0
    assert abs(kept.mean() - 230 / 256) < 3e-3
    np.testing.assert_allclose(y[kept], 2 * 256 / 230, rtol=1e-6)


def test_dropout_is_independent_from_element_to_element():
    """The four elements that share a random word, too."""
    kept = np.asarray(ops.dropout(jnp.ones(400_000), 0.5, jax.random.key(3)) != 0).astype(float)
    for shift in (1, 2, 3, 4, 384):
        assert abs(np.corrcoef(kept[:-shift], kept[shift:])[0, 1]) < 0.01
    other = np.asarray(ops.dropout(jnp.ones(400_000), 0.5, jax.random.key(4)) != 0).astype(float)
    assert abs(np.corrcoef(kept, other)[0, 1]) < 0.01


@pytest.mark.parametrize("count", [8, 32])
def test_the_attention_bias_has_as_many_buckets_as_the_config_says(count, monkeypatch):
    """An index beyond the table would be clamped in silence."""
    found, buckets = [], ops.relative_buckets
    monkeypatch.setattr(ops, "relative_buckets", lambda *a: found.append(buckets(*a)) or found[-1])
    config = bert.BertConfig(**SMALL, relative_attention_num_buckets=count)
    row = fill([np.arange(200) % 20 + 5], [0], 1, Shape(1, 200))
    jax.eval_shape(config.network().init, jax.random.key(0), *row[:3])
    assert found[-1].max() == count - 1
