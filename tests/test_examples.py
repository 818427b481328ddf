"""The examples run, from an empty folder, and print what they promise."""

import ast
import re
import runpy
from pathlib import Path

import family_bases
import notebooks
import pytest
from syntax import parse

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# What the last lines of each say.
PRINTS = {
    "tickets": r"my tent has not arrived: (billing|delivery|damage|account) \(",
    "pcgrad_flax": r"(?m)^nash_mtl  large \d+\.\d%  small \d+\.\d%  conflicts \d+%$",
    "peft_in_and_out": r"after the round trip: \d\.\de-0[67]\n",
    "labels": r"billing: \d+ of \d+ found\nbug: \d+ of \d+ found\n",
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


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_a_notebook_has_the_cells_of_its_script_and_no_output(name):
    """After a change of the script: `python tests/notebooks.py`."""
    script = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    notebook = (ROOT / "examples" / f"{name}.ipynb").read_text(encoding="utf-8")
    assert notebook == notebooks.from_script(script)
    cells = notebooks.code_of(notebook)
    joined = parse("\n".join(cells)).body
    _, *body = parse(script).body
    assert list(map(ast.dump, joined)) == list(map(ast.dump, body)) and len(cells) > 3
    assert '"outputs": []' in notebook and '"execution_count": null' in notebook


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=pytest.mark.slow if path.stem == "labels" else (), id=path.stem)
        for path in EXAMPLES
    ],
)
def test_it_runs_in_small(path, base, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BASE", str(base))
    monkeypatch.setenv("STEPS", "2")
    said = run(path, tmp_path, monkeypatch, capsys)
    assert re.search(PRINTS[path.stem], said), said


@pytest.mark.slow
def test_the_search_finds_the_article_that_is_meant(tmp_path, monkeypatch, capsys):
    said = run(ROOT / "examples" / "search.py", tmp_path, monkeypatch, capsys)
    first = re.findall(r"^(\w.*)\n  \d\.\d\d  (.*)$", said, re.MULTILINE)
    assert [article.split()[0] for _, article in first] == ["Changing", "What", "When"]


@pytest.mark.slow
def test_the_tickets_are_learnt(tmp_path, monkeypatch, capsys):
    said = run(ROOT / "examples" / "tickets.py", tmp_path, monkeypatch, capsys)
    assert re.search(r"my tent has not arrived: delivery .*\nI paid two times: billing", said)
    assert float(re.search(r"│ accuracy +│ (\d\.\d+)", said)[1]) > 0.9


@pytest.mark.slow
def test_sets_of_labels_are_learnt(tmp_path, monkeypatch, capsys):
    said = run(ROOT / "examples" / "labels.py", tmp_path, monkeypatch, capsys)
    assert "('billing', 'bug') of {" in said
    found = re.findall(r"^\w+: (\d+) of (\d+) found$", said, re.MULTILINE)
    assert len(found) == 4 and all(int(right) >= 0.8 * int(there) for right, there in found)


@pytest.mark.slow
def test_pcgrad_helps_the_small_task(tmp_path, monkeypatch, capsys):
    said = run(ROOT / "examples" / "pcgrad_flax.py", tmp_path, monkeypatch, capsys)
    small = [float(found) for found in re.findall(r"small (\d+\.\d)%", said)]
    assert small == sorted(small, reverse=True) and small[0] > 2 * small[1] > 4 * small[2]
