"""The reproduction: what is run, that nothing runs twice, and what a crash or a stop leaves."""

import dataclasses
import doctest
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny import Silent, leaves_equal, trained_trees

from experiments import fleet, reproduce, runs, studies, timing
from jaxlora.cli import train as cli
from jaxlora.serving import finished_run
from jaxlora.tasks.sharing import VARIANTS
from jaxlora.training import metrics_log, run_folder
from jaxlora.training import run as train
from jaxlora.training.presets import make_settings
from jaxlora.training.run import RunOptions
from jaxlora.utils.errors import Stopped, UserError

METHODS = ("summed", "gradvac", "upgrad", "cagrad", "nash_mtl", "uw")
EXTRAS = [
    *(f"{name}-{method}" for name in ("lora3", "lora4", "baseline3") for method in METHODS),
    "pairs",
    "lora1-joint",
    "lora3-joint",
    "warmup24",
    "rank1",
    "rank1-scaled",
    "rank4",
    "rank4-scaled",
    "rank8",
    "rank8-scaled",
    "rank15",
    "rank15-scaled",
    "rank64",
    "rank64-scaled",
    "lora-lr-1e-5",
    "lora-lr-1e-4",
    "lora-lr-1e-3",
    "full-lr-1e-5",
    "full-lr-5e-5",
    "full-lr-1e-4",
    "cls",
    "concat",
    "cls-concat",
    "synthetic",
]

# ---- the studies


def test_the_variants_and_the_extras():
    assert list(studies.STUDIES) == [*VARIANTS, *EXTRAS]
    assert all(name == one.name for name, one in studies.STUDIES.items())
    with pytest.raises(UserError, match=r"--variants lora3-sumed: unknown .*mean lora3-summed\?"):
        studies.study("lora3-sumed")


@pytest.mark.parametrize("module", [studies, timing])
def test_doctests(module):
    failed, tried = doctest.testmod(module)
    assert tried and not failed


@pytest.mark.parametrize("name", studies.STUDIES)
@pytest.mark.parametrize("preset", ["demo", "cs224n"])
def test_every_study_resolves_and_its_command_gives_its_flags(preset, name):
    study = studies.STUDIES[name]
    data = {"data_dir": Path("x y")} if preset == "cs224n" else {}
    asked = study.asked(preset=preset, seed=3, **data)
    words = studies.arguments(asked | {"resume": True, "predict_test": False})
    flags = cli.parse(words)
    assert flags.run == RunOptions(resume=True, predict_test=False)
    if preset == "demo" and study.real_data:
        with pytest.raises(UserError, match="`synthetic_sts`"):
            cli.to_settings(flags, words)
        return
    settings = make_settings(**asked)
    assert cli.to_settings(flags, words) == settings
    assert (settings.variant, settings.loop.seed) == (study.variant, 3)
    pairs = {spec.task.pair_encoding for spec in settings.tasks if spec.task.pair}
    found = settings.flat() | {"pair_encoding": pairs.pop()}
    for key, value in study.settings.items():
        if key != "groups":
            assert found[key] == value
    assert settings.groups == (
        (("sst",), ("para", "sts")) if name == "pairs" else VARIANTS[study.variant].groups
    )


def test_the_demo_takes_one_epoch_unless_told_otherwise():
    assert reproduce.Flags().given() == {"preset": "demo", "epochs": 1}
    assert reproduce.Flags(shared=reproduce.SharedFlags(epochs=3)).given()["epochs"] == 3
    assert "epochs" not in reproduce.Flags(preset="cs224n").given()


def test_what_a_study_is_comes_before_what_is_given():
    asked = studies.STUDIES["warmup24"].asked(batch_size=8, epochs=1)
    assert (asked["batch_size"], asked["epochs"]) == (24, 1)


# ---- the fleet


@dataclasses.dataclass(frozen=True)
class Job:
    name: str
    code: str
    folder: Path

    @property
    def command(self):
        return [sys.executable, "-S", "-c", self.code, str(self.folder / self.name)]

    @property
    def log(self):
        return self.folder / "logs" / self.name


class Watching:
    def __init__(self):
        self.now, self.most, self.order, self.codes = 0, 0, [], {}

    def started(self, job):
        self.now += 1
        self.most = max(self.most, self.now)
        self.order.append(job.name)

    def ended(self, job, code):
        self.now -= 1
        self.codes[job.name] = code

    def look(self):
        pass


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(fleet, "LOOK_EVERY", 0.02)


