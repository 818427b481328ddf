"""What tables say about their task, and the task file that is drafted from that."""

import csv
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlora.data.draft import draft, remarks
from jaxlora.data.labels import FoundLabels
from jaxlora.data.survey import Row, Survey, group_files, guess_label, guess_text, survey
from jaxlora.data.task_files import read_tasks
from jaxlora.utils.errors import UserError


def write(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_a_draft_is_read_as_the_task_that_was_found(tmp_path, tiny):
    rows = [(n, f"a film {n}", f"a dog {n}", ("true", "FALSE")[n % 2]) for n in range(40)]
    train = write(tmp_path / "p-train.csv", ["id", "text_a", "text_b", "same"], rows)
    (files,) = group_files([train]).values()
    found = survey(files, tiny.tokenizer)
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "p.toml"
    path.write_text(draft({"p": found}, path.parent, 128))
    (spec,) = read_tasks([str(path)])
    assert (spec.task.kind, spec.task.pair, spec.task.classes) == (
        "binary",
        True,
        ("FALSE", "true"),
    )
    assert spec.task.pair_encoding == "separate"
    path.write_text(path.read_text().replace('pair = "separate"', 'pair = "joint"'))
    assert read_tasks([str(path)])[0].task.joint
    assert spec.table.columns.text == ("text_a", "text_b")
    assert (Path(spec.table.train).resolve(), spec.table.dev) == (train, 0.2)


def test_columns_that_were_not_guessed_are_named(tmp_path, tiny):
    rows = [
        (n, f"a long film about dogs {n}", f"a dog {n}", ("good", "bad")[n % 2], n % 3 == 0, "a b")
        for n in range(40)
    ]
    path = write(tmp_path / "t.csv", ["id", "body", "subject", "topic", "urgent", "same"], rows)
    found = survey({"train": path}, tiny.tokenizer)
    assert (found.text, found.label) == (("body",), "topic")
    assert (found.other_texts, found.other_labels) == (("subject",), ("urgent",))
    assert list(remarks(found, 128))[:2] == [
        "Other columns of text: subject.", "Other columns that may be labels: urgent.",
    ]  # fmt: skip
    chosen = survey({"train": path}, tiny.tokenizer, "subject", "urgent")
    assert (chosen.other_texts, chosen.other_labels) == ((), ())


NAMES = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(
    columns=st.lists(NAMES, min_size=2, max_size=4),
    classes=st.lists(NAMES, min_size=2, max_size=4, unique=True),
)
def test_any_names_of_columns_and_classes_stay_as_they_are(columns, classes):
    found = Survey(
        {"train": Path("a b.csv")}, tuple(columns), (columns[0],), columns[1],
        FoundLabels("classification", dict.fromkeys(classes, 5), None, 1),
        {"train": [Row(("x",), "y")]}, np.array([3]),
    )  # fmt: skip
    (fields,) = tomllib.loads(draft({"a.b": found}, Path(), 2)).values()
    assert (fields["text"], fields["label"]) == (columns[0], columns[1])
    assert fields["classes"] == classes
    assert fields["train"] == "a b.csv"


def test_what_is_wrong_with_the_data_is_said(tmp_path, tiny):
    train = [("a dog", "x")] * 12 + [("a cat", "x"), ("a cat", "y"), (" ", "y"), ("a film", "")]
    files = {
        "train": write(tmp_path / "train.csv", ["t", "l"], train),
        "dev": write(tmp_path / "dev.csv", ["t", "l"], [("a dog", "x"), ("new " * 60, "y")]),
    }
    found = survey(files, tiny.tokenizer)
    assert (found.text, found.label, found.labels.classes) == (("t",), "l", ("x", "y"))
    assert (found.blank, found.repeated, found.contradicted, found.leaked("dev")) == (1, 12, 1, 1)
    told = "\n".join(remarks(found, 64))
    for part in (
        "1 rows have no label", "1 rows have a blank text", "12 training rows repeat",
        "the same text has several labels", "1 dev rows have the text", "uneven, 14 to 3",
        "Fewer than 10 rows: y", "5.6% of the texts are cut",
    ):  # fmt: skip
        assert part in told


@pytest.mark.parametrize(
    ("header", "label", "text"),
    [
        (
            ["id", "question1", "question2", "is_duplicate"],
            "is_duplicate",
            ("question1", "question2"),
        ),
        (["a", "Category", "body"], "Category", ("body",)),
        (["premise", "hypothesis", "label"], "label", ("premise", "hypothesis")),
    ],
)
def test_columns_are_guessed(header, label, text):
    width = {name: "w" * (9 if name in text else 1) for name in header}
    rows = [
        [f"{width[name]}{n % (3 if name == label else 50)}" for name in header] for n in range(50)
    ]
    assert guess_label(header, rows) == label
    assert guess_text(header, rows, label) == text


def test_a_column_of_labels_that_has_another_name_has_the_fewest_values():
    rows = [[str(n), f"text {n}", str(n % 3), "same"] for n in range(30)]
    assert guess_label(["key", "t", "what", "constant"], rows) == "what"
    with pytest.raises(UserError, match="`label`: name the column"):
        guess_label(["key", "t"], [row[:2] for row in rows])


def test_files_that_do_not_fit_together():
    with pytest.raises(UserError, match=r"a\.csv is the train file of a already"):
        group_files([Path("a.csv"), Path("a-train.csv")])
    with pytest.raises(UserError, match=r"a-dev\.csv: there is no training file of a"):
        group_files([Path("a-dev.csv")])
