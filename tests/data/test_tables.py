"""Tables as people have them: quotes, labels, blank texts, and files that are something else."""

import bz2
import csv
import gzip
import io
import json
import lzma
import math
import os
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tiny import Silent

from jaxlora.cli import main
from jaxlora.data import cs224n, sources, tables, tokenized
from jaxlora.data.raw_examples import is_blank, parse_label
from jaxlora.data.table_formats import open_sheets
from jaxlora.data.task_files import read_tasks
from jaxlora.serving.predict_table import predict_file
from jaxlora.serving.predictor import Predictor
from jaxlora.tasks.task import PARA, SST, Task
from jaxlora.training import inputs
from jaxlora.training import run as train
from jaxlora.training.config import Settings
from jaxlora.training.presets import make_settings
from jaxlora.training.run import RunOptions
from jaxlora.utils import process
from jaxlora.utils.errors import UserError
from tests.fuzz.readers import Echo
from tests.fuzz.samples import tokenizer
from tests.fuzz.samples import trained as sample

BINARY = Task("topic", "classification", classes=("0", "1"))
COLUMNS = tables.Columns(("text",), "label")
# Sentences as a splitter leaves them: quotes open in one row and close in another.
SPLIT = ('"He came.', "She saw.", 'They left."', '"Oh," he said.', 'A 5" pipe', '"""')
# Fields as csv quotes them, on a line each.
QUOTED = ('"He said ""no""."', '"Yes"', "plain", 'a 5" pipe')
UNQUOTED = ('He said "no".', "Yes", "plain", 'a 5" pipe')


def rows_of(path, task=BINARY, columns=COLUMNS, **more):
    return [(row.sentence1, row.label) for row in tables.read(task, path, columns, **more)]


