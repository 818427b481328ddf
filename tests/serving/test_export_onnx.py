"""ONNX folders: ONNX Runtime computes what our predictor does, for every family and task."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import family_bases
import jax
import numpy as np
import onnx
import pytest
from onnxruntime import InferenceSession
from tiny import random_adapter
from tokenizers import Tokenizer

import jaxlora
from jaxlora.data.delimited import Reading
from jaxlora.formats import families, huggingface, onnx_graph
from jaxlora.formats.onnx_graph import INT, Graph, Inputs
from jaxlora.lora import LoraConfig
from jaxlora.nn import bert
from jaxlora.serving import bank, export_onnx, export_onnx_check
from jaxlora.serving.task_models import Facts, TaskModel, TaskModels
from jaxlora.tasks.kinds import LOSSES
from jaxlora.tasks.task import HEADS, Task
from jaxlora.utils.errors import UserError

CONFIG = LoraConfig(4, 8.0, ("query", "output.dense"))
# Far more tokens than max_length, one, and some.
SENTENCES = ("a film", "the dog runs, not running. " * 9, "x", "the dog the dog a film", "dog. a")
PAIRS = tuple(zip(SENTENCES, SENTENCES[1:] + SENTENCES[:1], strict=True))
LONGEST = 24
TOPIC = Task("topic", "classification", classes=("sport", "a_b_c", "art"), title="# one *two*")
PRICE = Task("price", "regression", low=-2.0, high=30.0)
ALIKE = Task("alike", "similarity", pair=True, low=-1.0, high=1.0)
SAME = Task("same", "binary", pair=True)


def random_head(task, width, features):
    """A head whose answers differ, and are not clipped."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: task.init_head(jax.random.key(0), width, features))
    head = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes)
    if head and not task.classes:
        head["out"]["bias"] += 2.5
    return head


@functools.cache
def adapter_of(folder, config):
    return random_adapter(huggingface.load(folder).params, config)


def trained(base, task, pooling="cls", features="concat", config=CONFIG):
    config = families.localise(config, base.config)
    adapter = adapter_of(base.name, config)
    head = random_head(task, base.config.hidden_size, features)
    return TaskModels(
        base.name, base.fingerprint, pooling, LONGEST, "float32",
        models={task.name: TaskModel(task, "tree", head, features)},
        trees={"tree": {"lora": adapter}}, configs={"tree": config}, origin="here",
    )  # fmt: skip


def texts(task):
    return [(s,) for s in SENTENCES] if not task.pair else list(PAIRS)


