"""No function of the package is long."""

import ast
from pathlib import Path

from syntax import parse

import jaxlora

PACKAGE = Path(jaxlora.__file__).parent
MOST = 50  # lines, of which a median function has seven
# Their docstrings are pages of the documentation; only those may make them longer.
PAGES = {"aggregate", "pcgrad"}


def lengths(source):
    """Yield the name, the lines, and the lines of the docstring of each function."""
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            about = 0 if ast.get_docstring(node) is None else first.end_lineno - first.lineno + 1
            yield node.name, node.end_lineno - node.lineno + 1, about


def test_lines_are_counted_from_def_to_the_last():
    source = (
        '@decorated\ndef f(\n    x,\n):\n    """A.\n\n    B.\n    """\n    def g():\n        pass\n'
    )
    assert list(lengths(source)) == [("f", 9, 4), ("g", 2, 0)]


def test_no_function_is_long():
    long = [
        f"{path.relative_to(PACKAGE)}: {name} has {lines} lines"
        for path in PACKAGE.rglob("*.py")
        for name, lines, about in lengths(path.read_text(encoding="utf-8"))
        if lines - (about if name in PAGES else 0) > MOST
    ]
    assert not long
