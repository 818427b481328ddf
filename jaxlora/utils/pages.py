"""HTML pages from Jinja templates."""

from __future__ import annotations

from pathlib import Path

from jaxlora.utils.extras import explained

with explained():
    import jinja2


def environment(folder: Path) -> jinja2.Environment:
    """Return where a folder's templates are found; values are escaped, and missing ones refused."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