def outputs(folder, task):
    """All outputs of a folder's model."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    parts = zip(*map(task.encoded, texts(task)), strict=True)
    given = {}
    for end, part in zip(("", "_2"), parts, strict=False):
        given |= export_onnx_check._inputs(tokenizer.encode_batch(list(part)), end)
    return InferenceSession(folder / "model.onnx").run(None, given)


def answers(predictor, task):
    """Our probabilities, or scores."""
    found = predictor([(task.name, *example) for example in texts(task)])
    if not task.classes:
        return np.array([one.value for one in found])
    return np.array([list(one.probabilities.values()) for one in found])


TAGS = Task("tags", "multilabel", classes=("a", "b", "c"), thresholds=(0.4, 0.5, 0.55))
CASES = [
    (TAGS, {"pooling": "mean"}),
    (Task("spam", "binary", thresholds=(0.45,)), {}),
    (Task("stars", "ordinal", classes=("1", "2", "3", "4")), {}),
    (TOPIC, {"pooling": "mean"}),
    (dataclasses.replace(TOPIC, head="pooler"), {}),
    (dataclasses.replace(TOPIC, head="dense_relu"), {}),
    (dataclasses.replace(TOPIC, head="dense_gelu"), {}),
    (Task("good", "binary", classes=("no", "yes")), {}),
    (PRICE, {}),
    (dataclasses.replace(PRICE, head="pooler"), {}),
    (SAME, {"features": "interaction"}),
    (SAME, {}),
    (ALIKE, {"pooling": "mean"}),
    (dataclasses.replace(ALIKE, loss="squared_error"), {}),
    (dataclasses.replace(SAME, pair_encoding="joint"), {"pooling": "mean"}),
    (dataclasses.replace(ALIKE, loss="squared_error", pair_encoding="joint"), {}),
]  # fmt: skip


def test_cases_have_every_loss_and_head():
    assert {task.loss for task, _ in CASES} == set(LOSSES)
    assert {task.head for task, _ in CASES} == set(HEADS) - {"classifier"}  # one of the others


@pytest.mark.parametrize(("task", "options"), CASES)
def test_every_kind_of_head_equals_ours(task, options, tiny, tmp_path, monkeypatch):
    """Our own head on the vectors that the model gives; the next test compares those."""
    made = trained(tiny, task, **options)
    export_onnx.save(tmp_path / "out", tiny, made, task.name)
    *vectors, found = outputs(tmp_path / "out", task)
    model = made.models[task.name]
    logits = task.apply_head(model.head, vectors[0], vectors[-1], pair_features=model.pair_features)
    wanted = task.probabilities(logits) if task.classes else task.decode(logits)
    assert np.ptp(wanted, 0).min() > 0.01
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * (task.high - task.low))
    # The README's code needs nothing of ours.
    monkeypatch.chdir(tmp_path / "out")
    (code,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    predicted = names["predict"](texts(task) if task.pair else list(SENTENCES))
    np.testing.assert_allclose(predicted, task.decode(logits), rtol=0, atol=1e-3)
    assert not task.classes or np.asarray(predicted).dtype.kind == "i"
    if task.classes:
        decided = export_onnx_check.decide(task, found)
        np.testing.assert_array_equal(decided, task.decode(logits))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("family", family_bases.FAMILIES)
def test_every_family_equals_the_predictor(family, pooling, tmp_path):
    """In one padded batch, and each example alone, at its own length."""
    family_bases.save(tmp_path / "base", family)
    base = huggingface.load(str(tmp_path / "base"))
    task = dataclasses.replace(SAME, pair_encoding="joint" if pooling == "cls" else "separate")
    made = trained(base, task, pooling)
    export_onnx.save(tmp_path / "out", base, made, task.name)
    wanted = answers(jaxlora.Predictor(base, made), task)
    assert np.ptp(wanted, 0).min() > 0.01
    together = export_onnx_check.run(tmp_path / "out", export_onnx.MODEL, task, PAIRS)
    alone = [export_onnx_check.run(tmp_path / "out", "model.onnx", task, [one]) for one in PAIRS]
    np.testing.assert_allclose(together, wanted, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.concatenate(alone), wanted, rtol=0, atol=1e-5)
    names = {one.name for one in onnx.load(tmp_path / "out" / "model.onnx").graph.input}
    assert ("token_type_ids" in names) == families.of(base.config).token_types
    assert ("input_ids_2" in names) == (pooling == "mean")


def encoded(base, ids, mask, **types):
    """The last layer's vectors, by ONNX Runtime."""
    graph, shape = Graph(), ("batch", "length")
    params = onnx_graph.weights(graph, onnx_graph.unstack(base.params))
    names = ("tokens", "mask", *types)
    inputs = Inputs(*(graph.input(name, INT, shape) for name in names))
    hidden = onnx_graph.encode(graph, base.config, params, inputs)
    graph.output("hidden", hidden, (*shape, base.config.hidden_size))
    model = graph.model("test")
    onnx.checker.check_model(model, full_check=True)
    session = InferenceSession(model.SerializeToString())
    return session.run(None, {"tokens": ids, "mask": mask, **types})[0]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mpnet", {}),  # whose distances above 128 share a bucket
        ("modernbert", {"max_position_embeddings": 150, "num_hidden_layers": 7}),
        ("modernbert", {"norm_bias": True, "attention_bias": True, "mlp_bias": True}),
        ("modernbert", {"hidden_activation": "silu"}),
        ("roberta", {"hidden_act": "gelu_new"}),
        ("bert", {"hidden_act": "relu"}),
        ("electra", {"embedding_size": 32}),
    ],
)
def test_every_layer_equals_torch(family, changes, tmp_path):
    torch = pytest.importorskip("torch")
    model = family_bases.save(tmp_path, family, **changes)
    base = huggingface.load(str(tmp_path))
    lengths = (140, 3) if base.config.max_length > 140 else (60, 3, 1)
    sentences = family_bases.sentences(lengths=lengths)
    ids = np.full((len(lengths), max(lengths)), 1, np.int64)
    mask = np.zeros_like(ids)
    for row, sentence in enumerate(sentences):
        ids[row, : len(sentence)], mask[row, : len(sentence)] = sentence, 1
    with torch.no_grad():
        given = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        wanted = model(**given).last_hidden_state.numpy()
    found = encoded(base, ids, mask)
    seen = mask.astype(bool)
    assert np.abs(found - wanted)[seen].max() < 5e-5


