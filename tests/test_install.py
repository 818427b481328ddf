"""What is installed and imported: light imports, extras, the wheel and its use."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from tiny import write_data

import jaxlora
from jaxlora.utils.extras import EXTRAS

ROOT = Path(__file__).parents[1]
HEAVY = {
    "flax", "orbax", "tensorstore", "transformers", "tokenizers", "huggingface_hub", "safetensors",
    "pydantic", "tyro", "rich", "grain", "tensorflow_datasets", "tensorboardX", "matplotlib",
    "jinja2", "scipy",
}  # fmt: skip


def python(code, *args):
    """Run code in a fresh interpreter; it must succeed."""
    words = [sys.executable, "-c", code, *args]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["jaxlora", "jaxlora.pcgrad", "jaxlora.lora", "jaxlora.__main__"])
def test_importing_loads_jax_numpy_and_optax_only(name):
    code = """if True:
        import sys
        import jax, jax.numpy, numpy, optax
        before = set(sys.modules)
        __import__(sys.argv[1])
        print(*(set(sys.modules) - before))
        print(*sys.modules)
    """
    added, loaded = python(code, name).splitlines()
    new = {module.split(".")[0] for module in added.split()}
    assert new - sys.stdlib_module_names == {"jaxlora"}
    assert not {module.split(".")[0] for module in loaded.split()} & HEAVY


def test_pcgrad_is_a_function_and_a_module():
    code = """if True:
        from jaxlora.pcgrad import gram
        import jaxlora
        import jaxlora.pcgrad as again
        assert jaxlora.pcgrad(3) and again is jaxlora.pcgrad
        jaxlora.Predictor  # imports the rest
        from jaxlora.pcgrad import pcgrad
        assert jaxlora.pcgrad is pcgrad
    """
    python(code)


def test_every_public_name_is_listed_and_found():
    code = """if True:
        import jaxlora
        assert set(jaxlora.__all__) <= set(dir(jaxlora)), dir(jaxlora)
        from jaxlora import *
        assert load == Predictor.load and issubclass(Answer, tuple)
        assert from_pretrained.__annotations__["return"] == SentenceEncoder.__name__
    """
    python(code)
    with pytest.raises(AttributeError, match="has no attribute 'laod'"):
        jaxlora.laod  # noqa: B018


def distribution(requirement):
    """Return a requirement's name, as it is imported."""
    return re.match(r"[\w-]+", requirement)[0].lower().replace("-", "_")


def test_the_table_of_extras_is_that_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with_them = {"tokenizers", "huggingface_hub"}  # come with transformers
    core = {distribution(r) for r in project["dependencies"]}
    for extra, packages in EXTRAS.items():
        declared = {distribution(r) for r in project["optional-dependencies"][extra]} - {"jaxlora"}
        assert declared == {name.lower() for name in packages} - with_them
        assert not declared & core


BLOCKED = """if True:
    import sys

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == sys.argv[1]:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Blocker())
"""