def tsv(path, texts, header="text\tlabel"):
    lines = [header, *(f"{text}\t{n % 2}" for n, text in enumerate(texts))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# --- quotes


def test_unclosed_quotes_in_tab_separated_files_lose_no_row(tmp_path):
    path = tsv(tmp_path / "x.tsv", SPLIT)
    assert rows_of(path) == [(text, n % 2) for n, text in enumerate(SPLIT)]
    assert rows_of(path, quoting="none") == rows_of(path)
    (note,) = tables.notes(open_sheets({"train": path}))["train"]
    assert "part of the text" in note and "line 2" in note


def test_quoted_fields_in_tab_separated_files_are_read_as_csv_wrote_them(tmp_path):
    path = tsv(tmp_path / "x.tsv", QUOTED)
    assert [text for text, _ in rows_of(path)] == list(UNQUOTED)
    assert [text for text, _ in rows_of(path, quoting="none")] == list(QUOTED)
    (note,) = tables.notes(open_sheets({"train": path}))["train"]
    assert note == "2 fields are in double quotes, as in standard CSV"


def test_quotes_have_one_meaning_in_all_files_of_a_task(tmp_path):
    train, dev = tsv(tmp_path / "train.tsv", SPLIT), tsv(tmp_path / "dev.tsv", QUOTED)
    splits = tables.read_splits(BINARY, tables.Table(COLUMNS, str(train), str(dev)))
    assert [row.sentence1 for row in splits["dev"]] == list(QUOTED)
    splits = tables.read_splits(BINARY, tables.Table(COLUMNS, str(dev), str(dev)))
    assert [row.sentence1 for row in splits["dev"]] == list(UNQUOTED)


@pytest.mark.parametrize("delimiter", list("\t,;|"))
def test_fields_with_line_breaks_and_delimiters_are_counted(tmp_path, delimiter):
    path, text = tmp_path / "x.csv", io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    writer.writerows([("text", "label"), ("a\nb", 0), (f"c{delimiter}d", 1), ("e", 0)])
    path.write_text(text.getvalue(), encoding="utf-8")
    quoting = "standard" if delimiter == "\t" else None
    assert [t for t, _ in rows_of(path, quoting=quoting)] == ["a\nb", f"c{delimiter}d", "e"]
    sheets = open_sheets({"train": path}, None, quoting)
    (note,) = tables.notes(sheets)["train"]
    assert note.startswith("of the quoted fields 1 span several lines and 1 contain a ")


def test_errors_of_misread_quotes_suggest_the_other_quoting(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text('text\tlabel\n"a\nb"\t0\n')
    with pytest.raises(UserError, match=r"x\.tsv:2: 1 fields .* choose quoting standard"):
        rows_of(path)
    path.write_text('"text"\t"label"\n"a\nb"\t"0"\n')
    with pytest.raises(UserError, match=r"x\.tsv:1: no column text, .* choose quoting standard"):
        rows_of(path)
    assert rows_of(path, quoting="standard") == [("a\nb", 0)]
    path = tmp_path / "x.csv"
    path.write_text('text,label\n"a" b,0\n')
    with pytest.raises(UserError, match=r"x\.csv:2: .* choose quoting none"):
        rows_of(path)
    assert rows_of(path, quoting="none") == [('"a" b', 0)]


def test_a_csv_file_with_one_column_has_standard_quoting(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('text\n"a, ""b""\nc"\n')
    (row,) = tables.read(BINARY, path, COLUMNS, labelled=False)
    assert row.sentence1 == 'a, "b"\nc'
    path = path.rename(tmp_path / "x.txt")
    assert len(tables.read(BINARY, path, COLUMNS, labelled=False)) == 2


def test_the_cs224n_files_follow_the_same_rule(tmp_path):
    header = "\tid\tsentence\tsentiment\n"
    for split, name in cs224n.SUFFIXES.items():
        text = '"Good .' if split == "dev" else '"Good ""film"" ."'
        (tmp_path / f"ids-sst-{name}.csv").write_text(f"{header}0\ta\t{text}\t3\n1\tb\tBad\t0\n")
    rows = cs224n.read_splits(SST, tmp_path)
    assert [rows[s][0].sentence1 for s in ("train", "dev")] == ['"Good ""film"" ."', '"Good .']


def test_quoting_can_be_set_in_a_task_file_and_by_flag(tmp_path):
    path = tsv(tmp_path / "x.tsv", QUOTED)
    toml = tmp_path / "tasks.toml"
    toml.write_text(
        '[topic]\nkind = "classification"\ntext = "text"\nlabel = "label"\n'
        'train = "x.tsv"\ndev = "x.tsv"\nquoting = "none"\n'
    )
    (topic,) = read_tasks([str(toml)])
    assert topic.table.quoting == "none"
    rows = tables.read_splits(topic.task, topic.table)["train"]
    assert [row.sentence1 for row in rows] == list(QUOTED)
    (changed,) = read_tasks([str(toml), "topic.quoting=standard"])
    assert changed.table.quoting == "standard"
    keys = [sources.fingerprint(t.task, "files", t.table) for t in (topic, changed)]
    assert keys[0] != keys[1]
    with pytest.raises(UserError, match="quoting: must be 'none' or 'standard', not 'both'"):
        read_tasks([str(toml), "topic.quoting=both"])
    assert path.exists()


def test_settings_of_runs_before_quoting_are_read(tmp_path):
    path = tsv(tmp_path / "x.tsv", QUOTED)
    flags = ("kind=classification", "text=text", "label=label", f"train={path}", f"dev={path}")
    settings = make_settings("lora1", tasks=tuple(f"topic.{flag}" for flag in flags))
    old = settings.to_json()
    del old["tasks"][0]["table"]["quoting"]
    assert Settings.from_json(old) == settings


# --- labels

NUMBERED = Task("x", "classification", classes=("1", "2", "3", "unknown"))
WORDS = Task("x", "classification", classes=("no", "yes", "maybe"))
LONG = Task("x", "classification", classes=("9007199254740992", "9007199254740993"))
ZEROS = Task("x", "classification", classes=("01", "02"))
STARS = Task("x", "classification", classes=("1 star", "2 stars", "3 stars"))
OWN_NUMBERS = Task("x", "classification", classes=("LABEL_0", "LABEL_1"))
PRICE = Task("x", "regression", low=-10, high=90)


@pytest.mark.parametrize(
    ("task", "written", "label"),
    [
        *((NUMBERED, text, 0) for text in ("1", "1.0", " 1 ", "01", "1e0", "+1", "1.")),
        *((NUMBERED, text, 2) for text in ("3", "3.0", "3.000")),
        (NUMBERED, "unknown", 3),
        (ZEROS, "1", 0), (ZEROS, "2.0", 1), (ZEROS, "02", 1),
        (WORDS, "yes", 1), (WORDS, "1", 1), (WORDS, "2.0", 2), (WORDS, " no", 0),
        (LONG, "9007199254740992", 0), (LONG, "9007199254740993.0", 1),
        (SST, "4", 4), (SST, "4.0", 4), (PRICE, "-1e1", -10), (PRICE, "1.5 ", 1.5),
        (Task("x", "classification", classes=("none", "NA")), "none", 0),
        (Task("x", "classification", classes=("none", "NA")), "NA", 1),
        (Task("x", "classification", classes=("nan", "1.5")), "nan", 0),
        (STARS, "2 stars", 1), (OWN_NUMBERS, "1", 1), (OWN_NUMBERS, "LABEL_0", 0),
    ],
)  # fmt: skip
def test_a_label_is_the_class_of_that_name_in_any_spelling(task, written, label):
    assert parse_label(written, task, "x:1") == label


@pytest.mark.parametrize(
    ("task", "written"),
    [
        *((NUMBERED, text) for text in ("0", "4", "1.5", "-1", "inf", "Unknown", "1_0", "1e400")),
        (WORDS, "3"), (WORDS, "-1"), (WORDS, "0.5"), (WORDS, "Yes"), (ZEROS, "0"),
        (LONG, "9007199254740994"), (Task("x", "classification", classes=("1", "01")), "1.0"),
        (PRICE, "inf"), (PRICE, "-inf"), (PRICE, "1_0"), (PRICE, "91"), (PRICE, "1e400"),
        (Task("x", "classification", classes=("none", "some")), "None"),
        # Which of the classes 1 is, is not known where their names hold other numbers.
        (STARS, "0"), (STARS, "1"), (STARS, "2.0"),
        (Task("x", "classification", classes=("100%", "50%")), "1"),
        (Task("x", "classification", classes=("grade-1", "grade-2")), "1"),
    ],
)  # fmt: skip
def test_other_labels_are_refused(task, written):
    with pytest.raises(UserError, match="x:1: label"):
        parse_label(written, task, "x:1")


@pytest.mark.parametrize("written", ["", "NaN", "nan", "NA", "N/A", "None", "NULL", "null", "<NA>"])
@pytest.mark.parametrize("task", [NUMBERED, WORDS, SST, PRICE], ids=["numbers", "words", "sst", ""])
def test_missing_labels_are_counted(tmp_path, task, written):
    assert math.isnan(parse_label(f" {written} ", task, "x:1"))
    path = tmp_path / "x.csv"
    path.write_text(f"text,label\na,1\na dog,{written}\ne,2\n")
    table = tables.Table(COLUMNS, str(path), str(path))
    found = tokenized.load_examples(task, "files", table, tokenizer(), "k", 8, tmp_path / "cache")
    assert (len(found["train"]), found["train"].unlabelled) == (2, 1)


# --- blank texts


@pytest.mark.parametrize(
    "text",
    ["", " ", "\t", "\u00a0", "\u200b", "\ufeff", "\u00ad\u200c", "\u200b \u200d", "\x07", "\u2028",
     "\u0301", "\ufffd"],
)  # fmt: skip
def test_texts_of_invisible_characters_are_blank(text):
    assert is_blank(text)
    assert len(tokenizer().encode(text).ids) == 2  # as BERT sees it


@pytest.mark.parametrize("text", ["\u2800", "\u3164 ", "\u115f\u1160", "\uffa0\u200b"])
def test_texts_of_letters_with_empty_glyphs_are_blank(text):
    assert is_blank(text)


@pytest.mark.parametrize("text", ["a", "?", "\U0001f642", "\u200ba", "0", "\u05e9", "e\u0301"])
def test_other_texts_are_not_blank(text):
    assert not is_blank(text)


def blank_table(folder, count=14):
    """Fourteen rows, every second of which is blank, from line 2 on."""
    path = folder / "x.csv"
    lines = ["text,label", *(f"{('a dog', ' ')[n % 2 == 0]},{n % 2}" for n in range(count))]
    path.write_text("\n".join(lines) + "\n")
    return tables.Table(COLUMNS, str(path), str(path), str(path))


def test_rows_with_a_blank_text_are_left_out_and_listed(tmp_path):
    table = blank_table(tmp_path, 26)
    args = (BINARY, "files", table, tokenizer(), "k", 8, tmp_path / "cache")
    for _ in ("cold", "warm"):
        found = tokenized.load_examples(*args)["train"]
        assert found.labels.tolist() == [1] * 13
        assert [row.line for row in found.blank] == list(range(2, 28, 2))
        (note,) = inputs.notes(dict.fromkeys(("train", "dev", "test"), found))[:1]
        assert note == (
            "train: 13 rows with a blank text (lines 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, …) "
            "left out"
        )


def test_a_pair_is_blank_if_one_of_its_texts_is(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text("a\tb\tlabel\na dog\t\u200b\t1\na dog\truns\t0\n \truns\t0\n")
    columns = tables.Columns(("a", "b"), "label")
    table = tables.Table(columns, str(path), str(path))
    found = tokenized.load_examples(PARA, "files", table, tokenizer(), "k", 8, tmp_path / "cache")
    assert found["train"].labels.tolist() == [0]
    assert [row.line for row in found["train"].blank] == [2, 4]


def test_texts_without_tokens_are_blank(tmp_path):
    from tokenizers import normalizers

    dropping = tokenizer()
    dropping.normalizer = normalizers.Sequence(
        [normalizers.Replace("*", ""), normalizers.BertNormalizer(lowercase=True)]
    )
    path = tmp_path / "x.csv"
    path.write_text("text,label\na dog,1\n***,0\na dog,1\n")
    table = tables.Table(COLUMNS, str(path), str(path))
    found = tokenized.load_examples(BINARY, "files", table, dropping, "k", 8, tmp_path / "cache")
    assert [row.line for row in found["train"].blank] == [3]
    assert found["train"].offsets.tolist() == [0, 4, 8]


def test_a_table_without_any_text_is_refused(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("text,label\n ,1\n\u200b,0\n")
    table = tables.Table(COLUMNS, str(path), str(path))
    with pytest.raises(UserError, match=r"x\.csv: no example is left; .*\(lines 2, 3\)"):
        tokenized.load_examples(BINARY, "files", table, tokenizer(), "k", 8, tmp_path / "cache")


def test_a_run_leaves_out_blank_rows_and_strict_refuses_them(tmp_path, tiny_base):
    table = blank_table(tmp_path)
    flags = [f"topic.{split}={table.train}" for split in ("train", "dev", "test")]
    flags += ["topic.kind=classification", "topic.text=text", "topic.label=label"]
    settings = make_settings(
        "baseline1", tasks=tuple(flags), base=str(tiny_base), batch_size=4, max_steps=1,
        max_length=64,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"x\.csv: 7 rows with a blank text \(lines 2, 4"):
        train.run(settings, tmp_path / "run", Silent(), RunOptions(strict=True))
    callback = Silent()
    train.run(settings, tmp_path / "run", callback)
    (plan,) = callback.summaries
    assert plan.examples["topic"] == {"train": 7, "dev": 7, "test": 7}
    assert plan.notes["topic"][0].startswith("train: 7 rows with a blank text (lines 2, 4")
    with (tmp_path / "run" / "predictions" / "topic-test.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [str(n) for n in range(14)]
    assert [bool(row["prediction"]) for row in rows] == [False, True] * 7
    assert [row["reason"] for row in rows] == ["blank text", ""] * 7


# --- predictions


@pytest.fixture
def echo(tiny):
    """Answers without computing anything."""
    return Echo(tiny, sample(Path(tiny.name)))


def answers(echo, source, task=None, **more):
    """The rows of the answers, and what was told."""
    told = []
    target = source.with_name("answers.csv")
    count = predict_file(echo, source, target, task, note=told.append, **more)
    with target.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == count
    return rows, told


def test_an_id_may_hold_any_line_break(echo, tmp_path):
    path = tmp_path / "in.csv"
    ids = ["a\rb", "a\nb", "a\r\nb", "\r"]
    path.write_bytes(b"id,sentence\n" + b"".join(f'"{i}",a film\n'.encode() for i in ids))
    answers(echo, path, "sst")
    with path.with_name("answers.csv").open(encoding="utf-8", newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == ids


def test_every_request_is_answered_with_any_quotes(echo, tmp_path):
    path = tmp_path / "in.tsv"
    lines = ["id\tsentence", *(f"{n}\t{text}" for n, text in enumerate(SPLIT))]
    path.write_text("\n".join(lines) + "\n")
    rows, told = answers(echo, path, "sst")
    assert [row["id"] for row in rows] == [str(n) for n in range(6)]
    assert any("part of the text" in note for note in told)
    path.write_text("id\tsentence\n" + "".join(f"{n}\t{t}\n" for n, t in enumerate(QUOTED)))
    seen = []
    echo_call = type(echo).__call__

    class Noting(Echo):
        def __call__(self, requests, truncated):
            seen.extend(requests)
            return echo_call(self, requests, truncated)

    noting = Noting(echo.base, echo.trained)
    for quoting, texts in ((None, UNQUOTED), ("standard", UNQUOTED), ("none", QUOTED)):
        seen.clear()
        answers(noting, path, "sst", quoting=quoting)
        assert [text for _, text in seen] == list(texts)


def test_fields_with_line_breaks_are_reported_for_requests(echo, tmp_path):
    path = tmp_path / "in.csv"
    path.write_text('id,sentence\n1,"a\nb"\n2,"c, d"\n')
    rows, told = answers(echo, path, "sst")
    assert len(rows) == 2
    assert told == ["of the quoted fields 1 span several lines and 1 contain a comma"]


def test_a_blank_request_has_a_reason_instead_of_an_answer(echo, tmp_path):
    path = tmp_path / "in.tsv"
    path.write_text(
        "id\ttask\tsentence\tsentence2\n"
        "1\tsst\ta dog\t\n2\tsst\t \t\n3\tsts\ta\t\u200b\n4\tsts\ta\tb\n5\tsst\ta dog\t \n"
    )
    rows, told = answers(echo, path)
    assert [bool(row["prediction"]) for row in rows] == [True, False, False, True, True]
    assert [row["reason"] for row in rows] == ["", "sentence blank", "sentence2 blank", "", ""]
    assert told == ["2 rows with a blank text (lines 3, 4) not answered"]
    predict_file(echo, path, tmp_path / "o.jsonl", None)
    found = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert found[1] == {
        "id": "2", "task": "sst", "prediction": None, "label": None,
        "labels": None, "probability": None,
        "probabilities": None, "reason": "sentence blank",
    }  # fmt: skip
    (tmp_path / "o.jsonl").unlink()
    with pytest.raises(UserError, match=r"in\.tsv: 2 rows with a blank text \(lines 3, 4\)"):
        predict_file(echo, path, tmp_path / "o.jsonl", None, strict=True)
    assert not (tmp_path / "o.jsonl").exists()


def test_a_table_is_checked_completely_before_anything_is_answered(echo, tmp_path):
    path = tmp_path / "in.tsv"
    path.write_text("task\tsentence\n" + "sst\ta dog\n" * 9 + "stt\ta dog\n")
    with pytest.raises(UserError, match=r"in\.tsv:11: .*stt"):
        predict_file(echo, path, tmp_path / "o.csv", None, progress=pytest.fail)


def test_a_table_that_grows_during_prediction_is_refused(echo, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlora.serving.predict_table.PART", 2)
    path = tmp_path / "in.tsv"
    path.write_text("task\tsentence\n" + "sst\ta dog\n" * 5000)

    def grow(done):
        if done == 2:
            with path.open("a") as file:
                file.write("sst\ta dog\n")

    with pytest.raises(UserError, match="5,000 rows, then 5,001"):
        predict_file(echo, path, tmp_path / "o.csv", None, progress=grow)
    assert not (tmp_path / "o.csv").exists()


def test_requests_can_be_read_from_a_pipe(echo, tmp_path):
    pipe, target = tmp_path / "pipe", tmp_path / "o.csv"
    os.mkfifo(pipe)
    text = "task\tsentence\n" + "sst\ta dog\n" * 3
    writer = threading.Thread(target=pipe.write_text, args=(text,))
    writer.start()
    assert predict_file(echo, pipe, target, None) == 3
    writer.join()


def test_predict_has_the_flags_quoting_and_strict(echo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Predictor, "load", lambda bank, base, memory: echo)
    monkeypatch.setattr(process, "reuse_memory", lambda: True)
    monkeypatch.setattr(process, "keep_programs", lambda folder: None)
    source, target = tmp_path / "in.tsv", tmp_path / "out.csv"
    source.write_text('task\tsentence\nsst\t"film\nsst\t\u200b\nsst\tdog"\n')

    def call(*flags):
        code = main.main(["predict", "--bank=x", f"--input={source}", f"--output={target}", *flags])
        said = capsys.readouterr()
        return code, said.out + said.err

    code, shown = call()
    assert (code, "3 answers; 1 row with a blank text (line 3) not answered; " in shown) == (
        0,
        True,
    )
    assert "double quotes are part of the text (line 2 opens one only)" in shown
    target.unlink()
    code, shown = call("--strict")
    assert (code, "1 row with a blank text (line 3)" in shown, target.exists()) == (2, True, False)
    code, shown = call("--quoting=standard")
    assert (code, "1 answer; of the quoted fields 1 span several" in shown) == (0, True)
    assert call("--quoting=none")[0] == 0


# --- files that are no tables


def _zip(name):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, "text,label\na,1\n")
    return file.getvalue()


def _tar(name):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    return file.getvalue()


TEXT = "text\tlabel\na dog\t1\n"
FOREIGN = {
    "parquet": (b"PAR1\x15\x04\x15\x10PAR1", "a Parquet file"),
    "gzip": (gzip.compress(TEXT.encode()), "compressed with gzip"),
    "bzip2": (bz2.compress(TEXT.encode()), "compressed with bzip2"),
    "xz": (lzma.compress(TEXT.encode()), "compressed with xz"),
    "zip": (_zip("x.csv"), "a zip archive or an Excel workbook"),
    "xls": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Excel workbook"),
    "json lines": (b'{"text": "a dog", "label": 1}\n', "JSON"),
    "json after a mark": (b'\xef\xbb\xbf{"text": "a dog"}\n', "JSON"),
    "json": (b'[\n  {"text": "a dog", "label": 1}\n]\n', "JSON"),
    "json columns": (b'{\n "text": ["a dog"]}\n', "JSON"),
    "utf-16": (TEXT.encode("utf-16"), "UTF-16"),
    "utf-16 big": ("\ufeff".encode("utf-16-be") + TEXT.encode("utf-16-be"), "UTF-16"),
    "utf-16 without a mark": (TEXT.encode("utf-16-le"), "UTF-16"),
    "html": (b"<!DOCTYPE html>\n<html>", "a web page"),
    "json lines of lists": (b'[1, "a dog"]\n[0, "a cat"]\n', "JSON"),
    "orc": (b"ORC\n\x12\x00\x01", "an ORC file"),
    "avro": (b"Obj\x01\x04\x16avro.schema", "an Avro file"),
    "hdf5": (b"\x89HDF\r\n\x1a\n\x00", "an HDF5 file"),
    "numpy": (b"\x93NUMPY\x01\x00v\x00", "a NumPy file"),
    "stata": (b"<stata_dta><header>", "a Stata file"),
    "spss": (b"$FL2@(#) SPSS DATA FILE", "an SPSS file"),
    "lz4": (b'\x04"M\x18d@\xa7', "compressed with lz4"),
    "compress": (b"\x1f\x9d\x90a", "compressed with compress"),
    "rar": (b"Rar!\x1a\x07\x01\x00", "a RAR archive"),
    "tar": (_tar("x.csv"), "a tar archive"),
    "rtf": (b"{\\rtf1\\ansi text\tlabel}\n", "a document in RTF"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
}


@pytest.mark.parametrize(("content", "name"), FOREIGN.values(), ids=FOREIGN)
def test_a_file_of_another_kind_is_named(echo, tmp_path, content, name):
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.csv:1: is {name}.*; \w+ .*\.$") as caught:
        rows_of(path)
    with pytest.raises(UserError) as asked:
        predict_file(echo, path, tmp_path / "o.csv", "sst")
    assert str(asked.value) == str(caught.value)


@pytest.mark.parametrize(
    "header", ["{a}\tlabel", "[a]\tlabel", "PAR1\tlabel", "PK\tlabel", "ORC\tlabel", "ORCID\tlabel"]
)
def test_unusual_headers_are_not_taken_for_other_kinds_of_files(tmp_path, header):
    path = tsv(tmp_path / "x.tsv", ["a dog"], header)
    columns = tables.Columns((header.split("\t")[0],), "label")
    assert rows_of(path, columns=columns) == [("a dog", 0)]


@pytest.mark.parametrize("hint", ["sep=;", '"sep=;"', "SEP=;"])
def test_a_line_that_names_the_delimiter_is_respected(echo, tmp_path, hint):
    path = tmp_path / "x.csv"
    path.write_bytes(f"\ufeff{hint}\r\ntext;label\r\na, b;1\r\n".encode())
    assert rows_of(path) == [("a, b", 1)]
    path.write_text(f"{hint}\ntext;label\na;9\n")
    with pytest.raises(UserError, match=r"x\.csv:3: label '9'"):
        rows_of(path)
    path.write_text(f"{hint}\nsentence;id\na, b;x\n")
    rows, _ = answers(echo, path, "sst")
    assert [row["id"] for row in rows] == ["x"]


@pytest.mark.parametrize("column", ["lable", "Label", " label"])
def test_a_misspelt_label_column_is_named(tmp_path, column):
    path = tmp_path / "x.csv"
    path.write_text(f"text,{column}\na,1\n")
    table = tables.Table(COLUMNS, str(path), str(path))
    with pytest.raises(UserError, match=rf"no column label \(did you mean '{column}'\?\); found"):
        tables.read_splits(BINARY, table)


def test_only_the_test_file_may_lack_labels(tmp_path):
    path, test = tmp_path / "x.csv", tmp_path / "test.csv"
    path.write_text("text,label\na,1\nb,0\n")
    test.write_text("text\na\n")
    splits = tables.read_splits(BINARY, tables.Table(COLUMNS, str(path), str(path), str(test)))
    assert math.isnan(splits["test"][0].label)


# --- ids


def test_one_long_id_does_not_enlarge_the_others(tmp_path):
    path = tmp_path / "x.csv"
    ids = ["i" * 5000, *(f"i{n}" for n in range(199))]
    path.write_text(
        "id,text,label\n" + "".join(f"{name},a dog,{n % 2}\n" for n, name in enumerate(ids))
    )
    table = tables.Table(tables.Columns(("text",), "label", "id"), str(path), str(path))
    args = (BINARY, "files", table, tokenizer(), "k", 8, tmp_path / "cache")
    for _ in ("cold", "warm"):
        found = tokenized.load_examples(*args)["train"]
        assert found.ids.tolist() == ids
        assert found.ids.nbytes < 10_000  # 4 MB as an array of NumPy's own strings
        assert found.join(found).ids[[0, 200]].tolist() == [ids[0], ids[0]]
        assert found.take(np.array([199, 0])).ids.tolist() == [ids[199], ids[0]]
    (cached,) = (tmp_path / "cache" / "tokens").iterdir()
    assert cached.stat().st_size < 100_000


def test_a_dev_set_of_one_label_is_noted(tmp_path, tiny_base):
    train_rows, dev_rows = tmp_path / "train.csv", tmp_path / "dev.csv"
    train_rows.write_text("text,label\na dog,1\na cat,2.5\nthe cat,4\n")
    dev_rows.write_text("text,label\na film,2.5\na dog,2.5\n")
    flags = ["topic.kind=regression", "topic.text=text", "topic.label=label", "topic.range=0,5"]
    flags += [f"topic.train={train_rows}", f"topic.dev={dev_rows}"]
    settings = make_settings(
        "baseline1", tasks=tuple(flags), base=str(tiny_base), max_steps=1, max_length=64
    )
    callback = Silent()
    train.run(settings, tmp_path / "run", callback)
    assert any("same label" in note for note in callback.summaries[0].notes["topic"])
