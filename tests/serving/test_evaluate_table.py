"""An evaluation of a table: what is read, what is left out, and what the page says."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxlora.cli.evaluate import show
from jaxlora.data.delimited import Reading
from jaxlora.data.raw_examples import TextExample
from jaxlora.data.table_formats import open_sheets
from jaxlora.data.tables import Columns, Table, read_splits
from jaxlora.serving import evaluate_table
from jaxlora.serving.evaluate_table import Labelled, choose_columns, read_table, report, to_json
from jaxlora.serving.evaluation_page import page
from jaxlora.serving.predictor import Answer
from jaxlora.serving.task_models import Facts, TaskModel
from jaxlora.tasks.evaluation import Evaluation
from jaxlora.tasks.task import Task
from jaxlora.utils.errors import UserError

TASK = Task("t", "binary", classes=("no", "<yes>"))
PRICE = Task("p", "regression", pair=True, low=0.0, high=10.0)


def write(tmp_path, *lines):
    path = tmp_path / "x.csv"
    path.write_text("\n".join(lines))
    return path


def read_labelled(task, path, columns):
    return evaluate_table.read_labelled(task, open_sheets({"": path})[""], columns)


class Parrot:
    """Answers with the class that a sentence names, at the probability that it says."""

    def task(self, name):
        return TASK

    def __call__(self, requests, truncated):
        answers = []
        for _, sentence in requests:
            word, sure = sentence.split()
            number = TASK.classes.index(word)
            probabilities = {name: 1 - float(sure) for name in TASK.classes} | {word: float(sure)}
            answers.append(Answer("t", number, word, probabilities))
        return answers


def test_each_row_is_scored_with_its_own_label(tmp_path):
    path = write(
        tmp_path, "text,label", "no 0.9,no", "<yes> 0.8,no", "<yes> 0.7,<yes>", " ,no", "no 0.6,",
        "no 0.6,<yes>",
    )  # fmt: skip
    labelled = read_labelled(TASK, path, Columns(("text",), "label"))
    assert (len(labelled.rows), labelled.unlabelled, labelled.blank) == (4, 1, 1)
    found = evaluate_table.evaluate(Parrot(), "t", labelled.rows)
    assert found.labels.tolist() == [0, 0, 1, 1] and found.predictions.tolist() == [0, 1, 1, 0]
    assert found.confidence.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6])
    told = report(found, path, labelled, resamples=20)
    assert told.confusion == [[1, 1], [1, 1]] and told.scores["accuracy"].value == 0.5
    assert [(m.line, m.label, m.prediction) for m in told.mistakes] == [
        (3, "no", "<yes>"), (7, "<yes>", "no"),
    ]  # fmt: skip
    plain = json.loads(json.dumps(to_json(told)))
    assert plain["scores"]["accuracy"].keys() == {"value", "low", "high"}
    assert plain["mistakes"][0]["texts"] == ["<yes> 0.8"]


def test_columns_are_those_of_training_or_usual_ones():
    known = Columns(("subject",), "topic")
    assert choose_columns(known, ["id", "subject", "topic"]) == known
    assert choose_columns(known, ["text", "label"]) == Columns(("text",), "label")
    assert choose_columns(known, ["subject", "label"]) == Columns(("subject",), "label")
    pair = ["sentence1", "sentence2", "label"]
    assert choose_columns(None, pair) == Columns(("sentence1", "sentence2"), "label")
    assert choose_columns(known, ["a", "b", "c"], "a,b", "c") == Columns(("a", "b"), "c")
    assert choose_columns(known, ["a", "b"]).label == "topic"  # is asked for
    assert choose_columns(None, ["a", "label"]) == Columns(("sentence1",), "label")  # is asked for


def test_tables_that_cannot_be_scored(tmp_path):
    path = write(tmp_path, "text,label", " ,no", "no,")
    with pytest.raises(UserError, match=r"x\.csv: no row has both a text and a label"):
        read_labelled(TASK, path, Columns(("text",), "label"))
    with pytest.raises(UserError, match=r"p reads two texts: name their columns .*taken: text"):
        read_labelled(PRICE, path, Columns(("text",), "label"))
    with pytest.raises(UserError, match=r"no column lable \(did you mean 'label'"):
        read_labelled(TASK, path, Columns(("text",), "lable"))
    with pytest.raises(UserError, match=r"`against`: its t has classes \('a', 'b'\)"):
        evaluate_table.check_same(TASK, Task("t", "binary", classes=("a", "b")))


# The dev file alone would count as quoted; with the training file, quotes are part of the text.
TRAIN = 'text\tlabel\n"Hello, he said.\t<yes>\nNo.\tno\n'
DEV = 'text\tlabel\n"Great."\t<yes>\n"Bad."\tno\n'
AS_TEXT, ENCLOSING = ['"Great."', '"Bad."'], ["Great.", "Bad."]


def trained_on(folder, train, dev, suffix=".tsv", **more):
    """A task as if it had been trained on two tables; also its dev rows, as training reads them."""
    paths = [folder / f"{name}{suffix}" for name in ("train", "dev")]
    for path, content in zip(paths, (train, dev), strict=True):
        path.write_text(content)
    table = Table(Columns(("text",), "label"), *map(str, paths), **more)
    facts = Facts(columns=table.columns, reading=table.reading())
    return TaskModel(TASK, "t", {}, "concat", facts), paths[1], read_splits(TASK, table)["dev"]


def texts(labelled):
    return [row.sentence1 for row in labelled.rows]


@pytest.mark.parametrize(
    ("train", "dev", "known"),
    [
        (TRAIN, DEV, {"\t": "none"}),
        (DEV, DEV, {"\t": "standard"}),
        (TRAIN.replace('"', ""), TRAIN.replace('"', ""), {}),
    ],
)
def test_a_table_is_read_as_in_training(tmp_path, train, dev, known):
    model, path, rows = trained_on(tmp_path, train, dev)
    assert model.facts.reading == Reading(None, known)
    assert read_table(model, path).rows == rows


def test_quotes_in_a_table_mean_what_they_meant_in_training_or_what_is_asked(tmp_path):
    model, path, _ = trained_on(tmp_path, TRAIN, DEV)
    found = read_table(model, path)
    assert (texts(found), found.notes) == (
        AS_TEXT, ("double quotes are part of the text, as in training",),
    )  # fmt: skip
    assert texts(read_table(model, path, quoting="standard")) == ENCLOSING
    model, path, _ = trained_on(tmp_path, DEV, DEV)
    found = read_table(model, path)
    assert (texts(found), found.notes) == (
        ENCLOSING, ("double quotes enclose fields, as in training",),
    )  # fmt: skip
    assert texts(read_table(model, path, quoting="none")) == AS_TEXT
    unknown = dataclasses.replace(model, facts=Facts())  # as in banks written before
    found = read_table(unknown, path)
    assert (texts(found), found.notes) == (
        ENCLOSING, ("2 fields are in double quotes, as in standard CSV",),
    )  # fmt: skip


def test_quotes_are_detected_where_training_shows_nothing(tmp_path):
    model, _, _ = trained_on(tmp_path, TRAIN, DEV)
    path = write(tmp_path, "text,label", '"a, b",no')
    assert texts(read_table(model, path)) == ["a, b"]  # another delimiter
    plain, _, _ = trained_on(tmp_path, TRAIN.replace('"', ""), "text\tlabel\na\tno\n")
    (tmp_path / "open.tsv").write_text(TRAIN)
    found = read_table(plain, tmp_path / "open.tsv")
    assert texts(found) == ['"Hello, he said.', "No."]
    assert found.notes == ("double quotes are part of the text (line 2 opens one only)",)
    (tmp_path / "x.jsonl").write_text('{"text": "\\"Great.\\"", "label": "no"}\n')
    assert texts(read_table(model, tmp_path / "x.jsonl")) == ['"Great."']


@pytest.mark.parametrize("delimiter", ["^", ";"])
def test_a_delimiter_of_the_task_file_is_used(tmp_path, delimiter):
    train = f'text{delimiter}label{delimiter}a, b, c\n"A{delimiter}no{delimiter}\n'
    train += f"B{delimiter}<yes>{delimiter}\n"
    model, path, rows = trained_on(
        tmp_path, train, train, ".txt", delimiter=delimiter, quoting="none"
    )
    assert model.facts.reading == Reading(delimiter, {delimiter: "none"})
    assert read_table(model, path).rows == rows
    (tmp_path / "x.tsv").write_text(DEV)  # it is not in this header
    assert texts(read_table(model, tmp_path / "x.tsv")) == ENCLOSING


def test_a_table_in_the_home_folder_is_read(tmp_path, monkeypatch):
    model, _, rows = trained_on(tmp_path, TRAIN, DEV)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_table(model, Path("~/dev.tsv")).rows == rows


def test_rows_of_typed_tables_are_called_rows(tmp_path, capsys):
    model, path, _ = trained_on(tmp_path, TRAIN, DEV)
    typed = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["no 0.9", "<yes> 0.8"], "label": ["no", "no"]}), typed)
    for source, unit in ((typed, "row"), (path, "line")):
        labelled = read_table(model, source)
        found = Evaluation(TASK, np.ones(2), np.zeros(2), np.full((2, 2), 0.5))
        told = report(found, source, labelled, resamples=5)
        assert (told.unit, to_json(told)["unit"]) == (unit, unit)
        show(told)
        shown = capsys.readouterr().out
        assert f"\n{unit} {told.mistakes[0].line}: " in shown
        assert f"\n{'row' if unit == 'line' else 'line'} " not in shown
        text = page([(told, found)])
        assert [unit, "text", "label", "prediction", "confidence"] in read(text).rows
        assert ("as in training" in text) == (unit == "line")
        assert list(to_json(told)["notes"]) == list(labelled.notes)


class Structure(HTMLParser):
    """Checks that elements are closed in order; collects what they hold, and rows of cells."""

    VOID = ("meta", "link", "path", "line", "circle")

    def __init__(self):
        super().__init__()
        self.open, self.told, self.sources, self.tags, self.rows = [], [], [], set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert tag in self.VOID or self.open.pop() == tag

    def handle_data(self, data):
        self.told.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def read(text):
    assert text.startswith("<!doctype html>")
    seen = Structure()
    seen.feed(text)
    assert seen.open == []
    return seen


@pytest.mark.parametrize("task", [TASK, PRICE])
def test_the_page_needs_nothing_else_and_shows_texts_as_they_are(tmp_path, task):
    evil = "<script>alert(1)</script>&amp;"
    path = write(tmp_path, "a,b,label", *[f"{evil},{evil},{n % 2}" for n in range(6)])
    columns = Columns(("a", "b")[: 1 + task.pair], "label")
    labelled = read_labelled(task, path, columns)
    task = dataclasses.replace(task, title=evil)
    probabilities = np.tile([0.3, 0.7], (6, 1)) if task.classes else None
    found = Evaluation(task, np.ones(6), np.arange(6.0) % 2, probabilities)
    text = page([(report(found, path, labelled, (evil, found), resamples=5), found)])
    seen = read(text)
    assert "script" not in seen.tags and set(seen.sources) == {"data:,"} and "url(" not in text
    told = "".join(seen.told)
    assert " ‖ ".join([evil] * (1 + task.pair)) in told
    assert f"minus {evil}" in told and told.count(evil) >= 2 + 3 * (1 + task.pair)
    assert "<yes>" in told or not task.classes
    assert "NaN" not in text and not re.search(r"\bnan\b", text)


def four(values):
    return [f"{value:.4f}" for value in values]


def test_the_numbers_of_the_page_are_those_of_the_json():
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=50).astype(float)
    sure = np.clip(0.5 * labels + 0.5 * rng.random(50), 0, 1)
    found = Evaluation(TASK, (sure > 0.6).astype(float), labels, np.stack([1 - sure, sure], 1))
    rows = [TextExample(f"i{n}", f"text {n}", "", label, n + 2) for n, label in enumerate(labels)]
    told = report(found, "x.csv", Labelled(rows, 0, 0), resamples=20)
    plain, seen = to_json(told), read(page([(told, found)]))
    for name, one in plain["scores"].items():
        value, low, high = four(one.values())
        assert [name, value, f"{low}\u00a0to\u00a0{high}"] in seen.rows
    for one, counts in zip(plain["classes"], plain["confusion"], strict=True):
        name, *shares, support = one.values()
        assert [name, *four(shares), str(support)] in seen.rows
        assert [name, *map(str, counts)] in seen.rows
    for one in plain["mistakes"]:
        confidence = f"{one['confidence']:.4f}"
        row = [str(one["line"]), *one["texts"], one["label"], one["prediction"], confidence]
        assert row in seen.rows
    assert plain["mistakes"] and f"calibration error {plain['calibration_error']:.4f}" in "".join(
        seen.told
    )
    assert four([plain["best_threshold"], plain["best_f1"]]) in seen.rows


def test_a_page_of_several_tasks_has_a_section_for_each():
    parts = []
    for task in (TASK, PRICE):
        probabilities = np.full((3, 2), 0.5) if task.classes else None
        found = Evaluation(task, np.ones(3), np.zeros(3), probabilities)
        rows = [TextExample(f"id of {task.name}", "a", "", 0.0)] * 3
        parts.append((report(found, "the dev set", Labelled(rows, 0, 0), resamples=5), found))
    seen = read(page(parts, "a run"))
    assert [one for one in seen.sources if one[0] == "#"] == ["#task-1", "#task-2"]
    assert ["id", "text", "label", "prediction", "confidence"] in seen.rows
    assert ["id", "text", "label", "prediction"] in seen.rows  # scores have no confidence
    assert ["id of t", "a", "no", "<yes>", "0.5000"] in seen.rows
    assert ["id of p", "a", "0", "1"] in seen.rows


def test_marks_lie_within_the_plot_and_axes_have_a_middle():
    found = Evaluation(TASK, np.ones(4), np.ones(4), np.tile([0.0, 1.0], (4, 1)))
    text = page([(report(found, "x", Labelled([None] * 4, 0, 0), resamples=5), found)])
    left, top, width, _ = map(float, re.search(r'viewBox="(.*?)"', text)[1].split())
    ((x, y, r),) = re.findall(r'cx="(.*?)" cy="(.*?)" r="(.*?)"', text)
    assert float(y) - float(r) > top and float(x) + float(r) < left + width
    assert re.findall(r">([\d.]+)</text>", text) == ["0", "0", "0.5", "0.5", "1", "1"]


def test_labels_of_the_report_are_checked_against_the_other_model():
    rows = Labelled([], 0, 0)
    found = Evaluation(TASK, np.ones(2), np.ones(2), np.full((2, 2), 0.5))
    other = Evaluation(TASK, np.ones(2), np.zeros(2), np.full((2, 2), 0.5))
    with pytest.raises(ValueError, match="labels"):
        report(found, "x", rows, ("other", other), resamples=5)
