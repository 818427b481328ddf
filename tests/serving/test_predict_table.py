"""Tables of requests in every format, with the columns of training; answers in every format."""

import csv
import dataclasses
import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxlora.cli import main
from jaxlora.data.delimited import Reading
from jaxlora.data.tables import Columns
from jaxlora.serving.predict_table import predict_file
from jaxlora.serving.predictor import Answer, Predictor
from jaxlora.serving.task_models import Facts
from jaxlora.utils import process
from jaxlora.utils.errors import UserError
from tests.fuzz.samples import trained as sample


class Counting(Predictor):
    """Answers with the number of letters of the texts, without computing anything."""

    def __call__(self, requests, truncated):
        return [self._answer(*request) for request in requests]

    def _answer(self, name, *texts):
        task, size = self.task(name), sum(map(len, texts))
        if not task.classes:
            return Answer(name, float(size), None, None)
        chosen = size % len(task.classes)
        rest = 0.25 / (len(task.classes) - 1)
        chances = {c: 0.75 if n == chosen else rest for n, c in enumerate(task.classes)}
        return Answer(name, float(chosen), task.classes[chosen], chances)


def predictor(tiny, columns, only=(), reading=None):
    """Give tasks of a sample the columns that they were trained on, and how these were read."""
    trained = sample(Path(tiny.name))
    models = {
        name: dataclasses.replace(
            model, facts=Facts(columns=columns.get(name), reading=(reading or {}).get(name))
        )
        for name, model in trained.models.items()
        if not only or name in only
    }
    return Counting(tiny, dataclasses.replace(trained, models=models))


ROWS = [("a", 'A "dog", 1', "4"), ("b", "line\nbreak 🙂", ""), ("c", " ", "0")]
HEADLINE = {"sst": Columns(("headline",), "topic", "key")}


def _csv(header, rows, delimiter=","):
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter).writerows([header, *rows])
    return text.getvalue().encode()


def _lines(header, rows):
    return "".join(json.dumps(dict(zip(header, row, strict=True))) + "\n" for row in rows).encode()


def _parquet(header, rows):
    file = io.BytesIO()
    columns = {name: [row[n] for row in rows] for n, name in enumerate(header)}
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


MAKERS = {"csv": _csv, "jsonl": _lines, "parquet": _parquet}
READERS = {
    "csv": lambda content: list(csv.DictReader(io.StringIO(content.decode(), newline=""))),
    "tsv": lambda content: list(
        csv.DictReader(io.StringIO(content.decode(), newline=""), delimiter="\t")
    ),
    "jsonl": lambda content: list(map(json.loads, content.splitlines())),
    "parquet": lambda content: [
        {**row, "probabilities": row["probabilities"] and dict(row["probabilities"])}
        for row in pq.read_table(io.BytesIO(content)).to_pylist()
    ],
}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [("csv", "parquet"), ("csv.gz", "jsonl"), ("jsonl", "csv.gz"), ("jsonl.gz", "tsv"),
     ("parquet", "jsonl.gz"), ("parquet", "parquet"), ("csv", "tsv.gz")],
)  # fmt: skip
def test_the_table_that_a_task_came_from_is_predicted(tiny, tmp_path, given, wanted):
    header = ("key", "headline", "topic")
    content = MAKERS[given.removesuffix(".gz")](header, ROWS)
    source, target = tmp_path / f"big.{given}", tmp_path / f"out.{wanted}"
    source.write_bytes(gzip.compress(content) if given.endswith(".gz") else content)
    asked = predictor(tiny, HEADLINE, only=("sst",))
    assert predict_file(asked, source, target, None) == 3
    written = target.read_bytes()
    if wanted.endswith(".gz"):
        written = gzip.decompress(written)
    rows = READERS[wanted.removesuffix(".gz")](written)
    assert [row["id"] for row in rows] == ["a", "b", "c"]
    assert [row["task"] for row in rows] == ["sst"] * 3
    assert [row["label"] or "" for row in rows] == ["0", "2", ""]
    assert [row["reason"] for row in rows] == ["", "", "headline blank"]
    shown = [-1 if row["prediction"] in (None, "") else float(row["prediction"]) for row in rows]
    assert shown == [0, 2, -1]
    assert float(rows[0]["probability"]) == 0.75
    if "probabilities" in rows[0]:
        assert rows[1]["probabilities"] == {
            "0": 0.0625, "1": 0.0625, "2": 0.75, "3": 0.0625, "4": 0.0625,
        }  # fmt: skip
        assert rows[2]["probabilities"] is None
    assert ("probabilities" in rows[0]) == (not wanted.startswith(("csv", "tsv")))


def answers(asked, source, task=None, **more):
    target = source.with_name("answers.jsonl")
    predict_file(asked, source, target, task, **more)
    return list(map(json.loads, target.read_text().splitlines()))


