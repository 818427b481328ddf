"""One file of a table, of any format: a header, and rows of strings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxlora.data.quoting import Tally
from jaxlora.utils.errors import ConfigError

Write = Callable[[Sequence[Mapping[str, Any]]], None]
"""Writes records of one table: column → value."""
Kinds = Mapping[str, type]
"""Column → `str`, `float` (also whole numbers), `list` of strings, or `dict` of names and numbers.

Each value may be None.
"""


class Sheet(Protocol):
    """One file of a table.

    A value that is missing is an empty string, and a number is written as its file has it.
    """

    @property
    def path(self) -> Path:
        """Its path, for messages."""

    @property
    def unreadable(self) -> Mapping[str, str]:
        """Column → why it cannot be read as strings, such as `a list`."""

    @property
    def lists(self) -> frozenset[str]:
        """Those of the unreadable columns that hold nothing but lists of strings or whole numbers.

        Their cells are such lists as JSON.
        """

    def rows(self, tally: Tally | None = None) -> Iterator[tuple[int, list[str]]]:
        """Yield the header, and then each row that is not blank, with its number.

        All rows are as wide as the header. May be called several times.

        Raises:
          UserError: naming the file, and the row if one is at fault.
        """

    def where(self, number: int) -> str:
        """Return the place of a row for messages."""

    def layout(self, columns: Sequence[str]) -> str:
        """Return what the header must be to have some columns."""

    def describe(self, tally: Tally) -> list[str]:
        """Return notes on how its rows were read, which `tally` has counted."""


def refuse_options(name: str, delimiter: str | None, quoting: str | None) -> None:
    """Refuse what only delimited text has, for another format.

    Raises:
      ConfigError: naming the option.
    """
    for option, value in (("delimiter", delimiter), ("quoting", quoting)):
        if value is not None:
            raise ConfigError(option, f"is for CSV and TSV files, not for {name}", value)
