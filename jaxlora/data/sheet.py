"""Common interface to the files of a table in any format: a header, and rows of strings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxlora.data.quoting import Tally
from jaxlora.utils.errors import ConfigError

Write = Callable[[Sequence[Mapping[str, Any]]], None]
"""Writes records of one table: column → value."""
Kinds = Mapping[str, type]
"""Column → `str`, `float` (also for integers), `list` (of strings) or `dict` (names → numbers).

Any value may be None.
"""


class Sheet(Protocol):
    """One file of a table.

    Missing values are empty strings, and numbers keep the spelling of the file.
    """

    @property
    def path(self) -> Path:
        """Path for messages."""

    @property
    def unreadable(self) -> Mapping[str, str]:
        """Column that cannot be read as strings → what it contains, such as `a list`."""

    @property
    def lists(self) -> frozenset[str]:
        """Unreadable columns that contain only lists of strings or integers.

        `rows` yields these lists as JSON.
        """

    def rows(self, tally: Tally | None = None) -> Iterator[tuple[int, list[str]]]:
        """Yield the header and then each non-blank row, with its number; may be called repeatedly.

        All rows have as many fields as the header. `tally` is updated with counts of the rows.

        Raises:
          UserError: if the file cannot be read; the message states the file and, if known, the row.
        """

    def where(self, number: int) -> str:
        """Return the location of a row for messages."""

    def layout(self, columns: Sequence[str]) -> str:
        """Describe, for messages, a header with these columns."""

    def describe(self, tally: Tally) -> list[str]:
        """Return notes on how the rows counted in `tally` were read."""


def refuse_options(name: str, delimiter: str | None, quoting: str | None) -> None:
    """Check that the options of delimited text are not given for another format.

    Raises:
      ConfigError: if one is given.
    """
    for option, value in (("delimiter", delimiter), ("quoting", quoting)):
        if value is not None:
            raise ConfigError(option, f"is for CSV and TSV files, not for {name}", value)
