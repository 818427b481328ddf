"""Tables in every format: the same rows come in, the same answers go out, errors name places."""

import csv
import gzip
import io
import json
import math
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxlora.data import sources, table_formats, tables
from jaxlora.data.raw_examples import UNLABELLED
from jaxlora.data.survey import group_files
from jaxlora.data.task_files import read_tasks
from jaxlora.tasks.task import Task
from jaxlora.utils.errors import UserError
from jaxlora.utils.extras import MissingExtraError

TOPIC = Task("topic", "classification", classes=("sport", "science"))
PRICE = Task("price", "regression", low=0, high=100)
COLUMNS = tables.Columns(("text",), "label", "key")
# What a table may hold: delimiters, quotes, line breaks, letters of all scripts, a missing label.
ROWS = [
    {"key": "a", "text": 'One, "two"; three', "label": "sport"},
    {"key": "b", "text": "First line\nsecond\tline", "label": "science"},
    {"key": "ключ", "text": "日本語 — naïve 🙂 | x", "label": "sport"},
    {"key": "d", "text": "no label", "label": ""},
]


def _delimited(delimiter):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ROWS[0], delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def _json_lines():
    return "".join(json.dumps({**row, "other": [1]}) + "\n" for row in ROWS).encode()


def _parquet(rows=ROWS, **types):
    file = io.BytesIO()
    columns = {name: [row[name] or None for row in rows] for name in rows[0]}
    arrays = {name: pa.array(values, types.get(name)) for name, values in columns.items()}
    pq.write_table(pa.table({"other": [[1]] * len(rows), **arrays}), file, row_group_size=3)
    return file.getvalue()


# Suffix → the bytes of a table with `ROWS`. A line break in a field needs its own quoting for tabs.
CONTENT = {
    "csv": _delimited(","),
    "txt": _delimited("|"),
    "jsonl": _json_lines(),
    "ndjson": _json_lines(),
    "parquet": _parquet(key=pa.large_string(), label=pa.dictionary(pa.int8(), pa.string())),
}
CONTENT |= {f"{n}.gz": gzip.compress(CONTENT[n]) for n in ("csv", "jsonl")}


def saved(folder, parts, names=("sport", "science")):
    """Write a folder as `datasets` does: Arrow streams, and what describes them."""
    folder.mkdir(parents=True)
    feature = {"names": list(names), "_type": "ClassLabel"}
    features = {"text": {"dtype": "string", "_type": "Value"}, "label": feature}
    about = json.dumps({"info": {"features": features}})
    files = []
    for number, rows in enumerate(parts):
        columns = {name: [row[name] for row in rows] for name in ("key", "text", "label")}
        table = pa.table(columns).replace_schema_metadata({"huggingface": about})
        files.append({"filename": f"data-{number:05d}-of-{len(parts):05d}.arrow"})
        with pa.ipc.new_stream(str(folder / files[-1]["filename"]), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": "train"}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    return folder


NUMBERED = [{**row, "label": {"sport": 0, "science": 1, "": -1}[row["label"]]} for row in ROWS]


def check(rows):
    """Compare what was read with `ROWS`."""
    assert [(row.id, row.sentence1) for row in rows] == [(r["key"], r["text"]) for r in ROWS]
    assert [row.label for row in rows[:3]] == [0, 1, 0]
    assert math.isnan(rows[3].label)


@pytest.mark.parametrize("suffix", CONTENT)
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(CONTENT[suffix])
    check(tables.read(TOPIC, path, COLUMNS))


def test_a_folder_of_datasets_gives_the_same_rows_with_names_of_classes(tmp_path):
    folder = saved(tmp_path / "x", [NUMBERED[:3], NUMBERED[3:]])
    check(tables.read(TOPIC, folder, COLUMNS))
    check(tables.read(TOPIC, folder, COLUMNS))  # it can be read again


def test_parquet_with_class_labels_gives_their_names(tmp_path):
    about = {
        "info": {"features": {"label": {"names": ["sport", "science"], "_type": "ClassLabel"}}}
    }
    columns = {name: [row[name] for row in NUMBERED] for name in NUMBERED[0]}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(about)})
    pq.write_table(table, tmp_path / "x.parquet")
    check(tables.read(TOPIC, tmp_path / "x.parquet", COLUMNS))


