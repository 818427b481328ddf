"""Pairs that are read together: as transformers does, packed, trained, served and exported."""

import dataclasses
import itertools
import json
import random
import re
import shutil
from pathlib import Path

import family_bases
import jax
import numpy as np
import pytest
from tiny import Silent, random_adapter

import jaxlora
from jaxlora import lora
from jaxlora.data.tokenized import load_examples, tokenize, truncating
from jaxlora.formats import families, huggingface
from jaxlora.lora import LoraConfig
from jaxlora.serving import bank, classifier, export_merged, export_peft, inference
from jaxlora.serving.task_models import TaskModel, TaskModels
from jaxlora.tasks.task import PARA, SST, STS_COSINE, STS_MSE, Task
from jaxlora.training import inputs, task_group
from jaxlora.training.presets import make_settings
from jaxlora.training.run import run
from jaxlora.training.sharding import make_mesh
from jaxlora.utils.errors import ConfigError, UserError

torch = pytest.importorskip("torch")
FAMILIES = ("bert", "roberta", "distilbert", "electra", "mpnet", "xlm-roberta")
PAIRS = (
    ("a film", "the dog runs"), ("the dog the dog not a film", "a café, running. the dog runs the"),
    ("a", "x"), ("x" * 30, "the film"), ("the dog", "the dog " * 9), ("film film", "film"),
)  # fmt: skip
LONGEST = 20


def joint(task, name=None):
    return dataclasses.replace(task, pair_encoding="joint", name=name or task.name)


