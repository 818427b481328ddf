"""What others wrote is data: nothing of it is run, leads out of its folder, or is open to all."""

import ast
import json
import pickle
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from syntax import parse
from tiny import Silent

import jaxlora
from jaxlora.data import official, tokenized
from jaxlora.formats import huggingface, peft_config
from jaxlora.formats import peft as peft_files
from jaxlora.serving import bank, export_peft, finished_run, manifest, tree_files
from jaxlora.training import run as train
from jaxlora.training.config import Settings
from jaxlora.training.presets import make_settings
from jaxlora.training.run import RunOptions
from jaxlora.utils.errors import UserError

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    p for d in ("jaxlora", "experiments", "benchmarks") for p in (ROOT / d).rglob("*.py")
)


@pytest.fixture
def trap(tmp_path):
    """Pickled bytes that make a file when they are opened, and the file."""
    sprung = tmp_path / "sprung"

    class Trap:
        def __reduce__(self):
            return Path.touch, (sprung,)

    content = pickle.dumps({"weight": Trap()})
    pickle.loads(content)
    assert sprung.exists()  # it works
    sprung.unlink()
    return content, sprung


@pytest.fixture
def folder(finished_lora3, tmp_path):
    """A bank, and an exported task beside it."""
    bank.add(tmp_path / "bank", bank.load(finished_lora3), ["sst", "para"])
    export_peft.save(tmp_path / "peft", bank.load(tmp_path / "bank"), "sst")
    return tmp_path


# --- no pickle is opened


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model.pkl"])
def test_a_pickled_base_is_refused(tiny_base, tmp_path, trap, name):
    content, sprung = trap
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "model.safetensors").unlink()
    (base / name).write_bytes(content)
    with pytest.raises(UserError, match="safetensors"):
        huggingface.load(str(base))
    assert not sprung.exists()


@pytest.mark.parametrize("name", ["adapter_model.bin", peft_files.TENSORS, "head.safetensors"])
def test_a_pickled_adapter_is_refused(folder, trap, name):
    content, sprung = trap
    if name.endswith(".bin"):
        (folder / "peft" / peft_files.TENSORS).unlink()
    (folder / "peft" / name).write_bytes(content)
    with pytest.raises(UserError, match="safetensors"):
        export_peft.load(folder / "peft", "x")
    assert not sprung.exists()


def test_a_pickle_beside_sound_weights_is_left_alone(folder, tiny_base, trap):
    content, sprung = trap
    base = shutil.copytree(tiny_base, folder / "base")
    for place in (base / "pytorch_model.bin", folder / "peft" / "adapter_model.bin"):
        place.write_bytes(content)
    huggingface.load(str(base))
    export_peft.load(folder / "peft", "x")
    assert not sprung.exists()


def test_a_pickled_token_cache_is_made_anew(make, tiny, tmp_path, trap):
    _, sprung = trap

    class Trap:
        def __reduce__(self):
            return Path.touch, (sprung,)

    settings = make("lora1")
    args = (settings.named["sst"], "cs224n", settings.place("sst"), tiny.tokenizer, "k", 16)
    sound = tokenized.load_examples(*args, tmp_path)
    (path,) = (tmp_path / "tokens").iterdir()
    with np.load(path) as found:
        arrays = dict(found)
    for bad in (Trap(), np.array([Trap()], dtype=object)):
        if isinstance(bad, Trap):
            path.write_bytes(pickle.dumps(bad))
        else:
            np.savez(path, **arrays | {"train.ids": bad})
        again = tokenized.load_examples(*args, tmp_path)
        np.testing.assert_array_equal(again["train"].ids, sound["train"].ids)
        assert not sprung.exists()


def test_pickles_in_a_checkpoint_are_never_opened(finished_lora3, folder, trap):
    """Every file of a run's model and of a bank, replaced by a pickle, one after the other."""
    content, sprung = trap
    copy = shutil.copytree(finished_lora3, folder / "run")
    places = [(copy / finished_run.MODEL / part, copy) for part in bank.PARTS]
    kept = folder / "bank"
    places += [(kept / part, kept) for part in bank.PARTS]
    refused = 0
    for place, whole in places:
        for path in sorted(p for p in place.rglob("*") if p.is_file()):
            sound = path.read_bytes()
            path.write_bytes(content)
            try:
                found = bank.load(whole)  # reads nothing yet
                assert dict(found.trees) and [one.head for one in found.models.values()]
            except UserError:
                refused += 1
            path.write_bytes(sound)
            assert not sprung.exists(), path
    assert refused > 3


