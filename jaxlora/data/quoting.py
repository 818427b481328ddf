"""Detection of double quotes in tables: they enclose fields, or are part of the text."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

# none: a quote is an ordinary character. standard: a field that begins with a quote ends with one,
# may contain delimiters and line breaks, and doubles the quotes inside.
Quoting = Literal["none", "standard"]
QUOTINGS: tuple[Quoting, ...] = ("none", "standard")
CSV: dict[Quoting, Literal[0, 3]] = {"none": csv.QUOTE_NONE, "standard": csv.QUOTE_MINIMAL}


class Quotes(NamedTuple):
    """Fields of a file that begin with a double quote.

    Attributes:
      quoted: number of such fields before the first one that is not closed.
      open: line, from 1, of the first field not closed on that line; None if all are closed.
    """

    quoted: int
    open: int | None


def find_quotes(lines: Iterable[str], delimiter: str) -> Quotes:
    r"""Count fields that begin with a double quote, up to the first not closed on its line.

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
    """Return whether a field that begins with a quote also ends with one and doubles inner ones."""
    return len(field) > 1 and field.endswith('"') and '"' not in field[1:-1].replace('""', "")


@dataclasses.dataclass
class Tally:
    """Counts of a table's rows and quoted fields, updated while it is read.

    Attributes:
      rows: number of rows, including the header.
      lines: number of physical lines of these rows.
      spanning: number of fields that span several lines.
      holding: number of fields that contain the delimiter.
    """

    rows: int = 0
    lines: int = 0
    spanning: int = 0
    holding: int = 0

    def add(self, fields: Sequence[str], lines: int, delimiter: str) -> None:
        """Count a row that spans the given number of physical lines."""
        self.rows += 1
        self.lines += lines
        if lines > 1:
            self.spanning += sum("\n" in field or "\r" in field for field in fields)
        self.holding += sum(delimiter in field for field in fields)

    def note(self, delimiter: str) -> str:
        """Describe the fields that contain line breaks or delimiters; empty if there are none."""
        counts = {"span several lines": self.spanning, f"contain a {delimiter}": self.holding}
        parts = [f"{count:,} {what}" for what, count in counts.items() if count]
        return f"of the quoted fields {' and '.join(parts)}" if parts else ""
