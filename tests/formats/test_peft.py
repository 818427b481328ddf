"""PEFT's folders: what we write it reads, what it writes we read, and the rest is refused."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft_oracle
import pytest
from flax import traverse_util
from peft_oracle import edit_config
from safetensors.numpy import load_file, save_file
from tiny import leaves_equal, random_adapter

from jaxlora import lora
from jaxlora.data.packing import Shape, fill
from jaxlora.formats import families, peft_config
from jaxlora.formats import peft as peft_files
from jaxlora.lora import LoraConfig
from jaxlora.nn.bert import Encoder, pool
from jaxlora.utils.errors import UserError

SENTENCES = ("a film.", "how do i learn to play it?", "bada ceno liru.")

CASES = {
    "defaults": LoraConfig(6, 9.0),
    "every value": LoraConfig(
        4, 0.3, ("query", "key", "output.dense"), True,
        (("query", 2), ("attention.output.dense", 5)),
        (("output.dense", 3.5),), 0.25,
    ),
    "every dense": LoraConfig(3, 6.0, ("query", "dense")),  # would be the pooler's name, too
    "whole paths": LoraConfig(
        3, 6.0, ("layers.output.dense", "layers.attention.self.key"),
        rank_pattern=(("layers.output.dense", 5),), alpha_pattern=(("self.key", 1.0),),
    ),
}  # fmt: skip
cases = pytest.mark.parametrize("config", CASES.values(), ids=CASES)


def vectors(base, adapter=None, config=None):
    """[CLS] vectors by our packed encoder."""
    ids = [np.array(base.tokenizer.encode(s).ids) for s in SENTENCES]
    rows = fill(ids, range(len(ids)), len(ids), Shape(2, 48))
    variables = {"params": base.params} | ({"lora": adapter} if adapter else {})
    hidden = Encoder(base.config, lora=config or LoraConfig()).apply(variables, *rows[:3])
    return np.asarray(pool(hidden, rows.segment_ids, rows.cls_index, "cls"))


def save(folder, base, config=CASES["defaults"], name="tiny"):
    adapter = random_adapter(base.params, config)
    peft_files.save(folder, adapter, config, name, base.config)
    return adapter


def edit_tensors(folder, edit):
    tensors = load_file(folder / peft_files.TENSORS)
    edit(tensors)
    save_file(tensors, folder / peft_files.TENSORS, metadata={"format": "pt"})


# ---- there and back


@cases
def test_a_round_trip_changes_no_bit(tiny, tmp_path, config):
    adapter = save(tmp_path / "a", tiny, config)
    back, back_config = peft_files.load(tmp_path / "a", tiny.config)
    assert back_config == config
    ours, theirs = (traverse_util.flatten_dict(tree) for tree in (adapter, back))
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        np.testing.assert_array_equal(theirs[path], value)


def test_the_folder_holds_what_peft_looks_for(tiny, tmp_path):
    adapter = save(tmp_path / "new" / "a", tiny, LoraConfig(4, 6.0, ("query",)))
    folder = tmp_path / "new" / "a"
    assert sorted(p.name for p in folder.iterdir()) == [peft_config.CONFIG, peft_files.TENSORS]
    assert [p.name for p in folder.parent.iterdir()] == ["a"]  # nothing temporary is left
    header = (folder / peft_files.TENSORS).read_bytes()[8:300]
    assert b'"__metadata__":{"format":"pt"}' in header
    tensors = load_file(folder / peft_files.TENSORS)
    name = "base_model.model.encoder.layer.1.attention.self.query.lora_{}.weight"
    assert tensors.keys() == {
        name.replace("1", str(i)).format(f) for i in (0, 1) for f in ("A", "B")
    }
    factors = adapter["layers"]["attention"]["self"]["query"]
    for factor in "AB":
        np.testing.assert_array_equal(tensors[name.format(factor)], factors[factor][1].T)


def test_an_adapter_and_another_configuration(tiny, tmp_path):
    adapter = random_adapter(tiny.params, LoraConfig(4, 6.0, ("query",)))
    for config, fragment in (
        (LoraConfig(5, 6.0, ("query",)), "has rank 4, its configuration says 5"),
        (LoraConfig(4, 6.0, ("query", "key")), r"targets \(layers.attention.self.key\)"),
        (LoraConfig(4, 6.0, ("key",)), r"self.key, layers.attention.self.query"),
    ):
        with pytest.raises(UserError, match=fragment):
            peft_files.save(tmp_path / "a", adapter, config, "tiny", tiny.config)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tiny, tmp_path):
    folder = tmp_path / "a"
    save(folder, tiny)
    before = (folder / peft_config.CONFIG).read_bytes()
    with pytest.raises(UserError, match="is not empty"):
        save(folder, tiny, LoraConfig(2, 2.0))
    assert (folder / peft_config.CONFIG).read_bytes() == before
    with pytest.raises(UserError, match="is a file"):
        save(folder / peft_config.CONFIG, tiny)
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", tiny)
    assert len(list((tmp_path / "empty").iterdir())) == 2


def test_a_failed_save_leaves_nothing(tiny, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(peft_files, "save_file", fail)
    with pytest.raises(UserError, match="no space left"):
        save(tmp_path / "a", tiny)
    assert not list(tmp_path.iterdir())


# ---- peft reads what we write


@cases
def test_peft_reads_ours(tiny, tiny_base, tmp_path, config):
    peft = pytest.importorskip("peft")
    adapter = save(tmp_path / "a", tiny, config, str(tiny_base))
    model = peft_oracle.bert(tiny_base)
    base = peft_oracle.vectors(model, tiny.tokenizer, SENTENCES)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "a").eval()
    written = load_file(tmp_path / "a" / peft_files.TENSORS)
    assert written.keys() == peft.get_peft_model_state_dict(model).keys()
    theirs = peft_oracle.vectors(model, tiny.tokenizer, SENTENCES)
    assert np.abs(theirs - base).max() > 0.05
    ours = vectors(tiny, adapter, config)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    assert model.peft_config["default"].lora_dropout == config.dropout


# ---- we read what peft writes

PEFTS = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ["query", "value"]},
    "rslora": {"r": 4, "lora_alpha": 6, "target_modules": ["key"], "use_rslora": True},
    "all linear": {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"},
    "regex targets": {"r": 3, "lora_alpha": 5, "target_modules": r".*layer\.\d\.output\.dense"},
    "feed-forward": {
        "r": 3, "lora_alpha": 5, "target_modules": ["intermediate.dense", "output.dense"],
    },
    "suffix patterns": {
        "r": 4, "lora_alpha": 6, "target_modules": ["query", "output.dense"],
        "rank_pattern": {"output.dense": 2}, "alpha_pattern": {"attention.self.query": 11},
    },
    "first pattern counts": {
        "r": 4, "lora_alpha": 6, "target_modules": ["output.dense"],
        "rank_pattern": {"dense": 2, "output.dense": 7},
    },
    "ranks of single layers": {
        "r": 4, "lora_alpha": 6, "target_modules": ["query", "key"],
        "rank_pattern": {"encoder.layer.0.attention.self.query": 7, r"layer\.1\.attention.*key": 2},
    },
    "alphas of single layers": {
        "r": 4, "lora_alpha": 6, "target_modules": ["query", "key"],
        "alpha_pattern": {"layer.1.attention.self.key": 11},
    },
    "ranks and alphas of single layers, rslora": {
        "r": 4, "lora_alpha": 6, "target_modules": ["query", "value"], "use_rslora": True,
        "rank_pattern": {"layer.0.attention.self.query": 2},
        "alpha_pattern": {"layer.0.*value": 11},
    },
    "one layer": {"r": 4, "lora_alpha": 6, "target_modules": ["query"], "layers_to_transform": [1]},
    "gaussian": {
        "r": 4, "lora_alpha": 6, "target_modules": ["query"], "init_lora_weights": "gaussian",
        "lora_dropout": 0.5,
    },
}  # fmt: skip


def peft_folder(folder, model, values):
    """A perturbed peft adapter, saved by peft; the model that has it."""
    peft = pytest.importorskip("peft")
    import torch

    torch.manual_seed(0)
    excluded = {"exclude_modules": ["pooler.dense", "classifier"]}
    if values["target_modules"] != "all-linear":
        excluded = {}
    model = peft.get_peft_model(model, peft.LoraConfig(**values, **excluded)).eval()
    with torch.no_grad():
        for factor in peft_oracle.factors(model).values():
            factor.add_(0.2 * torch.randn_like(factor))
    model.save_pretrained(folder)
    return model


# Of a classifier only the prefix of names differs: a few of its cases are quick.
AS_CLASSIFIER = ("all linear", "suffix patterns", "one layer")


@pytest.mark.parametrize(
    ("case", "classifier"),
    [
        *((case, False) for case in PEFTS),
        *(
            pytest.param(case, True, marks=() if case in AS_CLASSIFIER else pytest.mark.slow)
            for case in PEFTS
        ),
    ],
)
def test_we_read_pefts(tiny, tiny_base, tmp_path, case, classifier):
    values = PEFTS[case]
    model = peft_folder(tmp_path / "a", peft_oracle.bert(tiny_base, classifier), values)
    theirs = peft_oracle.vectors(model, tiny.tokenizer, SENTENCES)
    adapter, config = peft_files.load(tmp_path / "a", tiny.config)
    assert np.abs(theirs - vectors(tiny)).max() > 0.05
    np.testing.assert_allclose(vectors(tiny, adapter, config), theirs, rtol=0, atol=1e-5)
    # The configuration describes the adapter: a fresh one by it has the same shapes.
    fresh = lora.init(jax.random.key(0), tiny.params, config)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, adapter)
    assert config.dropout == values.get("lora_dropout", 0.0)


# ---- what is refused

FIRST = "base_model.model.encoder.layer.0.attention.self.query.lora_{}.weight"


@pytest.mark.parametrize(
    ("values", "fragment"),
    [
        ({"use_dora": True}, "use_dora True is not supported"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not supported"),
        ({"peft_type": None}, "peft_type None is not supported"),
        ({"peft_type": ["LORA"]}, r"peft_type \['LORA'\] is not supported"),
        ({"bias": "lora_only"}, "bias 'lora_only' is not supported"),
        ({"modules_to_save": ["classifier"]}, "modules_to_save names classifier, which"),
        ({"modules_to_save": "classifier"}, "modules_to_save: must be a list, not 'classifier'"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path: must be a string, not 3"),
        ({"task_type": ["SEQ_CLS"]}, "task_type: must be a string, not"),
        ({"auto_mapping": "BertModel"}, "auto_mapping: must be an object, not"),
        ({"peft_type": "PROMPT_TUNING"}, "peft_type 'PROMPT_TUNING' .*change of the encoder$"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not supported"),
        ({"lora_bias": True}, "lora_bias True is not supported"),
        ({"some_future_field": {"x": 1}}, "some_future_field .*not supported"),
        ({"layers_to_transform": [0]}, r"layers_to_transform is \[0\].*layers \[0, 1\]"),
        ({"r": 5}, "says that .* has rank 5, its tensors have 6"),
        ({"rank_pattern": {"key": 3}}, "says that .*key has rank 3, its tensors have 6"),
        ({"r": "6"}, "r: must be a whole number, not '6'"),
        ({"lora_alpha": float("nan")}, "lora_alpha: must be a finite number, not nan"),
        ({"lora_dropout": 1.5}, "lora_dropout: must be less than 1, not 1.5"),
        ({"use_rslora": "yes"}, "use_rslora: must be true or false, not 'yes'"),
        ({"alpha_pattern": ["query"]}, "alpha_pattern: must be an object, not"),
        ({"alpha_pattern": {"(": 2}}, r"alpha_pattern: '\(' is no regular expression"),
        ({"alpha_pattern": {"query": None}}, r"alpha_pattern.query: must be a number, not None"),
    ],
)
def test_a_config_we_cannot_honour(tiny, tmp_path, values, fragment):
    save(tmp_path / "a", tiny)
    edit_config(tmp_path / "a", **values)
    with pytest.raises(UserError, match=f"{peft_config.CONFIG}: {fragment}"):
        peft_files.load(tmp_path / "a", tiny.config)


def rename(old, new):
    def edit(tensors):
        tensors[new] = tensors.pop(old)

    return edit


def put(name, shape):
    return lambda tensors: tensors.update({name: np.ones(shape, np.float32)})


@pytest.mark.parametrize(
    ("edit", "fragment"),
    [
        (put("base_model.model.classifier.weight", (2, 32)), "also trains classifier;"),
        (put("base_model.model.embeddings.word_embeddings.weight", (2, 32)), "no LoRA.*embeddings"),
        (put("base_model.model.encoder.layer.0.output.dense.weight", (2, 32)), "no LoRA.*output"),
        (put("base_model.model.roberta.pooler.dense.weight", (32, 32)), "no LoRA.*roberta"),
        (put(FIRST.replace("lora_{}.weight", "lora_magnitude_vector"), (32,)), "magnitude_vector"),
        (rename(FIRST.format("A"), FIRST.format("A").replace("base_model.", "")), "no LoRA factor"),
        (lambda tensors: tensors.pop(FIRST.format("A")), "query has lora_B but no lora_A"),
        (lambda tensors: tensors.pop(FIRST.format("B")), "query has lora_A but no lora_B"),
        (put(FIRST.format("A"), (6, 31)), r"query has lora_A \(6, 31\).* wants \(r, 32\)"),
        (put(FIRST.format("B"), (33, 6)), r"lora_B \(33, 6\), .*\(32, r\)"),
        (put(FIRST.format("A"), (7, 32)), r"lora_A \(7, 32\) and lora_B \(32, 6\)"),
        (put(FIRST.format("A"), (6, 32, 1)), "no LoRA factors .*query"),
        (put(FIRST.format("A").replace("model.enc", "model.bert.enc"), (6, 32)), "there twice"),
        (put(FIRST.format("A").replace("_A.", "_A.other."), (6, 32)), "there twice"),
        (lambda tensors: tensors.clear(), "has no tensors"),
    ],
)
def test_tensors_we_cannot_honour(tiny, tmp_path, edit, fragment):
    save(tmp_path / "a", tiny)
    edit_tensors(tmp_path / "a", edit)
    with pytest.raises(UserError, match=f"{peft_files.TENSORS}: .*{fragment}"):
        peft_files.load(tmp_path / "a", tiny.config)


@pytest.mark.parametrize("name", ["encoder.layer.2.attention.self.query", "encoder.layer.0.dense"])
def test_modules_the_base_has_not(tiny, tmp_path, name):
    save(tmp_path / "a", tiny)
    factors = {f"base_model.model.{name}.lora_{f}.weight" for f in "AB"}
    edit_tensors(
        tmp_path / "a",
        lambda t: t.update({k: np.ones((6, 32) if "A" in k else (32, 6), "f4") for k in factors}),
    )
    with pytest.raises(UserError, match=f"the base model has no {name}"):
        peft_files.load(tmp_path / "a", tiny.config)


@pytest.mark.parametrize("head", ["pooler.dense", *families.HEADS])
def test_factors_of_a_head_are_no_part_of_the_adapter(tiny, tmp_path, head):
    save(tmp_path / "a", tiny)
    factors = {
        f"base_model.model.{head}.lora_{name}.weight": np.ones(shape, "f4")
        for name, shape in (("A", (6, 32)), ("B", (2, 6)))
    }
    before, _ = peft_files.load(tmp_path / "a", tiny.config)
    edit_tensors(tmp_path / "a", lambda tensors: tensors.update(factors))
    leaves_equal(peft_files.load(tmp_path / "a", tiny.config, encoder_only=True)[0], before)


@pytest.mark.parametrize("size", [0, 7, 100, -4])
def test_a_cut_off_file(tiny, tmp_path, size):
    save(tmp_path / "a", tiny)
    path = tmp_path / "a" / peft_files.TENSORS
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=f"{peft_files.TENSORS}: not a valid safetensors file"):
        peft_files.load(tmp_path / "a", tiny.config)


@pytest.mark.parametrize(
    ("text", "fragment"), [("{", "not valid JSON"), ("[]", "not a JSON object"), (None, "read")]
)
def test_a_broken_config(tiny, tmp_path, text, fragment):
    save(tmp_path / "a", tiny)
    path = tmp_path / "a" / peft_config.CONFIG
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=f"{peft_config.CONFIG}: .*{fragment}"):
        peft_files.load(tmp_path / "a", tiny.config)


def test_a_folder_without_tensors(tiny, tmp_path):
    save(tmp_path / "a", tiny)
    Path(tmp_path / "a" / peft_files.TENSORS).unlink()
    with pytest.raises(UserError, match=f"{peft_files.TENSORS}: cannot be read"):
        peft_files.load(tmp_path / "a", tiny.config)