def test_numbers_are_read_as_they_are_written(tmp_path):
    rows = [{"key": 1, "text": "a", "label": 4.6}, {"key": 2, "text": "b", "label": 5.0}]
    rows.append({"key": 3, "text": "c", "label": math.nan})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "x.jsonl").write_text(lines)
    (tmp_path / "x.parquet").write_bytes(_parquet(rows, label=pa.float32()))
    for name in ("x.jsonl", "x.parquet"):
        found = tables.read(PRICE, tmp_path / name, COLUMNS)
        assert [row.id for row in found] == ["1", "2", "3"]
        assert [row.label for row in found[:2]] == [4.6, 5.0]
        assert math.isnan(found[2].label)


def test_truth_values_null_and_absent_keys_in_json(tmp_path):
    binary = Task("spam", "binary", classes=("no", "yes"))
    path = tmp_path / "x.jsonl"
    path.write_text('{"key": 7, "text": "a", "label": true}\n\n{"text": "b", "label": null}\n')
    found = tables.read(binary, path, COLUMNS)
    assert [(row.id, row.label, row.line) for row in found[:1]] == [("7", 1, 1)]
    assert (found[1].id, found[1].line) == ("", 3)
    assert math.isnan(found[1].label) and math.isnan(UNLABELLED)


def test_a_column_that_only_later_lines_have_is_a_column(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(
        '{"text": "a", "label": "sport"}\n{"text": "b", "label": "sport", "key": "z"}\n'
    )
    assert [row.id for row in tables.read(TOPIC, path, COLUMNS)] == ["", "z"]


DAMAGED = _parquet()[:-60] + b"\xff" * 52 + _parquet()[-8:]
BAD = {
    "json in pieces": (
        "x.jsonl",
        b'{"text": "a"\n}\n',
        r"x\.jsonl:1: not JSON .*one object on each",
    ),
    "json list": ("x.jsonl", b'["a", "sport"]\n', r"x\.jsonl:1: is a list; write one object"),
    "json value": ("x.jsonl", b'{"text": "a"}\n3\n', r"x\.jsonl:2: is a single value"),
    "json key twice": (
        "x.jsonl",
        b'{"text": "a", "text": "b"}\n',
        r":1: .*key 'text' occurs twice",
    ),
    "json surrogate": ("x.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}', r":2: 'text': a NUL"),
    "json NUL": ("x.jsonl", b'{"text": "\\u0000"}', r"x\.jsonl:1: 'text': a NUL"),
    "json deep": ("x.jsonl", b'{"text": ' + b"[" * 99999 + b"\n", r"x\.jsonl:1: not JSON"),
    "json nested": (
        "x.jsonl",
        b'{"key":1,"text":"a","label":1}\n{"text":["a"]}\n',
        r"x\.jsonl: column text is a list in line 2, not strings",
    ),
    "json column": (
        "x.jsonl",
        b'{"txt": "a", "label": 1}\n',
        r"no column key, text \(did you mean 'txt",
    ),
    "json not UTF-8": ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"x\.jsonl:2: not UTF-8"),
    "json empty": ("x.jsonl", b"\n\n", r"x\.jsonl: is empty.*objects with the keys key, text"),
    "json label": (
        "x.jsonl",
        b'{"key": 1, "text": "a", "label": "art"}',
        r"x\.jsonl:1: label 'art' is not one",
    ),
    "parquet named json": ("x.jsonl", _parquet(), r"x\.jsonl:1: is a Parquet file; .*\.parquet"),
    "not gzip": ("x.csv.gz", b"text,label\n", r"x\.csv\.gz: not a sound gzip file"),
    "gzip cut off": ("x.csv.gz", CONTENT["csv.gz"][:-9], r"x\.csv\.gz: not a sound gzip file"),
    "gzip damaged": (
        "x.csv.gz",
        CONTENT["csv.gz"][:30] + b"\0" * 9 + CONTENT["csv.gz"][39:],
        "not a sound gzip file",
    ),
    "gzip inside": (
        "x.csv.gz",
        gzip.compress(b"key,text,label\na,\xff,1\n"),
        r"x\.csv\.gz:2: not UTF-8",
    ),
    "gzip not named": ("x.csv", CONTENT["csv.gz"], r"x\.csv:1: is compressed with gzip; .*\.gz\.$"),
    "json not named": ("x.csv", _json_lines(), r"x\.csv:1: is JSON, .*\.jsonl\.$"),
    "parquet in gzip": ("x.parquet.gz", gzip.compress(_parquet()), "Parquet is compressed inside"),
    "no parquet": ("x.parquet", b"text,label\n", r"x\.parquet: cannot be read, or is damaged"),
    "parquet damaged": ("x.parquet", DAMAGED, r"x\.parquet: .*damaged"),
    "parquet nested": (
        "x.parquet",
        _parquet([{"key": "a", "text": ["b"], "label": "sport"}]),
        r"x\.parquet: column text is list<.*string>, not strings",
    ),
    "parquet bytes": (
        "x.parquet",
        _parquet([{"key": "a", "text": b"b", "label": "sport"}]),
        r"x\.parquet: column text is binary, not strings",
    ),
    "parquet column": (
        "x.parquet",
        _parquet([{"key": "a", "text": "b", "lable": "sport"}]),
        r"no column label \(did you mean 'lable'\?\); found .*needs columns of strings or numbers",
    ),
    "parquet label": (
        "x.parquet",
        _parquet([*ROWS, {"key": "a", "text": "b", "label": "art"}]),
        r"x\.parquet: row 5: label 'art' is not one of",
    ),
    "parquet empty": (
        "x.parquet",
        _parquet(ROWS[:1] * 0 or [{"key": "", "text": "\0", "label": ""}]),
        r"x\.parquet: row 1: text: not UTF-8 text without NUL",
    ),
}


@pytest.mark.parametrize(("name", "content", "match"), BAD.values(), ids=BAD)
def test_a_bad_file_is_refused_with_its_place(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=match) as caught:
        tables.read(TOPIC, tmp_path / name, COLUMNS)
    assert "\n" not in str(caught.value)


def test_a_string_that_is_not_utf8_in_parquet_names_row_and_column(tmp_path):
    text = pa.array([b"fine", b"\xff"]).view(pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": text, "label": ["sport"] * 2}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet: row 2: text: not UTF-8"):
        tables.read(TOPIC, tmp_path / "x.parquet", tables.Columns(("text",), "label"))


@pytest.mark.parametrize("option", [{"delimiter": ","}, {"quoting": "none"}])
@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_options_of_delimited_text_are_refused_for_other_formats(tmp_path, name, option):
    (tmp_path / name).write_bytes(CONTENT[name[2:]])
    with pytest.raises(UserError, match=rf"`{next(iter(option))}` .*: is for CSV and TSV files"):
        tables.read(TOPIC, tmp_path / name, COLUMNS, **option)


def test_bad_folders_are_refused(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match=r"not a dataset saved by `datasets` .*no state\.json"):
        tables.read(TOPIC, tmp_path / "x", COLUMNS)
    for split in ("train", "test"):
        saved(tmp_path / "both" / split, [NUMBERED])
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match=r"holds the splits train, test; name one, such as .*train"):
        tables.read(TOPIC, tmp_path / "both", COLUMNS)
    wrong = saved(tmp_path / "wrong", [[*NUMBERED, {**NUMBERED[0], "label": 2}]])
    with pytest.raises(UserError, match="wrong: row 5: label: 2 is none of its 2 classes"):
        tables.read(TOPIC, wrong, COLUMNS)
    state = wrong / "state.json"
    for files in ([{"filename": "../both/train/data-00000-of-00001.arrow"}], [], [{}], "x"):
        state.write_text(json.dumps({"_data_files": files}))
        with pytest.raises(UserError, match=r"state\.json: does not name the Arrow files"):
            tables.read(TOPIC, wrong, COLUMNS)
    saved(tmp_path / "cut", [NUMBERED])
    part = tmp_path / "cut" / "data-00000-of-00001.arrow"
    part.write_bytes(part.read_bytes()[:900])
    with pytest.raises(UserError, match=r"cut.*damaged"):
        tables.read(TOPIC, tmp_path / "cut", COLUMNS)


