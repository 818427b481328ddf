"""Tasks of every kind in one run: trained, stored with their thresholds, served, evaluated."""

import csv
import dataclasses
import json
import random

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny import Silent

import jaxlora
from jaxlora.serving import bank
from jaxlora.tasks.task import Task
from jaxlora.training import run as train
from jaxlora.training.presets import make_settings
from jaxlora.utils.errors import UserError

oracle = pytest.importorskip("sklearn.metrics")
WORDS = {"bug": "film", "login": "dog", "pay": "cat"}
TASKS = """
[tags]
text = "text"
label = "tags"
label_delimiter = ";"
train = "train.csv"
[marks]
text = "text"
label = ["bug", "login", "pay"]
train = "train.csv"
test = "test.csv"
metric = "macro_f1"
[spam]
text = "text"
label = "spam"
train = "train.csv"
threshold = "dev"
class_weights = "balanced"
metric = "balanced_accuracy"
[stars]
text = "text"
label = "stars"
kind = "ordinal"
train = "train.csv"
class_weights = { 1 = 2.0 }
[price]
text = "text"
label = "price"
train = "train.csv"
metric = "rmse"
"""


def write_table(path, rows, seed):
    """A word for each class of a set; a tenth of the rows has none."""
    rng = random.Random(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "tags", *WORDS, "spam", "stars", "price"])
        for n in range(rows):
            found = [name for name in WORDS if rng.random() < 0.5]
            text = " ".join(["the", *(WORDS[name] for name in found), "runs", *"in " * (n % 3)])
            marks = [int(name in found) for name in WORDS]
            stars, spam = 1 + sum(marks), "yes" if len(found) > 2 else "no"
            writer.writerow([f"{text} {n}", ";".join(found), *marks, spam, stars, stars / 4])


@pytest.fixture(scope="module")
def made(tiny_base, tmp_path_factory):
    """The folder of a run of tasks of all kinds, and its result."""
    folder = tmp_path_factory.mktemp("kinds")
    write_table(folder / "train.csv", 90, 1)
    write_table(folder / "test.csv", 30, 2)
    (folder / "tasks.toml").write_text(TASKS)
    settings = make_settings(
        "baseline1", tasks=(str(folder / "tasks.toml"),), base=str(tiny_base), batch_size=16,
        max_steps=60, max_length=32, head_learning_rate=0.02,
    )  # fmt: skip
    return folder, train.run(settings, folder / "run", Silent())


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def as_sets(cells, mark, size=3):
    out = np.zeros((len(cells), size))
    for row, cell in zip(out, cells, strict=True):
        row[[int(part) for part in cell.split(mark)] if cell else []] = 1
    return out


def test_scores_are_scikit_learns_of_the_written_predictions(made):
    folder, result = made
    rows = {
        name: read(folder / "run" / "predictions" / f"{name}-dev.csv") for name in result["dev"]
    }
    x, y = ({n: [r[c] for r in part] for n, part in rows.items()} for c in ("prediction", "label"))
    for name, mark, average in (("tags", ";", "micro"), ("marks", "|", "macro")):
        found, truth = as_sets(x[name], mark), as_sets(y[name], mark)
        expected = oracle.f1_score(truth, found, average=average, zero_division=0)
        assert result["dev"][name] == pytest.approx(expected)
        assert result["dev"][name] > 0.6  # a word for each class: learnt, not guessed
    numbers = {
        n: (np.array(y[n], float), np.array(x[n], float)) for n in ("spam", "stars", "price")
    }
    wanted = {
        "spam": oracle.balanced_accuracy_score(*numbers["spam"]),
        "stars": oracle.mean_absolute_error(*numbers["stars"]),
        "price": oracle.root_mean_squared_error(*numbers["price"]),
    }
    for name, value in wanted.items():
        assert result["dev"][name] == pytest.approx(value, abs=1e-4)
    assert 0 < result["test"]["marks"] <= 1


def test_errors_are_kept_at_their_lowest(made):
    """A metric of which less is better: the step that is kept has the least of all evaluations."""
    folder, result = made
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    for name in ("stars", "price"):
        seen = [
            record["dev"][name]
            for record in map(json.loads, lines)
            if record["kind"] == "eval" and record["group"] == name
        ]
        assert len(set(seen)) > 1 and result["dev"][name] == min(seen)


