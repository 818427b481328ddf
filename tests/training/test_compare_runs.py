"""Runs side by side: what differs, which score is best, and what cannot be compared."""

import json

import pytest

from jaxlora.cli import main
from jaxlora.cli.flags import naming_flags
from jaxlora.cli.train import Flags
from jaxlora.training import compare_runs, run_folder
from jaxlora.training.presets import make_settings
from jaxlora.utils.errors import UserError


def write_run(folder, scores, *, test=None, inputs=None, metric="accuracy", errors=(), **settings):
    """Write the files of a run; without scores it is not finished."""
    folder.mkdir()
    tasks = [
        {"task": {"name": name, "kind": "binary"}, "weight": settings.pop(f"{name}_weight", 1.0)}
        for name in ("spam", "mood")
    ]
    values = {"rank": 4, "epochs": 3, "target_modules": ["query"], "tasks": tasks, **settings}
    prints = {"the base's weights": "b", "the order of examples": str(settings.get("seed", 0))}
    for name in ("spam", "mood"):
        prints |= {f"the data of {name}": "d", f"the dev set of {name}": "v"}
    config = {"settings": values, "inputs": prints | (inputs or {}), "versions": {}}
    (folder / "config.json").write_text(json.dumps(config))
    if scores is not None:
        result = {
            "metrics": {name: f"{name} {metric}" for name in scores}, "dev": scores,
            "dev_mean": None if errors else sum(scores.values()) / len(scores),
            "lower_is_better": list(errors), "test": test or {},
            "parameters": {"incremental": 1_500_000}, "train_seconds": 61.0,
        }  # fmt: skip
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def rows(found):
    return {(row.split, row.task): (row.values, row.best) for row in found.scores}


def test_only_settings_that_differ_are_shown_as_they_are_typed(tmp_path):
    one = write_run(tmp_path / "a", {"spam": 0.5, "mood": 0.25}, rank=8, spam_weight=2.0)
    other = write_run(tmp_path / "b", {"spam": 0.5, "mood": 0.75}, seed=3)
    found = compare_runs.compare((one, other))
    assert found.settings == {
        "rank": (8, 4), "spam.weight": (2.0, 1.0), "seed": (None, 3),
    }  # fmt: skip
    assert found.notes == ()  # the order of examples follows from the seed
    assert rows(found) == {
        ("dev", "spam"): ((0.5, 0.5), (True, True)),
        ("dev", "mood"): ((0.25, 0.75), (False, True)),
        ("dev", "mean"): ((0.375, 0.625), (False, True)),
    }


def test_unfinished_runs_have_no_scores_and_are_named(tmp_path):
    done = write_run(tmp_path / "done", {"spam": 0.5})
    best = write_run(tmp_path / "best", {"spam": 0.75}, test={"spam": 0.5})
    begun = write_run(tmp_path / "begun", None, rank=1)
    found = compare_runs.compare((done, best, begun))
    assert found.notes == (f"{begun}: is not finished, so it has no scores; resume it",)
    assert rows(found)["dev", "spam"] == ((0.5, 0.75, None), (False, True, False))
    assert rows(found)["test", "spam"] == ((None, 0.5, None), (False, False, False))


def test_scores_on_other_data_are_named_and_none_is_best(tmp_path):
    one = write_run(tmp_path / "a", {"spam": 0.5, "mood": 0.5})
    other = {"the dev set of spam": "w", "the data of spam": "e", "the base's weights": "c"}
    found = compare_runs.compare(
        (one, write_run(tmp_path / "b", {"spam": 1.0, "mood": 1.0}, inputs=other))
    )
    assert set(found.notes) == {
        "the data of spam is not the same in all runs",
        "the dev set of spam is not the same in all runs: its scores cannot be compared",
        "the base's weights is not the same in all runs",
    }
    best = {place: best for place, (_, best) in rows(found).items()}
    assert best["dev", "spam"] == best["dev", "mean"] == (False, False)
    assert best["dev", "mood"] == (False, True)


