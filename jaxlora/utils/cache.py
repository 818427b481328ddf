"""Where prepared data and compiled programs are kept."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

from jaxlora.utils import files
from jaxlora.utils.errors import UserError


def cache_dir() -> Path:
    """Return the folder for prepared data and compiled programs, which can be written to.

    It is `$JAXLORA_CACHE`, or `~/.cache/jaxlora`; where that cannot be, one of ours alone in the
    system's temporary folder, which is said once.
    """
    wanted = os.environ.get("JAXLORA_CACHE") or "~/.cache/jaxlora"
    try:
        return files.writable(files.local(wanted).absolute())
    except (OSError, UserError) as error:
        found = files.own_temporary()
        _say_once(f"the cache is in {found}, {wanted} cannot be ({error}); set $JAXLORA_CACHE")
        return found


@functools.cache
def _say_once(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)
