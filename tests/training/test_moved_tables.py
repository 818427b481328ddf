"""A run on tables of one's own goes on: cold cache or warm, here or where its folder moved."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import Silent

from jaxlora.serving import finished_run
from jaxlora.training import inputs as prepare
from jaxlora.training import run as train
from jaxlora.training import run_folder
from jaxlora.training.presets import make_settings
from jaxlora.training.run import RunOptions
from jaxlora.utils.errors import UserError

TOPIC = """
[topic]
kind = "classification"
classes = ["sport", "science"]
text = "headline"
label = "what"
train = "train.csv"
dev = "dev.csv"
test = "test.csv"
"""
WORDS = ("goal", "team", "match"), ("atom", "cell", "light")


def write_tables(folder):
    """A task's TOML and its three tables, in a folder of their own."""
    folder.mkdir()
    (folder / "tasks.toml").write_text(TOPIC)
    rows = [f"the {WORDS[n % 2][n % 3]} was good,{('sport', 'science')[n % 2]}" for n in range(20)]
    for split, count in (("train", 20), ("dev", 6), ("test", 4)):
        (folder / f"{split}.csv").write_text("\n".join(["headline,what", *rows[:count]]) + "\n")
    return folder


def settings_of(folder, base):
    tasks = (str(folder / "tasks.toml"),)
    flags = {"batch_size": 6, "max_steps": 3, "eval_every": 2, "max_length": 16, "rank": 2}
    return make_settings("lora1", tasks=tasks, base=str(base), **flags)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache that is cold at first."""
    monkeypatch.setenv("JAXLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_fingerprints_are_those_of_the_content(tmp_path, cache, tiny, tiny_base):
    """Cold cache, warm cache, other places and the order of a dict make no difference."""
    folder = write_tables(tmp_path / "tables")
    found = []

    def take(where):
        data = prepare.load_data(settings_of(where, tiny_base), tiny)
        found.append(prepare.fingerprints(tiny, data, 0))
        return data

    take(folder)
    data = take(folder)
    turned = {"topic": dict(reversed(data["topic"].items()))}
    found.append(prepare.fingerprints(tiny, turned, 0))
    shutil.rmtree(cache)
    take(shutil.move(folder, tmp_path / "moved"))
    assert all(one == found[0] for one in found)
    text = (tmp_path / "moved" / "dev.csv").read_text().replace("goal", "gate")
    (tmp_path / "moved" / "dev.csv").write_text(text)
    take(tmp_path / "moved")
    assert found[-1]["the data of topic"] != found[0]["the data of topic"]


@pytest.mark.parametrize("stop", [True, False], ids=["stopped", "finished"])
def test_a_run_goes_on_where_its_tables_moved(tmp_path, cache, tiny_base, stop):
    folder = write_tables(tmp_path / "tables")
    callback = Silent(stop_at=("topic", 2) if stop else None)
    if stop:
        with pytest.raises(KeyboardInterrupt):
            train.run(settings_of(folder, tiny_base), folder / "run", callback)
    else:
        train.run(settings_of(folder, tiny_base), folder / "run", callback)
    moved = Path(shutil.move(folder, tmp_path / "elsewhere"))
    result = train.run(
        settings_of(moved, tiny_base), moved / "run", Silent(), RunOptions(resume=True)
    )
    assert result["groups"]["topic"]["step"] == 3


def test_a_run_goes_on_where_its_base_moved(tmp_path, cache, tiny_base):
    folder, base = write_tables(tmp_path / "tables"), tmp_path / "base"
    shutil.copytree(tiny_base, base)
    with pytest.raises(KeyboardInterrupt):
        train.run(settings_of(folder, base), tmp_path / "run", Silent(("topic", 2)))
    moved = shutil.move(base, tmp_path / "other-base")
    result = train.run(
        settings_of(folder, moved), tmp_path / "run", Silent(), RunOptions(resume=True)
    )
    assert result["groups"]["topic"]["step"] == 3


def test_other_tables_and_other_columns_are_still_refused(tmp_path, cache, tiny, tiny_base):
    folder = write_tables(tmp_path / "tables")
    settings, out = settings_of(folder, tiny_base), tmp_path / "run"
    inputs = prepare.fingerprints(tiny, prepare.load_data(settings, tiny), 0)
    config = {"settings": settings.to_json(), "inputs": inputs, "versions": {}}
    run_folder.write_json(out / finished_run.CONFIG, config)
    run_folder.check(out, json.loads(json.dumps(settings.to_json())), resume=True)
    (folder / "tasks.toml").write_text(TOPIC + 'id = "headline"\n')
    with pytest.raises(UserError, match=r"\n  topic.id: nothing there, headline here$"):
        run_folder.check(out, settings_of(folder, tiny_base).to_json(), resume=True)
    (folder / "tasks.toml").write_text(TOPIC)
    (folder / "train.csv").write_text((folder / "train.csv").read_text().replace("goal", "gate"))
    changed = prepare.fingerprints(tiny, prepare.load_data(settings, tiny), 0)
    with pytest.raises(UserError, match="the data of topic changed"):
        run_folder.check_same_inputs(out, changed)


@pytest.mark.slow
def test_new_processes_go_on(tmp_path, tiny_base):
    """By the command, as its users do: warm cache, then moved, then moved with a cold cache."""
    folder = write_tables(tmp_path / "tables")
    script = Path(__file__).parents[2] / "experiments" / "run.py"

    def start(folder, cache, *more):
        flags = ("--variant=lora1", f"--base={tiny_base}", "--max-steps=2", "--batch-size=6")
        tables = (str(folder / "tasks.toml"), f"--out={folder / 'run'}")
        command = [sys.executable, str(script), *flags, "--max-length=16", *tables, *more]
        environment = os.environ | {"JAXLORA_CACHE": str(cache)}
        subprocess.run(command, check=True, capture_output=True, env=environment)

    start(folder, tmp_path / "cache")
    (folder / "run" / finished_run.RESULT).unlink()  # as if it had been killed before the last line
    start(folder, tmp_path / "cache", "--resume")
    moved = Path(shutil.move(folder, tmp_path / "moved"))
    start(moved, tmp_path / "cache", "--resume")
    (moved / "run" / finished_run.RESULT).unlink()
    start(moved, tmp_path / "cold", "--resume")
