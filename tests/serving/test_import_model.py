"""Whole models of others as tasks: their own libraries give the same answers."""

import json
import pickle
import shutil

import family_bases
import numpy as np
import pytest

import jaxlora
from jaxlora.formats import families, huggingface
from jaxlora.serving import bank, export_merged, export_peft, import_model
from jaxlora.serving.task_models import TaskModel, TaskModels
from jaxlora.tasks.task import STS_COSINE
from jaxlora.utils.errors import UserError

torch = pytest.importorskip("torch")
HEAD = "ForSequenceClassification"
FAMILIES = tuple(name for name, family in families.FAMILIES.items() if family.classifier)
QUICK = ("bert", "roberta", "distilbert", "electra")
quick = pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in FAMILIES]
)
TEXTS = ("a film", "the dog runs, not running.", "x" * 9, "the dog " * 30, "café a")
PAIRS = tuple(zip(TEXTS, reversed(TEXTS), strict=True))


def logits(model, tokenizer, *texts):
    """Each example alone."""
    given = {"truncation": True, "max_length": 64, "return_tensors": "pt"}
    with torch.no_grad():
        rows = zip(*texts, strict=True)
        return np.concatenate([model.eval()(**tokenizer(*row, **given)).logits for row in rows])


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def probabilities(folder, name, examples):
    found = jaxlora.load(folder)([(name, *example) for example in examples])
    return np.array([list(answer.probabilities.values()) for answer in found])


@quick
def test_a_classifier_is_the_base_of_a_new_bank(family, tmp_path, call):
    names = {"id2label": {0: "no", 1: "perhaps", 2: "yes"}}
    model = family_bases.save(tmp_path / "m", family, HEAD, **names)
    code, shown = call("import", "model", tmp_path / "m", "--bank", tmp_path / "b", "--as", "x")
    assert code == 0, shown
    wanted = softmax(logits(model, family_bases.tokenizer(family), TEXTS))
    assert np.ptp(wanted, 0).min() > 0.01
    found = probabilities(tmp_path / "b", "x", [(text,) for text in TEXTS])
    print(f"\nFIGURE classifier {family} {np.abs(found - wanted).max():.1e}")
    np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-5)
    trained = bank.load(tmp_path / "b")
    assert trained.models["x"].task.classes == ("no", "perhaps", "yes")
    assert bank.verify(tmp_path / "b") == []
    # Out again, it is the same model.
    export_merged.save(tmp_path / "out", trained.load_base(), trained, "x")
    again = type(model).from_pretrained(tmp_path / "out")
    for name, tensor in again.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), model.state_dict()[name].numpy())
    assert again.config.id2label == {0: "no", 1: "perhaps", 2: "yes"}


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_a_multi_label_classifier_is_a_set_of_classes_and_out_again_the_same_model(
    family, tmp_path, call
):
    names = {"id2label": {0: "red", 1: "round", 2: "new"}}
    model = family_bases.save(
        tmp_path / "m", family, HEAD, problem_type="multi_label_classification", **names
    )
    code, shown = call("import", "model", tmp_path / "m", "--bank", tmp_path / "b", "--as", "x")
    assert code == 0, shown
    outputs = logits(model, family_bases.tokenizer(family), TEXTS)
    wanted = 1 / (1 + np.exp(-outputs))
    found = probabilities(tmp_path / "b", "x", [(text,) for text in TEXTS])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-5)
    predictor = jaxlora.load(tmp_path / "b")
    np.testing.assert_array_equal(predictor.predict("x", list(TEXTS)), outputs > 0)
    trained = bank.load(tmp_path / "b")
    assert trained.models["x"].task.kind == "multilabel"
    export_merged.save(tmp_path / "out", trained.load_base(), trained, "x")
    again = type(model).from_pretrained(tmp_path / "out")
    assert again.config.problem_type == "multi_label_classification"
    assert again.config.id2label == names["id2label"]
    again = logits(again, family_bases.tokenizer(family), TEXTS)
    np.testing.assert_allclose(again, outputs, rtol=0, atol=1e-6)


