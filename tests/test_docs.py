"""What the pages say: their Python runs, their commands' flags exist, tables are true."""

import dataclasses
import doctest
import importlib.util
import inspect
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
from tiny import train_flags

from jaxlora.cli import cost_table
from jaxlora.cli.flags import flag
from jaxlora.cli.main import COMMANDS
from jaxlora.tasks.sharing import VARIANTS
from jaxlora.training import presets
from jaxlora.training.presets import PAPER_GUESSES, PRESETS, Preset, make_settings

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CONTRIBUTING.md"]
PAGES += sorted(DOCS.glob("*.md"))
LONG = ("own-bert-loop",)  # it compiles a train step
# README.md's are run in test_readme.py.
WITH_PYTHON = [page for page in PAGES[1:] if ">>> " in page.read_text(encoding="utf-8")]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if page.stem in LONG else (), id=page.name)
        for page in WITH_PYTHON
    ],
)
def test_snippets_run(page):
    failed, tried = doctest.testfile(str(page), module_relative=False)
    assert tried > 3 and failed == 0


def commands(page, *programs):
    """The words after a program's name, in each shell line of a page that calls one of them."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).splitlines():
        words = shlex.split(line, comments=True)
        for place, word in enumerate(words):
            if word in programs:
                yield words[place + 1 :]


def runs(page):
    """The flags of each run that a page starts."""
    yield from commands(page, "experiments/run.py")
    yield from (words[1:] for words in commands(page, "jaxlora") if words[0] == "train")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_runs_have_flags_that_exist(page):
    known = {"--help", *train_flags()}
    text = page.read_text(encoding="utf-8")
    in_manifests = re.findall(r"^ +- (--[\w-]+)=?.*$", text, re.MULTILINE)
    given = [w.split("=")[0] for words in runs(page) for w in words]
    for word in [*given, *in_manifests]:
        assert not word.startswith("--") or word in known
    for words in runs(page):
        named = [w.split("=")[1] for w in words if w.startswith("--variant=")]
        own = [word for word in words if word.endswith((".toml", ".csv"))]
        assert words == ["--help"] or own or named
        assert set(named) <= VARIANTS.keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page):
    for first, *rest in commands(page, "jaxlora"):
        members = getattr(import_module(COMMANDS[first].module), "COMMANDS", None)
        assert members is None or rest[0] in members


def settings_of(section):
    """Flag → value, in a table of a section of paper.md."""
    text = (DOCS / "paper.md").read_text(encoding="utf-8").split(f"## {section}\n")[1]
    return dict(
        re.findall(r"^\| `--([\w-]+)` \| ([^|]*?) \|", text.split("\n## ")[0], re.MULTILINE)
    )


def shown(value):
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def test_what_the_paper_preset_guesses_is_listed():
    """Every value of the preset is in one of the two lists, with the value it has."""
    stated, guessed = settings_of("Stated"), settings_of("Guessed")
    assert set(guessed) == {name.replace("_", "-") for name in PAPER_GUESSES}
    assert not stated.keys() & guessed.keys()
    usual, values = Preset().flat(), PRESETS["paper"](VARIANTS["lora4"]).flat()
    of_preset = {name.replace("_", "-") for name in values if values[name] != usual[name]}
    rates = {"learning-rate", "head-learning-rate"}  # the variant's, in a table of their own
    assert of_preset - rates <= stated.keys() | guessed.keys()
    found = make_settings("lora4", preset="paper")
    values = {name: found.flat().get(name.replace("-", "_")) for name in stated | guessed}
    values["sts-weight"] = next(d.weight for d in found.tasks if d.task.name == "sts")
    by_words = {
        "eval-every": "four times an epoch",
        "dtype": "bfloat16 on accelerators, float32 on CPU",
    }
    assert (values.pop("eval-every"), values.pop("dtype")) == (None, "float32")
    assert stated | guessed == {name: shown(value) for name, value in values.items()} | by_words


def test_the_guesses_of_the_paper_preset_are_in_its_docstring():
    source = inspect.getsource(presets).split("PAPER_GUESSES = ")[1].split('"""')[1]
    found = make_settings("lora4", preset="paper")
    words = " ".join(source.split())
    for said in (
        f"dropout {found.model.encoder_dropout}", f"{found.loop.epochs} epochs",
        f"norm {found.optimizer.clip}",
        f"{found.model.max_length} tokens", "GLUE's Quora", "bfloat16", "best on dev", "no dropout",
    ):  # fmt: skip
        assert said in words