def test_what_was_chosen_on_dev_is_stored_with_the_task(made):
    folder, _ = made
    tasks = jaxlora.load(folder / "run").tasks
    assert len(tasks["tags"].thresholds) == len(tasks["marks"].thresholds) == 3
    assert len(tasks["spam"].thresholds) == 1 and not tasks["stars"].thresholds
    assert all(0 < one < 1 for one in tasks["tags"].thresholds)
    labels = [row["label"] for row in read(folder / "run" / "predictions" / "spam-dev.csv")]
    share = labels.count("1") / len(labels)  # of dev, which is stratified as the training rows
    lone, many = 1 / (2 * (1 - share)), 1 / (2 * share)
    np.testing.assert_allclose(tasks["spam"].class_weights, (lone, many), rtol=0.2)
    assert tasks["stars"].class_weights == (2.0, 1.0, 1.0, 1.0)


def test_answers_and_tables_of_sets(made, call):
    folder, _ = made
    predictor = jaxlora.load(folder / "run")
    asked = ["the film runs", "the dog and the cat", "in the"]
    found = predictor([("tags", text) for text in asked])
    sets = predictor.predict("tags", asked)
    assert sets.shape == (3, 3) and predictor.predict("tags", []).shape == (0, 3)
    task = predictor.tasks["tags"]
    for answer, row in zip(found, sets, strict=True):
        assert answer.value == tuple(np.flatnonzero(row))
        assert answer.label == tuple(task.classes[n] for n in answer.value)
        p = np.array([answer.probabilities[name] for name in task.classes])
        np.testing.assert_array_equal(p > task.thresholds, row > 0)
    (folder / "asked.csv").write_text("\n".join(["text", *asked]) + "\n")
    for suffix in ("csv", "jsonl", "parquet"):
        flags = ("--task", "tags", "--input", folder / "asked.csv")
        code, shown = call("predict", "--bank", folder / "run", *flags,
                           "--output", folder / f"out.{suffix}")  # fmt: skip
        assert code == 0, shown
    for row, answer in zip(read(folder / "out.csv"), found, strict=True):
        assert row["label"] == ";".join(answer.label)
        assert row["prediction"] == row["probability"] == ""
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == [";".join(answer.label) for answer in found]
    assert [line["probabilities"] for line in lines] == [a.probabilities for a in found]
    columns = pq.read_table(folder / "out.parquet").to_pydict()
    for labels in ([line["labels"] for line in lines], columns["labels"]):
        assert labels == [list(answer.label) for answer in found]


@pytest.mark.parametrize("name", ["tags", "marks"])
def test_an_evaluation_of_sets(made, call, name):
    folder, result = made
    flags = ("--task", name, "--input", folder / "test.csv", "--json")
    code, shown = call("evaluate", folder / "run", *flags)
    assert code == 0, shown
    found = json.loads(shown)
    rows = read(folder / "test.csv")
    truth = np.array([[int(row[name]) for name in WORDS] for row in rows])
    predictor = jaxlora.load(folder / "run")
    guess = predictor.predict(name, [row["text"] for row in rows])
    expected = oracle.precision_recall_fscore_support(truth, guess, zero_division=0)
    table = [list(row.values())[1:] for row in found["classes"]]
    np.testing.assert_allclose(np.array(table).T, expected)
    average = oracle.f1_score(truth, guess, average="micro", zero_division=0)
    assert found["scores"]["micro F1"]["value"] == pytest.approx(average)
    if name == "marks":
        assert found["scores"]["macro F1"]["value"] == pytest.approx(result["test"]["marks"])
    assert found["confusion"] == [] and found["best_threshold"] is None
    assert list(found["thresholds"].values()) == list(predictor.tasks[name].thresholds)
    assert len(found["mistakes"]) == min(20, (truth != guess).any(-1).sum())
    for one in found["mistakes"]:
        assert one["label"] == [name for name in WORDS if int(rows[one["line"] - 2][name])]
    code, shown = call("evaluate", folder / "run", *flags[:-1], "--page", folder / "page.html")
    assert code == 0 and "thresholds that it decides with: bug" in shown
    assert "Thresholds" in (folder / "page.html").read_text()


def test_a_bank_keeps_thresholds_through_update_and_rollback(made, tmp_path, call):
    folder, _ = made
    assert call("bank", "add", tmp_path / "b", "--run", folder / "run")[0] == 0
    before = jaxlora.load(tmp_path / "b").tasks["tags"]
    source = bank.load(folder / "run")
    model = source.models["tags"]
    other = dataclasses.replace(model.task, thresholds=(0.1, 0.2, 0.3))
    changed = dataclasses.replace(
        source, models={**source.models, "tags": dataclasses.replace(model, task=other)}
    )
    (change,) = bank.add(tmp_path / "b", changed, ["tags"], replace=True)
    assert change.made and jaxlora.load(tmp_path / "b").tasks["tags"] == other
    bank.rollback(tmp_path / "b", "tags")
    assert jaxlora.load(tmp_path / "b").tasks["tags"] == before
    assert bank.verify(tmp_path / "b") == []


