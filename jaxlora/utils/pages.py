"""HTML pages from Jinja templates."""

from __future__ import annotations

from pathlib import Path

from jaxlora.utils.extras import explained

with explained():
    import jinja2


def environment(folder: Path) -> jinja2.Environment:
    """Return a Jinja environment for a folder, with autoescaping and strict undefined values."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
