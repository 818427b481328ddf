"""The table of methods in the documentation is the registry's."""

import inspect
from pathlib import Path

from jaxlora.aggregation import MEMBERS, PROMISES

PAGE = Path(__file__).parents[2] / "docs" / "aggregation.md"


def row(name):
    found = MEMBERS[name]
    first = inspect.getdoc(found.make).split("\n\n")[0].replace("\n", " ")
    promises = ", ".join(p for p in PROMISES if p in found.promises)
    return f"| `{name}` | {first} | {promises} | {found.source} |"


def test_every_method_is_in_the_table():
    text = PAGE.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert rows == [row(name) for name in sorted(MEMBERS)]


def test_every_promise_is_explained():
    text = PAGE.read_text(encoding="utf-8")
    for promise, meaning in PROMISES.items():
        assert f"| {promise} | {meaning} |" in text