def models_of(base, pooling="cls", **tasks):
    """Tasks without adapters: name → task, head."""
    models = {n: TaskModel(task, "", head, "concat") for n, (task, head) in tasks.items()}
    return TaskModels(
        base.name, base.fingerprint, pooling, LONGEST, "float32",
        models=models, trees={"": {}}, configs={}, origin="a test",
    )  # fmt: skip


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    """Family → transformers' classifier with one output, its tokenizer, and a predictor of ours."""
    made = {}

    def get(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            model = family_bases.save(folder, family, "ForSequenceClassification", num_labels=1)
            base = huggingface.load(str(folder))
            source = classifier.Source(folder, base, export_peft.peft.HeadParts({}, {}), folder, "")
            like = models_of(base)
            found = classifier.read(source, "x", like, (), pair=True)
            tasks = models_of(base, x=(found.task, found.head))
            made[family] = model, family_bases.tokenizer(family), jaxlora.Predictor(base, tasks)
        return made[family]

    return get


def logits(model, tokenizer, pairs=PAIRS):
    """Each pair alone, without padding, truncated as transformers does by default."""
    given = {"truncation": True, "max_length": LONGEST, "return_tensors": "pt"}
    with torch.no_grad():
        return np.concatenate([model(**tokenizer(a, b, **given)).logits for a, b in pairs])


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_torch(family, scorer):
    model, tokenizer, predictor = scorer(family)
    wanted = logits(model, tokenizer)[:, 0]
    found = predictor.predict("x", PAIRS)
    assert np.ptp(wanted) > 0.03
    worst = np.abs(found - wanted).max()
    print(f"\nFIGURE joint {family} {worst:.1e}")
    assert worst <= 5e-5
    # The order of the two counts.
    turned = predictor.predict("x", [(b, a) for a, b in PAIRS])
    assert np.abs(turned - found).max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_alone(family, scorer):
    predictor = scorer(family)[2]
    alone = np.concatenate([predictor.predict("x", [pair]) for pair in PAIRS])
    np.testing.assert_allclose(predictor.predict("x", PAIRS * 3), np.tile(alone, 3), atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_the_mean_is_over_the_whole_pair(family, tmp_path):
    model = family_bases.save(tmp_path, family)
    base = huggingface.load(str(tmp_path))
    task = joint(STS_MSE)
    head = task.init_head(jax.random.key(0), 32, "concat")
    predictor = jaxlora.Predictor(base, models_of(base, "mean", sts=(task, head)))
    tokenizer = family_bases.tokenizer(family)
    given = {"truncation": True, "max_length": LONGEST, "padding": True, "return_tensors": "pt"}
    batch = tokenizer(*map(list, zip(*PAIRS, strict=True)), **given)
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    vectors = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
    wanted = task.decode(task.apply_head(head, vectors, vectors, pair_features="concat"))
    np.testing.assert_allclose(predictor.predict("sts", PAIRS), wanted, rtol=0, atol=5e-5)


def test_token_types_tell_the_sentences_apart(tiny):
    """Two types that are equal give what no types give, and others do not."""
    cut = truncating(tiny.tokenizer, LONGEST)
    made = tokenize(cut, [("ban", "cen dan")])
    assert made.types.tolist() == [0] * 3 + [1] * (len(made.types) - 3)
    task = joint(STS_MSE)
    head = task.init_head(jax.random.key(0), 32, "concat")
    table = tiny.params["embeddings"]["token_type_embeddings"]

    def score(rows):
        params = tiny.params | {
            "embeddings": tiny.params["embeddings"] | {"token_type_embeddings": table[rows]}
        }
        base = dataclasses.replace(tiny, params=params)
        return jaxlora.Predictor(base, models_of(base, sts=(task, head))).predict(
            "sts", [("ban", "cen dan")]
        )

    assert abs(score([0, 1]) - score([0, 0])) > 1e-4


@pytest.mark.parametrize("family", family_bases.FAMILIES)
def test_tokens_are_those_of_transformers(family):
    theirs, most = family_bases.tokenizer(family), 9
    ours = truncating(theirs.backend_tokenizer, most)
    pairs = list(itertools.product(("a film", "the dog " * 5, "x", "film a"), repeat=2))
    made = tokenize(ours, ["a", *pairs])
    whole = theirs(*map(list, zip(*pairs, strict=True)))["input_ids"]
    found = np.split(made.tokens, made.offsets[1:-1])
    for (a, b), tokens in zip(pairs, found[1:], strict=True):
        assert tokens.tolist() == theirs(a, b, truncation=True, max_length=most)["input_ids"]
    assert found[0].tolist() == theirs("a")["input_ids"]
    assert made.truncated == sum(len(ids) > most for ids in whole) > 0
    assert made.empty == []


# ---- refusals


def test_what_cannot_be_read_together(tiny):
    with pytest.raises(ValueError, match="'joint' reads two sentences; name two text columns"):
        Task("x", "classification", pair_encoding="joint")
    with pytest.raises(ValueError, match="'cosine' compares the vectors of two sentences"):
        joint(STS_COSINE)
    assert Task("x", "similarity", True, pair_encoding="joint").loss == "squared_error"
    with pytest.raises(UserError, match="max_length 4: joint pairs need at least 5"):
        tokenize(truncating(tiny.tokenizer, 4), [("ban", "cen")])
    from tokenizers import processors

    without = type(tiny.tokenizer).from_str(tiny.tokenizer.to_str())
    marks = [(mark, tiny.tokenizer.token_to_id(mark)) for mark in ("[CLS]", "[SEP]")]
    without.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=marks
    )
    with pytest.raises(UserError, match="no template for pairs"):
        tokenize(truncating(without, LONGEST), [("ban", "cen")])
    assert len(tokenize(truncating(without, LONGEST), ["ban", "cen"]).tokens) == 6


def test_a_joint_pair_has_no_vectors_of_its_own(tiny):
    task = joint(PARA)
    head = task.init_head(jax.random.key(0), 32, "concat")
    predictor = jaxlora.Predictor(tiny, models_of(tiny, para=(task, head)))
    with pytest.raises(UserError, match="para reads both sentences of a pair together"):
        predictor.encode("para", ["ban"])
    with pytest.raises(UserError, match="para takes pairs of sentences"):
        predictor.predict("para", ["ban"])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"variant": "lora2"}, "`pair_encoding` joint: \\[sts\\] loss: 'cosine'"),
        ({"variant": "lora1", "tasks": ("a.toml",)}, "set `pair` in `tasks`"),
    ],
)
def test_settings_that_do_not_go_together(fields, said):
    with pytest.raises(ConfigError, match=said):
        make_settings(pair_encoding="joint", **fields)


def test_the_setting_is_of_pairs_alone():
    read = {
        n: t.pair_encoding for n, t in make_settings("lora1", pair_encoding="joint").named.items()
    }
    assert read == {"sst": "separate", "para": "joint", "sts": "joint"}
    only = make_settings("lora2", pair_encoding="joint", only=("para",))  # no cosine among them
    assert only.named["para"].sentences == 1


