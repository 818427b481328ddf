"""Merged folders: transformers reads them, and their README's code predicts what we do."""

import dataclasses
import itertools
import json
import re
import shutil
from pathlib import Path

import family_bases
import jax
import jax.numpy as jnp
import numpy as np
import peft_oracle
import pytest
from flax import traverse_util
from tiny import random_adapter
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from jaxlora import lora
from jaxlora.data.packing import Shape, fill
from jaxlora.formats import families, heads, huggingface
from jaxlora.lora import LoraConfig
from jaxlora.nn import bert
from jaxlora.nn.encode import encoder
from jaxlora.serving import export_merged, export_readme
from jaxlora.serving.task_models import TaskModel, TaskModels
from jaxlora.tasks import task as tasks
from jaxlora.utils.errors import UserError

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
    models = {task.name: TaskModel(task, "tree", head or {}, pair)}
    of_base = {"pooling": "cls", "max_length": 48, "dtype": "float32"} | of_base
    return TaskModels(
        base.name, base.fingerprint, models=models, trees={"tree": {"lora": adapter}},
        configs={"tree": CONFIG}, origin="here", **of_base,
    )  # fmt: skip


def vectors(base, params, sentences, pooling, max_length=48):
    """Sentence vectors by our packed encoder."""
    base.tokenizer.enable_truncation(max_length)
    ids = [np.array(base.tokenizer.encode(s).ids) for s in sentences]
    base.tokenizer.no_truncation()
    rows = fill(ids, range(len(ids)), len(ids), Shape(4, 48))
    encode = encoder(base.config, jnp.float32, LoraConfig(), pooling)
    return encode({"params": params}, {}, rows, None)


def test_export_is_the_inverse_of_convert(tiny):
    tensors = huggingface.export(tiny.params, tiny.config)
    back = huggingface.convert(tensors, tiny.config)
    ours, theirs = (traverse_util.flatten_dict(tree) for tree in (tiny.params, back))
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        np.testing.assert_array_equal(theirs[path], value)
        assert theirs[path].dtype == np.float32