def test_a_folder_of_pickles_is_no_checkpoint(tmp_path, trap):
    content, sprung = trap
    for name in ("_METADATA", "manifest.ocdbt", "checkpoint", "_CHECKPOINT_METADATA"):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        tree_files.load(tmp_path / "model")
    assert not sprung.exists()


# --- no code of others is run


def calls(tree):
    """Dotted names of what is called, each with its keywords."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            yield from ([module] if module else [alias.name for alias in node.names])


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_that_could_run_code_is_called(path):
    tree = parse(path.read_text(encoding="utf-8"))
    roots = {name.split(".")[0] for name in imported(tree)}
    assert not roots & {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
    for name, keywords in calls(tree):
        assert name not in ("eval", "exec", "compile", "__import__", "torch.load", "yaml.load")
        # Of these a folder chooses the class; the speed suite loads its own.
        assert not name.startswith("Auto") or "benchmarks" in path.parts
        assert keywords.get("trust_remote_code", "False") == "False"
        assert keywords.get("allow_pickle", "False") == "False"
        assert name != "np.load" or keywords.get("allow_pickle") == "False"


@pytest.mark.parametrize("vocabulary", ["tokenizer.json", "vocab.txt"])
def test_code_in_a_base_is_not_run(tiny, tiny_base, tmp_path, vocabulary):
    base, sprung = shutil.copytree(tiny_base, tmp_path / "base"), tmp_path / "sprung"
    (base / "evil.py").write_text(f"open({str(sprung)!r}, 'w')\nclass Evil:\n    pass\n")
    names = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForMaskedLM"), "evil.Evil")
    names |= {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    config = json.loads((base / "config.json").read_text()) | {"auto_map": names}
    (base / "config.json").write_text(json.dumps(config))
    about = {"auto_map": names, "tokenizer_class": "Evil", "do_lower_case": True}
    (base / "tokenizer_config.json").write_text(json.dumps(about))
    if vocabulary == "vocab.txt":
        words = tiny.tokenizer.get_vocab()
        (base / "tokenizer.json").unlink()
        (base / "vocab.txt").write_text("\n".join(sorted(words, key=words.get)) + "\n")
        with pytest.raises(UserError, match="transformers cannot load its tokenizer"):
            huggingface.load(str(base))
    else:
        loaded = huggingface.load(str(base))
        assert loaded.tokenizer.encode("Ba lonk").tokens == ["[CLS]", "ba", "lon", "##k", "[SEP]"]
    assert not sprung.exists()


# --- archives and names stay in their folder


def archive(path, name, kind=0):
    with zipfile.ZipFile(path, "w") as file:
        member = zipfile.ZipInfo(name)
        member.external_attr = kind << 16
        file.writestr("trees/dev.txt", "sound")
        file.writestr(member, "../../outside")
    return path


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("../outside", 0, "leads out"),
        ("trees/../../outside", 0, "leads out"),
        ("/outside", 0, "leads out"),
        ("..\\outside", 0, "leads out"),
        ("C:outside", 0, "leads out"),
        ("link", stat.S_IFLNK | 0o777, "is a link"),
    ],
)
def test_an_archive_cannot_write_outside(tmp_path, name, kind, message):
    place = tmp_path / "downloads" / "here"
    place.mkdir(parents=True)
    with pytest.raises(UserError, match=rf"x\.zip is damaged .*{message}"):
        official.unzip(archive(place / "x.zip", name, kind))
    assert [p.name for p in place.iterdir()] == ["x.zip"]
    assert [p.name for p in tmp_path.rglob("*")] == ["downloads", "here", "x.zip"]


def test_an_archive_that_would_fill_the_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(official, "MAX_BYTES", 17)
    with pytest.raises(UserError, match="18 bytes, at most 17"):
        official.unzip(archive(tmp_path / "x.zip", "y"))
    monkeypatch.setattr(official, "MAX_BYTES", 18)
    found = official.unzip(tmp_path / "x.zip")
    assert (found / "trees" / "dev.txt").read_text() == "sound"


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "x.bin"])
def test_shards_stand_beside_their_index(tiny_base, tmp_path, name):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    shutil.copy(base / "model.safetensors", tmp_path / "x.safetensors")
    (base / "model.safetensors").unlink()
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"embeddings": name}}))
    with pytest.raises(UserError, match="does not name safetensors files beside it"):
        huggingface.load(str(base))


NAMES = ["../x", "..", "", "/etc", "a/b", "a\\b", "a\0b", "e\u0301", "~", "-x", "a\n"]


@pytest.mark.parametrize("name", NAMES)
def test_names_in_a_manifest_are_no_paths(folder, name):
    path = folder / "bank" / manifest.NAME
    sound = json.loads(path.read_text())
    entry = sound["tasks"]["sst"]
    adapters = sound["adapters"] | {name: sound["adapters"][entry["adapter"]]}
    for changed in (
        sound | {"adapters": adapters},
        sound | {"tasks": sound["tasks"] | {"sst": entry | {"head": name}}},
        sound | {"tasks": {name: entry | {"task": entry["task"] | {"name": name}}}},
    ):
        path.write_text(json.dumps(manifest.signed(changed)))
        with pytest.raises(UserError, match=r"bank\.json: .*changed by hand"):
            bank.load(folder / "bank")


@pytest.mark.parametrize("name", NAMES)
def test_names_in_a_run_are_no_paths(make, tmp_path, name):
    """Neither in one that goes on, nor in a finished one of an earlier jaxlora."""
    for changed in renamed(make("lora1").to_json(), name):
        with pytest.raises(UserError):
            Settings.from_json(changed)
    old = shutil.copytree(ROOT / "tests" / "data" / "format1" / "run", tmp_path / "run")
    config = json.loads((old / finished_run.CONFIG).read_text())
    for changed in renamed(config["settings"], name):
        (old / finished_run.CONFIG).write_text(json.dumps(config | {"settings": changed}))
        with pytest.raises(UserError, match=r"config\.json: "):
            bank.load(old)


def renamed(settings, name):
    """The settings with a name among the groups, and with one of a task."""
    groups = [[*settings["groups"][0], name], *settings["groups"][1:]]
    (first, *_) = settings["tasks"]
    tasks = [first | {"task": first["task"] | {"name": name}}]
    return settings | {"groups": groups}, settings | {"groups": [[name]], "tasks": tasks}


def test_a_tree_with_a_bad_name_is_not_stored(finished_lora3, tmp_path):
    """Even if it came past all that reads."""
    import dataclasses

    source = bank.load(finished_lora3)
    old = source.models["sst"]
    model = dataclasses.replace(old, tree="x/../../../outside")
    trees = {model.tree: source.trees[old.tree]}
    configs = {model.tree: source.configs[old.tree]}
    source = dataclasses.replace(source, models={"sst": model}, trees=trees, configs=configs)
    with pytest.raises(UserError, match="is not the name of a folder"):
        bank.add(tmp_path / "bank", source, ["sst"])
    assert not list(tmp_path.rglob("outside*"))


# --- a base from the hub


@pytest.fixture
def hub(tiny_base, monkeypatch):
    """The tiny base in the place of the hub; the list says what was asked for."""
    asked = []

    def download(repo, **how):
        asked.append((repo, how["revision"]))
        return str(tiny_base)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_a_base_is_pinned_to_a_revision_and_a_checksum(hub, tiny):
    found = tiny.fingerprint.weights
    assert huggingface.load("some/bert").fingerprint == tiny.fingerprint
    pinned = huggingface.load("some/bert@0123abc", found)
    assert pinned.name == "some/bert@0123abc"
    assert hub == [("some/bert", None), ("some/bert", "0123abc")]
    with pytest.raises(UserError, match=f"have sha256 {found}, not {'0' * 64}"):
        huggingface.load("some/bert@0123abc", "0" * 64)


@pytest.mark.parametrize("revision", ["", "../main", "a..b", "/x", "a b", "@", "x\n", "-x"])
def test_a_revision_is_no_path(hub, revision):
    with pytest.raises(UserError, match="is no revision"):
        huggingface.load(f"some/bert@{revision}")
    assert hub == []


def test_other_weights_are_refused_before_they_are_read(hub, tiny_base, monkeypatch):
    monkeypatch.setattr(huggingface, "read_tensors", pytest.fail)
    with pytest.raises(UserError, match="`base_sha256` says; they are not used"):
        huggingface.load(str(tiny_base), "0" * 64)
    with pytest.raises(UserError, match="64 hexadecimal digits"):
        huggingface.load("some/bert", "123")
    assert hub == []


def test_a_run_is_of_the_pinned_base(hub, tiny, data_dir, tmp_path):
    settings = make_settings(
        "lora1", base="some/bert@v1", data_dir=data_dir, rank=2, max_steps=1, max_length=16
    )
    more = {"predict_test": False}
    with pytest.raises(UserError, match="`base_sha256`"):
        train.run(settings, tmp_path / "run", Silent(), RunOptions(base_sha256="0" * 64, **more))
    assert not (tmp_path / "run").exists()
    train.run(
        settings,
        tmp_path / "run",
        Silent(),
        RunOptions(base_sha256=tiny.fingerprint.weights, **more),
    )
    jaxlora.load(tmp_path / "run").predict("sst", ["a film"])
    assert set(hub) == {("some/bert", "v1")}
    export_peft.save(tmp_path / "peft", bank.load(tmp_path / "run"), "sst")
    written = json.loads((tmp_path / "peft" / peft_config.CONFIG).read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == ("some/bert", "v1")


# --- what is written

OPEN = """
import os, runpy, sys
os.umask(0)
from pathlib import Path
from jaxlora.cli import main as cli
from jaxlora.serving import bank, export_peft
from jaxlora.training import run as train
from jaxlora.training.run import RunOptions
from jaxlora.training.presets import make_settings
sys.path.insert(0, {tests!r})
from tiny import Silent
out = Path({out!r})
sys.argv = ["run.py", "--variant=lora3", "--base={base}", "--data-dir={data}", "--rank=2",
            "--max-steps=2", "--eval-every=1", "--max-length=16", f"--out={{out / 'by-command'}}"]