def test_a_padding_token_inside_a_roberta_sentence_takes_no_position(tmp_path):
    torch = pytest.importorskip("torch")
    model = family_bases.save(tmp_path, "roberta")
    ids = np.array([[0, 7, 1, 9, 1, 2]])
    with torch.no_grad():
        given = {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.ones_like(torch.tensor(ids)),
        }
        wanted = model(**given).last_hidden_state.numpy()
    found = encoded(huggingface.load(str(tmp_path)), ids, np.ones_like(ids))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-5)


def test_padding_has_no_effect_whatever_it_holds(tiny):
    ids = np.array([[2, 8, 9, 3]])
    alone = encoded(tiny, ids, np.ones_like(ids))
    padded = np.concatenate([ids, [[11, 12]]], 1)
    found = encoded(tiny, padded, np.array([[1, 1, 1, 1, 0, 0]]))
    np.testing.assert_allclose(found[:, :4], alone, rtol=0, atol=1e-6)
    seen = encoded(tiny, padded, np.ones_like(padded))
    assert np.abs(seen[:, :4] - alone).max() > 1e-3


def test_every_activation_of_an_encoder_has_an_operator():
    x = np.linspace(-4, 4, 41, dtype=np.float32)
    for name, function in bert.ACTIVATIONS.items():
        graph = Graph()
        y = onnx_graph.activate(graph, name, graph.input("x", onnx.TensorProto.FLOAT, ("n",)))
        graph.output("y", y, ("n",))
        (found,) = InferenceSession(graph.model("x").SerializeToString()).run(None, {"x": x})
        np.testing.assert_allclose(found, function(x), rtol=0, atol=1e-5)


def test_the_cosine_of_a_zero_vector_is_zero():
    graph = Graph()
    pair = [graph.input(name, onnx.TensorProto.FLOAT, ("batch", 2)) for name in "uv"]
    graph.output("cosine", export_onnx._cosine(graph, *pair), ("batch", 1))
    given = {"u": np.array([[0, 0], [3, 4]], np.float32), "v": np.float32([[1, 2], [6, 8]])}
    (found,) = InferenceSession(graph.model("x").SerializeToString()).run(None, given)
    np.testing.assert_allclose(found, [[0], [1]], atol=1e-6)


