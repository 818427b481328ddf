"""What tables say about their task, and the task file that is drafted from that."""

import csv
import json
import tomllib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlora.data.draft import draft, remarks
from jaxlora.data.labels import FoundLabels
from jaxlora.data.survey import (
    Row,
    Survey,
    find_roles,
    group_files,
    guess_label,
    guess_text,
    survey,
)
from jaxlora.data.task_files import read_tasks
from jaxlora.utils.errors import Note, UserError


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
    assert 'pair = "separate"  # one vector per text; "joint" reads both texts' in path.read_text()
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
        "Rows without a label, which are left out: 1.",
        "Rows with a blank text, which are left out: 1.",
        "Training rows that repeat the text of an earlier row: 12.",
        "Training texts with more than one label: 1.",
        "Rows of dev whose text is also in train: 1; scores mislead.",
        'uneven, 14 to 3 rows: metric = "macro_f1" weights all classes equally, '
        'class_weights = "balanced" does so in training.',
        "Fewer than 10 rows: y", "5.6% of the texts are cut",
    ):  # fmt: skip
        assert part in told


def test_a_text_contradicts_itself_only_by_two_labels_that_are_used(tmp_path, tiny):
    rows = [("a", "x"), ("a", "y"), ("a", "z"), ("b", "y"), ("b", "n/a"), ("b", ""), (" ", "x")]
    train = write(tmp_path / "t.csv", ["t", "l"], [*rows, (" ", "y"), ("c", "z")])
    found = survey({"train": train}, tiny.tokenizer, "t", "l")
    assert found.contradicted == 1  # a; one label of b is missing, and blank texts are left out
    sets = write(tmp_path / "s.csv", ["t", "l"], [("a", "x|y"), ("a", ""), ("b", "x"), ("b", "y")])
    found = survey({"train": sets}, tiny.tokenizer, "t", "l")
    assert found.labels.kind == "multilabel" and found.contradicted == 2  # an empty set is a label


def test_words_among_numbers_are_remarked():
    labels = FoundLabels("classification", {"1": 12, "2": 12, "3": 12, "x": 12}, None, 0)
    found = Survey(
        {"train": Path("t.csv")}, ("t", "l"), ("t",), "l", labels,
        {"train": [Row(("a",), "1")]}, np.array([3]),
    )  # fmt: skip
    assert list(remarks(found, 4)) == ["Labels that are not numbers in a column of numbers: x."]


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


def test_only_a_separate_word_at_the_end_of_a_name_is_a_split():
    names = ["contest", "latest", "survival", "strain", "approval", "trainer"]
    grouped = group_files([Path(f"{name}.csv") for name in names])
    assert grouped == {name: {"train": Path(f"{name}.csv")} for name in names}
    for words in ("a-train a-dev", "a_TRAIN a_Valid", "a.train a.val", "train validation"):
        train, dev = (Path(f"{stem}.csv") for stem in words.split())
        (files,) = group_files([train, dev]).values()
        assert files == {"train": train, "dev": dev}


def test_files_that_do_not_fit_together():
    with pytest.raises(UserError, match=r"a\.csv is the train file of a already; rename one"):
        group_files([Path("a.csv"), Path("a-train.csv")])
    with pytest.raises(UserError, match=r"a-dev\.csv: there is no training file of a; name it"):
        group_files([Path("a-dev.csv")])


ROWS = [(f"a film {n}", ("bad", "good")[n % 2]) for n in range(40)]


def save(folder, *names):
    """Write a folder with splits as `datasets` does."""
    for name in names:
        part = folder / name
        part.mkdir(parents=True)
        texts, labels = zip(*ROWS, strict=True)
        table = pa.table({"text": texts, "label": labels})
        with pa.ipc.new_stream(str(part / "data.arrow"), table.schema) as writer:
            writer.write_table(table)
        (part / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": names}))


def test_two_splits_of_one_role_are_refused(tmp_path):
    save(tmp_path / "t", "train", "validation", "dev")
    for read in (lambda path: read_tasks([str(path)], "text", "label"), find_roles):
        with pytest.raises(
            UserError, match=r'validation and dev are both dev data; .* dev = ".*t/'
        ):
            read(tmp_path / "t")


def test_a_note_lists_the_splits_that_are_not_used(tmp_path):
    names = ("train", "validation_matched", "validation_mismatched", "test")
    save(tmp_path / "t", *names)
    with pytest.warns(Note, match="t: not used: validation_matched, validation_mismatched; .*TOML"):
        assert set(find_roles(tmp_path / "t")) == {"train", "test"}


# --- the command


def init(call, base, *words):
    return call("init", *words, "--base", base)


def test_a_draft_is_read_whatever_letters_its_name_has(tmp_path, tiny_base, call):
    for name in ("Anfragen für März", "тема", "v1.2", "a-b_c"):
        train = write(tmp_path / f"{name}.csv", ["text", "label"], ROWS)
        code, shown = init(call, tiny_base, train)
        assert code == 0, shown
        (spec,) = read_tasks([str(tmp_path / f"{name}.toml")])
        assert spec.task.name == name.replace(" ", "-")
        assert Path(spec.table.train).resolve() == train


def test_two_tables_of_one_name_are_refused(tmp_path, tiny_base, call):
    paths = [tmp_path / "my tickets.csv", tmp_path / "my-tickets.csv"]
    for path in paths:
        write(path, ["text", "label"], ROWS)
    code, shown = init(call, tiny_base, *paths)
    assert code == 2 and all(str(path) in shown for path in paths), shown
    assert "my-tickets" in shown and "rename one of the files" in shown
    assert not list(tmp_path.glob("*.toml"))


@pytest.mark.parametrize(
    ("given", "target", "files"),
    [
        (
            "hub:owner/films@v1",
            "films-v1",
            ["hub:owner/films@v1:train", "hub:owner/films@v1:validation"],
        ),
        ("hub:films", "hub-films", ["hub:films:train", "hub:films:validation"]),
        ("hub:owner/films:train", "films", ["hub:owner/films:train"]),
        (
            "hub:owner/films:train hub:owner/films:validation",
            "films",
            ["hub:owner/films:train", "hub:owner/films:validation"],
        ),
    ],
)
def test_a_draft_of_a_hub_data_set_keeps_its_address(
    tmp_path, monkeypatch, tiny_base, call, given, target, files
):
    monkeypatch.setenv("JAXLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name in ("owner--films@v1", "owner--films@latest", "films@latest"):
        save(tmp_path / "cache" / "datasets" / name, "train", "validation")
    code, shown = init(call, tiny_base, *given.split())
    assert code == 0 and shown.endswith(f"jaxlora train {target}.toml\n"), shown
    assert {path.name for path in tmp_path.iterdir()} == {"cache", f"{target}.toml"}
    (fields,) = tomllib.loads(Path(f"{target}.toml").read_text()).values()
    assert [fields["train"], *([fields["dev"]] if files[1:] else [])] == files
    (spec,) = read_tasks([f"{target}.toml"])
    assert spec.task.classes == ("bad", "good") and Path(spec.table.train).name == "train"
    assert init(call, tiny_base, *given.split(), "--output", "sub/x.toml")[0] == 0
    assert Path("sub/x.toml").read_text() == Path(f"{target}.toml").read_text()
