import doctest
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_readme_examples_run():
    failed, tried = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert tried > 10 and failed == 0


def test_readme_shows_the_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in text and "make test" in text