def test_the_lowest_error_is_best_and_has_no_mean(tmp_path):
    kept = {"metric": "mean absolute error", "errors": ["spam"]}
    found = compare_runs.compare(
        [write_run(tmp_path / name, {"spam": s}, **kept) for name, s in (("a", 0.2), ("b", 0.9))]
    )
    assert rows(found) == {("dev", "spam"): ((0.2, 0.9), (True, False))}


def test_a_run_without_a_task_leaves_the_others_comparable(tmp_path):
    runs = [
        write_run(tmp_path / name, scores)
        for name, scores in (("a", {"spam": 0.5}), ("b", {"spam": 0.7}), ("c", {"mood": 0.5}))
    ]
    other = json.loads((runs[2] / "config.json").read_text())
    del other["inputs"]["the dev set of spam"]
    (runs[2] / "config.json").write_text(json.dumps(other))
    found = rows(compare_runs.compare(runs))
    assert found["dev", "spam"] == ((0.5, 0.7, None), (False, True, False))


def test_of_a_task_that_only_some_runs_have_one_row_is_shown(tmp_path):
    one, other = (write_run(tmp_path / name, {"spam": 0.5}) for name in "ab")
    config = json.loads((other / "config.json").read_text())
    del config["settings"]["tasks"][1]
    (other / "config.json").write_text(json.dumps(config))
    found = compare_runs.compare((one, other))
    assert found.settings == {"[mood]": ("trained", None)}


def test_scores_by_other_metrics_stand_in_rows_of_their_own(tmp_path):
    one = write_run(tmp_path / "a", {"spam": 0.5})
    other = write_run(tmp_path / "b", {"spam": 0.75}, metric="macro F1")
    found = [r for r in compare_runs.compare((one, other)).scores if r.task == "spam"]
    assert [(row.metric, row.values) for row in found] == [
        ("spam accuracy", (0.5, None)), ("spam macro F1", (None, 0.75)),
    ]  # fmt: skip
    assert not any(any(row.best) for row in compare_runs.compare((one, other)).scores)


@pytest.mark.parametrize("names", [(), ("a",), ("a", "missing"), ("a", "empty")])
def test_what_is_no_run_is_refused(tmp_path, names):
    write_run(tmp_path / "a", {"spam": 0.5})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"name two runs or more|is .* the folder of a run\?"):
        compare_runs.compare([tmp_path / name for name in names])


def test_a_damaged_result_is_named(tmp_path):
    folders = [write_run(tmp_path / name, {"spam": 0.5}) for name in "ab"]
    (folders[1] / "result.json").write_text("[]")
    with pytest.raises(UserError, match=r"b/result\.json: not a JSON object"):
        compare_runs.compare(folders)
    (folders[1] / "result.json").write_text('{"dev": {}}')
    with pytest.raises(UserError, match=r"b/result\.json: has no dev_mean, metrics, "):
        compare_runs.compare(folders)


