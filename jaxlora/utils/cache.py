"""The cache folder for prepared data and compiled programs."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

from jaxlora.utils import files
from jaxlora.utils.errors import UserError


def cache_dir() -> Path:
    """Return a writable folder for prepared data and compiled programs.

    It is `$JAXLORA_CACHE` or `~/.cache/jaxlora`. If that folder cannot be written to, it is a
    private one in the system's temporary folder, and a note on stderr says so once.
    """
    wanted = os.environ.get("JAXLORA_CACHE") or "~/.cache/jaxlora"
    try:
        return files.writable(files.local(wanted).absolute())
    except (OSError, UserError) as error:
        found = files.own_temporary()
        _note_once(
            f"the cache is in {found}, {wanted} cannot be used ({error}); set $JAXLORA_CACHE"
        )
        return found


@functools.cache
def _note_once(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)
