"""Sphinx configuration: pages in MyST Markdown, and one page for each public name.

The reference is written from the `__all__` of `PUBLIC` when a build begins. A public name without
a docstring ends the build, as does any warning (`make docs` gives Sphinx `-W`).
"""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

import jaxlora

HERE = Path(__file__).parent
API = HERE / "api"
PUBLIC = {
    "jaxlora": "What most programs need: load a trained bank, predict, combine gradients.",
    "jaxlora.lora": "Adapters as plain pytrees.",
    "jaxlora.pcgrad": "PCGrad as an optax transform, and the functions it is made of.",
}

project = "jaxlora"
author = "the jaxlora authors"
release = jaxlora.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
default_role = "code"
html_theme = "furo"
html_title = f"jaxlora {release}"
exclude_patterns = ["_build"]


def public_names(module: str) -> list[str]:
    """Return the names that a module lists in `__all__`, modules of their own left out."""
    return [name for name in importlib.import_module(module).__all__ if f"{module}.{name}" not in PUBLIC or name == "pcgrad"]


def directive(module: str, name: str) -> str:
    """Return the autodoc directive for a public name.

    Raises:
      ExtensionError: if the name has no docstring.
    """
    value = getattr(importlib.import_module(module), name)
    if not getattr(value, "__doc__", None):
        raise ExtensionError(f"{module}.{name} is public and has no docstring")
    kind = "autoclass" if isinstance(value, type) else "autofunction"
    members = "\n   :members:\n   :undoc-members:" if kind == "autoclass" else ""
    return f"```{{eval-rst}}\n.. {kind}:: {module}.{name}{members}\n```\n"


def write_reference(app: Sphinx) -> None:
    """Write `api/`: an index, and a page for each public name."""
    del app
    shutil.rmtree(API, ignore_errors=True)
    API.mkdir()
    index = ["# Reference", ""]
    for module, about in PUBLIC.items():
        pages = []
        for name in public_names(module):
            page = f"{module}.{name}"
            (API / f"{page}.md").write_text(f"# {page}\n\n{directive(module, name)}", "utf-8")
            pages.append(page)
        index += [f"## {module}", "", about, "", "```{toctree}", ":maxdepth: 1", "", *pages, "```", ""]
    (API / "index.md").write_text("\n".join(index), "utf-8")


def setup(app: Sphinx) -> None:
    """Register the reference's writer."""
    app.connect("builder-inited", write_reference)
