"""Tasks that PEFT trained: sequence classifiers with PEFT's own answers; bases compared."""

import dataclasses
import json
import shutil

import numpy as np
import peft_oracle
import pytest
from peft_oracle import edit_config
from safetensors.numpy import load_file, save_file

import jaxlora
from jaxlora.formats import families, huggingface, peft_config
from jaxlora.formats import peft as peft_files
from jaxlora.serving import bank, export_merged, export_peft, export_readme
from jaxlora.serving.task_models import TaskModels
from jaxlora.utils.errors import UserError

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

SENTENCES = ("a film.", "how do i learn to play it?", "bada ceno liru.", "a fun run on. it", "un")
PAIR = ("a film.", "how do i learn?")


def base_like(folder, pooling="cls", **more):
    """What an import shall fit: a base of that folder."""
    found = huggingface.load(str(folder))
    about = {"max_length": 64, "dtype": "float32", "origin": "a bank"} | more
    return TaskModels(
        str(folder), found.fingerprint, pooling=pooling, models={}, trees={}, configs={}, **about
    )


def sequence_model(folder, outputs=3):
    """The base in transformers' sequence classifier, whose last layer is made up."""
    from transformers import BertForSequenceClassification

    torch.manual_seed(1)
    return BertForSequenceClassification.from_pretrained(
        folder, num_labels=outputs, attn_implementation="eager", dtype=torch.float32
    )


def classifier(folder, outputs=3, **values):
    """PEFT's sequence classifier on a base, every trained number moved."""
    model = sequence_model(folder, outputs)
    values = {"r": 4, "lora_alpha": 6, "target_modules": ["query", "value"]} | values
    config = peft.LoraConfig(task_type="SEQ_CLS", **values)
    model = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model, tokenizer, sentences=SENTENCES):
    with torch.no_grad():
        return np.concatenate(
            [model(input_ids=torch.tensor([tokenizer.encode(s).ids])).logits for s in sentences]
        )


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def answers(folder, name="x"):
    return jaxlora.load(folder)([(name, sentence) for sentence in SENTENCES])


def probabilities(folder, name="x"):
    return np.array([list(a.probabilities.values()) for a in answers(folder, name)])