# ---- training


@pytest.mark.parametrize(
    "variant", ["lora3", pytest.param("baseline2", marks=pytest.mark.slow), "baseline1"]
)
def test_a_step_encodes_what_serving_encodes(make, variant):
    """Tasks of one sentence, of separate and of joint pairs in one batch, however it is packed."""
    rate = {} if variant == "baseline1" else {"encoder_dropout": 0.0}
    settings = make(variant, pair_encoding="joint", **rate)
    specs = [
        dataclasses.replace(s, task=dataclasses.replace(s.task, pair_encoding="separate"))
        if s.task.name == "sts"
        else s
        for s in settings.tasks
    ]
    settings = dataclasses.replace(settings, tasks=tuple(specs))
    base = huggingface.load(settings.model.base)
    data = inputs.load_data(settings, base)
    assert [data[n]["train"].sentences for n in ("sst", "para", "sts")] == [1, 1, 2]
    assert data["para"]["train"].types is not None and data["sts"]["train"].types is None
    made = task_group.make_cohort(settings, base, data, settings.groups, make_mesh("data=1"))
    step, states = made.train_step, made.states
    encode = step.adaptation.encode_tasks(step.encode, [len(g.tasks) for g in made.groups])
    batch, drawn = made.batches[0], made.batches.order.at(0)
    trees = [states[group.name].trainable for group in made.groups]
    found, _ = encode(made.frozen, trees, batch.inputs, jax.random.key(0))
    size, rows = batch.labels.shape[1], zip(found, drawn, strict=True)
    for tree, group in zip(trees, made.groups, strict=True):
        for task in group.tasks:
            vectors, numbers = next(rows)
            wanted = made.vectors(tree, task.name, "train")
            for k in range(task.sentences):
                np.testing.assert_allclose(
                    vectors[k * size : k * size + len(numbers)],
                    wanted[numbers * task.sentences + k], rtol=0, atol=1e-5,
                )  # fmt: skip


def write_pairs(folder):
    """32 pairs whose label says whether both are the same word: neither says it alone."""
    rng, words = random.Random(3), ("aa", "bc", "dd", "ef")
    rows = []
    for a, b in itertools.product(words, repeat=2):
        rows += [f"{a} {b[::-1]},{a},yes", f"{a},{b} {a},{'yes' if a == b else 'no'}"]
    rng.shuffle(rows)
    table = "\n".join(["first,second,label", *rows]) + "\n"
    for split in ("train", "dev"):
        (folder / f"{split}.csv").write_text(table)
    return (
        "own.kind=classification", "own.classes=no,yes", "own.text=first,second", "own.pair=joint",
        "own.head=classifier", "own.label=label", f"own.train={folder}/train.csv",
        f"own.dev={folder}/dev.csv",
    )  # fmt: skip


@pytest.fixture(
    scope="module",
    params=["bert", *(pytest.param(f, marks=pytest.mark.slow) for f in ("roberta", "distilbert"))],
)
def finished(request, tmp_path_factory):
    """A run with the family's own classifier on joint pairs: its folder, its base's folder."""
    folder = tmp_path_factory.mktemp(request.param)
    family_bases.save(folder / "base", request.param)
    flags = {"batch_size": 16, "epochs": 20, "eval_every": 40, "max_length": LONGEST, "rank": 4,
             "learning_rate": 1e-2, "head_learning_rate": 1e-2, "pooling": "cls"}  # fmt: skip
    settings = make_settings("lora1", tasks=write_pairs(folder), base=str(folder / "base"), **flags)
    run(settings, folder / "run", Silent())
    return folder