def test_a_classifier_is_a_task_beside_adapters_of_another_base(tmp_path, call):
    """Each keeps its own encoder; both are answered in one call."""
    family_bases.save(tmp_path / "base", "bert")
    base = huggingface.load(str(tmp_path / "base"))
    sts = TaskModel(STS_COSINE, "", {}, "concat")
    trained = TaskModels(
        base.name, base.fingerprint, "cls", 64, "float32", models={"sts": sts}, trees={"": {}},
        configs={}, origin="a test",
    )  # fmt: skip
    bank.add(tmp_path / "b", trained, ["sts"])
    before = jaxlora.load(tmp_path / "b").predict("sts", PAIRS)
    model = family_bases.torch_model("bert", HEAD, num_labels=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.save_pretrained(tmp_path / "m")
    family_bases.tokenizer("bert").save_pretrained(tmp_path / "m")
    flags = ("--bank", tmp_path / "b", "--as", "x", "--pair", "--classes", "no", "yes")
    code, shown = call("import", "model", tmp_path / "m", *flags)
    assert code == 0, shown
    wanted = softmax(logits(model, family_bases.tokenizer("bert"), *zip(*PAIRS, strict=True)))
    np.testing.assert_allclose(probabilities(tmp_path / "b", "x", PAIRS), wanted, atol=5e-5)
    found = jaxlora.load(tmp_path / "b")
    np.testing.assert_array_equal(found.predict("sts", PAIRS), before)
    assert (
        found.trained.models["x"].task.joint
        and "params" in found.trained.trees[found.trained.models["x"].tree]
    )
    renamed = {"more": TaskModel(STS_COSINE, "", {}, "concat")}
    renamed["more"] = TaskModel(type(STS_COSINE)("more", "similarity", pair=True), "", {}, "concat")
    bank.add(tmp_path / "b", TaskModels(**trained.base_spec(), models=renamed, trees={"": {}},
                                        configs={}, origin="a test"), ["more"])  # fmt: skip
    assert bank.verify(tmp_path / "b") == []
    assert call("import", "model", tmp_path / "m", *flags)[0] == 2  # it is there already
    assert call("import", "model", tmp_path / "m", *flags, "--update")[0] == 0


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("activation", ["Sigmoid", "Identity"])
def test_a_cross_encoder(family, activation, tmp_path):
    reader = pytest.importorskip("sentence_transformers")
    family_bases.save(tmp_path / "m", family, HEAD, num_labels=1)
    edit(tmp_path / "m" / "tokenizer_config.json", model_max_length=48)
    theirs = reader.CrossEncoder(
        str(tmp_path / "m"), device="cpu", activation_fn=getattr(torch.nn, activation)()
    )
    theirs.save_pretrained(str(tmp_path / "ce"))
    trained = import_model.load(str(tmp_path / "ce"), "x")
    bank.add(tmp_path / "b", trained, ["x"])
    answers = jaxlora.load(tmp_path / "b")([("x", *pair) for pair in PAIRS])
    ours = [a.value if a.probabilities is None else a.probabilities["1"] for a in answers]
    assert trained.models["x"].task.kind == ("binary" if activation == "Sigmoid" else "regression")
    wanted = theirs.predict(PAIRS)
    assert np.ptp(wanted) > 0.001
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=5e-5)


def test_an_older_cross_encoder(tmp_path):
    """Before version 4 of sentence-transformers the activation stood in config.json."""
    model = family_bases.save(tmp_path / "m", "bert", HEAD, num_labels=1)
    old = {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}
    edit(tmp_path / "m" / "config.json", **old)
    edit(tmp_path / "m" / "tokenizer_config.json", model_max_length=64)
    trained = import_model.load(str(tmp_path / "m"), "x")
    assert trained.models["x"].task.joint
    found = jaxlora.Predictor(trained.load_base(), trained).predict("x", PAIRS)
    wanted = logits(model, family_bases.tokenizer("bert"), *zip(*PAIRS, strict=True))[:, 0]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-5)


def sentence_encoder(folder, *more, mode="mean"):
    """A folder that sentence-transformers saved."""
    reader = pytest.importorskip("sentence_transformers")
    from sentence_transformers import models

    family_bases.save(folder / "base", "bert")
    parts = [models.Transformer(str(folder / "base")), models.Pooling(32, mode), *more]
    model = reader.SentenceTransformer(modules=parts, device="cpu")
    model.save_pretrained(str(folder / "st"))
    return model, folder / "st"


@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_a_sentence_transformer(mode, tmp_path):
    models = pytest.importorskip("sentence_transformers.models")
    model, folder = sentence_encoder(tmp_path, models.Normalize(), mode=mode)
    trained = import_model.load(str(folder), "x")
    assert (trained.pooling, trained.models["x"].task.kind) == (mode, "similarity")
    predictor = jaxlora.Predictor(trained.load_base(), trained)
    found, wanted = predictor.encode("x", TEXTS), model.encode(list(TEXTS))
    length = np.linalg.norm(found, axis=1, keepdims=True)
    np.testing.assert_allclose(found / length, wanted, rtol=0, atol=5e-5)
    first, second = (model.encode(list(texts)) for texts in zip(*PAIRS, strict=True))
    wanted = np.clip((first * second).sum(1), 0, 1)
    np.testing.assert_allclose(predictor.predict("x", PAIRS), wanted, rtol=0, atol=5e-5)