def rename_tensors(folder, rename):
    tensors = {rename(key): x for key, x in load_file(folder / peft_files.TENSORS).items()}
    save_file(tensors, folder / peft_files.TENSORS, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def seq_cls(tiny_base, tmp_path_factory):
    """A folder by PEFT with three classes, and the model."""
    folder = tmp_path_factory.mktemp("seq-cls") / "topic"
    model = classifier(tiny_base)
    model.save_pretrained(folder)
    return folder, model


# ---- a sequence classifier

KINDS = {
    "default": {},
    "no targets named": {"target_modules": None},
    "all-linear": {"target_modules": "all-linear"},
    "dense, rslora": {"target_modules": ["query", "dense"], "use_rslora": True},
    "patterns": {
        "target_modules": ["dense"], "rank_pattern": {"pooler.dense": 2},
        "alpha_pattern": {"bert.pooler.dense": 11},
    },
    "pooler saved": {"target_modules": ["dense"], "modules_to_save": ["pooler"]},
    "pooler's Linear saved": {"modules_to_save": ["pooler.dense", "classifier"]},
}  # fmt: skip


@pytest.mark.parametrize("values", KINDS.values(), ids=KINDS)
def test_a_sequence_classifier_is_imported_whole(tiny, tiny_base, tmp_path, values):
    model = classifier(tiny_base, **values)
    model.save_pretrained(tmp_path / "theirs")
    found = export_peft.load(tmp_path / "theirs", "x", base_like(tiny_base))
    bank.add(tmp_path / "bank", found, ["x"])
    expected = softmax(logits(model, tiny.tokenizer))
    assert np.ptp(expected, 0).min() > 0.01
    np.testing.assert_allclose(probabilities(tmp_path / "bank"), expected, rtol=0, atol=1e-5)
    (task,) = (one.task for one in found.models.values())
    assert (task.kind, task.classes, task.pair) == ("classification", ("0", "1", "2"), False)
    assert not bank.verify(tmp_path / "bank")
    # PEFT reads our export as it reads its own.
    export_peft.save(tmp_path / "ours", bank.load(tmp_path / "bank"), "x")
    again = peft.PeftModel.from_pretrained(sequence_model(tiny_base), tmp_path / "ours").eval()
    np.testing.assert_allclose(
        logits(again, tiny.tokenizer), logits(model, tiny.tokenizer), rtol=0, atol=1e-5
    )


def test_a_regression_gives_the_number_itself(tiny, tiny_base, tmp_path):
    """Of any size: nobody says a range."""
    model = classifier(tiny_base, outputs=1)
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].bias.add_(-40.0)
    model.save_pretrained(tmp_path / "theirs")
    bank.add(
        tmp_path / "b", export_peft.load(tmp_path / "theirs", "x", base_like(tiny_base)), ["x"]
    )
    found = [answer.value for answer in answers(tmp_path / "b")]
    expected = logits(model, tiny.tokenizer)[:, 0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert expected.max() < -30


def test_the_command_imports_shows_predicts_and_exports(
    tiny, tiny_base, seq_cls, tmp_path, call, monkeypatch
):
    folder, model = seq_cls
    flags = ("--bank", tmp_path / "b", "--as", "x", "--base", tiny_base, "--classes", "a", "b", "c")
    code, shown = call("import", "peft", folder, *flags)
    assert code == 0, shown
    expected = logits(model, tiny.tokenizer)
    code, shown = call("predict", "--bank", tmp_path / "b", "--task", "x", SENTENCES[0])
    best = "abc"[expected[0].argmax()]
    assert (code, shown.split()[0]) == (0, best)
    for word in (("list",), ("show", "x"), ("verify",)):
        assert call("bank", word[0], tmp_path / "b", *word[1:])[0] == 0
    assert bank.load(tmp_path / "b").pooling == "cls"
    # Exported and imported again: the very same numbers.
    assert call("export", "peft", tmp_path / "p", "--bank", tmp_path / "b", "--task", "x")[0] == 0
    code, shown = call("import", "peft", tmp_path / "p", "--bank", tmp_path / "c", "--as", "x")
    assert code == 0, shown
    np.testing.assert_array_equal(probabilities(tmp_path / "b"), probabilities(tmp_path / "c"))
    # The code of the PEFT folder and of the merged one gives the same classes.
    assert call("export", "merged", tmp_path / "m", "--bank", tmp_path / "b", "--task", "x")[0] == 0
    for name in ("p", "m"):
        text = (tmp_path / name / export_merged.README).read_text()
        code = text.split("```")[1].removeprefix("python")
        monkeypatch.chdir(tmp_path / name)
        names = {}
        exec(code.replace(repr(tiny_base.name), repr(str(tiny_base))), names)
        np.testing.assert_array_equal(names["predict"](list(SENTENCES)), expected.argmax(-1))


def test_the_readme_loads_a_pinned_base_at_its_revision(tmp_path, seq_cls, tiny_base):
    found = export_peft.load(seq_cls[0], "x", base_like(tiny_base))
    pinned = dataclasses.replace(found, base="owner/name@abc123")
    text = export_readme.peft_readme(pinned, pinned.models["x"], families.FAMILIES["bert"])
    assert "'owner/name'  #" in text and "name@abc123'" not in text
    assert text.count("from_pretrained(base, revision='abc123'") == 2


OLDER = {
    "an adapter's name in LoRA's keys": lambda k: k.replace(".weight", ".default.weight")
    if "lora_" in k else k,
    "another name": lambda k: k.replace(".weight", ".topic.weight") if "lora_" in k else k,
    "wrappers in the classifier's": lambda k: k.replace(
        "classifier.", "classifier.modules_to_save.default."
    ),
    "wrappers without a name": lambda k: k.replace("classifier.", "classifier.modules_to_save."),
    "wrappers with another name": lambda k: k.replace(
        "classifier.", "classifier.modules_to_save.topic."
    ),
    "no bert.": lambda k: k.replace(".bert.", "."),
}  # fmt: skip


@pytest.mark.parametrize("rename", OLDER.values(), ids=OLDER)
def test_keys_of_other_versions(tiny_base, seq_cls, tmp_path, rename):
    shutil.copytree(seq_cls[0], tmp_path / "a")
    like, expected = base_like(tiny_base), export_peft.load(seq_cls[0], "x", base_like(tiny_base))
    before = load_file(tmp_path / "a" / peft_files.TENSORS).keys()
    rename_tensors(tmp_path / "a", rename)
    assert load_file(tmp_path / "a" / peft_files.TENSORS).keys() != before
    # Versions that kept the list of saved modules in the model alone.
    edit_config(tmp_path / "a", modules_to_save=None)
    found = export_peft.load(tmp_path / "a", "x", like)
    for trees in (
        (found.trees["x"], expected.trees["x"]),
        (found.models["x"].head, expected.models["x"].head),
    ):
        ours, theirs = map(torch.utils._pytree.tree_leaves, trees)
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one, other)


