"""Sphinx configuration: pages in MyST Markdown, and one page for each public name.

When a build begins it writes two folders of pages. `api/` is the reference, from the `__all__` of
the modules in `PUBLIC`. `project/` has the repository's own pages (README.md and others), with
links that fit the site. A public name or method without a docstring ends the build, and so does
any warning (`make docs` gives Sphinx `-W`).
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.pycode import ModuleAnalyzer

import jaxlora

HERE = Path(__file__).parent
ROOT = HERE.parent
API, PROJECT = HERE / "api", HERE / "project"

# Module → what its page in the reference says. Its public names are those of its `__all__`.
PUBLIC = {
    "jaxlora": "What most programs need: load a trained bank, predict, combine gradients.",
    "jaxlora.lora": "Adapters as plain pytrees.",
    "jaxlora.aggregation": "Gradient aggregators and their helpers.",
    "jaxlora.pcgrad": "The building blocks of `jaxlora.pcgrad`.",
}
# Page of the repository → its name in `project/`.
PAGES = {
    "README.md": "readme.md",
    "RESULTS.md": "results.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/RESULTS.md": "speed.md",
    "benchmarks/LOG.md": "speed-log.md",
}

project = "jaxlora"
author = "the jaxlora authors"
copyright = author
release = jaxlora.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_heading_anchors = 3
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes as a list, which the class's own docstring gives
default_role = "code"  # docstrings write code as Markdown does
html_theme = "furo"
html_title = f"jaxlora {release}"
html_show_sourcelink = html_copy_source = False
exclude_patterns = ["_build"]


def public(module: str) -> Iterator[tuple[str, Any]]:
    """Yield the names in a module's `__all__` and their values, without modules."""
    found = importlib.import_module(module)
    for name in found.__all__:
        value = getattr(found, name)
        if not inspect.ismodule(value):
            yield name, value


def has_docstring(value: Any) -> bool:
    """Return whether a docstring was written; dataclasses and named tuples generate one."""
    text = vars(value).get("__doc__") if isinstance(value, type) else inspect.getdoc(value)
    return bool(text) and not text.startswith(f"{value.__name__}(")


def undocumented(name: str, value: Any) -> Iterator[str]:
    """Yield a public name, and the names of a class's public methods, that have no docstring."""
    if is_constant(value):
        if home_of_constant(name) is None:
            yield name
        return
    if not has_docstring(value):
        yield name
    for member, found in vars(value).items() if isinstance(value, type) else ():
        method = isinstance(found, property | staticmethod | classmethod) or callable(found)
        shown = member == "__call__" or not member.startswith("_")
        if method and shown and not inspect.getdoc(found):
            yield f"{name}.{member}"


def home_of_constant(name: str) -> str | None:
    """Return the full name of a constant or type alias that a docstring follows, or None."""
    module, _, last = name.rpartition(".")
    for found in sorted(m for m in sys.modules if m == module or m.startswith(f"{module}.")):
        if ("", last) in ModuleAnalyzer.for_module(found).find_attr_docs():
            return f"{found}.{last}"
    return None


def is_constant(value: Any) -> bool:
    """Return whether a value is a constant or type alias, not a class or function."""
    return not (inspect.isclass(value) or inspect.isroutine(value)) or hasattr(value, "__origin__")


def directive(name: str, value: Any) -> str:
    """Return a public name's page.

    Raises:
      ExtensionError: if it, or one of its methods, has no docstring.
    """
    if missing := list(undocumented(name, value)):
        raise ExtensionError(f"public and without a docstring: {', '.join(missing)}")
    title = name.removeprefix("jaxlora.")
    kind, options = "autofunction", ""
    if is_constant(value):
        kind, name = "autodata", home_of_constant(name) or name
    elif isinstance(value, type):
        fields = ", ".join(vars(value).get("__annotations__", {}))
        called = "   :special-members: __call__\n" if "__call__" in vars(value) else ""
        kind, options = "autoclass", f"   :members:\n   :exclude-members: {fields}\n{called}"
    return f"# {title}\n\n```{{eval-rst}}\n.. {kind}:: {name}\n{options}```\n"


def write_reference() -> None:
    """Write `api/`: an index, and a page for each public name, in the first module that has it."""
    index, seen = ["# Reference", ""], set[int]()
    for module, about in PUBLIC.items():
        pages = []
        for name, value in public(module):
            if id(value) not in seen:
                seen.add(id(value))
                pages.append(f"{module}.{name}")
                text = directive(pages[-1], value)
                (API / f"{pages[-1]}.md").write_text(text, encoding="utf-8")
        tree = ["```{toctree}", ":maxdepth: 1", "", *pages, "```", ""]
        index += [f"## {module}", "", about, "", *tree]
    (API / "index.md").write_text("\n".join(index), encoding="utf-8")


def relink(text: str, source: Path, page: Path) -> str:
    """Return a page's Markdown with links that work on the site.

    Args:
      text: the page, with links to files of the repository.
      source: where it is in the repository.
      page: where it is on the site; links to pages of `PAGES` lead into `project/`.
    """

    def move(match: re.Match[str]) -> str:
        path, mark, anchor = match[1].partition("#")
        found = (source.parent / path).resolve()
        name = found.relative_to(ROOT).as_posix()
        goal = PROJECT / PAGES[name] if name in PAGES else found
        return f"]({os.path.relpath(goal, page.parent)}{mark}{anchor})"

    return re.sub(r"\]\((?!\w+:|#)([^)\s]+)\)", move, text)


def write_project() -> None:
    """Write `project/`: the repository's own pages."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        moved = relink(text, ROOT / name, PROJECT / page)
        (PROJECT / page).write_text(moved, encoding="utf-8")


def write_pages(app: Sphinx) -> None:
    """Write all generated pages."""
    del app
    for folder in (API, PROJECT):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    write_reference()
    write_project()


def relink_page(app: Sphinx, name: str, source: list[str]) -> None:
    """Relink a page of `docs/` to the repository's pages on the site."""
    page = Path(app.env.doc2path(name))
    if page.parent == HERE:
        source[0] = relink(source[0], page, page)


def setup(app: Sphinx) -> None:
    """Register the functions that write and change pages."""
    app.connect("builder-inited", write_pages)
    app.connect("source-read", relink_page)