def test_transformers_reads_it(tiny, tiny_base, adapter, merged_params, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModel, AutoTokenizer

    export_merged.save(tmp_path / "m", tiny, trained(tiny, adapter), "sts")
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


@pytest.mark.parametrize("family", family_bases.FAMILIES)
def test_transformers_reads_every_family(family, tmp_path, monkeypatch):
    """The vectors, padded by the exported tokenizer, are those of the adapter on the base."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModel

    family_bases.save(tmp_path / "base", family)
    base = huggingface.load(str(tmp_path / "base"))
    config = families.localise(CONFIG, base.config)
    adapter = random_adapter(base.params, config)
    made = trained(base, adapter, tasks.STS_COSINE, pooling="mean")
    made = dataclasses.replace(made, configs={"tree": config})
    export_merged.save(tmp_path / "m", base, made, "sts")
    entry = families.of(base.config)
    options = {"add_pooling_layer": False} if entry.pooler else {}
    model, info = AutoModel.from_pretrained(tmp_path / "m", output_loading_info=True, **options)
    assert not any(info.values()), info
    assert type(model).__name__ == entry.model and model.dtype == torch.float32
    monkeypatch.chdir(tmp_path / "m")
    (code,) = re.findall(r"```python\n(.*?)```", Path(export_merged.README).read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    ours = vectors(base, lora.merge(base.params, adapter, config), SENTENCES, "mean")
    np.testing.assert_allclose(names["encode"](list(SENTENCES)), ours, rtol=0, atol=1e-5)
    assert np.abs(ours - vectors(base, base.params, SENTENCES, "mean")).max() > 0.05
    back = huggingface.load(str(tmp_path / "m"))
    assert back.config == base.config
    assert back.fingerprint.tokenizer == base.fingerprint.tokenizer


def test_we_read_it(tiny, adapter, merged_params, tmp_path):
    export_merged.save(tmp_path / "m", tiny, trained(tiny, adapter), "sts")
    back = huggingface.load(str(tmp_path / "m"))
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
TAGS = tasks.Task("tags", "multilabel", classes=("a", "b", "c"), thresholds=(0.4, 0.5, 0.55))
SPAM = tasks.Task("spam", "binary", thresholds=(0.45,))
STARS = tasks.Task("stars", "ordinal", classes=("1", "2", "3", "4"))
CASES = [
    (TAGS, "mean", "concat", 48),
    (SPAM, "mean", "concat", 48),
    (STARS, "mean", "concat", 48),
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
        middle = outputs.mean(0) - (0 if task.classes else tasks.SPAN / 2)
        head["out"]["bias"] = head["out"]["bias"] - middle
    made = trained(tiny, adapter, task, head, pair_features, pooling=pooling, max_length=max_length)
    export_merged.save(tmp_path / "m", tiny, made, task.name)
    text = (tmp_path / "m" / export_merged.README).read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path / "m")
    names = {}
    exec(code, names)
    theirs = names["predict"](list(examples)).numpy()
    ours = np.asarray(task.decode(task.apply_head(head, u, v, pair_features=pair_features)))
    assert len(np.unique(ours, axis=0)) > 1
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4)
    assert (tmp_path / "m" / heads.HEAD).exists() == bool(head)


# ---- bases with other special tokens

MARKS = ("<s>", "<pad>", "</s>", "<unk>")
LETTERS = "abcdefghijklmnopqrstuvwxyz.?"


def word_pieces():
    """HerBERT's marks: those of XLM-R around the words of a BERT."""
    pieces = [*MARKS, "film", *LETTERS, *(f"##{c}" for c in LETTERS), "<mask>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer


def sentence_pieces(marks=MARKS):
    """Multilingual MiniLM's: XLM-R's tokenizer before a BERT."""
    pieces = [(m, 0.0) for m in marks] + [("▁film", -3.0), ("▁", -5.0)]
    pieces += [(c, -8.0) for c in LETTERS] + [("<mask>", 0.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=marks.index("<unk>")))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    ends = [(m, marks.index(m)) for m in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=ends
    )
    tokenizer.add_special_tokens([*marks, "<mask>"])
    return tokenizer


DECLARED = {f"{n}_token": m for n, m in zip(("cls", "pad", "sep", "unk"), MARKS, strict=True)}
ANY = {"tokenizer_class": "PreTrainedTokenizerFast"}  # as tokenizer.json says
XLM_R = {"tokenizer_class": "XLMRobertaTokenizer"}
MASK = {"__type": "AddedToken", "content": "<mask>", "lstrip": True, "rstrip": False}
MASK |= {"normalized": False, "single_word": False, "special": True}
BASES = {
    "HerBERT": (word_pieces, {"special_tokens_map.json": DECLARED}, "<pad>"),
    "multilingual MiniLM": (
        sentence_pieces, {"tokenizer_config.json": XLM_R | DECLARED | {"mask_token": MASK}}, "<pad>"
    ),
    "by its class alone": (sentence_pieces, {"tokenizer_config.json": XLM_R}, "<pad>"),
    "declared alone": (
        sentence_pieces, {"tokenizer_config.json": ANY | {"pad_token": "[PAD]"}}, "[PAD]"
    ),
    "a token without a name": (
        word_pieces, {"tokenizer_config.json": DECLARED | {"cls_token": None}}, "<pad>"
    ),
    "no padding": (
        lambda: sentence_pieces(("<s>", "</s>", "<unk>")), {"tokenizer_config.json": ANY}, "<unk>"
    ),
}  # fmt: skip


@pytest.fixture(params=["[CLS] and [SEP]", *BASES])
def other(request, tiny_base, tmp_path):
    """A base by name: the folder, its padding token."""
    if request.param not in BASES:
        return tiny_base, "[PAD]"
    build, files, padding = BASES[request.param]
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    build().save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder, padding


@pytest.fixture
def exported(other, tmp_path, monkeypatch):
    """Its merged export as the working folder; the base, what was trained, its merged params."""
    base = huggingface.load(str(other[0]))
    head = tasks.SST.init_head(jax.random.key(3), base.config.hidden_size, "concat")
    head = jax.tree.map(lambda x: 5 * x, head)
    fresh = lora.init(jax.random.key(0), base.params, CONFIG)
    adapter = jax.tree.map(lambda x: x + 0.2, fresh)
    made = trained(base, adapter, tasks.SST, head, pooling="mean")
    export_merged.save(tmp_path / "m", base, made, "sst")
    monkeypatch.chdir(tmp_path / "m")
    return base, head, lora.merge(base.params, adapter, CONFIG)


def test_the_readmes_code_with_any_special_tokens(exported):
    pytest.importorskip("torch")
    base, head, params = exported
    (code,) = re.findall(r"```python\n(.*?)```", Path(export_merged.README).read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    ours = vectors(base, params, SENTENCES, "mean")
    np.testing.assert_allclose(names["encode"](list(SENTENCES)), ours, rtol=0, atol=1e-5)
    classes = tasks.SST.decode(tasks.SST.apply_head(head, ours, ours, pair_features="concat"))
    np.testing.assert_array_equal(names["predict"](list(SENTENCES)), classes)


def test_the_special_tokens_are_the_bases(exported, other):
    pytest.importorskip("torch")
    from transformers import AutoConfig, AutoTokenizer

    base, padding = exported[0], other[1]
    tokenizer, config = AutoTokenizer.from_pretrained("."), AutoConfig.from_pretrained(".")
    first, last = map(base.tokenizer.id_to_token, base.tokenizer.encode("").ids)
    assert (tokenizer.cls_token, tokenizer.sep_token) == (first, last)
    assert tokenizer.pad_token == padding
    assert tokenizer.pad_token_id == config.pad_token_id == base.tokenizer.token_to_id(padding)
    assert tokenizer.convert_ids_to_tokens(tokenizer("字")["input_ids"])[-2] == tokenizer.unk_token
    assert len(tokenizer) == base.tokenizer.get_vocab_size()  # no token was added
    for sentence in SENTENCES:
        assert tokenizer(sentence)["input_ids"] == base.tokenizer.encode(sentence).ids


def test_sentence_transformers_reads_it(exported):
    reader = pytest.importorskip("sentence_transformers")
    base, _, params = exported
    model = reader.SentenceTransformer(".", device="cpu")
    ours = vectors(base, params, SENTENCES, "mean")
    np.testing.assert_allclose(model.encode(list(SENTENCES)), ours, rtol=0, atol=1e-5)
    assert model.get_max_seq_length() == 48


def test_the_readme_says_what_the_encoder_is(tiny, adapter):
    made = trained(tiny, adapter)
    assert "its adapter merged into the weights" in export_readme.readme(
        made, made.find("sts"), families.FAMILIES["bert"]
    )
    for tree in ({}, {"params": tiny.params}):  # frozen, fully trained
        made.trees["tree"] = tree
        assert "adapter" not in export_readme.readme(
            made, made.find("sts"), families.FAMILIES["bert"]
        )


@pytest.mark.parametrize(
    ("base", "shown"),
    [
        ("/home/someone/models/mine", "`mine`"),
        ("bert-base-uncased", "`bert-base-uncased`"),
        (huggingface.MINILM, f"`{huggingface.MINILM_HUB}`"),
    ],
)
def test_the_readme_names_the_base_and_no_folder_of_ours(tiny, adapter, base, shown):
    made = dataclasses.replace(trained(tiny, adapter), base=base)
    text = export_readme.readme(made, made.find("sts"), families.FAMILIES["bert"])
    assert f"trained from {shown} with" in text and "someone" not in text


def test_the_readmes_title_means_only_itself(tiny, adapter):
    title = "~~gone~~ &lt;img&gt; https://x.org www.x.org @someone"
    made = trained(tiny, adapter, dataclasses.replace(tasks.STS_COSINE, title=title))
    first = export_readme.readme(made, made.find("sts"), families.FAMILIES["bert"]).splitlines()[0]
    assert first.replace("\u200b", "").replace("\\", "") == f"# {title}"
    assert not re.search(r"(?<!\\)[~&]|://|www\.|@\w", first)


def test_nothing_is_overwritten(tiny, adapter, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match="is not empty"):
        export_merged.save(tmp_path, tiny, trained(tiny, adapter), "sts")
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
    ours = {name: x.shape for name, x in huggingface.export(params, small).items()}
    assert ours == theirs
