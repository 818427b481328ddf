"""Double quotes in tables: whether they hold fields together, or are part of the text."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

# none: a quote is a character like any other. standard: a field that begins with one ends with
# one, may hold delimiters and line breaks, and has the quotes inside it doubled.
Quoting = Literal["none", "standard"]
QUOTINGS: tuple[Quoting, ...] = ("none", "standard")
CSV: dict[Quoting, Literal[0, 3]] = {"none": csv.QUOTE_NONE, "standard": csv.QUOTE_MINIMAL}


class Quotes(NamedTuple):
    """The fields of a file that begin with a double quote.

    Attributes:
      quoted: how many there are before the first open one.
      open: the line of the first that is not closed on its own line, from 1; None if all are.
    """

    quoted: int
    open: int | None


def find_quotes(lines: Iterable[str], delimiter: str) -> Quotes:
    r"""Look for fields that begin with a double quote, up to one that is not closed on its line.

    >>> find_quotes(["a\tb\n", '"one ""two"" three"\t"four"\n'], "\t")
    Quotes(quoted=2, open=None)
    >>> find_quotes(["a\tb\n", '"One," he said.\t1\n'], "\t")
    Quotes(quoted=0, open=2)
    """
    quoted = 0
    for number, line in enumerate(lines, 1):
        if '"' in line:
            fields = [f for f in line.rstrip("\r\n").split(delimiter) if f.startswith('"')]
            if not all(map(_closed, fields)):
                return Quotes(quoted, number)
            quoted += len(fields)
    return Quotes(quoted, None)


def _closed(field: str) -> bool:
    """Whether a field that begins with a quote ends with one, and has those inside doubled."""
    return len(field) > 1 and field.endswith('"') and '"' not in field[1:-1].replace('""', "")


@dataclasses.dataclass
class Tally:
    """What quotes did to the fields of a table, counted while it is read.

    Attributes:
      rows: rows, the header among them.
      lines: physical lines that they take.
      spanning: fields that go over more than one line.
      holding: fields that hold the delimiter.
    """

    rows: int = 0
    lines: int = 0
    spanning: int = 0
    holding: int = 0

    def add(self, fields: Sequence[str], lines: int, delimiter: str) -> None:
        """Count a row that takes so many lines."""
        self.rows += 1
        self.lines += lines
        if lines > 1:
            self.spanning += sum("\n" in field or "\r" in field for field in fields)
        self.holding += sum(delimiter in field for field in fields)

    def note(self, delimiter: str) -> str:
        """Say how many fields hold what would otherwise end them; empty if none does."""
        counts = {"go over several lines": self.spanning, f"hold a {delimiter}": self.holding}
        told = [f"{count:,} {what}" for what, count in counts.items() if count]
        return f"of the quoted fields {' and '.join(told)}" if told else ""