def test_the_folder_says_what_it_is_and_its_tokenizer_cuts_and_pads(tiny, tmp_path):
    made = trained(tiny, TOPIC)
    export_onnx.save(tmp_path / "out", tiny, made, "topic")
    about = json.loads((tmp_path / "out" / "task.json").read_text())
    assert about["classes"] == ["sport", "a_b_c", "art"] and about["max_length"] == LONGEST
    assert about["inputs"] == ["input_ids", "attention_mask", "token_type_ids"]
    assert about["outputs"] == ["vector", "probabilities"]
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    batch = tokenizer.encode_batch([SENTENCES[0], SENTENCES[1]])
    assert [len(one.ids) for one in batch] == [LONGEST, LONGEST]
    assert sum(batch[0].attention_mask) < LONGEST == sum(batch[1].attention_mask)
    model = onnx.load(tmp_path / "out" / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    shapes = {
        one.name: [d.dim_param or d.dim_value for d in one.type.tensor_type.shape.dim]
        for one in (*model.graph.input, *model.graph.output)
    }
    assert shapes["input_ids"] == ["batch", "length"]
    assert shapes["probabilities"] == ["batch", 3]
    assert shapes["vector"] == ["batch", tiny.config.hidden_size]


def test_vectors_are_those_of_the_predictor(tiny, tmp_path):
    made = trained(tiny, ALIKE, "mean")
    export_onnx.save(tmp_path / "out", tiny, made, "alike")
    predictor = jaxlora.Predictor(tiny, made)
    for found, part in zip(
        outputs(tmp_path / "out", ALIKE), zip(*PAIRS, strict=True), strict=False
    ):
        np.testing.assert_allclose(found, predictor.encode("alike", part), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tree", ["frozen", "full"])
def test_a_task_without_an_adapter(tree, tiny, tmp_path):
    made = trained(tiny, TOPIC)
    moved = jax.tree.map(lambda x: 1.1 * x, tiny.params)
    trees = {"tree": {} if tree == "frozen" else {"params": moved}}
    made = dataclasses.replace(made, trees=trees, configs={})
    export_onnx.save(tmp_path / "out", tiny, made, "topic")
    found = export_onnx_check.run(tmp_path / "out", export_onnx.MODEL, TOPIC, texts(TOPIC))
    wanted = answers(jaxlora.Predictor(tiny, made), TOPIC)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_weights_of_a_large_model_are_in_a_file_beside_it(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(export_onnx, "MOST_IN_ONE_FILE", 1000)
    made = trained(tiny, TOPIC)
    export_onnx.save(tmp_path / "out", tiny, made, "topic", int8=True)
    for file in (export_onnx.MODEL, export_onnx.QUANTIZED):
        assert (tmp_path / "out" / f"{file}.data").stat().st_size > 10_000
        found = export_onnx_check.run(tmp_path / "out", file, TOPIC, texts(TOPIC))
        wanted = answers(jaxlora.Predictor(tiny, made), TOPIC)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=0.1)


def test_8_bits_are_small_and_close(tiny, tmp_path):
    made = trained(tiny, TOPIC)
    export_onnx.save(tmp_path / "out", tiny, made, "topic", int8=True)
    stored = {}
    for file in (export_onnx.MODEL, export_onnx.QUANTIZED):
        graph = onnx.load(tmp_path / "out" / file).graph
        stored[file] = {one.name: one.data_type for one in graph.initializer}
    short = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    integers = {n for n, t in stored[export_onnx.QUANTIZED].items() if t in short}
    wanted = {n for n in stored[export_onnx.MODEL] if n.endswith(("kernel", "embeddings"))}
    named = {re.sub("_quantized$", "", n) for n in integers if not n.endswith("_zero_point")}
    assert named == {n for n in wanted if not n.startswith("head.") and "position" not in n}
    found = export_onnx_check.run(tmp_path / "out", export_onnx.QUANTIZED, TOPIC, texts(TOPIC))
    exact = answers(jaxlora.Predictor(tiny, made), TOPIC)
    assert 1e-5 < np.abs(found - exact).max() < 0.1


def test_what_cannot_be_exported(tiny, tmp_path):
    made = trained(tiny, TOPIC)
    with pytest.raises(UserError, match="no task 'topics'; there are topic; did you mean"):
        export_onnx.save(tmp_path / "out", tiny, made, "topics")
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UserError, match="is not empty; name a new folder"):
        export_onnx.save(tmp_path, tiny, made, "topic")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.fixture(scope="module")
def banked(tiny, tmp_path_factory):
    """A bank with the task, and a labelled table with its predictions."""
    folder = tmp_path_factory.mktemp("banked")
    made = trained(tiny, TOPIC)
    bank.add(folder / "bank", made, ["topic"])
    labels = [answer.label for answer in jaxlora.Predictor(tiny, made)(requests())]
    labels[-1] = next(name for name in TOPIC.classes if name != labels[-1])
    rows = zip(SENTENCES, labels, strict=True)
    table = "sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows)
    (folder / "labelled.tsv").write_text(table)
    return folder


def requests():
    return [("topic", sentence) for sentence in SENTENCES]


def test_the_command_compares_on_a_table(banked, tmp_path, call):
    words = ("export", "onnx", tmp_path / "out", "--bank", banked / "bank", "--task", "topic")
    code, shown = call(*words, "--int8", "--check", banked / "labelled.tsv")
    assert code == 0, shown
    rows = [[c.strip() for c in line.split("│")] for line in shown.splitlines() if "│" in line]
    found = {row[1]: row[2:-1] for row in rows}
    accuracy = 1 - 1 / len(SENTENCES)
    assert found["jaxlora"][0] == found["model.onnx"][0] == f"{accuracy:.4f}"
    assert float(found["model.onnx"][1]) < 1e-5 < float(found["model_quantized.onnx"][1]) < 0.1
    size = (tmp_path / "out" / "model_quantized.onnx").stat().st_size
    assert found["model_quantized.onnx"][2] == f"{size / 1e6:.1f}"


def test_the_command_reads_its_table_as_in_training_or_as_asked(
    banked, tmp_path, call, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    made, seen = bank.load(banked / "bank"), []
    facts = Facts(reading=Reading(None, {"\t": "none"}))
    model = dataclasses.replace(made.models["topic"], facts=facts)
    monkeypatch.setattr(bank, "load", lambda _: dataclasses.replace(made, models={"topic": model}))
    compare = export_onnx_check.compare

    def noting(folder, predictor, name, rows):
        seen.append(rows[0].sentence1)
        return compare(folder, predictor, name, rows)

    monkeypatch.setattr(export_onnx_check, "compare", noting)
    (tmp_path / "x.tsv").write_text('sentence\tlabel\n"a film"\tsport\n')
    words = ("export", "onnx", "--bank", banked / "bank", "--task", "topic")
    code, shown = call(*words, tmp_path / "a", "--check=~/x.tsv")
    assert (code, seen) == (0, ['"a film"'])
    assert "1 labelled row; double quotes are part of the text, as in training\n" in shown
    assert call(*words, tmp_path / "b", "--check=~/x.tsv", "--quoting=standard")[0] == 0
    assert seen[1:] == ["a film"]
    code, shown = call(*words, tmp_path / "c", "--quoting=none")
    assert code == 2 and "--quoting none: is for the table of --check; name one" in shown


def test_the_command_says_what_it_did_not_measure(banked, tmp_path, call):
    words = ("export", "onnx", tmp_path / "out", "--bank", banked / "bank", "--task", "topic")
    code, shown = call(*words, "--int8")
    assert code == 0 and "not checked; --check=labelled.csv does" in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--task", "topics"), "no task 'topics'; there are topic"),
        (("--task", "topic", "--base", "nowhere"), "nowhere"),
        (("--task", "topic", "--check", "nowhere.csv"), "nowhere.csv"),
        (("--task", "topic", "--check", "unlabelled.csv"), "label"),
    ],
)
def test_the_command_refuses(words, said, banked, tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("unlabelled.csv").write_text("sentence,other\nthe dog,1\n")
    code, shown = call("export", "onnx", "out", "--bank", banked / "bank", *words)
    assert code == 2 and said in shown and "Traceback" not in shown
    assert not Path("out").exists()
