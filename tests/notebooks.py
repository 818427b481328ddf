"""Notebooks of examples: the cells of a script as JSON. `python tests/notebooks.py` writes them."""

import json
import re
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("tickets",)
_CELL = re.compile(r"^# %%(.*)\n", re.MULTILINE)


def from_script(script: str) -> str:
    """Return the notebook of a script whose cells begin with `# %%` and a title.

    Its docstring and the titles become text; nothing is stored that a cell has printed.
    """
    first, *rest = _CELL.split(script)
    about, code = re.fullmatch(r'"""(.*?)"""\n(.*)', first, re.DOTALL).groups()
    cells = [_text(about), _code(code)]
    for title, part in zip(rest[::2], rest[1::2], strict=True):
        cells += [_text(f"## {title.strip()}"), _code(part)]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = {
        "cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 4,
    }  # fmt: skip
    return json.dumps(notebook, ensure_ascii=False, indent=1) + "\n"


def code_of(notebook: str) -> list[str]:
    """Return the cells of code in a notebook."""
    cells = json.loads(notebook)["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def _text(source: str) -> dict[str, object]:
    return {"cell_type": "markdown", "metadata": {}, "source": _lines(source)}


def _code(source: str) -> dict[str, object]:
    return {
        "cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [],
        "source": _lines(source),
    }  # fmt: skip


def _lines(source: str) -> list[str]:
    return source.strip().splitlines(keepends=True)


if __name__ == "__main__":
    for name in NAMES:
        script = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        (EXAMPLES / f"{name}.ipynb").write_text(from_script(script), encoding="utf-8")