def test_what_stood_there_before_is_left_out(tiny_base, seq_cls, tmp_path):
    """A whole state dict also has the classifier from before training."""
    shutil.copytree(seq_cls[0], tmp_path / "a")
    tensors = load_file(tmp_path / "a" / peft_files.TENSORS)
    for name in ("weight", "bias"):
        key = f"base_model.model.classifier.original_module.{name}"
        tensors[key] = np.zeros_like(tensors[f"base_model.model.classifier.{name}"])
    save_file(tensors, tmp_path / "a" / peft_files.TENSORS)
    found = export_peft.load(tmp_path / "a", "x", base_like(tiny_base))
    assert np.abs(found.models["x"].head["out"]["kernel"]).min() > 0


def test_fan_in_fan_out_changes_nothing(tiny, tiny_base, seq_cls, tmp_path):
    """PEFT warns and takes a torch.nn.Linear as it is."""
    folder, model = seq_cls
    shutil.copytree(folder, tmp_path / "a")
    edit_config(tmp_path / "a", fan_in_fan_out=True)
    plain = sequence_model(tiny_base)
    with pytest.warns(UserWarning, match="Setting fan_in_fan_out to False"):
        theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "a").eval()
    expected = logits(model, tiny.tokenizer)
    np.testing.assert_allclose(logits(theirs, tiny.tokenizer), expected, rtol=0, atol=1e-6)
    bank.add(tmp_path / "b", export_peft.load(tmp_path / "a", "x", base_like(tiny_base)), ["x"])
    np.testing.assert_allclose(probabilities(tmp_path / "b"), softmax(expected), rtol=0, atol=1e-5)


def test_the_encoder_alone(tiny, tiny_base, seq_cls, tmp_path, call):
    folder, model = seq_cls
    flags = ("--bank", tmp_path / "b", "--as", "x", "--base", tiny_base, "--encoder-only")
    code, shown = call("import", "peft", folder, *flags)
    assert (code, "left out" in shown, "classifier" in shown) == (0, True, True)
    u, v = peft_oracle.vectors(model, tiny.tokenizer, PAIR, "mean")
    (answer,) = jaxlora.load(tmp_path / "b")([("x", *PAIR)])
    assert answer.value == pytest.approx(u @ v / np.linalg.norm(u) / np.linalg.norm(v), abs=1e-5)
    adapter, _ = peft_files.load(folder, tiny.config, encoder_only=True)
    assert adapter.keys() == {"layers"}
    with pytest.raises(UserError, match=r"also trains classifier.*encoder_only=True"):
        peft_files.load(folder, tiny.config)


