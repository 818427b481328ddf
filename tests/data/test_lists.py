"""Lists of labels in JSON lines and Parquet, and what labels imply of a kind that nobody named."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxlora.data import table_formats, tables
from jaxlora.data.draft import draft, remarks
from jaxlora.data.survey import survey
from jaxlora.data.task_files import read_tasks
from jaxlora.tasks.task import Task
from jaxlora.utils.errors import UserError

SETS = [["bug", "pay"], [], ["pay"], ["login"], ["bug"], ["login", "pay"]] * 4
WANTED = Task("t", "multilabel", classes=("bug", "login", "pay"))


def write(folder, name, labels, more=None):
    rows = [{"text": f"a dog {n}", "labels": one} for n, one in enumerate(labels)]
    rows = [{**row, **(more or {})} for row in rows]
    path = folder / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path, *values):
    (spec,) = read_tasks([path, *values], "text", "labels")
    return spec.task, tables.read_splits(spec.task, spec.table)


def numbers(sets, task=WANTED):
    return sorted(tuple(sorted(map(task.classes.index, one))) for one in sets)


@pytest.mark.parametrize("name", ["t.jsonl", "t.parquet"])
@pytest.mark.parametrize("sets", [SETS, [one[:1] for one in SETS]], ids=["several", "at most one"])
def test_lists_are_sets_of_labels(tmp_path, tiny, name, sets):
    path = write(tmp_path, name, sets, {"scores": [0.5], "tokens": ["a", "b"] * 40})
    task, splits = read(path)
    assert task == WANTED
    assert sorted(r.label for s in ("train", "dev") for r in splits[s]) == numbers(sets)
    found = survey({"train": tmp_path / name}, tiny.tokenizer)
    assert (found.text, found.label, found.labels.empty) == (("text",), "labels", sets.count([]))
    (tmp_path / "t.toml").write_text(draft({"t": found}, tmp_path, 128))
    assert read_tasks([str(tmp_path / "t.toml")])[0].task == WANTED


def test_lists_of_classes_of_datasets_have_their_names(tmp_path):
    feature = {"names": ["pay", "bug", "login"], "_type": "ClassLabel"}
    for kind in ({"feature": feature, "_type": "Sequence"}, [feature]):
        table = pa.table({"text": ["a", "b", "c"], "labels": [[1, 0], [], [2]]})
        about = json.dumps({"info": {"features": {"labels": kind}}})
        pq.write_table(
            table.replace_schema_metadata({"huggingface": about}), tmp_path / "t.parquet"
        )
        sheet = table_formats.open_sheets({"": tmp_path / "t.parquet"})[""]
        rows = tables.read_sheet(WANTED, sheet, tables.Columns(("text",), "labels"))
        assert [row.label for row in rows] == [(0, 2), (), (1,)]


def test_null_is_a_missing_label(tmp_path, tiny):
    for name in ("t.jsonl", "t.parquet"):
        path = write(tmp_path, name, [*SETS, None])
        with pytest.raises(UserError, match=rf"{name}(:|: row ){len(SETS) + 1}: null .*write \[\]"):
            read(path)
        (spec,) = read_tasks([path], "text", "labels")
        rows = tables.read(spec.task, tmp_path / name, spec.table.columns)  # as `evaluate` does
        assert [row.labelled for row in rows] == [True] * len(SETS) + [False]
        assert rows[1].label == ()
        found = survey({"train": tmp_path / name}, tiny.tokenizer)
        assert any("write [] where there is no label" in one for one in remarks(found, 99))


@pytest.mark.parametrize(
    ("label", "values", "message"),
    [
        (["a|b"], (), r"t\.jsonl:25: the label 'a\|b' contains '\|'.*choose another `label_del"),
        (["none"], (), r"t\.jsonl:25: the label 'none' denotes a missing value"),
        ([" "], (), r"t\.jsonl:25: .*an entry is not a label name"),
        (["pay", "pay "], (), r"t\.jsonl:25: a label is named twice"),
        (["pay", "x"], ("t.classes=bug,login,pay",), r"t\.jsonl:25: 'x' in 'pay\|x' is not one of"),
        ([None], (), "column labels is a list in line 1, not strings; labels of a multilabel"),
        ([["pay"]], (), "in all rows"),
        ("pay", (), "in all rows"),
        ([], ("t.kind=binary", "t.classes=a,b"), "labels of a multilabel task may be lists"),
        ([], ("t.range=0,1",), r"\[t\] range: goes with regression and similarity"),
        ([], ("t.kind=classification",), "labels of a multilabel task may be lists"),
    ],
)
def test_lists_that_are_no_sets_are_refused(tmp_path, label, values, message):
    with pytest.raises(UserError, match=message):
        read(write(tmp_path, "t.jsonl", [*SETS, label]), *values)


def test_a_list_of_texts_is_no_text(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": ["a"], "labels": ["x", "y"]}\n')
    with pytest.raises(UserError, match="column text is a list in line 1, not strings"):
        read_tasks([str(path)], "text", "labels")


def test_a_gap_in_a_list_is_refused_with_its_row(tmp_path):
    path = write(tmp_path, "t.parquet", [*SETS, ["pay", None]])
    with pytest.raises(UserError, match=r"row 25: .*an entry is not a label name"):
        read(path)


def test_another_delimiter_lets_names_have_a_bar(tmp_path):
    path = write(tmp_path, "t.jsonl", [["a|b"], ["c"], []] * 5)
    task, splits = read(path, "t.label_delimiter=;")
    assert task.classes == ("a|b", "c") and len(splits["train"]) + len(splits["dev"]) == 15


# --- kinds that follow from classes, and numbers that are none


def csv(folder, labels):
    path = folder / "t.csv"
    path.write_text("text\tlabels\n" + "".join(f"a dog {n}\t{x}\n" for n, x in enumerate(labels)))
    return str(path)


@pytest.mark.parametrize(
    ("labels", "classes", "kind"),
    [
        (["a|b", "b", ""], "a,b,c", "multilabel"),  # `c` is in no row: that is read later
        (["0|2", "1"], "3", "multilabel"),
        (["a|b", "c"], "a|b,a,b,c", "classification"),
        (["a", "b"], "a,b", "classification"),
    ],
)
def test_classes_without_a_kind(tmp_path, labels, classes, kind):
    values = [csv(tmp_path, labels * 5), "t.delimiter=\t", f"t.classes={classes}"]
    (spec,) = read_tasks(values, "text", "labels")
    assert spec.task.kind == kind


def test_classes_with_another_delimiter_are_refused_with_what_to_write(tmp_path):
    path = csv(tmp_path, ["a", "b", "b;a"] * 3)
    said = r't\.csv:4: column .labels.: .b;a. holds .*"multilabel" and label_delimiter = ";"'
    with pytest.raises(UserError, match=said):
        read_tasks([path, "t.delimiter=\t", "t.classes=a,b"], "text", "labels")
    values = [path, "t.delimiter=\t", "t.classes=a,b", "t.kind=multilabel", "t.label_delimiter=;"]
    (spec,) = read_tasks(values, "text", "labels")
    assert spec.task.classes == ("a", "b")


@pytest.mark.parametrize("wrong", ["inf", "-Infinity", "+nan", "sNaN"])
@pytest.mark.parametrize("labels", [["1", "2", "3"], ["0.5", "1.5"], ["0", "1"]])
def test_what_is_no_finite_number_is_no_class(tmp_path, tiny, wrong, labels):
    path = csv(tmp_path, [*labels * 4, wrong, *labels])
    said = (
        rf"t\.csv:{2 + 4 * len(labels)}: column 'labels': label '{wrong[0]}?.*among numbers is no"
    )
    with pytest.raises(UserError, match=said.replace("+", r"\+")):
        read_tasks([path, "t.delimiter=\t"], "text", "labels")
    with pytest.raises(UserError, match=said.replace("+", r"\+")):
        survey({"train": tmp_path / "t.csv"}, tiny.tokenizer, "text", "labels")


def test_inf_among_words_is_a_class(tmp_path):
    (spec,) = read_tasks(
        [csv(tmp_path, ["inf", "fin", "ger"] * 4), "t.delimiter=\t"], "text", "labels"
    )
    assert spec.task.classes == ("fin", "ger", "inf")