@pytest.mark.parametrize(
    ("package", "extra", "words"),
    [
        ("tyro", "serve", ["bank", "list", "bank"]),
        ("onnx", "onnx", ["export", "onnx", "out", "--bank=bank", "--task=x"]),
        ("onnxruntime", "onnx", ["export", "onnx", "out", "--bank=bank", "--task=x"]),
        ("jinja2", "serve", ["evaluate", "bank", "--input=x.csv"]),
        ("rich", "serve", ["train", "--variant=lora3"]),
        ("transformers", "serve", ["train", "--variant=lora3"]),
        pytest.param("grain", "train", ["train", "--variant=lora3"], marks=pytest.mark.slow),
        pytest.param(
            "tensorflow_datasets", "train", ["train", "--variant=lora3"], marks=pytest.mark.slow
        ),
        ("tensorboardX", "train", ["train", "--variant=lora3"]),
        pytest.param("matplotlib", "train", ["train", "--variant=lora3"], marks=pytest.mark.slow),
    ],
)
def test_a_command_names_the_extra_that_is_missing(package, extra, words, tiny_base, tmp_path):
    code = BLOCKED + "    from jaxlora.__main__ import main; sys.exit(main(sys.argv[2:]))"
    if words[0] == "train":
        data = write_data(tmp_path / "data")
        words = [*words, f"--base={tiny_base}", f"--data-dir={data}", "--max-steps=1"]
    done = subprocess.run(
        [sys.executable, "-c", code, package, *words],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAXLORA_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last == f"error: {package} is not installed; pip install 'jaxlora[{extra}]' brings it"
    assert "Traceback" not in done.stderr


def test_the_library_names_the_extra_that_is_missing(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLORA_CACHE", str(tmp_path))  # no tokenizer is kept yet
    code = (
        BLOCKED
        + """
    import jaxlora
    jaxlora.Predictor  # needs nothing more by itself
    try:
        jaxlora.from_pretrained(sys.argv[2])
    except ImportError as error:
        print(error)
    """
    )
    assert "pip install 'jaxlora[serve]'" in python(code, "transformers", str(tiny_base))


def test_predicting_needs_nothing_of_the_extra_for_training():
    code = (
        BLOCKED.replace("== sys.argv[1]", "in sys.argv[1:]")
        + """
    import importlib
    from jaxlora.cli.main import COMMANDS
    for word, command in COMMANDS.items():
        if word != "train":
            importlib.import_module(command.module)
    """
    )
    python(code, *EXTRAS["train"], *EXTRAS["onnx"])


def test_version():
    done = subprocess.run(
        [sys.executable, "-m", "jaxlora", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"jaxlora {jaxlora.__version__}\n"
    assert f"version: {jaxlora.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the sources."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "jaxlora", source / "jaxlora")
    out = tmp_path_factory.mktemp("wheel")
    words = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", out, source]
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    (found,) = out.glob("*.whl")
    return found


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    files = {p.relative_to(ROOT).as_posix() for p in (ROOT / "jaxlora").rglob("*") if p.is_file()}
    wanted = {name for name in files if "__pycache__" not in name}
    with zipfile.ZipFile(wheel) as archive:
        about = {name for name in archive.namelist() if ".dist-info/" in name}
        assert set(archive.namelist()) - about == wanted
        (entry,) = (name for name in about if name.endswith("entry_points.txt"))
        assert "jaxlora = jaxlora.__main__:main" in archive.read(entry).decode()
    assert "jaxlora/py.typed" in wanted


def without_checkout():
    """Return the environment variables less those that lead to the checkout."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")}


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment with the wheel and `jaxlora[train]`, and nothing of the checkout."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
    pinned = ["--constraint", ROOT / "constraints.txt"]
    subprocess.run([*pip, *pinned, f"{wheel}[train]"], check=True, env=without_checkout())
    return folder


def outside(installed, cwd, *words):
    """Run a program of that environment, in a folder without the checkout."""
    done = subprocess.run(
        [installed / "bin" / words[0], *words[1:]],
        cwd=cwd, env=without_checkout(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_trains_keeps_a_bank_predicts_and_exports(installed, tiny_base, tmp_path):
    def command(*words):
        return outside(installed, tmp_path, "jaxlora", *words)

    command(
        "train", "--variant=lora1", f"--base={tiny_base}", "--max-steps=2", "--max-length=16",
        "--out=run",
    )  # fmt: skip
    command("bank", "add", "bank", "--run=run")
    said = command("predict", "--bank=bank", "--task=sst", "A lovely film.")
    command("export", "merged", "merged", "--bank=bank", "--task=sst")
    command("export", "peft", "peft", "--bank=bank", "--task=sst")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()
    code = (
        "import json, jaxlora; (a,) = jaxlora.load('bank')([('sst', 'A lovely film.')]);"
        "print(jaxlora.__file__); print(json.dumps([a.label, a.probabilities]))"
    )
    where, answer = outside(installed, tmp_path, "python", "-c", code).splitlines()
    assert where.startswith(str(installed))
    label, probabilities = json.loads(answer)
    assert said.startswith(f"{label}  (") and f"{label} {probabilities[label]:.4f}" in said
    version = importlib.metadata.version("jaxlora")
    assert outside(installed, tmp_path, "jaxlora", "--version") == f"jaxlora {version}\n"


WRONG = """import jaxlora

jaxlora.load(3)
jaxlora.pcgrad("two")
jaxlora.Answer("sst").labels
"""


def check(installed, folder, *words):
    """Check `public_api.py` and WRONG with a type checker that sees the installed wheel alone."""
    (folder / "wrong.py").write_text(WRONG)
    (folder / "pyrightconfig.json").write_text('{"typeCheckingMode": "standard"}')
    shutil.copy(ROOT / "tests" / "public_api.py", folder)
    command = [sys.executable, "-m", *words, "public_api.py", "wrong.py"]
    return subprocess.run(
        command, cwd=folder, env=without_checkout(), capture_output=True, text=True, check=False
    ).stdout


@pytest.mark.slow
def test_a_program_outside_passes_mypy_strict(installed, tmp_path):
    """The types of lazy names, too, are known: misuse is found."""
    where = f"--python-executable={installed / 'bin' / 'python'}"
    said = check(installed, tmp_path, "mypy", "--strict", "--config-file=", where)
    assert re.findall(r"^(\S+):(\d+): error: .*\[(\S+)\]$", said, re.MULTILINE) == [
        ("wrong.py", "3", "arg-type"),
        ("wrong.py", "4", "arg-type"),
        ("wrong.py", "5", "call-arg"),
        ("wrong.py", "5", "attr-defined"),
    ]


@pytest.mark.slow
def test_a_program_outside_passes_pyright(installed, tmp_path):
    """As mypy; basedpyright is pyright in a wheel with its own Node."""
    where = f"--pythonpath={installed / 'bin' / 'python'}"
    said = check(installed, tmp_path, "basedpyright", "--outputjson", where)
    found = [d for d in json.loads(said)["generalDiagnostics"] if d["severity"] == "error"]
    assert [(Path(d["file"]).name, d["range"]["start"]["line"] + 1, d["rule"]) for d in found] == [
        ("wrong.py", 3, "reportArgumentType"),
        ("wrong.py", 4, "reportArgumentType"),
        ("wrong.py", 5, "reportCallIssue"),
        ("wrong.py", 5, "reportAttributeAccessIssue"),
    ]