def test_the_table_of_scaling_is_the_calculators():
    lines = [line for line in (DOCS / "scaling.md").read_text().splitlines() if line[:1] == "|"]
    head, _, *rows = [tuple(cell.strip() for cell in line[1:-1].split("|")) for line in lines]
    bases = ("bert-base", "bert-large", "1b", "3b", "10b")
    meshes = ("data=1", "fsdp=8", "data=8,fsdp=8")
    table = cost_table.lines(bases, ("lora3", "baseline2"), meshes, batch_size=64, dtype="bfloat16")
    assert [head, *rows[: len(table) - 1]] == list(map(cost_table.show, table))


@pytest.fixture(scope="module")
def conf():
    """The site's configuration, as a module."""
    spec = importlib.util.spec_from_file_location("conf", DOCS / "conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_docstring():
    return 1


class WithMethod:
    """Has a docstring."""

    def bare(self):
        return 1

    def _private(self):
        return 1


@dataclasses.dataclass
class Bare:
    number: int


@pytest.mark.parametrize(
    ("value", "missing"),
    [(without_docstring, "x"), (Bare, "x"), (WithMethod, "x.bare"), (Preset, None), (flag, None)],
)
def test_a_public_name_without_a_docstring_ends_the_build(conf, value, missing):
    """A docstring that `dataclass` makes up does not count."""
    assert list(conf.undocumented("x", value)) == [missing] * (missing is not None)
    if missing:
        with pytest.raises(conf.ExtensionError, match=missing):
            conf.directive("x", value)


def test_every_public_name_has_a_docstring(conf):
    names = [f"{module}.{name}" for module in conf.PUBLIC for name, _ in conf.public(module)]
    assert {"jaxlora.load", "jaxlora.pcgrad", "jaxlora.lora.init"} <= set(names)
    for module in conf.PUBLIC:
        for name, value in conf.public(module):
            assert not list(conf.undocumented(f"{module}.{name}", value))


@pytest.mark.parametrize(
    ("link", "source", "page", "moved"),
    [
        ("tour.md", "docs/bank.md", "docs/bank.md", "tour.md"),
        ("../RESULTS.md#claims", "docs/paper.md", "docs/paper.md", "project/results.md#claims"),
        ("docs/lora4.png", "README.md", "docs/project/readme.md", "../lora4.png"),
        ("CHANGELOG.md", "README.md", "docs/project/readme.md", "changelog.md"),
        ("https://a.b/c", "README.md", "docs/project/readme.md", "https://a.b/c"),
    ],
)
def test_links_are_moved_to_the_site(conf, link, source, page, moved):
    assert conf.relink(f"[a]({link})", ROOT / source, ROOT / page) == f"[a]({moved})"


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "RESULTS.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name
)
def test_links_lead_to_files_of_the_repository(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!\w+:|#)([^)\s#]+)", text):
        assert (page.parent / link).exists(), link


def test_tests_named_by_reliability_exist():
    text = (DOCS / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+)(…?)`", text)
    code = "\n".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")
    )
    defined = set(re.findall(r"^def (test_\w+)", code, re.MULTILINE))
    assert len(named) > 20
    for name, cut in named:
        assert any(test.startswith(name) for test in defined) if cut else name in defined, name
