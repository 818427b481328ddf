"""What may happen to a run: it is stopped, its files are damaged, a loss is not finite, …"""

import dataclasses
import errno
import hashlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import Silent, leaves_equal, short, trained_trees, write_data

from jaxlora.serving import bank, finished_run
from jaxlora.training import checkpoint, loop, metrics_log, run_folder
from jaxlora.training import run as train
from jaxlora.training.run import RunOptions
from jaxlora.utils import process as host
from jaxlora.utils.errors import Stopped, UserError

ROOT = Path(__file__).parents[2]
GROUP = "sst+para+sts"


class Signalling(Silent):
    """Sends a signal to this very process at a training record."""

    def __init__(self, step, number, times=1, kind="train"):
        super().__init__()
        self.at, self.number, self.times = (kind, step), number, times

    def record(self, record):
        super().record(record)
        if (record["kind"], record["step"]) == self.at:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


def models(tmp_path, *names):
    return [trained_trees(tmp_path / name) for name in names]


def timeless(out):
    """The records of a run, all but the time they took."""
    records = metrics_log.read_records(out)
    return [{k: v for k, v in r.items() if k != "steps_per_second"} for r in records]


@pytest.fixture
def whole(finished_lora3, tmp_path):
    """An uninterrupted run."""
    return shutil.copytree(finished_lora3, tmp_path / "whole")


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_a_signal_saves_and_says_so(make, whole, tmp_path, number):
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=r"at step 3 of 7, saved; .* `resume=True`") as stopped:
        train.run(make("lora3"), tmp_path / "parts", Signalling(2, number))
    assert stopped.value.signal == number
    assert signal.getsignal(number) == before
    callback = Silent()
    train.run(make("lora3"), tmp_path / "parts", callback, RunOptions(resume=True))
    assert callback.started == (GROUP, 3, 7)
    leaves_equal(*models(tmp_path, "whole", "parts"))


def test_a_second_signal_stops_at_once(make, tmp_path):
    with pytest.raises(Stopped, match="nothing was saved"):
        train.run(make("lora3"), tmp_path / "run", Signalling(2, signal.SIGTERM, times=2))


def test_a_signal_during_the_last_evaluation_of_a_cohort_is_not_lost(make, tmp_path):
    """Its encoder is the first of two that train one after another."""
    settings = make("baseline4", only=("sst", "sts"), max_steps=1)
    with pytest.raises(Stopped, match="at the end, saved") as stopped:
        train.run(settings, tmp_path / "run", Signalling(1, signal.SIGTERM, kind="eval"))
    assert stopped.value.saved
    begun = {r["group"] for r in metrics_log.read_records(tmp_path / "run")}
    assert begun == {"sst"}
    train.run(settings, tmp_path / "run", Silent(), RunOptions(resume=True))
    assert trained_trees(tmp_path / "run").keys() == {"sst", "sts"}


def test_outside_the_main_thread_a_run_trains_all_the_same(make, tmp_path):
    thread = threading.Thread(
        target=train.run, args=(make("baseline1"), tmp_path / "run", Silent())
    )
    thread.start()
    thread.join()
    assert (tmp_path / "run" / finished_run.RESULT).exists()


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (Stopped(signal.SIGTERM, "here"), 143, "stopped here"),
        (Stopped(signal.SIGINT), 130, "nothing was saved"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (UserError("--rank is wrong"), 2, "error: --rank is wrong"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "is there room"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, "the reader of the output has exited"),
        (None, 0, ""),
    ],
)
def test_exit_codes(raised, code, said, capsys):
    def main():
        if raised is not None:
            raise raised

    assert host.exit_code(main) == code
    assert said in capsys.readouterr().err


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def scratch(path):
    """Flip a bit here and there: Orbax's files have parts that nobody reads."""
    content = np.frombuffer(path.read_bytes(), np.uint8).copy()
    content[::50] ^= 4
    path.write_bytes(content.tobytes())


def biggest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


DAMAGE = {
    "truncated": lambda step: truncate(biggest(step)),
    "emptied": lambda step: empty(biggest(step)),
    "one bit": lambda step: flip(biggest(step)),
    "progress": lambda step: flip(biggest(step / "progress")),
    "a file gone": lambda step: biggest(step).unlink(),
    "a file more": lambda step: (step / "more").write_text("x"),
    "no checksums": lambda step: step.with_name(f"{step.name}.sha256.json").unlink(),
    "checksums cut off": lambda step: truncate(step.with_name(f"{step.name}.sha256.json")),
}


