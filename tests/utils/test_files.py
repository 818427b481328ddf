"""Files and folders: odd names, no home, several processes, and what a killed one leaves."""

import dataclasses
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import WORDS, Silent, leaves_equal, short, write_data

import jaxlora
from jaxlora.cli import curves
from jaxlora.data import official, tokenized
from jaxlora.serving import bank, export_peft, finished_run, tree_files
from jaxlora.serving import manifest as manifests
from jaxlora.serving.predict_table import predict_file
from jaxlora.tasks.sharing import group_name
from jaxlora.training import checkpoint, metrics_log, run_folder
from jaxlora.training import run as train
from jaxlora.training.presets import make_settings
from jaxlora.training.run import RunOptions
from jaxlora.utils import cache, files, process
from jaxlora.utils.errors import UserError

ROOT = Path(__file__).parents[2]
TREE = {"a": {"b": np.arange(4, dtype=np.float32)}, "h": np.ones((2, 3), np.int32)}
ODD = (
    "run [v2]", "[!a]", "a*b", "q?x", "{a,b}", "back\\slash", "gs:", "s3:", "sp ace", "h#x%20",
    "ünï 日本", "dot.", "~", "~x", "$HOME", "-dash", "new\nline", "it's", "x" * 200, "tmp.orbax",
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_base):
    """Two finished runs of the same tasks, an adapter each."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_data(folder / "data")
    for seed, name in enumerate(("one", "two")):
        settings = make_settings(
            "lora1", preset="cs224n", base=str(tiny_base), data_dir=data, seed=seed, rank=2,
            max_steps=1, max_length=16, batch_size=6,
        )  # fmt: skip
        train.run(settings, folder / name, Silent(), RunOptions(predict_test=False))
    return folder


# --- paths that Orbax would take for something else


@pytest.mark.parametrize("name", ODD)
def test_a_tree_is_restored_from_a_folder_of_any_name(tmp_path, name):
    folder = tmp_path / name / "model"
    for tree in (TREE, jax.tree.map(lambda x: x + 1, TREE)):
        tree_files.save(folder, tree)
        leaves_equal(tree_files.load(folder), tree)
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ODD)
def test_states_are_restored_from_a_folder_of_any_name(tmp_path, name):
    folder = tmp_path / name / "states" / "g"
    like = {"a": jnp.ones(3), "key": jax.random.key(0)}
    states = checkpoint.StateCheckpoints(folder)
    for step in (1, 2, 3):
        states.save(step, {"a": jnp.full(3, step), "key": jax.random.key(step)}, {"step": step})
    states.close()
    states = checkpoint.StateCheckpoints(folder)
    tree, progress = states.restore(like)
    states.close()
    assert states.dropped == [] and progress == {"step": 3}
    np.testing.assert_array_equal(tree["a"], [3, 3, 3])
    assert (
        jax.random.key_data(tree["key"]).tolist() == jax.random.key_data(jax.random.key(3)).tolist()
    )
    assert sorted(p.name for p in folder.glob("[0-9]")) == ["2", "3"]


def test_siblings_that_match_a_name_as_a_pattern_are_not_read(tmp_path):
    for name, value in (("a1", 1.0), ("a?", 2.0), ("a[12]", 3.0)):
        tree_files.save(tmp_path / name / "model", {"x": np.full(2, value)})
    for name, value in (("a1", 1.0), ("a?", 2.0), ("a[12]", 3.0)):
        assert tree_files.load(tmp_path / name / "model")["x"].tolist() == [value] * 2


@pytest.mark.slow
def test_a_run_and_a_bank_in_folders_with_brackets(make, tmp_path):
    train.run(make("lora3"), tmp_path / "plain", Silent())
    odd = tmp_path / "runs *" / "run [v2]"
    with pytest.raises(KeyboardInterrupt):
        train.run(make("lora3"), odd, Silent(("sst+para+sts", 6)))
    callback = Silent()
    train.run(make("lora3"), odd, callback, RunOptions(resume=True))
    assert callback.started == ("sst+para+sts", 4, 7) and callback.notes == []
    assert not (odd / run_folder.STATES).exists()
    leaves_equal(dict(bank.load(odd).trees), dict(bank.load(tmp_path / "plain").trees))
    bank.add(tmp_path / "bank [prod]", bank.load(odd), ["sst", "sts"])
    assert bank.verify(tmp_path / "bank [prod]") == []
    shutil.move(tmp_path / "bank [prod]", tmp_path / "moved?")
    leaves_equal(
        [bank.load(tmp_path / "moved?").models["sst"].head], [bank.load(odd).models["sst"].head]
    )


@pytest.fixture
def careless(monkeypatch):
    """Orbax is given every path as it is, and so loses what it writes to some."""
    monkeypatch.setattr(tree_files, "PLAIN", tree_files.re.compile(r"(?s).*"))


def test_a_lost_tree_is_noticed_and_the_previous_one_kept(tmp_path, careless):
    folder, old = tmp_path / "[v2]" / "model", {"x": np.ones(2)}
    tree_files.save(tmp_path / "plain", old)
    shutil.copytree(tmp_path / "plain", folder)
    with pytest.raises(UserError, match=r"\[v2\]/model: "):
        tree_files.save(folder, TREE)
    assert [p.name for p in folder.parent.iterdir()] == ["model"]
    shutil.move(folder, tmp_path / "back")
    leaves_equal(tree_files.load(tmp_path / "back"), old)


def test_a_tree_that_is_read_differently_is_refused(tmp_path, monkeypatch):
    tree_files.save(tmp_path / "model", TREE)
    real = tree_files._read
    monkeypatch.setattr(
        tree_files, "_read", lambda *args: jax.tree.map(lambda x: x + 1, real(*args))
    )
    with pytest.raises(UserError, match="does not read back"):
        tree_files.save(tmp_path / "model", jax.tree.map(lambda x: x * 2, TREE))
    monkeypatch.undo()
    leaves_equal(tree_files.load(tmp_path / "model"), TREE)


def test_a_lost_state_is_noticed_and_the_previous_ones_kept(tmp_path, careless):
    folder = tmp_path / "[v2]" / "g"
    states = checkpoint.StateCheckpoints(folder)
    for step in (1, 2, 3):
        with pytest.raises(UserError, match=rf"g/{step}: the checkpoint cannot be written") as e:
            states.save(step, {"a": jnp.ones(3)}, {})
        assert "\n" not in str(e.value)
    states.close()
    assert {p.name for p in folder.glob("[0-9]")} == {"1", "2", "3"}  # none was deleted for them


def test_an_unreadable_state_gives_a_one_line_error(tmp_path, careless, monkeypatch):
    """As an earlier version left them in such a folder: their checksums fit."""
    monkeypatch.setattr(
        checkpoint.StateCheckpoints,
        "_complete",
        lambda self, step, _: run_folder.write_json(
            checkpoint._sums_file(folder / str(step)), checkpoint._sums(folder / str(step))
        ),
    )
    folder = tmp_path / "[v2]" / "g"
    states = checkpoint.StateCheckpoints(folder)
    states.save(4, {"a": jnp.ones(3)}, {})
    with pytest.raises(UserError, match=r"g/4: the checkpoint cannot be read .*; delete") as error:
        states.restore({"a": jnp.ones(3)})
    states.close()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gs://bucket/run", "is an address"),
        ("s3:/bucket/run", "is an address"),
        ("file:///run", "is an address"),
        ("a\udcffb", "UTF-8"),
        ("a\0b", "UTF-8"),
        ("x" * 256, "too long"),
        ("é" * 128, "too long"),
        ("/".join(["x" * 200] * 20), "too long"),
    ],
)
def test_addresses_and_invalid_names_are_refused_before_anything_is_written(
    make, runs, tmp_path, monkeypatch, path, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        train.run(make("lora1"), Path(path), Silent())
    with pytest.raises(UserError, match=message):
        bank.add(Path(path), bank.load(runs / "one"), ["sst"])
    for read in (bank.load, bank.verify, bank.contents, bank.load, jaxlora.load):
        with pytest.raises(UserError, match=message):
            read(Path(path))
    with pytest.raises(UserError, match=message):
        export_peft.save(path, bank.load(runs / "one"), "sst")
    assert list(tmp_path.iterdir()) == []


def test_home_folders_are_expanded_and_a_missing_one_is_named(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    bank.add(Path("~/bank"), bank.load(runs / "one"), ["sst"])
    assert bank.verify(tmp_path / "home" / "bank") == []
    assert list(bank.load(Path("~/bank")).models) == ["sst"]
    no_home(monkeypatch)
    with pytest.raises(UserError, match=r"~/bank: there is no home folder"):
        bank.load(Path("~/bank"))
    assert files.local("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")


def test_many_processes_refuse_an_odd_folder_before_training(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    checkpoint.check_place(tmp_path / "plain")
    with pytest.raises(UserError, match="with several processes, a path may"):
        checkpoint.check_place(tmp_path / "[v2]")


def test_results_are_written_through_links(make, runs, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is a link to .*nowhere"):
        run_folder.check(tmp_path / "link", {}, resume=False)
    (tmp_path / "nowhere").mkdir()
    export_peft.save(tmp_path / "link", bank.load(runs / "one"), "sst")
    assert (tmp_path / "link").is_symlink() and export_peft.described(tmp_path / "nowhere")


def test_answers_are_never_written_over_a_device_or_a_link(runs, tmp_path):
    (tmp_path / "in.tsv").write_text("task\tsentence\nsst\ta film\n")
    predictor = jaxlora.load(runs / "one")
    with pytest.raises(UserError, match="is a device or a pipe"):
        predict_file(predictor, tmp_path / "in.tsv", Path("/dev/null"), None)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    (tmp_path / "link.csv").symlink_to(tmp_path / "out.csv")
    predict_file(predictor, tmp_path / "in.tsv", tmp_path / "link.csv", None)
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "out.csv").read_text().startswith("id,task,")


# --- groups of many tasks


def fourteen(folder):
    """Flags of a run of 14 tasks whose names have 18 letters."""
    lines = []
    for number in range(14):
        name = f"task-of-letters-{number:02}"
        assert len(name) == 18
        rows = [f"the {WORDS[n % 12]},{n % 2}" for n in range(6)]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
        lines += [
            f'[{name}]\nkind = "binary"\ntext = "text"\nlabel = "label"',
            f'train = "{name}.csv"\ndev = "{name}.csv"',
        ]
    (folder / "tasks.toml").write_text("\n".join(lines))
    return (str(folder / "tasks.toml"),)


@pytest.mark.slow
def test_fourteen_tasks_with_long_names_share(tiny, tiny_base, tmp_path):
    flags = {"base": str(tiny_base), "tasks": fourteen(tmp_path), "preset": "cs224n"}
    flags |= {"max_steps": 2, "eval_every": 1, "rank": 2, "batch_size": 2, "max_length": 16}
    settings = make_settings("lora3", **flags)
    (group,) = map(group_name, settings.groups)
    out = tmp_path / "run"
    train.inputs.load_data(settings, tiny)  # so that both read the cache
    with pytest.raises(KeyboardInterrupt):
        train.run(settings, out, Silent((group, 2)))
    callback = Silent()
    train.run(settings, out, callback, RunOptions(resume=True))
    assert callback.started == (group, 1, 2)
    trained = bank.load(out)
    bank.add(tmp_path / "bank", trained, list(trained.models))
    assert bank.verify(tmp_path / "bank") == []
    leaves_equal([*bank.load(tmp_path / "bank").trees.values()], [*trained.trees.values()])
    names = [p.name for p in tmp_path.rglob("*")]
    assert max(len(name.encode()) for name in names) <= 255
    assert len(trained.trees) == 1
    assert {r["group"] for r in metrics_log.read_records(out)} == {group}


def test_curves_of_many_tasks_are_drawn(tmp_path):
    names = [f"task-of-letters-{n:02}" for n in range(14)]
    pairs = {f"{a}-{b}": 0.1 for a in names for b in names if a < b}
    loss = dict.fromkeys(names, 1.0)
    train = {"kind": "train", "loss": loss, "cosine": pairs, "conflicts": 0.0}
    records = [train | {"step": 1}, train | {"step": 2}, {"kind": "eval", "step": 2, "dev": loss}]
    curves.draw(records, tmp_path / "curves.png", "x" * 64, {"a": "accuracy"})
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("cosine", "panels"),
    [
        ({}, ["loss", "MAE", "Pearson r"]),
        ({"a-b": 0.1}, ["loss", "MAE", "Pearson r", "cosine of two tasks' gradients"]),
    ],
)
def test_each_metric_has_a_panel_and_conflicts_only_where_tasks_share(
    cosine, panels, tmp_path, monkeypatch
):
    values, drawn = {"a": 1.0, "b": 2.0, "c": 0.5}, []
    real = curves._draw_panel
    monkeypatch.setattr(
        curves, "_draw_panel", lambda axes, *rest: (drawn.append(axes), real(axes, *rest))
    )
    train = {"kind": "train", "step": 1, "loss": values, "cosine": cosine, "conflicts": 0.0}
    metrics = {"a": "MAE", "b": "Pearson r", "c": "MAE"}
    records = [train, {"kind": "eval", "step": 1, "dev": values, "dev_loss": values}]
    curves.draw(records, tmp_path / "curves.png", "title", metrics)
    assert [axes.get_ylabel() for axes in drawn] == panels
    lines = [{line.get_label(): line.get_color() for line in axes.get_lines()} for axes in drawn]
    assert lines[1].keys() == {"a", "c"} and lines[2].keys() == {"b"}
    assert lines[1]["c"] == lines[0]["c"] and lines[2]["b"] == lines[0]["b"]


def test_names_of_groups_are_bounded_and_differ():
    long = [f"a-task-with-a-long-name-{n}" for n in range(40)]
    names = {group_name(long[:k]) for k in range(1, 41)} | {group_name(long[1:])}
    assert len(names) == 41 and max(map(len, names)) == 200
    assert group_name(long[:7]) == "+".join(long[:7])  # as banks and runs have it


def test_a_run_without_its_adapter_is_not_served_as_the_base(runs, tmp_path):
    out = shutil.copytree(runs / "one", tmp_path / "run")
    (adapter,) = (out / finished_run.MODEL / bank.ADAPTERS).glob("sst-*")
    shutil.rmtree(adapter)
    predictor = jaxlora.load(out)
    with pytest.raises(UserError, match=rf"{adapter.name}: missing"):
        predictor.predict("sst", ["a film"])


# --- no home folder


def no_home(monkeypatch):
    """As in a container with a bare uid."""

    def unknown(*_):
        raise KeyError("uid not found")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The system's temporary folder, and nothing remembered."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path / "tmp"))
    files.own_temporary.cache_clear()
    cache._note_once.cache_clear()
    yield tmp_path / "tmp"
    files.own_temporary.cache_clear()
    cache._note_once.cache_clear()


PLACES = {
    "no home": {},
    "HOME=/proc": {"HOME": "/proc"},
    "a file": {"JAXLORA_CACHE": __file__},
    "below a file": {"JAXLORA_CACHE": f"{__file__}/cache"},
    "not writable": {"JAXLORA_CACHE": "/proc/cache"},
    "an address": {"JAXLORA_CACHE": "gs://bucket/cache"},
    "no name": {"JAXLORA_CACHE": "x" * 300},
    "a home that is not known": {"JAXLORA_CACHE": "~/cache"},
}


@pytest.mark.parametrize("place", PLACES)
def test_the_cache_falls_back_to_the_temporary_folder(temporary, monkeypatch, capsys, place):
    no_home(monkeypatch)
    monkeypatch.delenv("JAXLORA_CACHE")
    for name, value in PLACES[place].items():
        monkeypatch.setenv(name, value)
    found = cache.cache_dir()
    assert found == temporary / f"jaxlora-{os.getuid()}" == cache.cache_dir()
    assert stat.S_IMODE(found.stat().st_mode) == 0o700
    (line,) = capsys.readouterr().err.splitlines()
    assert str(found) in line and "$JAXLORA_CACHE" in line


def test_a_writable_cache_is_used(temporary, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("JAXLORA_CACHE", str(tmp_path / "new" / "[cache]"))
    assert cache.cache_dir() == tmp_path / "new" / "[cache]"
    monkeypatch.delenv("JAXLORA_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.cache_dir() == tmp_path / "home" / ".cache" / "jaxlora"
    assert capsys.readouterr().err == "" and list(temporary.iterdir()) == []


@pytest.mark.parametrize("trap", ["link", "open", "file"])
def test_a_temporary_cache_prepared_by_others_is_not_used(temporary, tmp_path, trap):
    taken = temporary / f"jaxlora-{os.getuid()}"
    if trap == "link":
        (tmp_path / "theirs").mkdir(0o700)
        taken.symlink_to(tmp_path / "theirs")
    elif trap == "open":
        taken.mkdir()
        taken.chmod(0o777)
    else:
        taken.touch()
    found = files.own_temporary()
    assert found != taken and found.parent == temporary and found == files.own_temporary()
    assert stat.S_IMODE(found.lstat().st_mode) == 0o700
    assert not (tmp_path / "theirs").exists() or list((tmp_path / "theirs").iterdir()) == []


@pytest.fixture
def no_cache():
    """No cache of compiled programs yet."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("no_cache")
