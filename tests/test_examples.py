"""The examples run, from an empty folder, and print what they promise."""

import re
import runpy
from pathlib import Path

import family_bases
import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# What the last lines of each say.
PRINTS = {
    "tickets": r"my tent has not arrived: (billing|delivery|damage|account) \(",
    "pcgrad_flax": r"(?m)^nash_mtl  large \d+\.\d%  small \d+\.\d%  conflicts \d+%$",
    "peft_in_and_out": r"after the round trip: \d\.\de-0[67]\n",
    "search": r"when do I get my money back\?\n  \d\.\d\d  ",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny random BERT."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("base")
    family_bases.save(folder, "bert", max_position_embeddings=130)
    return folder


def run(path, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    runpy.run_path(str(path), run_name="__main__")
    return capsys.readouterr().out


def test_each_is_listed_and_on_the_page():
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    assert [path.stem for path in EXAMPLES] == sorted(PRINTS)
    for path in EXAMPLES:
        assert f"```{{literalinclude}} ../examples/{path.name}\n" in page
        assert 30 <= len(path.read_text(encoding="utf-8").splitlines()) <= 75


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs_in_small(path, base, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BASE", str(base))
    monkeypatch.setenv("STEPS", "2")
    said = run(path, tmp_path, monkeypatch, capsys)
    assert re.search(PRINTS[path.stem], said), said