def test_a_classifier_head_is_the_familys(tmp_path):
    """Named by the base before the run; refused where there is none, or the vector is another."""
    tasks = write_pairs(tmp_path)
    for family, head in (("roberta", "pooler"), ("electra", "dense_gelu"), ("modernbert", None)):
        family_bases.save(tmp_path / family, family)
        given = {"tasks": tasks, "base": str(tmp_path / family)}
        settings = make_settings("lora1", pooling="cls", **given)
        if head is None:
            with pytest.raises(ConfigError, match=r"\[own\] head: the classifier of a ModernBert"):
                inputs.fit_to_base(settings)
            continue
        fitted = inputs.fit_to_base(settings)
        assert fitted.named["own"].head == head and inputs.fit_to_base(fitted) == fitted
        with pytest.raises(ConfigError, match="`pooling` mean: a head 'classifier' reads"):
            inputs.fit_to_base(make_settings("lora1", **given))
    with pytest.raises(UserError, match=r"head: 'classifier' reads one vector"):
        make_settings("lora1", tasks=(*tasks, "own.pair=separate"))
    with pytest.raises(UserError, match=r"pair: goes with two text columns"):
        make_settings("lora1", tasks=(*tasks, "own.text=first"))


def rows_of(folder):
    lines = (folder / "train.csv").read_text().splitlines()[1:]
    *pairs, labels = zip(*(line.split(",") for line in lines), strict=True)
    return list(zip(*pairs, strict=True)), labels


def test_a_run_learns_serves_and_exports_what_torch_reads(finished, tmp_path, monkeypatch):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    pairs, labels = rows_of(finished)
    predictor = jaxlora.load(finished / "run")
    answers = predictor([("own", *pair) for pair in pairs])
    right = np.mean([a.label == b for a, b in zip(answers, labels, strict=True)])
    assert right > max(labels.count("yes"), labels.count("no")) / len(labels)
    found = np.array([list(a.probabilities.values()) for a in answers])
    assert np.ptp(found, 0).min() > 0.05
    trained = bank.load(finished / "run")
    base = trained.load_base()
    export_merged.save(tmp_path / "m", base, trained, "own")
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "m", output_loading_info=True
    )
    assert not any(info.values()), info
    assert model.config.id2label == {0: "no", 1: "yes"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    wanted = torch.softmax(torch.tensor(logits(model.eval(), tokenizer, pairs)), -1).numpy()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)
    monkeypatch.chdir(tmp_path / "m")
    (code,) = re.findall(r"```python\n(.*?)```", Path(export_merged.README).read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    np.testing.assert_array_equal(names["predict"](pairs).numpy(), found.argmax(-1))
    # A task of the folder that was exported answers the same.
    back = export_merged.families.of(huggingface.load(str(tmp_path / "m")).config)
    assert back.model == families.of(base.config).model


def test_a_cross_encoder_gives_equal_scores(finished, tmp_path):
    reader = pytest.importorskip("sentence_transformers")
    pairs, _ = rows_of(finished)
    trained = bank.load(finished / "run")
    export_merged.save(tmp_path / "m", trained.load_base(), trained, "own")
    model = reader.CrossEncoder(str(tmp_path / "m"), device="cpu")
    predictor = jaxlora.Predictor(trained.load_base(), trained)
    (_, _, outputs), *_ = predictor._outputs([predictor.check(("own", *pair)) for pair in pairs])
    np.testing.assert_allclose(model.predict(pairs), outputs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["binary", "regression"])
def test_a_cross_encoder_with_one_output(kind, tiny, tmp_path):
    """Its score is the probability of yes, or the score itself."""
    reader = pytest.importorskip("sentence_transformers")
    task = Task("x", kind, pair=True, head="pooler", pair_encoding="joint")
    head = jax.tree.map(lambda x: 2 * x, task.init_head(jax.random.key(2), 32, "concat"))
    trained = models_of(tiny, x=(task, head))
    export_merged.save(tmp_path / "m", tiny, trained, "x")
    pairs = [("ban cen.", "dan"), ("fen", "gan len " * 20), ("ba", "ba")]
    found = jaxlora.Predictor(tiny, trained)([("x", *pair) for pair in pairs])
    ours = [a.value if kind == "regression" else a.probabilities["1"] for a in found]
    assert np.ptp(ours) > 0.01
    theirs = reader.CrossEncoder(str(tmp_path / "m"), device="cpu").predict(pairs)
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=2e-5)


