import json

import pytest

from jaxlora.training import metrics_log, run_folder
from jaxlora.training.presets import make_settings
from jaxlora.utils import distributed, files
from jaxlora.utils.errors import UserError


def test_a_half_written_last_line_is_left_out(tmp_path):
    whole = '{"kind": "train", "step": 1, "group": "a"}'
    (tmp_path / "metrics.jsonl").write_text(f"{whole}\n{whole[:-5]}")
    assert [r["step"] for r in metrics_log.read_records(tmp_path)] == [1]


def test_log_drops_what_came_after_the_checkpoint(tmp_path):
    log = metrics_log.MetricsLog(tmp_path, {})
    for group, step in (("a", 1), ("a", 2), ("b", 1), ("a", 3)):
        log.write({"kind": "train", "group": group, "step": step, "loss": {"sst": 1.0}})
    log.close()
    log = metrics_log.MetricsLog(tmp_path, {"a": 2})
    log.close()
    assert [(r["group"], r["step"]) for r in metrics_log.read_records(tmp_path)] == [
        ("a", 1),
        ("a", 2),
    ]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_of_many_processes_the_others_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "is_primary", lambda: False)
    monkeypatch.setattr(metrics_log.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    log = metrics_log.MetricsLog(tmp_path / "run", {})
    log.write({"kind": "train", "group": "a", "step": 1, "loss": {"sst": 1.0}})
    log.close()
    assert not list((tmp_path / "temporary").iterdir()) and not (tmp_path / "run").exists()


def test_flatten():
    record = {"kind": "eval", "step": 3, "score": 0.5, "dev": {"sst": 0.25}}
    assert dict(metrics_log.flatten(record)) == {"score": 0.5, "dev.sst": 0.25}


def test_write_text_leaves_nothing_behind_when_it_fails(tmp_path):
    files.write_text(tmp_path / "a", "old")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(tmp_path / "a", "\ud800")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_predictions_are_csv(tmp_path):
    run_folder.write_table(
        tmp_path / "p" / "x.csv", {"id": ["a,b", "c"], "prediction": ["1", "0.5000"]}
    )
    assert (tmp_path / "p" / "x.csv").read_text() == 'id,prediction\n"a,b",1\nc,0.5000\n'


def test_read_json_names_the_file(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: missing"):
        run_folder.read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        run_folder.read_json(tmp_path / "config.json")


def test_a_number_that_no_float_holds_ends_the_records(tmp_path):
    record = {"kind": "train", "group": "sst", "step": 1, "loss": 1}
    lines = [json.dumps(record), json.dumps(record | {"loss": 10**400})]
    (tmp_path / metrics_log.METRICS).write_text("\n".join(lines))
    assert metrics_log.read_records(tmp_path) == [record]


def test_a_number_that_no_float_holds_is_no_json(tmp_path):
    (tmp_path / "x.json").write_text(f'{{"alpha": {10**400}}}')
    with pytest.raises(UserError, match="a number of 401 digits"):
        run_folder.read_json(tmp_path / "x.json")


def test_a_run_goes_on_when_only_titles_of_tasks_changed(tmp_path):
    """A demo run of an earlier version called its made-up data SST-5."""
    settings = make_settings("lora3").to_json()
    (tmp_path / "config.json").write_text(
        json.dumps({"settings": settings, "inputs": {}}).replace("made-up sentiment", "SST-5")
    )
    run_folder.check(tmp_path, settings, resume=True)
    with pytest.raises(UserError, match="`epochs`"):
        run_folder.check(tmp_path, settings | {"epochs": 7}, resume=True)
    other = json.loads(json.dumps(settings).replace('"high": 5.0', '"high": 4.0'))
    with pytest.raises(UserError, match=r"\n  sts.range: 0, 5 there, 0, 4 here$"):
        run_folder.check(tmp_path, other, resume=True)
