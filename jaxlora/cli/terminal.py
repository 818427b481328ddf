"""Output of all commands, and the types of their positional arguments."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

if TYPE_CHECKING:
    from jaxlora.serving.predictor import Predictor

Folder = Annotated[Path, tyro.conf.Positional]
Name = Annotated[str, tyro.conf.Positional]
# Any number of names; what none means is in the help of the flag.
Names = Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="")]
# Width of lines in a pipe, which has no width of its own.
PIPE_WIDTH = 1000


def make_console(quiet: bool = False) -> Console:
    """Return a console; a quiet one prints nothing."""
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, quiet=quiet)


CONSOLE = make_console()


def say(text: str, console: Console = CONSOLE) -> None:
    """Print a line unchanged: without wrapping, markup or highlighting."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def count(number: int, what: str) -> str:
    """Return a number with its noun.

    >>> count(1, "row"), count(2_000, "row")
    ('1 row', '2,000 rows')
    """
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def note_truncated(predictor: Predictor) -> Callable[[int], None]:
    """Return a function that prints a number of truncated texts on stderr, as a note."""

    def note(count: int) -> None:
        if count:
            print(f"note: {predictor.describe_truncated(count)}", file=sys.stderr)

    return note


def print_json(value: Any) -> None:
    """Print JSON for other programs, with null for NaN and infinity, which JSON does not have."""
    print(json.dumps(_finite(value), ensure_ascii=False, indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