@pytest.mark.parametrize("task", [PARA, STS_MSE], ids=lambda task: task.name)
def test_a_head_that_is_no_classifier_is_applied_by_the_readmes_code(
    task, tiny, tmp_path, monkeypatch
):
    task = joint(task, "x")
    head = jax.tree.map(lambda x: 3 * x, task.init_head(jax.random.key(4), 32, "concat"))
    trained = models_of(tiny, "mean", x=(task, head))
    export_merged.save(tmp_path / "m", tiny, trained, "x")
    monkeypatch.chdir(tmp_path / "m")
    text = Path(export_merged.README).read_text()
    assert "Its head is not one of a BertForSequenceClassification" in text
    assert not Path("modules.json").exists()  # no vectors of sentences, so no SentenceTransformer
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(code, names)
    pairs = [("ban cen.", "dan"), ("fen", "gan len " * 20), ("ba", "ba")]
    ours = jaxlora.Predictor(tiny, trained).predict("x", pairs)
    np.testing.assert_allclose(names["predict"](pairs).numpy(), ours, rtol=0, atol=1e-5)


def test_peft_reads_the_adapter_and_its_classifier(finished, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForSequenceClassification

    pairs, _ = rows_of(finished)
    trained = bank.load(finished / "run")
    export_peft.save(tmp_path / "p", trained, "own")
    start = AutoModelForSequenceClassification.from_pretrained(finished / "base", num_labels=2)
    model = peft.PeftModel.from_pretrained(start, tmp_path / "p").eval()
    tokenizer = family_bases.tokenizer(finished.name.rstrip("0123456789"))
    wanted = logits(model, tokenizer, pairs)
    predictor = jaxlora.load(finished / "run")
    (_, _, outputs), *_ = predictor._outputs([predictor.check(("own", *pair)) for pair in pairs])
    np.testing.assert_allclose(outputs, wanted, rtol=0, atol=2e-5)
    # And back, bit for bit.
    bank.add(tmp_path / "bank", export_peft.load(tmp_path / "p", "own"), ["own"])
    again = jaxlora.load(tmp_path / "bank")
    assert again.tasks["own"] == predictor.tasks["own"] and again.tasks["own"].joint
    assert again([("own", *pair) for pair in pairs]) == predictor([("own", *p) for p in pairs])


# ---- serving


def test_requests_to_all_kinds_of_tasks_in_one_call(tiny):
    """Each answer is what its task gives alone; adapters of two widths, and none."""
    tasks = {"sst": SST, "para": joint(PARA), "sts": STS_COSINE, "joint": joint(STS_MSE, "joint")}
    configs = {"a": LoraConfig(2, 4.0), "b": LoraConfig(4, 4.0)}
    trees = {"": {}} | {
        n: {"lora": random_adapter(tiny.params, config)} for n, config in configs.items()
    }
    used = dict(zip(tasks, ("a", "b", "a", ""), strict=True))
    models = {
        n: TaskModel(t, used[n], t.init_head(jax.random.key(1), 32, "concat"), "concat")
        for n, t in tasks.items()
    }
    trained = dataclasses.replace(
        models_of(tiny, "mean"), models=models, trees=trees, configs=configs
    )
    predictor = jaxlora.Predictor(tiny, trained)
    requests = [
        ("sts", "ban", "cen dan"), ("para", "ban cen", "dan"), ("sst", "ban"),
        ("joint", "fen", "la"), ("para", "dan", "ban cen"), ("joint", "ban " * 30, "la " * 30),
        ("sts", "dan fen", "gan len"),
    ]  # fmt: skip
    for request, answer in zip(requests, predictor(requests), strict=True):
        (alone,) = predictor([request])
        assert answer.label == alone.label
        np.testing.assert_allclose(answer.value, alone.value, atol=1e-5)
    merged = lora.merge(tiny.params, trees["b"]["lora"], configs["b"])
    base = dataclasses.replace(tiny, params=merged)
    one = jaxlora.Predictor(
        base, models_of(base, "mean", para=(models["para"].task, models["para"].head))
    )
    np.testing.assert_allclose(
        [list(a.probabilities.values()) for a in predictor([requests[1], requests[4]])],
        [list(a.probabilities.values()) for a in one([requests[1], requests[4]])],
        atol=1e-5,
    )


def test_the_cache_knows_how_pairs_were_encoded(tiny, data_dir, tmp_path):
    def load(task, tokenizer=tiny.tokenizer):
        return load_examples(task, "cs224n", data_dir, tokenizer, "key", 16, tmp_path)["train"]

    apart, together = load(PARA), load(joint(PARA))
    assert (apart.sentences, together.sentences) == (2, 1)
    assert len(together.lengths) == len(together) == len(apart)
    again = load(joint(PARA))
    for name, value in vars(together).items():
        np.testing.assert_array_equal(vars(again)[name], value)
    assert len(list((tmp_path / "tokens").iterdir())) == 2
    from tokenizers import processors

    other = type(tiny.tokenizer).from_str(tiny.tokenizer.to_str())
    marks = {m: tiny.tokenizer.token_to_id(m) for m in ("[CLS]", "[SEP]")}
    other.post_processor = processors.RobertaProcessing(
        ("[SEP]", marks["[SEP]"]), ("[CLS]", marks["[CLS]"]), trim_offsets=False,
        add_prefix_space=False,
    )  # fmt: skip
    assert load(joint(PARA), other).types is None  # [CLS] a [SEP] [SEP] b [SEP], all of type 0


def test_untrained_scores_do_not_compare_halves(tiny, data_dir, tmp_path):
    """Of joint pairs the best constant answer, as of single sentences."""
    dev = load_examples(joint(PARA), "cs224n", data_dir, tiny.tokenizer, "k", 16, tmp_path)["dev"]
    vectors = np.random.default_rng(0).normal(size=(len(dev), 4)).astype(np.float32)
    share = dev.labels.mean()
    assert inference.untrained(joint(PARA), dev, vectors) == pytest.approx(max(share, 1 - share))


def with_template(folder, to, **kind):
    """A copy of a base whose tokenizer puts other token types around a pair."""
    shutil.copytree(folder, to)
    path = to / "tokenizer.json"
    about = json.loads(path.read_text())
    for part in about["post_processor"]["pair"]:
        part[next(iter(part))]["type_id"] = kind.get("all_types", 0)
    path.write_text(json.dumps(about))
    return to


@pytest.fixture
def templated(tiny_base, tmp_path):
    """The tiny base, its pairs joined by a template that can be edited."""
    from tokenizers import Tokenizer, processors

    folder = tmp_path / "templated"
    shutil.copytree(tiny_base, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(m, tokenizer.token_to_id(m)) for m in ("[CLS]", "[SEP]")],
    )  # fmt: skip
    tokenizer.save(str(folder / "tokenizer.json"))
    # BERT's own class would put BERT's template in its place.
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