def test_a_tokenizer_without_a_limit_has_that_of_the_base(tmp_path, tiny):
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": Infinity}')
    assert import_model._max_length(tmp_path, tiny) == tiny.config.max_length


# ---- refusals


def refused(folder, said, like=None, **more):
    with pytest.raises(UserError, match=said) as caught:
        import_model.load(str(folder), "x", like, **more)
    assert "\n" not in str(caught.value)


def test_modules_that_are_not_supported_are_named(tmp_path):
    models = pytest.importorskip("sentence_transformers.models")
    refused(
        sentence_encoder(tmp_path / "a", models.Dense(32, 8))[1], "modules.json: the module Dense"
    )
    refused(sentence_encoder(tmp_path / "b", mode="max")[1], r"the pooling max is not supported")
    folder = sentence_encoder(tmp_path / "c")[1]
    refused(folder, "`pair` goes with a classifier", pair=True)
    for file, field in (
        ("sentence_bert_config.json", "do_lower_case"),
        ("config_sentence_transformers.json", "default_prompt_name"),
    ):
        copy = shutil.copytree(folder, tmp_path / field)
        edit(copy / file, **{field: "query"})
        refused(copy, f"{file}: {field} is not supported")
    (folder / "model_head.pkl").write_bytes(pickle.dumps(0))
    refused(folder, "model_head.pkl: the head of a SetFit model is a pickle")


def test_models_without_such_a_classifier_are_named(tmp_path):
    family_bases.save(tmp_path / "a", "bert", "ForTokenClassification")
    refused(tmp_path / "a", "architectures BertForTokenClassification: only sequence classifiers")
    family_bases.save(tmp_path / "b", "bert")
    refused(tmp_path / "b", "architectures BertModel: only sequence classifiers")
    family_bases.save(tmp_path / "c", "modernbert", HEAD)
    refused(tmp_path / "c", "the classifier of a ModernBertModel cannot be imported")
    several = {"num_labels": 3, "problem_type": "regression"}
    family_bases.save(tmp_path / "d", "bert", HEAD, **several)
    refused(tmp_path / "d", "problem_type 'regression' with 3 outputs")
    family_bases.save(tmp_path / "e", "bert", HEAD, num_labels=2)
    refused(tmp_path / "e", "3 classes are named, the classifier has 2", classes=("a", "b", "c"))


def test_a_model_of_another_shape_needs_a_bank_of_its_own(tiny, tmp_path):
    family_bases.save(tmp_path / "m", "bert", HEAD, num_labels=2)
    like = TaskModels(
        tiny.name, tiny.fingerprint, "cls", 64, "float32", models={}, trees={}, configs={},
        origin="the bank",
    )  # fmt: skip
    refused(
        tmp_path / "m",
        "another config, another tokenizer and another pair template than .* bank of its own",
        like,
    )


# ---- PEFT's sequence classifiers of other families


@pytest.mark.parametrize("family", ["roberta", "distilbert", "electra"])
@pytest.mark.parametrize("pair", [False, True])
def test_a_sequence_classifier_of_peft(family, pair, tmp_path):
    peft = pytest.importorskip("peft")
    # PEFT does not keep a DistilBERT's pre_classifier, so the base must have it.
    family_bases.save(tmp_path / "base", family, HEAD if family == "distilbert" else "Model")
    from transformers import AutoModelForSequenceClassification

    names = {"target_modules": ["q_lin", "lin2"]} if family == "distilbert" else {}
    torch.manual_seed(5)
    start = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True
    )
    model = peft.get_peft_model(start, peft.LoraConfig(task_type="SEQ_CLS", r=2, **names))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "peft")
    base = huggingface.load(str(tmp_path / "base"))
    like = TaskModels(
        base.name, base.fingerprint, "cls", 64, "float32", models={}, trees={}, configs={},
        origin="a bank",
    )  # fmt: skip
    trained = export_peft.load(tmp_path / "peft", "x", like, pair=pair)
    bank.add(tmp_path / "b", trained, ["x"])
    examples = PAIRS if pair else [(text,) for text in TEXTS]
    wanted = softmax(logits(model, family_bases.tokenizer(family), *zip(*examples, strict=True)))
    found = probabilities(tmp_path / "b", "x", examples)
    assert np.ptp(wanted, 0).min() > 0.005
    np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-5)