try:
    runpy.run_path({run!r}, run_name="__main__")
except SystemExit as end:
    assert end.code == 0, end.code
more = dict(rank=2, max_steps=1, max_length=16)
settings = make_settings("lora1", base={base!r}, data_dir={data!r}, **more)
train.run(settings, out / "by-library", Silent())
bank.add(out / "bank", bank.load(out / "by-library"), ["sst", "sts"])
export_peft.save(out / "peft", bank.load(out / "bank"), "sst")
(out / "requests.tsv").write_text("task\\tsentence\\nsst\\ta film\\n")
(out / "requests.tsv").chmod(0o644)
os.chdir(out)
for words in (
    ["bank", "add", "second", "--run=by-library"],
    ["export", "merged", "merged", "--bank=bank", "--task=sst"],
    ["export", "peft", "peft2", "--bank=bank", "--task=sst"],
    ["export", "onnx", "onnx", "--bank=bank", "--task=sts", "--int8"],
    ["predict", "--bank=bank", "--input=requests.tsv", "--output=answers.csv"],
):
    assert cli.main(words) == 0
assert os.umask(0) == 0  # as it was
"""


@pytest.mark.slow
def test_nothing_is_open_to_all_even_without_a_umask(tiny_base, data_dir, tmp_path, monkeypatch):
    out, cache = tmp_path / "out", tmp_path / "cache"
    out.mkdir(mode=0o755)
    code = OPEN.format(
        tests=str(ROOT / "tests"), run=str(ROOT / "experiments" / "run.py"), out=str(out),
        base=str(tiny_base), data=str(data_dir),
    )  # fmt: skip
    monkeypatch.setenv("JAXLORA_CACHE", str(cache))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = [*out.rglob("*"), *cache.rglob("*")]
    names = {p.name for p in written}
    assert {"config.json", "bank.json", "model.safetensors", "answers.csv", "tokens"} <= names
    assert {"tfds", "curves.png", "result.json", ".lock"} <= names
    # JAX writes compiled programs itself, into a folder that nobody else can enter.
    assert stat.S_IMODE((cache / "xla").stat().st_mode) == 0o700
    free = [
        str(p)
        for p in written
        if p.stat().st_mode & stat.S_IWOTH and not p.is_symlink() and p.parent != cache / "xla"
    ]
    assert free == []