def test_a_base_that_joins_pairs_in_another_way_is_another_base(templated, tmp_path):
    """For joint pairs; for separate ones it answers the same."""
    base = huggingface.load(str(templated))
    other = huggingface.load(str(with_template(templated, tmp_path / "other")))
    assert base.fingerprint.tokenizer == other.fingerprint.tokenizer
    for task, same in ((joint(PARA), False), (PARA, True)):
        head = task.init_head(jax.random.key(0), 32, "concat")
        models = models_of(base, para=(task, head))
        bank.write(tmp_path / str(same), models)
        jaxlora.load(tmp_path / str(same))
        if same:
            jaxlora.load(tmp_path / str(same), base=other.name)
            continue
        with pytest.raises(UserError, match=r"not the pairs that .* was trained on"):
            jaxlora.load(tmp_path / str(same), base=other.name)


def test_a_token_type_without_an_embedding_is_refused(templated, tmp_path, data_dir):
    """JAX would take the last one there is."""
    wrong = with_template(templated, tmp_path / "wrong", all_types=2)
    base = huggingface.load(str(wrong))
    for task in (PARA, joint(PARA)):
        head = task.init_head(jax.random.key(0), 32, "concat")
        bank.write(tmp_path / task.pair_encoding, models_of(base, para=(task, head)))
    jaxlora.load(tmp_path / "separate")  # which does not see it
    encoder = jaxlora.from_pretrained(str(wrong))
    encoder.encode(encoder.params, ["ban cen"])
    settings = make_settings(
        "lora1", base=str(wrong), data_dir=data_dir, pair_encoding="joint", max_length=16, rank=2
    )
    for use in (
        lambda: jaxlora.load(tmp_path / "joint"),
        lambda: encoder.encode(encoder.params, [("ban", "cen")]),
        lambda: inputs.check_base(settings, base),
    ):
        with pytest.raises(UserError, match=r"token type 2, and config\.json says"):
            use()
