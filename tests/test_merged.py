"""Merged folders: transformers reads them, and their README's code predicts what we do."""

import dataclasses
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import peft_oracle
import pytest
from flax import traverse_util

from jaxlora import bert, head_files, lora, merged, pretrained, step, tasks
from jaxlora.data.packing import Shape, fill
from jaxlora.errors import UserError
from jaxlora.lora import LoraConfig
from jaxlora.trained import Served, Trained

CONFIG = LoraConfig(4, 8.0, ("query", "output.dense"))
SENTENCES = ("a film.", "how do i learn to play it?", "bada ceno liru.", "a fun run on. it", "un")
PAIRS = tuple(itertools.pairwise(SENTENCES))


@pytest.fixture(scope="module")
def adapter(tiny):
    keys = iter(jax.random.split(jax.random.key(7), 100))
    fresh = lora.init(jax.random.key(0), tiny.params, CONFIG)
    return jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), fresh)


@pytest.fixture(scope="module")
def merged_params(tiny, adapter):
    return lora.merge(tiny.params, adapter, CONFIG)


def trained(base, adapter, task=tasks.STS_COSINE, head=None, pair="concat", **of_base):
    served = {task.name: Served(task, "tree", head or {}, pair)}
    of_base = {"pooling": "cls", "max_length": 48, "dtype": "float32"} | of_base
    return Trained(
        base.name, base.fingerprint, served, {"tree": {"lora": adapter}}, {"tree": CONFIG},
        origin="here", **of_base,
    )  # fmt: skip


def vectors(base, params, sentences, pooling, max_length=48):
    """Sentence vectors by our packed encoder."""
    base.tokenizer.enable_truncation(max_length)
    ids = [np.array(base.tokenizer.encode(s).ids) for s in sentences]
    base.tokenizer.no_truncation()
    rows = fill(ids, range(len(ids)), len(ids), Shape(4, 48))
    encode = step.encoder(base.config, jnp.float32, LoraConfig(), pooling)
    return encode({"params": params}, {}, rows, None)


def test_export_is_the_inverse_of_convert(tiny):
    tensors = pretrained.export(tiny.params, tiny.config)
    back = pretrained.convert(tensors, tiny.config)
    ours, theirs = (traverse_util.flatten_dict(tree) for tree in (tiny.params, back))
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        np.testing.assert_array_equal(theirs[path], value)
        assert theirs[path].dtype == np.float32


def test_transformers_reads_it(tiny, tiny_base, adapter, merged_params, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModel, AutoTokenizer

    merged.save(tmp_path / "m", tiny, trained(tiny, adapter), "sts")
    model, info = AutoModel.from_pretrained(
        tmp_path / "m", add_pooling_layer=False, attn_implementation="eager",
        output_loading_info=True,
    )  # fmt: skip
    assert not any(info.values()), info  # nothing missing, unexpected, or of another shape
    assert all(p.dtype == torch.float32 for p in model.parameters())
    theirs = peft_oracle.vectors(model.eval(), tiny.tokenizer, SENTENCES)
    ours = vectors(tiny, merged_params, SENTENCES, "cls")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    base = peft_oracle.vectors(peft_oracle.bert(tiny_base), tiny.tokenizer, SENTENCES)
    assert np.abs(theirs - base).max() > 0.05
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    for sentence in SENTENCES:
        assert tokenizer(sentence)["input_ids"] == tiny.tokenizer.encode(sentence).ids
    assert tokenizer.pad_token_id == model.config.pad_token_id == 0


def test_we_read_it(tiny, adapter, merged_params, tmp_path):
    merged.save(tmp_path / "m", tiny, trained(tiny, adapter), "sts")
    back = pretrained.load(str(tmp_path / "m"))
    assert back.config == tiny.config
    assert back.fingerprint.tokenizer == tiny.fingerprint.tokenizer
    jax.tree.map(np.testing.assert_array_equal, back.params, dict(merged_params))
    pooling = json.loads((tmp_path / "m" / "1_Pooling" / "config.json").read_text())
    assert (pooling["pooling_mode_cls_token"], pooling["pooling_mode_mean_tokens"]) == (True, False)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["architectures"] == [
        "BertModel"
    ]


TOPIC = tasks.Task(
    "topic",
    "classification",
    classes=("sport", "a_b_c", "art"),
    title="# one\n```python\ntwo *three*",
)
PRICE = tasks.Task("price", "regression", low=-2.0, high=30.0)
ALIKE = tasks.Task("alike", "similarity", pair=True, low=-1.0, high=1.0)
CASES = [
    (TOPIC, "mean", "concat", 48),
    (PRICE, "mean", "concat", 48),
    (ALIKE, "mean", "concat", 48),
    (tasks.SST, "cls", "concat", 48),
    (tasks.SST, "mean", "interaction", 5),
    (tasks.PARA, "mean", "interaction", 48),
    (tasks.PARA, "cls", "concat", 48),
    (tasks.STS_MSE, "mean", "concat", 48),
    (tasks.STS_COSINE, "mean", "interaction", 48),
]


@pytest.mark.parametrize(("task", "pooling", "pair_features", "max_length"), CASES)
def test_the_readmes_code_predicts_what_we_do(
    tiny, adapter, merged_params, tmp_path, monkeypatch, task, pooling, pair_features, max_length
):
    pytest.importorskip("torch")
    head = task.init_head(jax.random.key(3), tiny.config.hidden_size, pair_features)
    examples = PAIRS if task.pair else SENTENCES
    first, second = zip(*examples, strict=True) if task.pair else (examples, examples)
    u, v = (vectors(tiny, merged_params, s, pooling, max_length) for s in (first, second))
    if head:  # Outputs far apart about their middle, so that the predictions differ.
        head = jax.tree.map(lambda x: 3 * x + 0.1, head)
        outputs = task.apply_head(head, u, v, pair_features=pair_features)
        middle = outputs.mean(0) - (0 if task.integer else tasks.SPAN / 2)
        head["out"]["bias"] = head["out"]["bias"] - middle
    made = trained(tiny, adapter, task, head, pair_features, pooling=pooling, max_length=max_length)
    merged.save(tmp_path / "m", tiny, made, task.name)
    text = (tmp_path / "m" / merged.README).read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path / "m")
    names = {}
    exec(code, names)
    theirs = names["predict"](list(examples)).numpy()
    ours = np.asarray(task.decode(task.apply_head(head, u, v, pair_features=pair_features)))
    assert len(set(ours.tolist())) > 1
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4)
    assert (tmp_path / "m" / head_files.HEAD).exists() == bool(head)