def test_the_command_prints_whole_columns_and_json(tmp_path, capsys):
    long = "a-run-" * 30
    one = write_run(tmp_path / long, {"spam": 0.5}, rank=16)
    other = write_run(tmp_path / "b", {"spam": 0.75}, target_modules=["query", "value"])
    assert main.main(["compare", str(one), str(other)]) == 0
    said = capsys.readouterr().out
    assert str(one) in said and "0.7500 *" in said and "query, value" in said and "1.50M" in said
    assert "--target-modules" in said
    assert main.main(["compare", str(one), str(other), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"] == {"rank": [16, 4], "target_modules": [["query"], ["query", "value"]]}
    assert found["runs"][0] == {"folder": str(one), "finished": True}
    assert found["scores"][0]["best"] == [False, True]
    assert main.main(["compare", str(one)]) == 2
    assert "name two runs or more" in capsys.readouterr().err


TOML = """
[spam]
text = "text"
label = "label"
train = "{folder}/t.csv"
kind = "{kind}"
classes = ["no", "yes"]
threshold = {threshold}
weight = {weight}
epochs = {epochs}
"""


def settings_of(folder, **fields):
    fields = {"kind": "binary", "threshold": 0.5, "weight": 1.0, "epochs": 3} | fields
    own = {name: fields.pop(name) for name in ("rank", "lora_dropout") if name in fields}
    (folder / "t.csv").write_text("text,label\na,yes\nb,no\n" * 9)
    (folder / "t.toml").write_text(TOML.format(folder=folder, **fields))
    return make_settings(tasks=(str(folder / "t.toml"),), **own).to_json()


def test_a_run_of_an_earlier_version_differs_only_in_what_was_typed(tmp_path):
    runs = [write_run(tmp_path / name, {"spam": 0.5}) for name in "ab"]
    values = settings_of(tmp_path), settings_of(tmp_path, rank=3, threshold='"dev"', epochs=4)
    for run, settings in zip(runs, values, strict=True):
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(config | {"settings": settings}))
    old = json.loads((runs[0] / "config.json").read_text())
    for name in ("rslora", "lora_dropout", "surgery"):  # which it had not
        del old["settings"][name]
    for name in ("pair_encoding", "head", "label_delimiter"):
        del old["settings"]["tasks"][0]["task"][name]
    (runs[0] / "config.json").write_text(json.dumps(old))
    found = compare_runs.compare(runs).settings
    assert found == {
        "rank": (8, 3), "alpha": (8.0, 3.0), "spam.threshold": ([0.5], "dev"),
        "spam.epochs": (3, 4),
    }  # fmt: skip


def test_a_resumed_run_says_what_was_typed_otherwise(tmp_path):
    run = write_run(tmp_path / "a", None)
    config = json.loads((run / "config.json").read_text())
    config["settings"] = settings_of(tmp_path, lora_dropout=0.1)
    (run / "config.json").write_text(json.dumps(config))
    run_folder.check(run, config["settings"], resume=True)
    changed = settings_of(tmp_path, weight=2.0, threshold=0.25, epochs=7)
    with pytest.raises(UserError) as caught:
        run_folder.check(run, changed, resume=True)
    head, *lines = str(caught.value).splitlines()
    assert "its run has other settings; resume it with the same settings" in head
    assert "\n  --lora-dropout: 0.1 there" in naming_flags(Flags)(str(caught.value))
    assert sorted(lines) == [
        "  `lora_dropout`: 0.1 there, 0 here", "  spam.epochs: 3 there, 7 here",
        "  spam.threshold: 0.5 there, 0.25 here", "  spam.weight: 1 there, 2 here",
    ]  # fmt: skip
    (run / "result.json").write_text("{}")
    for epochs, remedy in ((7, r"it is finished; train on .* `start_from=.*a`"), (2, "resume it")):
        settings = settings_of(tmp_path, lora_dropout=0.1, epochs=epochs)
        with pytest.raises(UserError, match=remedy):
            run_folder.check(run, settings, resume=True)


@pytest.mark.parametrize(
    "damage", [{"tasks": 3}, {"tasks": [3, {"task": 4, "own": [5]}]}, {"groups": {"a": 1}}]
)
def test_settings_that_are_none_are_compared_as_they_stand(tmp_path, damage):
    run = write_run(tmp_path / "a", None)
    config = json.loads((run / "config.json").read_text())
    config["settings"] = settings_of(tmp_path)
    (run / "config.json").write_text(json.dumps(config | {"settings": config["settings"] | damage}))
    with pytest.raises(UserError, match="other settings"):
        run_folder.check(run, config["settings"], resume=True)
    assert compare_runs.compare([run, write_run(tmp_path / "b", None)]).settings