def test_some_at_a_time_and_a_failing_one_stops_no_other(quick, tmp_path):
    good = "import sys; open(sys.argv[1], 'w').write('done')"
    jobs = [Job(f"good{n}", good, tmp_path) for n in range(4)]
    jobs.insert(
        1, Job("bad", "print('first'); print('error: so it is'); raise SystemExit(3)", tmp_path)
    )
    jobs.insert(2, Job("killed", "import os; os.kill(os.getpid(), 9)", tmp_path))
    watching = Watching()
    ended = fleet.Fleet(jobs, 2, watching).run()
    codes = {job.name: code for job, code in ended}
    assert codes == watching.codes == {f"good{n}": 0 for n in range(4)} | {"bad": 3, "killed": -9}
    assert watching.order == [job.name for job in jobs] and watching.most == 2
    assert all((tmp_path / f"good{n}").read_text() == "done" for n in range(4))
    assert fleet.reason(jobs[1].log, 3) == "error: so it is"
    assert fleet.reason(jobs[2].log, -9) == "ended by SIGKILL"
    assert fleet.reason(jobs[0].log, 5) == "ended with exit code 5"


SAVING = """
import os, signal, sys, time
def save(number, frame):
    open(sys.argv[1] + ".part", "w").write("saved")
    os.rename(sys.argv[1] + ".part", sys.argv[1])  # whole when it is seen
    if {again}: signal.signal(signal.SIGTERM, signal.SIG_DFL); time.sleep(60)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
open(sys.argv[1] + ".ready", "w").close()
time.sleep(60)
"""