def test_programs_are_cached_in_a_private_folder(tmp_path):
    process.keep_programs(tmp_path / "xla")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "xla")
    assert stat.S_IMODE((tmp_path / "xla").stat().st_mode) == 0o700


@pytest.mark.usefixtures("no_cache")
def test_programs_are_not_cached_in_an_unwritable_folder():
    process.keep_programs(Path(__file__) / "xla")
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.usefixtures("no_cache")
def test_a_cache_that_the_user_chose_stays(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    process.keep_programs(tmp_path / "xla")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    assert not (tmp_path / "xla").exists()


def test_a_run_continues_if_its_tokens_cannot_be_cached(make, tiny, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    settings = make("lora1")
    args = (settings.named["sst"], "cs224n", settings.place("sst"), tiny.tokenizer, "k", 16)
    kept = tokenized.load_examples(*args, tmp_path)
    monkeypatch.setattr(files.os, "fsync", full)
    monkeypatch.setattr(files, "sync", lambda path: None)
    shutil.rmtree(tmp_path / "tokens")
    again = tokenized.load_examples(*args, tmp_path)
    np.testing.assert_array_equal(again["train"].tokens, kept["train"].tokens)
    assert "is not cached" in capsys.readouterr().err
    assert list((tmp_path / "tokens").iterdir()) == []


CACHES_OF_OTHERS = """
import sys
from jaxlora.training import run
from jaxlora.utils import process as host  # and all that a command imports
assert not {"huggingface_hub.constants", "matplotlib"} & sys.modules.keys()
def main():
    import huggingface_hub.constants, matplotlib
    print(huggingface_hub.constants.HF_HUB_CACHE, matplotlib.get_configdir())
sys.exit(host.exit_code(main))
"""


@pytest.mark.parametrize("home", ["/proc", "/dev/null", "there"])
def test_other_libraries_get_a_writable_cache_folder(tmp_path, home):
    (tmp_path / "there").mkdir()
    home = str(tmp_path / home)  # an absolute one stays
    kept = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", CACHES_OF_OTHERS], env=kept | {"HOME": home}, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    own = tmp_path / f"jaxlora-{os.getuid()}"
    wanted = [own / "huggingface" / "hub", own / "matplotlib"]
    if home.endswith("there"):
        wanted = [Path(home) / ".cache" / "huggingface" / "hub", Path(home) / ".config/matplotlib"]
    assert done.stdout.split() == list(map(str, wanted))


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{}, {"HOME": "/proc"}])
def test_a_user_without_an_account_can_train(tiny_base, data_dir, tmp_path, variables):
    """A user who is in no list, with nothing in the environment."""
    run = [sys.executable, str(ROOT / "experiments" / "run.py"), f"--out={tmp_path / 'run'}"]
    flags = {"variant": "lora3", "base": tiny_base, "data_dir": data_dir, **short("lora3")}
    run += [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    (tmp_path / "tmp").mkdir()
    kept = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "tmp")}
    done = subprocess.run(
        ["unshare", "--user", "--map-user=12345", *run], env=kept | variables, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tmp" / "jaxlora-12345" / "tokens").is_dir()
    assert "$JAXLORA_CACHE" in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"run", "tmp"}  # no folder that is called ~


