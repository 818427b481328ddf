"""Tasks whose names have letters of any script, from packed tables to answers and exports."""

import csv
import gzip
import json

import pyarrow.parquet as pq
import pytest
from tiny import Silent, sentence

from jaxlora.cli import main
from jaxlora.data.task_files import check_name, name_of, read_tasks
from jaxlora.serving import bank
from jaxlora.serving.predict_table import predict_file
from jaxlora.serving.predictor import Predictor
from jaxlora.tasks.sharing import group_name
from jaxlora.training import metrics_log, run
from jaxlora.training.presets import make_settings
from jaxlora.utils.errors import UserError

NAMES = ("тема", "हिन्दी-2")


@pytest.mark.parametrize("name", [*NAMES, "Größe", "主题", "a.b_c-d", "x" * 64])
def test_names_may_have_letters_of_any_script(name):
    assert check_name(name, "x") == name


@pytest.mark.parametrize(
    "name",
    ["", "a b", "a/b", "..", "-a", ".a", "a\\b", "a|b", "a,b", "a+b", "a=b", "a\n", "a\u202eb",
     "\u0301a", "x" * 65, "𐌰" * 41, "a\ud800", "🙂", "Gro\u0308ße"],
)  # fmt: skip
def test_names_that_files_and_flags_cannot_have_are_refused(name):
    with pytest.raises(UserError, match="cannot be a name"):
        check_name(name, "x")


def test_decomposed_letters_of_a_task_file_are_composed(tmp_path):
    (tmp_path / "x.csv").write_text("text,label\na,1\nb,0\nc,1\n")
    path = tmp_path / "x.toml"
    path.write_text('["Gro\u0308ße"]\ntext = "text"\nlabel = "label"\ntrain = "x.csv"\n')
    (found,) = read_tasks([str(path), "Größe.epochs=3"])
    assert found.task.name == "Größe" and found.own == (("epochs", 3),)
    assert name_of(tmp_path / "Gro\u0308ße (neu).csv") == "Größe-neu"
    assert name_of(tmp_path / "🙂.csv") == "task"


def test_names_of_groups_fit_into_names_of_files():
    many = [f"主题{n}" for n in range(60)]
    name = group_name(many)
    assert len(name.encode()) <= 200 and name.startswith("主题0+主题1")
    assert group_name([*many[:-1], "主题"]) != name


def write_table(path, rng):
    """Forty rows whose labels are words; the dev set is held out."""
    lines = [("key", "Überschrift", "класс")]
    lines += [(f"r{n}", sentence(rng), ("да", "нет", "?")[n % 3]) for n in range(40)]
    with gzip.open(path, "wt", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(lines)
    return lines[1:]


@pytest.mark.slow
def test_such_tasks_are_trained_kept_predicted_and_exported(tmp_path, tiny_base, capsys):
    import random

    rows = write_table(tmp_path / "t.csv.gz", random.Random(0))
    toml = "".join(
        f'["{name}"]\ntext = "Überschrift"\nlabel = "класс"\nid = "key"\ntrain = "t.csv.gz"\n'
        for name in NAMES
    )
    (tmp_path / "t.toml").write_text(toml, encoding="utf-8")
    settings = make_settings(
        tasks=(str(tmp_path / "t.toml"),), base=str(tiny_base), max_steps=2, batch_size=8,
        rank=2, max_length=16,
    )  # fmt: skip
    out, folder = tmp_path / "run", tmp_path / "bank"
    run.run(settings, out, Silent())
    records = metrics_log.read_records(out)
    assert {record["group"] for record in records} == set(NAMES)
    for name in NAMES:
        with (out / "predictions" / f"{name}-dev.csv").open(encoding="utf-8") as file:
            found = list(csv.DictReader(file))
        assert set(found[0]) >= {"predicted_class", "label_class", "p(да)", "p(нет)", "p(?)"}
        labels = {key: label for key, _, label in rows}
        assert all(row["label_class"] == labels[row["id"]] for row in found)

    assert main.main(["bank", "add", str(folder), f"--run={out}"]) == 0
    assert bank.verify(folder) == []
    assert all(path.name.isascii() for path in folder.rglob("*"))
    assert main.main(["bank", "verify", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.partition("\n")[2]) == {"problems": []}

    predictor = Predictor.load(folder)
    count = predict_file(predictor, tmp_path / "t.csv.gz", tmp_path / "o.parquet", NAMES[1])
    table = pq.read_table(tmp_path / "o.parquet").to_pylist()
    assert count == 40 and [row["id"] for row in table] == [key for key, *_ in rows]
    answers = predictor([(NAMES[1], text) for _, text, _ in rows])
    assert [row["label"] for row in table] == [answer.label for answer in answers]
    assert [dict(row["probabilities"]) for row in table] == [a.probabilities for a in answers]

    words = ["evaluate", str(folder), f"--input={tmp_path / 't.csv.gz'}", f"--task={NAMES[0]}"]
    assert main.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 40
    for kind in ("merged", "peft"):
        place = tmp_path / kind
        assert (
            main.main(["export", kind, str(place), f"--bank={folder}", f"--task={NAMES[0]}"]) == 0
        )
        assert any(place.iterdir())
    added = ["import", "peft", str(tmp_path / "peft"), f"--bank={folder}", "--as=копия"]
    assert main.main(added) == 0
    again = Predictor.load(folder)([("копия", text) for _, text, _ in rows])
    first = predictor([(NAMES[0], text) for _, text, _ in rows])
    assert [answer.label for answer in again] == [answer.label for answer in first]