@pytest.fixture(scope="module")
def stopped(make, finished_lora3, tmp_path_factory):
    """A run that was stopped after step 6: its checkpoints are those of steps 4 and 6."""
    folder = tmp_path_factory.mktemp("stopped")
    shutil.copytree(finished_lora3, folder / "whole")
    with pytest.raises(KeyboardInterrupt):
        train.run(make("lora3"), folder / "parts", Silent((GROUP, 7)))
    return folder


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(name, marks=() if name in ("one bit", "a file gone") else pytest.mark.slow)
        for name in DAMAGE
    ],
)
def test_of_damaged_checkpoints_the_last_good_one_is_taken(make, stopped, tmp_path, damage):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    states = tmp_path / "parts" / run_folder.STATES / GROUP
    DAMAGE[damage](states / "6")
    callback = Silent()
    train.run(make("lora3"), tmp_path / "parts", callback, RunOptions(resume=True))
    assert callback.started == (GROUP, 4, 7)
    (note,) = callback.notes
    assert str(states / "6") in note and "goes on from step 4" in note
    leaves_equal(*models(tmp_path, "whole", "parts"))
    assert timeless(tmp_path / "parts") == timeless(tmp_path / "whole")


def test_without_a_good_checkpoint_the_group_starts_again(make, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "parts" / run_folder.STATES / GROUP).glob("[0-9]"):
        flip(biggest(path))
    callback = Silent()
    train.run(make("lora3"), tmp_path / "parts", callback, RunOptions(resume=True))
    assert callback.started == (GROUP, 0, 7)
    assert len(callback.notes) == 2 and "from step 0" in callback.notes[-1]
    leaves_equal(*models(tmp_path, "whole", "parts"))


def test_a_damaged_model_is_not_loaded(whole):
    scratch(biggest(whole / finished_run.MODEL))
    trees = bank.load(whole).trees  # reads nothing yet
    with pytest.raises(UserError, match=r"model/adapters/.*: damaged"):
        dict(trees)


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_ones(
    make, stopped, tmp_path, monkeypatch
):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    run = tmp_path / "run"
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"make room.*`resume=True`"),
    ):
        patch.setattr(checkpoint, "_sums", full)  # the third thing that a save does
        train.run(make("lora3"), run, Silent())
    assert not (run / finished_run.RESULT).exists()
    train.run(make("lora3"), run, Silent(), RunOptions(resume=True))
    leaves_equal(*models(tmp_path, "run"), *models(stopped, "whole"))


def flags_of(tiny_base, data_dir, **more):
    flags = {"variant": "lora3", "base": tiny_base, "data_dir": data_dir, **short("lora3", **more)}
    return [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]


IN_A_SMALL_DISK = """
set -u
mount -t tmpfs -o size=64m none "$DISK"
cp -r "$BEFORE" "$DISK/run"
mount -o "remount,$OPTION" "$DISK"
"$@" --out="$DISK/run"; echo "code $?"
(cd "$DISK/run/states" && find . -type f -print0 | sort -z | xargs -0 sha256sum) > "$AFTER/sums"
mount -o remount,rw,size=64m "$DISK"
"$@" --out="$DISK/run" && cp -r "$DISK/run" "$AFTER/run"
"""


