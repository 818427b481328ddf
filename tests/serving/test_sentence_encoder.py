"""`from_pretrained`: sentence vectors by torch's numbers, pure, differentiable, of few programs."""

import family_bases
import jax
import jax.numpy as jnp
import numpy as np
import peft_oracle
import pytest
from tiny import random_adapter

import jaxlora
from jaxlora import lora
from jaxlora.formats import huggingface
from jaxlora.lora import LoraConfig
from jaxlora.utils.errors import UserError

TEXTS = ["A film.", "How do I learn to play it?", "Two dogs run along the beach.", "", "un " * 40]


@pytest.fixture(scope="module")
def encoder():
    return jaxlora.from_pretrained("minilm", max_length=24)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_vectors_are_torchs(pooling):
    encoder = jaxlora.from_pretrained("minilm", pooling=pooling)
    model = peft_oracle.bert(huggingface.find("minilm"))
    wanted = peft_oracle.vectors(model, encoder.tokenizer, TEXTS, pooling)
    found = encoder.encode(encoder.params, TEXTS)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, atol=5e-5)


def test_texts_and_packed_tokens_give_the_same(encoder):
    by_texts = encoder.encode(encoder.params, TEXTS)
    tokens = encoder.pack(TEXTS)
    assert len(tokens.tokens) < len(TEXTS)
    by_tokens = jax.jit(encoder.encode)(encoder.params, tokens)
    np.testing.assert_allclose(by_tokens, by_texts, atol=1e-5)
    alone = np.stack([encoder.encode(encoder.params, [text])[0] for text in TEXTS])
    np.testing.assert_allclose(by_texts, alone, atol=1e-5)
    assert encoder.encode(encoder.params, []).shape == (0, 384)


def test_pairs_are_read_together(encoder):
    """As transformers does, with token types, beside single texts."""
    torch = pytest.importorskip("torch")
    pair = encoder.tokenizer.encode(TEXTS[0], TEXTS[1])
    assert set(pair.type_ids) == {0, 1}
    model = peft_oracle.bert(huggingface.find("minilm"))
    given = {"input_ids": pair.ids, "token_type_ids": pair.type_ids}
    with torch.no_grad():
        hidden = model(**{k: torch.tensor([v]) for k, v in given.items()}).last_hidden_state[0]
    wanted = hidden.mean(0) if encoder.pooling == "mean" else hidden[0]
    mixed = [TEXTS[2], (TEXTS[0], TEXTS[1])]
    for inputs in (mixed, encoder.pack(mixed)):
        found = encoder.encode(encoder.params, inputs)
        np.testing.assert_allclose(found[1], wanted.numpy(), atol=5e-5)
        np.testing.assert_allclose(
            found[0], encoder.encode(encoder.params, TEXTS[2:3])[0], atol=1e-5
        )


def test_long_texts_are_cut(encoder):
    tokens = encoder.pack(["un " * 40])
    assert (tokens.segment_ids > 0).sum() == 24 and tokens.tokens.shape == (1, 32)
    shorter = encoder.encode(encoder.params, ["un " * 22])
    np.testing.assert_allclose(encoder.encode(encoder.params, ["un " * 40]), shorter, atol=1e-6)


def test_an_adapter_is_as_one_that_is_merged(encoder):
    config = LoraConfig(3, 6.0, ("query", "output.dense"))
    adapter = random_adapter(encoder.params, config, 0.05)
    merged = encoder.encode(lora.merge(encoder.params, adapter, config), TEXTS)
    beside = encoder.encode(encoder.params, TEXTS, adapter=(adapter, config))
    np.testing.assert_allclose(beside, merged, atol=1e-4)
    assert np.abs(beside - encoder.encode(encoder.params, TEXTS)).max() > 0.01


@pytest.mark.slow
def test_a_gradient_is_that_of_finite_differences(encoder):
    config = LoraConfig(2, 2.0, ("query",))
    adapter = random_adapter(encoder.params, config, 0.05)
    tokens = encoder.pack(TEXTS[:2])

    @jax.jit
    def loss(adapter):
        return jnp.sum(encoder.encode(encoder.params, tokens, adapter=(adapter, config)) ** 3)

    keys = iter(jax.random.split(jax.random.key(0), 4))
    way = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), adapter)
    slope = sum(map(jnp.vdot, *(jax.tree.leaves(t) for t in (jax.grad(loss)(adapter), way))))
    ahead, behind = (
        loss(jax.tree.map(lambda x, d, step=step: x + step * d, adapter, way))
        for step in (1e-3, -1e-3)
    )
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-3, rtol=1e-2)


def test_dropout_is_on_with_a_key_alone(encoder):
    tokens = encoder.pack(TEXTS[:2])
    run = jax.jit(lambda key: encoder.encode(encoder.params, tokens, key=key))
    off = encoder.encode(encoder.params, tokens)
    on = [run(jax.random.key(k)) for k in (0, 0, 1)]
    np.testing.assert_array_equal(on[0], on[1])
    assert np.abs(on[0] - on[2]).max() > 0.01 and np.abs(on[0] - off).max() > 0.01


@pytest.mark.parametrize("family", ["roberta", "modernbert"])
def test_every_family_has_it(family, tmp_path):
    model = family_bases.save(tmp_path, family)
    encoder = jaxlora.from_pretrained(str(tmp_path), pooling="cls")
    ids = [np.array(encoder.tokenizer.encode(text).ids) for text in TEXTS[:3]]
    wanted = np.stack([one[0] for one in family_bases.torch_hidden(model, ids)])
    np.testing.assert_allclose(encoder.encode(encoder.params, TEXTS[:3]), wanted, atol=5e-5)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda e: e.encode(e.params, "one text"), "give a list of strings"),
        (lambda e: e.encode(e.params, [1, 2]), "give a list of strings"),
        (lambda e: e.encode(e.params, [("a", "b", "c")]), "give a list of strings or pairs"),
        (lambda e: e.encode(e.params, ["a"], key=jax.random.key(0)), "pack the texts first"),
        (lambda e: e.pack(["a"] * 9, rows=1, length=8), "do not fit.*give more rows or length"),
        (lambda e: e.pack(["how do i learn it?"], length=4), "do not fit"),
        (lambda e: jaxlora.from_pretrained("minilm", pooling="max"), "pooling 'max'"),
        (lambda e: jaxlora.from_pretrained("minilm", dtype="int8"), "dtype 'int8'"),
        (lambda e: jaxlora.from_pretrained("minilm", max_length=513), "max_length 513.*to 512"),
        (lambda e: jaxlora.from_pretrained("minilm", sha256="0" * 64), "not 0000"),
        (lambda e: jaxlora.from_pretrained("./nowhere"), "no such folder"),
    ],
)
def test_bad_input_is_one_line(encoder, call, said):
    with pytest.raises(UserError, match=said) as caught:
        call(encoder)
    assert "\n" not in str(caught.value)
