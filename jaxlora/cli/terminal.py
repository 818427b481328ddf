"""What every command prints with, and the types of its arguments that come without a flag."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

Folder = Annotated[Path, tyro.conf.Positional]
Name = Annotated[str, tyro.conf.Positional]
CONSOLE = Console()


def say(text: str, console: Console = CONSOLE) -> None:
    """Print a line as it is, without wrapping it, however long its paths are."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)