def test_the_readme_says_what_the_encoder_is(tiny, adapter):
    made = trained(tiny, adapter)
    assert "its adapter merged into the weights" in merged.readme(made, made.find("sts"))
    for tree in ({}, {"params": tiny.params}):  # frozen, fully trained
        made.trees["tree"] = tree
        assert "adapter" not in merged.readme(made, made.find("sts"))


@pytest.mark.parametrize(
    ("base", "shown"),
    [
        ("/home/someone/models/mine", "`mine`"),
        ("bert-base-uncased", "`bert-base-uncased`"),
        (pretrained.MINILM, f"`{pretrained.MINILM_HUB}`"),
    ],
)
def test_the_readme_names_the_base_and_no_folder_of_ours(tiny, adapter, base, shown):
    made = dataclasses.replace(trained(tiny, adapter), base=base)
    text = merged.readme(made, made.find("sts"))
    assert f"trained from {shown} with" in text and "someone" not in text


def test_the_readmes_title_means_only_itself(tiny, adapter):
    title = "~~gone~~ &lt;img&gt; https://x.org www.x.org @someone"
    made = trained(tiny, adapter, dataclasses.replace(tasks.STS_COSINE, title=title))
    first = merged.readme(made, made.find("sts")).splitlines()[0]
    assert first.replace("\u200b", "").replace("\\", "") == f"# {title}"
    assert not re.search(r"(?<!\\)[~&]|://|www\.|@\w", first)


def test_nothing_is_overwritten(tiny, adapter, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match="is not empty"):
        merged.save(tmp_path, tiny, trained(tiny, adapter), "sts")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_shapes_of_bert_base_have_transformers_names():
    """Names, not numbers: the table of a real config, made by transformers itself."""
    pytest.importorskip("torch")
    from transformers import BertConfig, BertModel

    small = bert.BertConfig(
        vocab_size=7, hidden_size=4, num_hidden_layers=12, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=6,
    )  # fmt: skip
    params = jax.tree.map(lambda x: np.zeros(x.shape), bert.param_shapes(small))
    model = BertModel(
        BertConfig(
            vocab_size=7, hidden_size=4, num_hidden_layers=12, num_attention_heads=2,
            intermediate_size=8, max_position_embeddings=6,
        ),
        add_pooling_layer=False,
    )  # fmt: skip
    theirs = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    ours = {name: x.shape for name, x in pretrained.export(params, small).items()}
    assert ours == theirs