def test_a_folder_with_splits_is_a_task(tmp_path):
    for split in ("train", "validation", "test"):
        saved(tmp_path / "tickets" / split, [NUMBERED])
    names = {"splits": ["train", "validation", "test"]}
    (tmp_path / "tickets" / "dataset_dict.json").write_text(json.dumps(names))
    (topic,) = read_tasks([str(tmp_path / "tickets")], "text", "label")
    assert topic.task.name == "tickets" and topic.task.classes == ("science", "sport")
    assert {n: p.name for n, p in topic.table.files.items()} == {
        "train": "train", "dev": "validation", "test": "test",
    }  # fmt: skip
    assert list(group_files([tmp_path / "tickets"])["tickets"]) == ["train", "dev", "test"]
    before = sources.fingerprint(topic.task, "files", topic.table)
    changed = [{**row, "label": 0} for row in NUMBERED]
    (tmp_path / "tickets" / "test").rename(tmp_path / "old")
    saved(tmp_path / "tickets" / "test", [changed])
    assert sources.fingerprint(topic.task, "files", topic.table) != before


def test_a_packed_table_is_a_task_named_without_its_suffixes(tmp_path):
    path = tmp_path / "my tickets.csv.gz"
    path.write_bytes(CONTENT["csv.gz"])
    (topic,) = read_tasks([str(path)], "text", "label")
    assert topic.task.classes == ("science", "sport")
    assert topic.task.name == "my-tickets"


