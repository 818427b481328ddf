"""Errors with one-line messages for the user."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Collection, Iterable

MOST_LISTED = 10  # names in a message
LONGEST = 60  # characters of a name in a list


class UserError(ValueError):
    """Bad input: the message names the file, line or argument and what to do about it.

    Scripts print the message alone and exit with code 2; library code may catch it.
    """


class ConfigError(UserError):
    """A setting or an argument that cannot be used.

    Messages name arguments as in Python, in backquotes: `max_length`, `resume=True`. The commands
    turn these names into their flags, see `jaxlora.cli.flags`.

    Attributes:
      field: name of the setting or argument.
    """

    def __init__(self, field: str, message: str, value: object = None) -> None:
        shown = "" if value is None else f" {value}"
        super().__init__(f"`{field}`{shown}: {message}")
        self.field = field


class Stopped(BaseException):
    """A signal ended the run. Like `KeyboardInterrupt`, it is not an `Exception`.

    Attributes:
      signal: number of the signal; scripts exit with 128 + this.
      saved: whether all processes stopped at the same step and saved their state.
    """

    def __init__(
        self, signal: int, where: str = "immediately; nothing was saved", saved: bool = False
    ) -> None:
        super().__init__(f"stopped {where}")
        self.signal, self.saved = signal, saved


class Note(UserWarning):
    """Warning that does not prevent the operation; commands print it as one line."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return a hint at the known name closest to a wrong one, or an empty string.

    >>> suggestion("querry", ["query", "key"]), suggestion("x", ["query"])
    ('; did you mean query?', '')
    """
    close = difflib.get_close_matches(name[:100], known, 1)
    return f"; did you mean {close[0]}?" if close else ""


def list_some(names: Collection[str]) -> str:
    """Return the first `MOST_LISTED` names, and the number of the others.

    >>> list_some(["a", "b"]), list_some([str(n) for n in range(12)])
    ('a, b', '0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more')
    """
    rest = len(names) - MOST_LISTED
    first = itertools.islice(names, MOST_LISTED)
    shown = ", ".join(name if len(name) <= LONGEST else f"{name[:LONGEST]}…" for name in first)
    return f"{shown} and {rest:,} more" if rest > 0 else shown