DEAF = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(sys.argv[1] + ".ready", "w").close()
time.sleep(30)
"""


def signal_when(path, times=1):
    """Send SIGINT to this process when a file is there, and again when `path` is."""

    def watch():
        for file in [path.with_name(path.name + ".ready"), path][:times]:
            while not file.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_lets_the_running_ones_save_and_a_second_one_does_not_wait(quick, tmp_path, times):
    job = Job("job", SAVING.format(again=times == 2), tmp_path)
    other = Job("other", "", tmp_path)
    thread, watching, began = signal_when(tmp_path / "job", times), Watching(), time.monotonic()
    with pytest.raises(Stopped) as stopped:
        fleet.Fleet([job, other], 1, watching).run()
    thread.join()
    assert stopped.value.signal == signal.SIGINT and time.monotonic() - began < 50
    assert (tmp_path / "job").read_text() == "saved"
    assert watching.order == ["job"]  # the other one was not begun any more


def test_a_job_that_ignores_sigterm_is_killed_in_the_end(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(fleet, "TO_SAVE", 0.2)
    monkeypatch.setattr(fleet, "TO_END", 0.1)
    job = Job("job", DEAF, tmp_path)
    thread, began = signal_when(tmp_path / "job"), time.monotonic()
    with pytest.raises(Stopped):
        fleet.Fleet([job], 1, Watching()).run()
    thread.join()
    assert time.monotonic() - began < 20


# ---- the runs

TINY = ["--preset=cs224n", "--batch-size=6", "--eval-every=2", "--max-length=16"]


@pytest.fixture
def call(tiny_base, data_dir, tmp_path, monkeypatch, quick):
    """Call the script; the report is only noted."""
    reports = []
    monkeypatch.setattr(
        reproduce.report, "build", lambda root, out: reports.append((root, out)) or out
    )

    def cli(*flags, defaults=(*TINY, f"--base={tiny_base}", f"--data-dir={data_dir}")):
        given = {flag.split("=")[0] for flag in flags}
        rest = [flag for flag in defaults if flag.split("=")[0] not in given]
        return reproduce.cli([*rest, f"--out={tmp_path / 'root'}", *flags])

    cli.reports = reports
    return cli


STUB = """
import json, os, sys
from pathlib import Path
flags = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:] if "=" in word)
out = Path(flags["out"])
out.mkdir(parents=True, exist_ok=True)
with (out / "calls").open("a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if float(flags.get("learning-rate", 0)) > 1:
    sys.exit("error: it blew up")
# Beside and renamed, as a run does it: the progress bar reads this file meanwhile.
(out / "part").write_text(json.dumps({"dev": {}, "dev_mean": 0.5, "train_seconds": 1}))
(out / "part").rename(out / "result.json")
"""


CHECK = runs.run_folder.check


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """Instead of training, note the call, and fail where the learning rate is absurd."""
    script = tmp_path / "stub.py"
    script.write_text(STUB)
    monkeypatch.setattr(runs, "SCRIPT", script)
    # The stub's folders are no runs.
    monkeypatch.setattr(runs.run_folder, "check", lambda *_, **__: None)
    broken = studies.Study("broken", "lora4", {"learning_rate": 1e30}, "")
    monkeypatch.setitem(studies.STUDIES, "broken", broken)


def calls(root):
    found = {p.parent.relative_to(root).as_posix(): p.read_text() for p in root.rglob("calls")}
    return {name: text.count("\n") for name, text in found.items()}


def test_what_is_not_finished_is_run_and_nothing_twice(call, stub, tmp_path, capfd):
    asked = ["--variants", "broken", "lora3", "baseline1", "--seeds", "0", "1"]
    root = tmp_path / "root"
    every = {f"{n}/seed{s}": 1 for n in ("broken", "lora3", "baseline1") for s in (0, 1)}
    assert call(*asked) == 1
    assert calls(root) == every
    said = capfd.readouterr().err
    for seed in (0, 1):
        assert f"failed: broken seed {seed}: error: it blew up" in said
    assert call.reports == [(root, Path("report"))]
    plan = json.loads((root / "plan.json").read_text())
    assert plan["studies"] == ["baseline1", "lora3", "broken"] and plan["seeds"] == [0, 1]
    assert plan["failed"] == {f"broken/seed{seed}": "error: it blew up" for seed in (0, 1)}
    (root / "lora3" / "seed1" / "result.json").unlink()
    assert call(*asked) == 1
    assert calls(root) == every | {"broken/seed0": 2, "broken/seed1": 2, "lora3/seed1": 2}
    assert call("--variants", "lora4", "--jobs=2") == 0
    plan = json.loads((root / "plan.json").read_text())
    assert plan["studies"] == ["baseline1", "lora3", "lora4", "broken"] and plan["seeds"] == [0, 1]
    assert set(plan["failed"]) == {"broken/seed0", "broken/seed1"}  # this call did not try them


def test_a_run_that_failed_and_then_did_not_is_no_failure(call, stub, tmp_path, monkeypatch):
    asked = ["--variants", "broken", "--seeds", "0"]
    assert call(*asked) == 1
    monkeypatch.setitem(studies.STUDIES, "broken", studies.Study("broken", "lora4", {}, ""))
    assert call(*asked) == 0
    assert json.loads((tmp_path / "root" / "plan.json").read_text())["failed"] == {}


def test_the_commands_are_those_of_single_runs(call, stub, tmp_path):
    assert call("--variants", "rank4", "--epochs=3", "--seeds", "5") == 0
    command = json.loads((tmp_path / "root" / "plan.json").read_text())["commands"]["rank4"]
    words = command.split()
    assert words[:3] == ["python", "experiments/run.py", "--variant=lora4"]
    given = {"--rank=4", "--alpha=15.0", "--epochs=3", "--seed=5", "--batch-size=6"}
    assert given | {f"--out={tmp_path / 'root' / 'rank4' / 'seed5'}"} <= set(words)
    ran = (tmp_path / "root" / "rank4" / "seed5" / "calls").read_text()
    assert set(ran.split()) == {*words[2:], "--resume"}


def test_a_command_is_that_of_the_last_call(call, stub, tmp_path):
    """Its runs may have other flags; of the seeds of a call the first stands for all."""
    for epochs, seeds in ((1, "0"), (2, "1 2")):
        assert call("--variants", "lora3", f"--epochs={epochs}", "--seeds", *seeds.split()) == 0
        plan = json.loads((tmp_path / "root" / "plan.json").read_text())
    command = plan["commands"]["lora3"].split()
    assert {"--epochs=2", "--seed=1"} <= set(command)


def test_a_broken_plan_is_told(call, stub, tmp_path, capfd):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "plan.json").write_text("[]")
    assert call("--variants", "lora3") == 2
    assert "plan.json: not a JSON object" in capfd.readouterr().err


def test_where_timing_fails_there_is_a_report(call, stub, tmp_path, capfd, monkeypatch):
    class Dead:
        def __init__(self, *_):
            pass

        def __call__(self, *_):
            raise EOFError

    monkeypatch.setattr(timing.harness, "Worker", Dead)
    assert call("--variants", "lora3", "--timing") == 2
    assert "--timing: a process that takes a variant's steps died" in capfd.readouterr().err
    assert call.reports == [(tmp_path / "root", Path("report"))]


def test_the_report_has_the_times(call, stub, tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(timing, "measure", lambda runs, path: measured.append(len(call.reports)))
    assert call("--variants", "lora3", "--timing") == 0
    assert measured == [1] and len(call.reports) == 2


def test_what_resolves_to_the_same_is_run_once(call, stub, tmp_path):
    root = tmp_path / "root"
    assert call("--variants", "rank15-scaled", "rank15", "lora3") == 0
    ran = {p.parent.parent.name for p in root.rglob("calls") if not p.parent.is_symlink()}
    assert ran == {"rank15", "lora3"}
    assert (root / "rank15-scaled" / "seed0").resolve() == (root / "rank15" / "seed0").resolve()
    assert (root / "rank15-scaled" / "seed0" / "result.json").exists()
    assert call("--variants", "rank15-scaled") == 0  # by the link it is finished
    assert (root / "rank15" / "seed0" / "calls").read_text().count("\n") == 1


def test_a_link_to_a_deleted_run_is_replaced_by_a_run(call, stub, tmp_path, monkeypatch):
    monkeypatch.setattr(runs.run_folder, "check", CHECK)
    root = tmp_path / "root"
    (root / "rank15").mkdir(parents=True)
    (root / "rank15" / "seed0").symlink_to("../lora4/seed0")
    assert call("--variants", "rank15") == 0
    assert not (root / "rank15" / "seed0").is_symlink() and calls(root) == {"rank15/seed0": 1}


def test_only_the_report(call, tmp_path, capfd):
    (tmp_path / "old").mkdir()
    assert call("--from", str(tmp_path / "old"), "--report", str(tmp_path / "page")) == 0
    assert call.reports == [(tmp_path / "old", tmp_path / "page")]
    assert not (tmp_path / "root").exists()
    assert call("--from", str(tmp_path / "none")) == 2
    assert "--from" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--variants", "lora9"], ["--variants lora9: unknown", "mean lora"]),
        (["--seeds"], ["--seeds: give at least one"]),
        (["--jobs=0"], ["--jobs 0"]),
        (["--seeds", "-1"], ["`seed` -1"]),
        (["--data-dir=nowhere"], ["--data-dir", "nowhere"]),
        (["--base=nowhere/x/y"], ["--base"]),
        (["--max-length=1000"], ["--max-length 1000"]),
        (["--variants", "rank64", "--batch-size=0"], ["--batch-size 0"]),
    ],
)
def test_bad_flags_are_told_before_anything_is_written(call, tmp_path, capfd, flags, said):
    assert call(*flags) == 2
    message = capfd.readouterr().err
    assert all(part in message for part in said), message
    assert not (tmp_path / "root").exists() and not call.reports


def test_without_data_the_message_says_what_to_do(call, capfd):
    assert call("--variants", "lora3", defaults=["--preset=cs224n"]) == 2
    message = capfd.readouterr().err
    assert "lora3: --data-dir: missing" in message and "--preset=demo" in message


def test_a_folder_holds_one_preset_and_one_set_of_flags(call, stub, tmp_path, capfd, monkeypatch):
    assert call("--variants", "baseline1") == 0
    assert call("--variants", "baseline1", "--preset=demo") == 2
    assert "holds runs of --preset=cs224n" in capfd.readouterr().err


def test_extras_leave_out_what_means_nothing_to_the_built_in_data():
    demo = reproduce.chosen(reproduce.Flags(extras=True))
    real = reproduce.chosen(
        reproduce.Flags("cs224n", reproduce.SharedFlags(data_dir="x"), extras=True)
    )
    assert real == list(studies.STUDIES)
    assert set(real) - set(demo) == {"synthetic"}
    official = reproduce.SharedFlags(source="official")
    assert reproduce.chosen(reproduce.Flags("demo", official, extras=True)) == real
    assert reproduce.chosen(reproduce.Flags()) == list(VARIANTS)
    assert reproduce.chosen(reproduce.Flags(variants=("lora4", "lora3", "lora4"))) == [
        "lora3", "lora4",
    ]  # fmt: skip


@pytest.mark.parametrize(("variant", "three", "two"), [("lora1", 9, 6), ("baseline4", 3, 7)])
def test_how_far_a_run_is(make, tmp_path, variant, three, two):
    """Adapters of all groups take their steps together, whole encoders one after another."""
    study, steps = studies.STUDIES[variant], {"sst": 5, "para": 7, "sts": 4}
    run = runs.Run(study, study.asked(), make(variant), tmp_path, steps)
    assert run.done() == 0 and run.total == 16
    run.out.mkdir(parents=True)
    log = run.out / "metrics.jsonl"
    log.write_text('{"group": "sst", "step": 3}\n{"group": "para", "st')
    assert run.done() == three
    log.write_text('{"group": "sst", "step": 5}\n' * 2000 + '{"group": "para", "step": 2}\n')
    assert run.done() == two
    log.write_text("")
    assert run.done() == 0
    (run.out / "result.json").write_text("{}")
    assert run.done() == 16


# ---- all of it


def when(path, text, number):
    """Send a signal to this process as soon as a file contains a text."""

    def watch():
        while not (path.exists() and text in path.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
def test_stopped_gone_on_with_and_one_that_fails(call, make, tmp_path, capfd, monkeypatch):
    broken = studies.Study("broken", "baseline2", {"learning_rate": 1e30, "warmup_steps": 0}, "")
    monkeypatch.setitem(studies.STUDIES, "broken", broken)
    root, first = tmp_path / "root", tmp_path / "root" / "lora3" / "seed0"
    asked = [
        "--variants",
        "lora3",
        "broken",
        "baseline1",
        "--seeds",
        "0",
        "1",
        "--epochs=8",
        "--eval-every=4",
    ]
    # Of the first seed's runs baseline1 comes first; lora3 is stopped at some step.
    thread = when(first / metrics_log.METRICS, '"step": 4,', signal.SIGTERM)
    assert call(*asked) == 143
    thread.join()
    assert "go on with the same command" in capfd.readouterr().err
    assert not (first / finished_run.RESULT).exists() and list(
        (first / run_folder.STATES).rglob("*.json")
    )
    done = root / "baseline1" / "seed0" / finished_run.RESULT
    before = done.stat().st_mtime_ns
    assert call(*asked) == 1
    assert "failed: broken seed 0: error: step " in capfd.readouterr().err
    finished = {p.parent.relative_to(root).as_posix() for p in root.rglob(finished_run.RESULT)}
    assert finished == {f"{name}/seed{s}" for name in ("lora3", "baseline1") for s in (0, 1)}
    assert done.stat().st_mtime_ns == before
    like = make("lora3")
    settings = make_settings(
        "lora3", "cs224n", base=like.model.base, data_dir=like.data.data_dir, batch_size=6,
        eval_every=4, max_length=16, epochs=8,
    )  # fmt: skip
    train.run(settings, tmp_path / "whole", Silent())
    leaves_equal(*(trained_trees(p) for p in (first, tmp_path / "whole")))
    # Finished runs are compared with what is asked for now.
    assert call("--variants", "baseline1", "--epochs=3") == 2
    assert "baseline1: --out" in capfd.readouterr().err


@pytest.mark.slow
def test_times_are_measured_in_turn(make, tmp_path):
    made = [
        runs.Run(studies.STUDIES[name], {"variant": name}, make(name), tmp_path, steps)
        for name, steps in (
            ("baseline1", {"sst": 5, "para": 7, "sts": 4}), ("lora3", {"sst+para+sts": 7}),
            ("baseline4", {"sst": 5, "para": 7, "sts": 4}),
        )
    ]  # fmt: skip
    found = timing.measure(made, tmp_path / "timing.json", rounds=2, steps=1)
    assert json.loads((tmp_path / "timing.json").read_text()) == found
    assert list(found["studies"]) == ["baseline1", "lora3", "baseline4"]
    # Groups that share steps take as many as the longest; whole encoders take turns.
    for name, steps in (("baseline1", 7), ("lora3", 7), ("baseline4", 16)):
        times = found["studies"][name]["ms_per_step"]
        assert found["studies"][name]["steps"] == steps
        assert 0 < times["low"] <= times["median"] <= times["high"]
