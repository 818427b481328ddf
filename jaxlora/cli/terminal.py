"""What every command prints with, and the types of its arguments that come without a flag."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

Folder = Annotated[Path, tyro.conf.Positional]
Name = Annotated[str, tyro.conf.Positional]
# A pipe gets whole lines: nothing there says how wide they may be.
CONSOLE = Console(width=None if sys.stdout.isatty() else 1000)


def say(text: str, console: Console = CONSOLE) -> None:
    """Print a line as it is, without wrapping it, however long its paths are."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)
