import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_readme_examples_run():
    failed, tried = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert tried > 10 and failed == 0


def test_readme_shows_the_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in text and "make test" in text


def section(name):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text.split(f"## {name}\n")[1].split("\n## ")[0]


def test_speed_names_the_peers_habits_and_our_misses():
    """Figures as the bench measured them, those among them in which the peer is better."""
    said = section("Speed")
    bench = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    assert "eager" in said and "pads" in said
    one = re.search(r"^\| 1 \|.*\| ([\d.]+) \| [\d.e-]+ \|$", bench, re.MULTILINE)[1]
    assert f"| one request, three adapters loaded | **{one}** |" in said
    full = re.findall(r"^\| baseline2 \| \d+ \| \d+ \| \d+ \| ([\d.]+) \|$", bench, re.MULTILINE)
    assert len(full) == 2
    for memory in full:
        assert f"**{float(memory):.1f}**" in said


def test_what_it_cannot_do_is_said():
    said = section("What it cannot do")
    for word in ("jax.jacfwd", "jax.hessian", "one", "made-up"):
        assert word in said
    assert "three train programs" not in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["README.md", "RESULTS.md", "docs/tuning.md"])
def test_pages_with_quora_scores_say_what_minilm_has_seen(page):
    assert "Quora duplicates" in (ROOT / page).read_text(encoding="utf-8")


def test_results_decide_no_score_by_one_seed():
    """The table's own rows: a verdict stands only where seeds change nothing."""
    text = (ROOT / "RESULTS.md").read_text(encoding="utf-8").split("## Claims and verdicts")[1]
    rows = [line for line in text.split("\n## ")[0].splitlines() if re.match(r"\| [a-e] \|", line)]
    assert len(rows) > 20
    decided = [row for row in rows if re.search(r"\| (not )?reproduced \|", row)]
    assert decided and all("parameters" in row or "a LoRA step" in row for row in decided)