@pytest.mark.parametrize("targets", ["all-linear", ["query", "dense"]], ids=str)
def test_factors_of_a_pooler_that_nothing_reads(tiny, tiny_base, tmp_path, call, targets):
    config = peft.LoraConfig(r=3, target_modules=targets, task_type="FEATURE_EXTRACTION")
    model = peft.get_peft_model(peft_oracle.bert(tiny_base), config).eval()
    with torch.no_grad():
        for factor in peft_oracle.factors(model).values():
            factor.add_(0.2 * torch.randn_like(factor))
    model.save_pretrained(tmp_path / "a")
    assert any("pooler" in key for key in load_file(tmp_path / "a" / peft_files.TENSORS))
    flags = ("--bank", tmp_path / "b", "--as", "x", "--base", tiny_base)
    code, shown = call("import", "peft", tmp_path / "a", *flags)
    assert (code, "left out" in shown, "pooler.dense" in shown) == (0, True, True), shown
    theirs = peft_oracle.vectors(model, tiny.tokenizer, SENTENCES, "mean")
    ours = jaxlora.load(tmp_path / "b").encode("x", SENTENCES)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_names_of_classes_come_from_the_base(tiny_base, seq_cls, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    about = json.loads((base / "config.json").read_text())
    for names, expected in (
        ({"0": "sport", "1": "art", "2": "law"}, ("sport", "art", "law")),
        ({"0": "sport", "1": "art"}, ("0", "1", "2")),  # another task's
        (None, ("0", "1", "2")),
    ):
        (base / "config.json").write_text(json.dumps(about | {"id2label": names}))
        found = export_peft.load(seq_cls[0], "x", base_like(base), any_base=True)
        assert found.models["x"].task.classes == expected
    like = base_like(base)
    found = export_peft.load(seq_cls[0], "x", like, any_base=True, classes=["a", "b", "c"])
    assert found.models["x"].task.classes == ("a", "b", "c")
    for wrong in (["a", "b"], ["a", "b", "b"], ["a", "b", " "]):
        with pytest.raises(UserError, match="name them with `classes`"):
            export_peft.load(seq_cls[0], "x", like, any_base=True, classes=wrong)


def test_a_multi_label_classifier_is_known_by_its_base(tiny, tiny_base, seq_cls, tmp_path):
    """Its probabilities are PEFT's; out and in again, it keeps its thresholds bit for bit."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    about = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps(about | {"problem_type": "multi_label_classification"})
    )
    found = export_peft.load(seq_cls[0], "x", base_like(base), any_base=True)
    model = found.models["x"]
    assert model.task.kind == "multilabel"
    task = dataclasses.replace(model.task, thresholds=(0.1, 0.5, 1 / 3))
    bank.add(
        tmp_path / "b",
        dataclasses.replace(found, models={"x": dataclasses.replace(model, task=task)}), ["x"],
    )  # fmt: skip
    expected = 1 / (1 + np.exp(-logits(seq_cls[1], tiny.tokenizer)))
    np.testing.assert_allclose(probabilities(tmp_path / "b"), expected, rtol=0, atol=1e-5)
    export_peft.save(tmp_path / "ours", bank.load(tmp_path / "b"), "x")
    again = export_peft.load(tmp_path / "ours", "x", base_like(base))
    assert again.models["x"].task == task


def test_what_cannot_be_imported_whole(tiny_base, seq_cls, tmp_path, call):
    """Each refusal names a way that works."""
    folder = shutil.copytree(seq_cls[0], tmp_path / "a")
    like = base_like(tiny_base)
    with pytest.raises(UserError, match=r"pooling mean.*`encoder_only=True`"):
        export_peft.load(folder, "x", base_like(tiny_base, "mean"))
    export_peft.load(folder, "x", base_like(tiny_base, "mean"), encoder_only=True)
    base = shutil.copytree(tiny_base, tmp_path / "base")
    about = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(about | {"problem_type": "regression"}))
    with pytest.raises(UserError, match=r"'regression' with 3 outputs.*`encoder_only=True`"):
        export_peft.load(folder, "x", base_like(base), any_base=True)
    tensors = load_file(base / "model.safetensors")
    save_file({k: x for k, x in tensors.items() if "pooler" not in k}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"has no pooler.dense.*`encoder_only=True`"):
        export_peft.load(folder, "x", base_like(base), any_base=True)
    edit_config(folder, task_type="TOKEN_CLS")
    with pytest.raises(UserError, match=r"task_type 'TOKEN_CLS'.*classifier.*`encoder_only=True`"):
        export_peft.load(folder, "x", like)
    export_peft.load(folder, "x", like, encoder_only=True)
    edit_config(folder, task_type="SEQ_CLS", modules_to_save=["classifier", "embeddings"])
    with pytest.raises(UserError, match="modules_to_save names embeddings"):
        export_peft.load(folder, "x", like)


def test_an_export_changed_by_hand_never_spoils_a_bank(tiny_base, seq_cls, tmp_path):
    made = export_peft.load(seq_cls[0], "x", base_like(tiny_base))
    export_peft.save(tmp_path / "p", made, "x")
    path = tmp_path / "p" / export_peft.ABOUT
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"pooling": "mean"}))
    with pytest.raises(UserError, match="does not go with pooling mean"):
        export_peft.load(tmp_path / "p", "x")
    wrong = dataclasses.replace(made, pooling="mean")
    with pytest.raises(UserError, match="the head of x needs pooling cls"):
        wrong.load_base()


@pytest.mark.parametrize("place", ["none", "x" * 300, "~nobody-of-that-name/x"])
def test_a_folder_that_is_not_there(tmp_path, call, place):
    code, shown = call("import", "peft", place, "--bank", tmp_path / "b", "--as", "x")
    assert (code, "there is no such folder" in shown) == (2, True)


# ---- several adapters in one folder


def test_named_adapters(tiny, tiny_base, tmp_path, call):
    model = classifier(tiny_base)
    model.add_adapter("other", peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["key"]))
    model.save_pretrained(tmp_path / "all")
    flags = ("--bank", tmp_path / "b", "--base", tiny_base)
    for number, (name, rank) in enumerate((("default", 4), ("other", 2))):
        add = ("--as", f"x{number}", "--adapter", name)
        assert call("import", "peft", tmp_path / "all", *flags, *add)[0] == 0
        assert (
            bank.load(tmp_path / "b")
            .configs[bank.load(tmp_path / "b").models[f"x{number}"].tree]
            .rank
            == rank
        )
    code, shown = call("import", "peft", tmp_path / "all", *flags, "--as", "x9", "--adapter", "no")
    assert (code, "'no'; choose with --adapter from default, other" in shown) == (2, True)
    # As PEFT: the folder's own adapter, unless it has none.
    assert peft_files.find(tmp_path / "all") == tmp_path / "all"
    model.save_pretrained(tmp_path / "named", selected_adapters=["other"])
    assert peft_files.find(tmp_path / "named") == tmp_path / "named" / "other"
    shutil.copytree(tmp_path / "named" / "other", tmp_path / "named" / "third")
    with pytest.raises(UserError, match="several adapters; choose with `adapter` from other, th"):
        peft_files.find(tmp_path / "named")


# ---- the base


def test_another_base_is_refused(tiny_base, seq_cls, tmp_path, call):
    """Of the same shape, so that only its name tells."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    save_file({k: x + 0.01 for k, x in tensors.items()}, base / "model.safetensors")
    flags = ("--bank", tmp_path / "b", "--as", "x", "--base", base)
    code, shown = call("import", "peft", seq_cls[0], *flags)
    assert code == 2 and not (tmp_path / "b").exists()
    assert all(part in shown for part in (str(base), str(tiny_base), "--any-base")), shown
    assert call("import", "peft", seq_cls[0], *flags, "--any-base")[0] == 0


HUB = "sentence-transformers/all-MiniLM-L6-v2"
BASES = [
    # an adapter's base and revision, the base here, whether they are the same
    ("bert-base-uncased", None, "bert-base-uncased", True),
    ("google-bert/bert-base-uncased", None, "bert-base-uncased", True),
    ("bert-base-uncased/", None, "google-bert/bert-base-uncased", True),
    ("bert-base-uncased", "main", "bert-base-uncased", True),
    ("bert-base-uncased", None, "bert-base-uncased@v1", True),  # the adapter says no revision
    ("bert-base-uncased", "v1", "bert-base-uncased@v1", True),
    ("bert-base-uncased", "v1", "bert-base-uncased", False),
    ("bert-base-uncased", "v1", "bert-base-uncased@v2", False),
    ("bert-base-uncased", "main", "bert-base-uncased@v2", False),
    ("bert-base-cased", None, "bert-base-uncased", False),
    ("someone/bert-base-uncased", None, "bert-base-uncased", False),
    ("/models/bert-base-uncased", None, "bert-base-uncased", False),
    (HUB, None, "minilm", True),
    ("minilm", None, HUB, True),
    (HUB, "v1", "minilm", False),
    ("sentence-transformers/all-MiniLM-L12-v2", None, "minilm", False),
    ("FOLDER", None, "FOLDER", True),
    ("FOLDER/", None, "FOLDER", True),
    ("FOLDER/../NAME", None, "FOLDER", True),
    ("NAME", None, "FOLDER", True),  # from the folder above it
    ("./NAME", None, "FOLDER", True),
    ("LINK", None, "FOLDER", True),
    ("COPY", None, "FOLDER", True),
    ("CHANGED", None, "FOLDER", False),
    ("FOLDER", "v1", "FOLDER", False),  # a folder has no revisions
    (None, None, "FOLDER", False),
    ("", None, "FOLDER", False),
]


@pytest.fixture(scope="module")
def places(tiny_base, tmp_path_factory):
    """Folders with the tiny base, and one with another tokenizer."""
    root = tmp_path_factory.mktemp("places")
    shutil.copytree(tiny_base, root / "base")
    shutil.copytree(tiny_base, root / "copy")
    changed = shutil.copytree(tiny_base, root / "changed")
    (changed / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    (root / "link").symlink_to(root / "base")
    return {
        "FOLDER": root / "base", "NAME": "base", "LINK": root / "link", "COPY": root / "copy",
        "CHANGED": root / "changed",
    }  # fmt: skip


@pytest.mark.parametrize(("name", "revision", "base", "same"), BASES)
def test_names_of_bases(tiny, places, tmp_path, monkeypatch, name, revision, base, same):
    def placed(text):
        for word, place in places.items():
            text = text and text.replace(word, str(place))
        return text

    monkeypatch.chdir(places["FOLDER"].parent)
    (tmp_path / peft_config.CONFIG).write_text(
        json.dumps(
            {"peft_type": "LORA", "base_model_name_or_path": placed(name), "revision": revision}
        )
    )
    written = peft_config.read_config(tmp_path)
    here = dataclasses.replace(tiny, name=placed(base))
    if same:
        export_peft._check_base(tmp_path, written, here)
    else:
        with pytest.raises(UserError, match="`any_base=True`"):
            export_peft._check_base(tmp_path, written, here)


# ---- what a refusal tells to do


@pytest.mark.parametrize(
    "values", [{"use_dora": True}, {"bias": "lora_only"}], ids=["use_dora", "bias"]
)
def test_a_merged_model_can_be_the_base(tiny, tiny_base, tmp_path, values):
    config = peft.LoraConfig(r=3, target_modules=["query", "value"], **values)
    model = peft.get_peft_model(peft_oracle.bert(tiny_base), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.rand_like(parameter))
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(UserError, match=r"merge_and_unload.*save_pretrained.*`base`"):
        peft_files.load(tmp_path / "a", tiny.config)
    expected = peft_oracle.vectors(model, tiny.tokenizer, SENTENCES)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    shutil.copy(tiny_base / "tokenizer.json", tmp_path / "merged")
    base = huggingface.load(str(tmp_path / "merged"))
    theirs = peft_oracle.vectors(peft_oracle.bert(tmp_path / "merged"), base.tokenizer, SENTENCES)
    np.testing.assert_allclose(theirs, expected, rtol=0, atol=1e-5)


def test_trained_norms_are_refused_with_a_way_out(tiny, tiny_base, tmp_path):
    classifier(tiny_base, modules_to_save=["LayerNorm"]).save_pretrained(tmp_path / "a")
    with pytest.raises(UserError, match=r"LayerNorm.*merge_and_unload.*save_pretrained.*`base`"):
        peft_files.load(tmp_path / "a", tiny.config)


def test_a_pickle_is_named(tiny, tiny_base, tmp_path):
    model = classifier(tiny_base)
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / peft_files.TENSORS).rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model.bin is a pickle.*safe_serialization=True"):
        peft_files.load(tmp_path / "a", tiny.config)