def on_a_small_disk(option, before, tmp_path, tiny_base, data_dir):
    """Go on with a run on a file system of its own, once with a mount option, once without."""
    (tmp_path / "disk").mkdir()
    paths = {"DISK": tmp_path / "disk", "AFTER": tmp_path, "BEFORE": before, "OPTION": option}
    run = [sys.executable, str(ROOT / "experiments" / "run.py"), *flags_of(tiny_base, data_dir)]
    return subprocess.run(
        ["unshare", "-rm", "bash", "-c", IN_A_SMALL_DISK, "bash", *run, "--resume"],
        env=os.environ | {name: str(value) for name, value in paths.items()},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def sums(folder):
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    return {f"./{f}": hashlib.sha256((folder / f).read_bytes()).hexdigest() for f in files}


@pytest.mark.slow
@pytest.mark.parametrize("option", ["size", "ro"])
def test_a_full_and_a_read_only_disk(tiny_base, data_dir, stopped, tmp_path, option):
    before = stopped / "parts"
    used = sum(-(-p.stat().st_size // 4096) * 4 for p in before.rglob("*") if p.is_file())
    option = f"size={used + 80}k" if option == "size" else option
    done = on_a_small_disk(option, before, tmp_path, tiny_base, data_dir)
    assert done.returncode == 0 and "code 2" in done.stdout, done
    assert "error: " in done.stderr
    ours = [f'File "{ROOT / name}/' for name in ("jaxlora", "experiments")]
    assert not any(name in done.stderr for name in ours)  # a library's thread may say more
    left = dict(line.split("  ")[::-1] for line in (tmp_path / "sums").read_text().splitlines())
    kept = sums(before / run_folder.STATES)
    assert kept and kept.items() <= left.items()  # the old checkpoints are as they were
    leaves_equal(*models(tmp_path, "run"), *models(stopped, "whole"))


def test_one_run_at_a_time_in_a_folder(make, tmp_path):
    class Second(Silent):
        def record(self, record):
            super().record(record)
            with pytest.raises(UserError, match="another run is writing"):
                train.run(make("baseline1"), tmp_path / "run", Silent(), RunOptions(resume=True))

    first = Second()
    train.run(make("baseline1"), tmp_path / "run", first)
    assert first.records


def with_nan(monkeypatch, task, number):
    """One training label of a task is not a number."""
    load_data = train.inputs.load_data

    def damaged(settings, base):
        data = load_data(settings, base)
        examples = data[task]["train"]
        labels = examples.labels.copy()
        labels[number] = np.nan
        data[task]["train"] = dataclasses.replace(examples, labels=labels)
        return data

    monkeypatch.setattr(train.inputs, "load_data", damaged)


@pytest.mark.parametrize("variant", ["lora3", "baseline1"])
def test_a_loss_that_is_not_finite_is_named(make, tmp_path, monkeypatch, variant):
    with_nan(monkeypatch, "sts", 11)
    with pytest.raises(UserError, match=r"step \d of .*: the loss of sts is nan \(examples sts-"):
        train.run(make(variant), tmp_path / "run", Silent())


def test_of_groups_in_one_step_the_one_whose_loss_overflowed_is_named(make, tmp_path, monkeypatch):
    """Its activations may make the gradients of the others NaN, whose losses are finite."""
    add = loop.Window.add

    def overflowing(self, metrics):
        failed = {name: one._replace(finite=np.bool_(False)) for name, one in metrics.items()}
        if "sts" in failed:
            failed["sts"] = failed["sts"]._replace(losses=np.array([np.nan]))
        add(self, failed)

    monkeypatch.setattr(loop.Window, "add", overflowing)
    with pytest.raises(UserError, match=r"step 1 of sts: the loss of sts is nan .*nor is .*para"):
        train.run(make("lora1"), tmp_path / "run", Silent())


def test_steps_that_are_not_finite_are_left_out_and_counted(make, tmp_path, monkeypatch):
    with_nan(monkeypatch, "sts", 11)
    with pytest.raises(UserError, match="`skip_nonfinite=True`"):
        train.run(make("lora3"), tmp_path / "run", Silent())
    result = train.run(
        make("lora3"), tmp_path / "run", Silent(), RunOptions(resume=True, skip_nonfinite=True)
    )
    # 19 examples are drawn 40 times in 7 steps of 6, so this one in two steps or three.
    assert result["groups"][GROUP]["skipped"] in (2, 3)
    records = metrics_log.read_records(tmp_path / "run")
    assert sum(r.get("skipped", 0) for r in records) == result["groups"][GROUP]["skipped"]
    assert all(np.isfinite(r["loss"]["sts"]) for r in records if r["kind"] == "train")
    (model,) = models(tmp_path, "run")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(model))


@pytest.mark.slow
def test_a_record_counts_the_steps_left_out_before_it(make, tmp_path, monkeypatch):
    """Each window is one step here; a bad one has no record, also when the run dies after it."""
    with_nan(monkeypatch, "sts", 11)
    settings, skip = make("lora3", eval_every=1), {"skip_nonfinite": True}
    result = train.run(settings, tmp_path / "whole", Silent(), RunOptions(**skip))
    records = timeless(tmp_path / "whole")
    logged = [r["step"] for r in records if r["kind"] == "train"]
    assert len(logged) == 7 - result["groups"][GROUP]["skipped"]
    after_bad = next(step for step in logged if step > 1 and step - 1 not in logged)
    with pytest.raises(KeyboardInterrupt):
        train.run(settings, tmp_path / "parts", Silent((GROUP, after_bad)), RunOptions(**skip))
    again = train.run(settings, tmp_path / "parts", Silent(), RunOptions(resume=True, **skip))
    assert timeless(tmp_path / "parts") == records
    assert again["groups"][GROUP]["skipped"] == result["groups"][GROUP]["skipped"]
    assert next(r for r in records if r["step"] == after_bad)["skipped"] >= 1
    leaves_equal(*models(tmp_path, "whole", "parts"))


def test_too_many_steps_in_a_row_are_not_left_out(make, tmp_path, monkeypatch):
    with_nan(monkeypatch, "sts", slice(None))
    monkeypatch.setattr(loop, "MOST_NONFINITE", 5)
    for resume in (False, True):  # the checkpoints of steps 2 and 4 know how many there were
        with pytest.raises(UserError, match=r"step 5 of .* the 4 steps before; lower") as caught:
            train.run(
                make("lora3"),
                tmp_path / "run",
                Silent(),
                RunOptions(resume=resume, skip_nonfinite=True),
            )
        assert "skip_nonfinite" not in str(caught.value)


def test_data_deleted_while_training(make, whole, tiny_base, tmp_path):
    from jaxlora.training.presets import make_settings

    folder = write_data(tmp_path / "data")

    class Deleting(Silent):
        def record(self, record):
            super().record(record)
            shutil.rmtree(folder, ignore_errors=True)

    settings = make_settings("lora3", base=str(tiny_base), data_dir=folder, **short("lora3"))
    train.run(settings, tmp_path / "run", Deleting())
    assert not folder.exists()
    leaves_equal(*models(tmp_path, "run", "whole"))


def test_a_clock_that_is_set_back(make, whole, tmp_path, monkeypatch):
    now = itertools.count(2_000_000_000, -3600)
    monkeypatch.setattr(time, "time", lambda: max(next(now), 1_000_000_000))
    result = train.run(make("lora3"), tmp_path / "run", Silent())
    assert result["train_seconds"] > 0
    leaves_equal(*models(tmp_path, "run", "whole"))


def half_written(states):
    """Whether a checkpoint was being written: it has a temporary name, or no checksums yet."""
    steps = [p for p in states.iterdir() if p.is_dir()]
    return any(not p.with_name(f"{p.name}.sha256.json").exists() for p in steps)


@pytest.mark.slow
def test_killed_twenty_times_it_ends_as_if_it_never_was(tiny_base, data_dir, tmp_path):
    """At random moments, and every other time while a checkpoint is being written."""
    flags = flags_of(tiny_base, data_dir, epochs=80)  # 560 steps, 280 checkpoints
    rng, torn = random.Random(0), 0

    def start(out):
        command = [sys.executable, str(ROOT / "experiments" / "run.py"), *flags, "--resume"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen([*command, f"--out={tmp_path / out}"], **quiet)

    def written():
        return (tmp_path / "killed" / "metrics.jsonl").stat().st_mtime_ns

    states = tmp_path / "killed" / run_folder.STATES / GROUP
    for number in range(20):
        process, began = start("killed"), time.monotonic()
        log = tmp_path / "killed" / "metrics.jsonl"
        seen = written() if log.exists() else 0
        while process.poll() is None and not (log.exists() and written() > seen):
            time.sleep(0.01)
            assert time.monotonic() - began < 120
        time.sleep(rng.uniform(0, 1.5))
        while number % 2 and process.poll() is None and not half_written(states):
            time.sleep(0.0005)
        assert process.poll() is None  # it has steps left
        process.kill()
        process.wait()
        torn += half_written(states)
    assert torn > 2  # what was being written may have been finished before the signal came
    assert start("killed").wait() == 0
    assert start("whole").wait() == 0
    leaves_equal(*models(tmp_path, "killed", "whole"))
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "whole")
    assert (tmp_path / "killed" / "predictions" / "sst-dev.csv").read_bytes() == (
        tmp_path / "whole" / "predictions" / "sst-dev.csv"
    ).read_bytes()