def test_rows_of_several_tasks_have_their_own_columns(tiny, tmp_path):
    columns = HEADLINE | {"para": Columns(("first", "second"), "same")}
    source = tmp_path / "in.csv"
    header = ("task", "headline", "first", "second", "sentence1", "sentence2", "id")
    rows = [("sst", "four", "", "", "x", "", "r0"), ("para", "", "one", "four", "x", "", "r1"),
            ("sts", "y", "y", "y", "ab", "cde", "r2")]  # fmt: skip
    source.write_bytes(_csv(header, rows))
    found = answers(predictor(tiny, columns), source)
    assert [(row["id"], row["prediction"]) for row in found] == [("r0", 4), ("r1", 1), ("r2", 5.0)]
    short = tmp_path / "short.csv"
    short.write_bytes(_csv(("task", "headline"), [("sst", "four"), ("para", "four")]))
    with pytest.raises(UserError, match=r"short\.csv:3: para needs the column first, second"):
        answers(predictor(tiny, columns), short)


NONE, STANDARD = (Reading(None, {"\t": quoting}) for quoting in ("none", "standard"))


@pytest.mark.parametrize(
    ("reading", "options", "size", "as_in_training"),
    [
        ({"sst": NONE}, {"task": "sst"}, 3, True),
        ({"sst": NONE}, {"task": "sst", "quoting": "standard"}, 1, False),
        ({"sst": STANDARD}, {"task": "sst"}, 1, True),
        ({"sst": STANDARD}, {"task": "sst", "quoting": "none"}, 3, False),
        ({"para": NONE}, {"task": "sst"}, 1, False),
        ({}, {"task": "sst"}, 1, False),
        (dict.fromkeys(("sst", "para", "sts"), NONE), {}, 3, True),
        ({"sst": NONE, "para": NONE, "sts": STANDARD}, {}, 1, False),
    ],
)
def test_quotes_of_requests_mean_what_they_meant_in_training(
    tiny, tmp_path, reading, options, size, as_in_training
):
    source, notes = tmp_path / "in.tsv", []
    source.write_text('task\tsentence\nsst\t"a"\n')
    asked = predictor(tiny, {}, reading=reading)
    assert answers(asked, source, note=notes.append, **options)[0]["prediction"] == size
    assert ("as in training" in "".join(notes)) == as_in_training


def test_requests_have_the_delimiter_of_the_task_file(tiny, tmp_path):
    source = tmp_path / "in.txt"
    source.write_text("id^a, b^sentence\n1^x, y^four\n")
    asked = predictor(tiny, {}, reading={"sst": Reading("^")})
    assert answers(asked, source, "sst")[0]["prediction"] == 4
    one = tmp_path / "one.csv"  # a single column, in which no delimiter occurs
    one.write_text('sentence\n"a, b"\n')
    asked = predictor(tiny, {}, reading={"sst": Reading("\t", {"\t": "none"})})
    assert answers(asked, one, "sst")[0]["prediction"] == 4


def test_columns_of_text_can_be_named(tiny, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(_lines(("headline", "body", "other"), [("a", "abc", "abcd")]))
    asked = predictor(tiny, HEADLINE)
    assert answers(asked, source, "sst")[0]["prediction"] == 1
    assert answers(asked, source, "sst", text="body")[0]["prediction"] == 3
    assert answers(asked, source, "para", text="body,other")[0]["prediction"] == 1
    with pytest.raises(UserError, match=r"no column boddy \(did you mean 'body'\?\)"):
        answers(asked, source, "sst", text="boddy")
    with pytest.raises(
        UserError,
        match=r"in\.jsonl.*no column task; .*needs objects with the keys.* the task with `task`",
    ):
        answers(asked, source)


def test_a_table_of_training_without_its_columns_names_them(tiny, tmp_path):
    source = tmp_path / "in.csv"
    source.write_bytes(_csv(("headlines",), [("a",)]))
    with pytest.raises(
        UserError,
        match=r"no column headline \(did you mean 'headlines'\?\).* Name other texts with `text`",
    ):
        answers(predictor(tiny, HEADLINE), source, "sst")


@pytest.mark.parametrize("name", ["o.xlsx", "o", "o.parquet.gz"])
def test_a_format_that_cannot_be_written_is_refused_before_anything_is_read(tiny, tmp_path, name):
    with pytest.raises(
        UserError, match=r"`output` .*: end the name with \.parquet, or with one of \.csv"
    ):
        predict_file(predictor(tiny, {}), tmp_path / "missing.csv", tmp_path / name, "sst")


def test_the_command_prints_one_answer_as_json(tiny, monkeypatch, capsys):
    monkeypatch.setattr(Predictor, "load", lambda *_, **__: predictor(tiny, {}))
    monkeypatch.setattr(process, "reuse_memory", lambda: True)
    monkeypatch.setattr(process, "keep_programs", lambda folder: None)
    assert main.main(["predict", "--bank=x", "--task=sst", "four", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["task"], found["prediction"], found["label"]) == ("sst", 4, "4")
    assert found["probability"] == found["probabilities"]["4"] == 0.75
    assert main.main(["predict", "--bank=x", "--task=sts", "ab", "cde", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "task": "sts", "prediction": 5.0, "label": None, "labels": None, "probability": None,
        "probabilities": None,
    }  # fmt: skip
    words = ["predict", "--bank=x", "--input=a.csv", "--output=b.csv", "--json"]
    assert main.main(words) == 2
    assert "--json: is for one example" in capsys.readouterr().err