@pytest.mark.parametrize("name", ["x.parquet", "folder"])
def test_the_error_for_a_missing_pyarrow_names_the_extra(tmp_path, monkeypatch, name):
    (tmp_path / "x.parquet").write_bytes(CONTENT["parquet"])
    saved(tmp_path / "folder", [NUMBERED])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pyarrow is not .* 'jaxlora\[parquet\]'"):
        tables.read(TOPIC, tmp_path / name, COLUMNS)


# --- the hub


class Hub:
    """In the place of the package `datasets`; saves folders as it does."""

    def __init__(self):
        self.asked = []

    def load_dataset(self, name, revision=None):
        self.asked.append((name, revision))
        if name == "none/such":
            raise FileNotFoundError("Dataset 'none/such' doesn't exist\non the Hub")
        return self

    def save_to_disk(self, folder):
        for split in ("train", "test"):
            saved(Path(folder) / split, [NUMBERED])
        (Path(folder) / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')


def test_a_data_set_of_the_hub_is_downloaded_once(tmp_path, monkeypatch):
    found = Hub()
    monkeypatch.setitem(sys.modules, "datasets", found)
    monkeypatch.setenv("JAXLORA_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        (topic,) = read_tasks(["hub:owner/tickets"], "text", "label")
        assert topic.task.name == "tickets" and topic.task.classes == ("science", "sport")
        assert {n: p.name for n, p in topic.table.files.items()} == {
            "train": "train",
            "test": "test",
        }
    assert found.asked == [("owner/tickets", None)]
    toml = tmp_path / "x.toml"
    toml.write_text('[a]\ntext = "text"\nlabel = "label"\ntrain = "hub:owner/tickets@v1:train"\n')
    (task,) = read_tasks([str(toml)])
    check(tables.read(TOPIC, task.table.files["train"], COLUMNS))
    assert found.asked[1:] == [("owner/tickets", "v1")]


@pytest.mark.parametrize(
    ("item", "match"),
    [("hub:none/such", r"hub:none/such: cannot be loaded from the hub \(Dataset .* exist\); check"),
     ("hub:", "write hub:owner/name"), ("hub:a/b/c", "write hub:owner/name"),
     ("hub:../../x", "write hub:owner/name")],
)  # fmt: skip
def test_what_the_hub_has_not_is_refused(tmp_path, monkeypatch, item, match):
    monkeypatch.setitem(sys.modules, "datasets", Hub())
    monkeypatch.setenv("JAXLORA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=match):
        read_tasks([item], "text", "label")
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_the_error_for_missing_datasets_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setenv("JAXLORA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(MissingExtraError, match=r"datasets is not .* 'jaxlora\[hub\]'"):
        read_tasks(["hub:owner/tickets"], "text", "label")


# --- what is written

KINDS = {
    "id": str, "prediction": float, "label": str, "labels": list, "probabilities": dict,
    "reason": str,
}  # fmt: skip
ANSWERS = [
    {"id": 'a, "b"', "prediction": 1, "label": "日本", "probabilities": {"x": 0.25, "日本": 0.75}},
    {"id": "line\nbreak", "prediction": 2.5, "label": None, "probabilities": None},
    {"id": "", "prediction": None, "label": None, "probabilities": None},
]
SETS = (["a", "日本"], [], None)
ANSWERS = [
    {**one, "labels": labels, "reason": "" if one["prediction"] else "blank"}
    for one, labels in zip(ANSWERS, SETS, strict=True)
]
CELLS = [
    ["id", "prediction", "label", "reason"], ['a, "b"', "1", "日本", ""],
    ["line\nbreak", "2.5", "", ""], ["", "", "", "blank"],
]  # fmt: skip


def write(path):
    with table_formats.writing(path, KINDS) as writer:
        writer(ANSWERS[:2])
        writer(ANSWERS[2:])
    return path.read_bytes()


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t"), ("tab", "\t")])
def test_delimited_answers_are_read_by_the_csv_module(tmp_path, suffix, delimiter):
    content = write(tmp_path / f"o.{suffix}")
    assert gzip.decompress(write(tmp_path / f"o.{suffix}.gz")) == content
    text = io.StringIO(content.decode(), newline="")
    assert list(csv.reader(text, delimiter=delimiter)) == CELLS


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "JSONL"])
def test_answers_in_json_lines_are_read_by_the_json_module(tmp_path, suffix):
    content = write(tmp_path / f"o.{suffix}")
    assert [json.loads(line) for line in content.decode().splitlines()] == ANSWERS
    assert gzip.decompress(write(tmp_path / f"o.{suffix}.gz")) == content


def test_answers_in_parquet_have_types(tmp_path):
    write(tmp_path / "o.parquet")
    table = pq.read_table(tmp_path / "o.parquet")
    kinds = [kind for kind in table.schema.types if not pa.types.is_map(kind)]
    names = pa.list_(pa.string())
    assert kinds == [pa.string(), pa.float64(), pa.string(), names, pa.string()]
    found = [{**row, "probabilities": row["probabilities"] and dict(row["probabilities"])}
             for row in table.to_pylist()]  # fmt: skip
    assert found == ANSWERS


def test_packed_answers_are_the_same_bytes_each_time(tmp_path):
    assert write(tmp_path / "a.csv.gz") == write(tmp_path / "b.csv.gz")


@pytest.mark.parametrize(
    "name", ["o", "o.gz", "o.xlsx", "o.txt", "o.json", "o.parquet.gz", "o.csv.zip"]
)
def test_a_name_without_a_format_is_refused(tmp_path, name):
    with pytest.raises(
        UserError, match=r"`output` .*end the name with \.parquet, or with one of \.csv, "
    ):
        write(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_an_error_while_writing_leaves_nothing(tmp_path):
    for name in ("o.csv.gz", "o.jsonl", "o.parquet"):
        with pytest.raises(KeyError), table_formats.writing(tmp_path / name, KINDS) as writer:
            writer(ANSWERS)
            writer([{"id": "a"}])
    assert not list(tmp_path.iterdir())


def test_a_part_with_a_name_that_no_file_can_have_is_refused(tmp_path):
    state = {"_data_files": [{"filename": "9" * 5000 + "data.arrow"}]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="does not name the Arrow files beside it"):
        table_formats.open_sheets({"": tmp_path})


def test_a_column_whose_name_is_not_utf_8_is_refused(tmp_path):
    path = tmp_path / "x.parquet"
    content = io.BytesIO()
    pq.write_table(pa.table({"texq": ["a"], "label": ["sport"]}), content)
    path.write_bytes(content.getvalue().replace(b"texq", b"\x80exq"))
    sheet = table_formats.open_sheets({"": path})[""]
    with pytest.raises(UserError, match=r"x\.parquet: cannot be read, or is damaged"):
        list(sheet.rows())
    with pytest.raises(UserError, match=r"x\.parquet: cannot be read, or is damaged"):
        dict(sheet.unreadable)