# --- several processes


def test_two_processes_can_unpack_the_same_archive(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("trees/dev.txt", "sound")
    both, found = threading.Barrier(2), []
    real = zipfile.ZipFile.extractall

    def extract(self, place):
        both.wait(30)  # neither has found the other's
        real(self, place)

    monkeypatch.setattr(zipfile.ZipFile, "extractall", extract)

    def unpack():
        try:
            found.append(official.unzip(tmp_path / "x.zip"))
        except UserError as error:
            found.append(error)

    threads = [threading.Thread(target=unpack) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "x.zip.files"] * 2
    assert (found[0] / "trees" / "dev.txt").read_text() == "sound"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.zip", "x.zip.files"]


def test_a_bank_is_read_beside_a_writer(runs, tmp_path):
    folder, sources = tmp_path / "bank", [bank.load(runs / name) for name in ("one", "two")]
    bank.add(folder, sources[0], ["sst", "para", "sts"])
    stop, changes = threading.Event(), []

    def write():
        while not stop.is_set():
            bank.add(folder, sources[len(changes) % 2], ["sst", "sts"], replace=True)
            changes.append(1)

    writer = threading.Thread(target=write)
    writer.start()
    reads, until = 0, time.monotonic() + 300
    try:
        while reads < 8 or (len(changes) < 3 and time.monotonic() < until):
            reads += 1
            rows = bank.contents(folder)
            assert [row.task for row in rows] == ["sst", "para", "sts"]
            assert all(row.bytes > 1000 for row in rows)
            assert bank.verify(folder) == []
            assert bank.load(folder).models.keys() == {"sst", "para", "sts"}
    finally:
        stop.set()
        writer.join()
    assert len(changes) > 2


def test_a_reader_retries_when_a_writer_replaces_what_it_reads(runs, tmp_path, monkeypatch):
    folder, sources = tmp_path / "bank", [bank.load(runs / name) for name in ("one", "two")]
    bank.add(folder, sources[0], ["sts"])
    real, calls = bank._load_tree, []

    def load_tree(*args):
        if args[1] == manifests.ADAPTERS and len(calls) < 3:
            calls.append(1)
            with monkeypatch.context() as patch:
                patch.setattr(bank, "_load_tree", real)
                bank.remove(folder, "sts")  # with its versions, so that the reader's is gone
                bank.add(folder, sources[len(calls) % 2], ["sts"])
        return real(*args)

    monkeypatch.setattr(bank, "_load_tree", load_tree)
    assert bank.verify(folder) == []
    assert len(calls) == 3


def test_sizes_are_those_of_the_files_that_exist(runs, tmp_path, monkeypatch):
    """Of a bank that does not say them, a task is replaced before its trees are measured."""
    folder, sources = tmp_path / "bank", [bank.load(runs / name) for name in ("one", "two")]
    bank.add(folder, sources[0], ["sst"])
    (said,) = bank.contents(folder)
    manifests.write(folder, dataclasses.replace(manifests.read(folder), sizes={}))
    assert bank.contents(folder) == [said]
    real, calls = bank._measure, []

    def measure(*args):
        if not calls:
            calls.append(1)
            bank.remove(folder, "sst")
            bank.add(folder, sources[1], ["sst"])
        return real(*args)

    monkeypatch.setattr(bank, "_measure", measure)
    (row,) = bank.contents(folder)
    assert calls and row.adapter != said.adapter
    assert (folder / manifests.ADAPTERS / row.adapter).is_dir() and row.bytes > 1000


def test_a_folder_that_cannot_be_locked_is_named(tmp_path, monkeypatch):
    (tmp_path / files.LOCK).mkdir()
    with (
        pytest.raises(UserError, match=r"\.lock: cannot be locked"),
        files.locked(tmp_path, "taken"),
    ):
        pass
    with (
        filelock.FileLock(tmp_path / "x"),
        pytest.raises(UserError, match="taken"),
        monkeypatch.context() as patch,
    ):
        patch.setattr(files, "LOCK", "x")
        with files.locked(tmp_path, "taken"):
            pass


# --- what a killed process leaves

KILLED = """
import os, signal, sys
from pathlib import Path
from jaxlora.serving import bank, manifest
from jaxlora.training import run_folder
Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
run_folder.write_json(Path(sys.argv[1]), {"old": 1})
"""


def killed_while_writing(path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = path.parent.iterdir()
    return left


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_starts_after_a_killed_first_write(make, tmp_path, resume):
    left = killed_while_writing(tmp_path / "run" / finished_run.CONFIG)
    train.run(make("baseline1", max_steps=1), tmp_path / "run", Silent(), RunOptions(resume=resume))
    assert not left.exists()


def test_a_bank_is_created_after_a_killed_first_write(runs, tmp_path):
    left = killed_while_writing(tmp_path / "bank" / manifests.NAME)
    bank.add(tmp_path / "bank", bank.load(runs / "one"), ["sst"])
    assert not left.exists() and bank.verify(tmp_path / "bank") == []


# --- what a power cut would leave


def test_everything_is_flushed_before_it_is_renamed(runs, tmp_path, monkeypatch):
    """Of each file and folder that appears, before it does; then the folder that names it."""
    flushed, renamed = set(), []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor):
        found = os.fstat(descriptor)
        flushed.add((found.st_ino, found.st_mtime_ns))
        real_fsync(descriptor)

    def replace(self, target):
        parts = [self, *self.rglob("*")] if self.is_dir() else [self]
        for found in (path.stat() for path in parts):
            assert (found.st_ino, found.st_mtime_ns) in flushed, self
        real_replace(self, target)
        renamed.append((Path(target).name, Path(target).parent.stat().st_ino))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    source = bank.load(runs / "one")
    bank.add(tmp_path / "bank", source, ["sst"])
    export_peft.save(tmp_path / "peft", source, "sst")
    states = checkpoint.StateCheckpoints(tmp_path / "states" / "g")
    states.save(1, {"a": jnp.ones(3)}, {})
    states.close()
    names = {name for name, _ in renamed}
    assert {manifests.NAME, "peft", "1.sha256.json"} <= names and len(renamed) >= 5
    for path in (tmp_path / "states" / "g" / "1").rglob("*"):
        found = path.stat()
        assert (found.st_ino, found.st_mtime_ns) in flushed
    assert {parent for _, parent in renamed} <= {number for number, _ in flushed}


# --- the umask is the process's, and nobody's here


@pytest.mark.slow
def test_the_library_leaves_the_umask_alone(make, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("a thread's files would change"))
    train.run(make("lora1", max_steps=1), tmp_path / "run", Silent())
    bank.add(tmp_path / "bank", bank.load(tmp_path / "run"), ["sst"])
    export_peft.save(tmp_path / "peft", bank.load(tmp_path / "bank"), "sst")
    (tmp_path / "in.tsv").write_text("task\tsentence\nsst\ta film\n")
    predict_file(jaxlora.load(tmp_path / "bank"), tmp_path / "in.tsv", tmp_path / "out.csv", None)


@pytest.mark.parametrize(("mask", "file", "folder"), [(0, 0o664, 0o775), (0o077, 0o600, 0o700)])
def test_modes_follow_the_umask_and_are_never_world_writable(tmp_path, mask, file, folder):
    before = os.umask(mask)
    try:
        files.write_text(tmp_path / "a" / "b" / "text", "x")
        tree_files.save(tmp_path / "a" / "tree", TREE)
    finally:
        os.umask(before)
    made = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a").rglob("*")}
    assert made[tmp_path / "a" / "b" / "text"] == file
    assert made[tmp_path / "a" / "b"] == folder == made[tmp_path / "a" / "tree"]
    assert not any(mode & stat.S_IWOTH for mode in made.values())


@pytest.mark.parametrize("write", [files.replacing, files.building])
def test_errors_name_the_file_and_not_its_temporary_name(tmp_path, monkeypatch, write):
    def refuse(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(Path, "mkdir", lambda self, *args, **kwargs: refuse(self))
    with pytest.raises(PermissionError) as caught, write(tmp_path / "a.toml"):
        pass
    assert caught.value.filename == str(tmp_path / "a.toml")


def test_an_interrupted_exchange_of_folders_keeps_the_old_one(tmp_path, monkeypatch):
    """Between the two renames, an error or Ctrl-C that the process survives."""
    folder = tmp_path / "bank"
    folder.mkdir()
    (folder / "old").write_text("old")
    monkeypatch.setattr(Path, "replace", lambda self, to: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), files.building(folder, replace=True) as content:
        (content / "new").write_text("new")
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["bank", "bank/old"]