def test_an_update_of_an_error_is_better_if_it_is_less(made, tmp_path):
    folder, result = made
    source = bank.load(folder / "run")
    bank.add(tmp_path / "b", source, ["price"])
    model = source.models["price"]

    def scored(value):
        facts = dataclasses.replace(model.facts, dev={"rmse": value})
        models = {**source.models, "price": dataclasses.replace(model, facts=facts)}
        return dataclasses.replace(source, models=models)

    error = result["dev"]["price"]
    for value, better in ((error + 1, False), (error / 2, True)):
        (change,) = bank.add(tmp_path / "b", scored(value), ["price"], replace=True, if_better=True)
        assert change.made == change.better == better


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('label_delimiter = ";"', 'label_delimiter = "+"', "'+' never occurs; name the"),
        ('label_delimiter = ";"', 'label_delimiter = ""', "cannot separate names"),
        ('label_delimiter = ";"', 'label_delimiter = ";"\nclasses = ["bug", "pay"]',
         "'login' in "),
        ('label_delimiter = ";"',
         'label_delimiter = ";"\nclasses = ["bug", "login", "pay", "none"]',
         "no training row has the label none"),
        ('label_delimiter = ";"', 'label_delimiter = ";"\nkind = "binary"',
         "label_delimiter: goes with multilabel, not with binary"),
        ('"bug", "login", "pay"]', '"bug", "stars"]', "column 'stars' has '"),
        ('"bug", "login", "pay"]', '"bug"]', "two and more columns of 0 and 1"),
        ('"bug", "login", "pay"]', '"bug", "gone"]', "no column gone"),
        ('"bug", "login", "pay"]', '"bug", "login"]\nclasses = ["bug", "pay"]',
         "classes: are the columns of the labels"),
        ('"bug", "login", "pay"]', '"bug", "login"]\nkind = "ordinal"', "several columns go with"),
        ('threshold = "dev"', "threshold = 1.5", "threshold: must be"),
        ('threshold = "dev"', 'threshold = "test"', "threshold: must be 'dev'"),
        ('"balanced"', "{ maybe = 2.0 }", "class_weights: 'maybe' is not one of no, yes"),
        ('"balanced"', "{ no = 0.0 }", "class_weights.no: must be greater than 0"),
        ('metric = "rmse"', "threshold = 0.3", "threshold: regression has none"),
        ('metric = "rmse"', 'class_weights = "balanced"', "regression has no single class"),
    ],
)  # fmt: skip
def test_mistakes_are_named(made, tmp_path, tiny, old, new, message):
    from jaxlora.training import inputs

    folder, _ = made
    assert old in TASKS
    (tmp_path / "train.csv").write_bytes((folder / "train.csv").read_bytes())
    (tmp_path / "test.csv").write_bytes((folder / "test.csv").read_bytes())
    (tmp_path / "tasks.toml").write_text(TASKS.replace(old, new, 1))
    with pytest.raises(UserError) as caught:
        inputs.load_data(make_settings(tasks=(str(tmp_path / "tasks.toml"),)), tiny)
    assert message in str(caught.value), str(caught.value)


def test_a_table_alone_and_its_draft(made, tmp_path, call, tiny_base):
    """`init` writes what `train` understands, of one column and of several."""
    from jaxlora.data.task_files import read_tasks

    folder, _ = made
    (spec,) = read_tasks([str(folder / "train.csv")], "text", "bug,login,pay")
    assert spec.task == Task("train", "multilabel", classes=("bug", "login", "pay"))
    lines = (folder / "train.csv").read_text().replace(";", "|")
    (tmp_path / "t.csv").write_text(lines)
    for n, label in enumerate(("tags", "bug,login,pay")):
        target = tmp_path / f"{n}.toml"
        code, shown = call("init", tmp_path / "t.csv", "--text", "text", "--label", label,
                           "--output", target, "--base", tiny_base)  # fmt: skip
        assert code == 0 and "multilabel" in shown, shown
        (drafted,) = read_tasks([str(target)])
        (found,) = read_tasks([str(tmp_path / "t.csv")], "text", label)
        assert (drafted.task, drafted.table) == (found.task, found.table)
