"""Tables of delimited text with a header: CSV, TSV and similar."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from jaxlora.data.quoting import CSV, Quotes, Quoting, Tally, find_quotes
from jaxlora.data.sheet import Kinds, Sheet, Write
from jaxlora.data.text_lines import stream
from jaxlora.utils import files as file_system
from jaxlora.utils.errors import UserError

DELIMITERS = "\t,;|"
DELIMITER_NAMES = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "bar"}
# Excel may write the delimiter in a line before the header.
_HINT = re.compile(r"""sep=([^"\r\n])|"sep=([^"\r\n])"[^"\r\n]*""", re.IGNORECASE)


class Dialect(NamedTuple):
    """How the fields of a file are separated and quoted.

    Attributes:
      delimiter: field delimiter.
      quoting: meaning of double quotes.
      found: the quotes from which `quoting` was detected; None if it was given or follows from the
        delimiter.
      trained: whether `quoting` is that of the training tables, see `open_like`.
    """

    delimiter: str
    quoting: Quoting
    found: Quotes | None = None
    trained: bool = False

    @property
    def is_evident(self) -> bool:
        """Whether `quoting` was detected from quotes, not by default from a lack of them."""
        return self.found is not None and (self.quoting == "none" or self.found.quoted > 0)


def is_delimiter(text: str) -> bool:
    """Return whether a text can delimit fields: one character, no quote and no line end."""
    return len(text) == 1 and text not in '"\r\n'


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the delimited training tables of a task were read, to read other tables alike.

    Attributes:
      delimiter: the field delimiter, if the task sets one; None: it was detected.
      quoting: delimiter → meaning of double quotes in the tables with this delimiter, if the task
        sets it or quotes in these tables show it.

    Raises:
      ValueError: if the delimiter is not one character.
    """

    delimiter: str | None = None
    quoting: dict[str, Quoting] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.delimiter is not None and not is_delimiter(self.delimiter):
            raise ValueError(f"delimiter: {self.delimiter!r} is not one character")


@dataclasses.dataclass(frozen=True)
class DelimitedSheet:
    """A `Sheet` of delimited text. The number of a row is that of its last line, from 1.

    Attributes:
      path: path for messages.
      file: the file to read.
      dialect: delimiter and quoting.
    """

    path: Path
    file: Path
    dialect: Dialect

    @property
    def unreadable(self) -> Mapping[str, str]:
        """No columns: all fields are text."""
        return {}

    @property
    def _delimiter(self) -> str:
        return DELIMITER_NAMES.get(self.dialect.delimiter, repr(self.dialect.delimiter))

    @property
    def lists(self) -> frozenset[str]:
        """No columns: no field is a list."""
        return frozenset()

    def rows(self, tally: Tally | None = None) -> Iterator[tuple[int, list[str]]]:
        """Yield the header and the rows, each with the number of its last physical line."""
        header: list[str] = []
        lines = stream(self.file, self.path)
        for line, fields in read_lines(lines, self.path, self.dialect, tally or Tally()):
            header = header or fields
            if len(fields) != len(header):
                raise UserError(f"{self.where(line)}: {self._misfit(len(fields), len(header))}")
            yield line, fields

    def _misfit(self, found: int, wanted: int) -> str:
        name = self._delimiter
        remedy = f'put a field that contains a {name} or a line break in "double quotes".'
        if self.dialect.quoting == "none":
            remedy = (
                f"double quotes are part of the text here: if they enclose fields with a {name} or "
                "a line break, choose quoting standard."
            )
        return (
            f"{found} fields where the header has {wanted}; "
            f"separate the fields by single {name}s, and {remedy}"
        )

    def where(self, number: int) -> str:
        """Return `file:line`."""
        return f"{self.path}:{number}"

    def layout(self, columns: Sequence[str]) -> str:
        """Return the required header as text for messages."""
        return f"a {self._delimiter}-separated header with {', '.join(columns)}"

    def describe(self, tally: Tally) -> list[str]:
        """Describe the detected meaning of quotes, and what quoted fields contain."""
        quotes, notes = self.dialect.found, []
        if self.dialect.trained:
            what = "are part of the text" if self.dialect.quoting == "none" else "enclose fields"
            notes.append(f"double quotes {what}, as in training")
        elif quotes and quotes.open:
            notes.append(f"double quotes are part of the text (line {quotes.open} opens one only)")
        elif quotes and self.dialect.quoting == "none":
            notes.append("double quotes are part of the text, as in the other files")
        elif quotes and quotes.quoted:
            notes.append(f"{quotes.quoted:,} fields are in double quotes, as in standard CSV")
        special = tally.note(self._delimiter)
        return [*notes, special] if special else notes


def open_sheets(
    files: Mapping[str, tuple[Path, Path]],
    delimiter: str | None = None,
    quoting: Quoting | None = None,
) -> dict[str, Sheet]:
    """Detect the delimiter and quoting of the files of a table.

    By default, fields separated by commas, semicolons or bars are quoted as in standard CSV. Many
    programs write tab-separated files without quoting, where a sentence may begin with a quote.
    Tab-separated files therefore count as quoted only if, in all of them, every field that begins
    with a double quote also ends with one on the same line and doubles the quotes inside.

    Args:
      files: name → path for messages and file to read.
      delimiter: field delimiter; None: detected from each header.
      quoting: `none` or `standard`; None: detected.

    Raises:
      UserError: if the delimiter cannot be detected from a header, or a file cannot be read.
    """
    headers = {name: _first_line(stream(file, path)) for name, (path, file) in files.items()}
    delimiters = {n: delimiter or sniff(headers[n], path) for n, (path, _) in files.items()}
    found: dict[str, Quotes] = {}
    for name, (path, file) in files.items():
        if quoting is None and _may_be_unquoted(headers[name], delimiters[name], path):
            found[name] = find_quotes(stream(file, path), delimiters[name])
    unquoted = any(quotes.open for quotes in found.values())
    return {
        name: DelimitedSheet(path, file, Dialect(
            delimiters[name],
            quoting or ("none" if unquoted and name in found else "standard"),
            found.get(name),
        ))
        for name, (path, file) in files.items()
    }  # fmt: skip


def open_like(path: Path, file: Path, reading: Reading, quoting: Quoting | None = None) -> Sheet:
    """Open a table as the training tables of a task were read.

    A delimiter that the task sets is used if it occurs in the header; otherwise it is detected.
    Tables with another delimiter than the training tables have their own quoting, such as a CSV
    file for a task that was trained on tabs.

    Args:
      path: path for messages.
      file: the file to read.
      reading: how the training tables were read.
      quoting: `none` or `standard`; None: as in training.

    Raises:
      UserError: see `open_sheets`.
    """
    header = _first_line(stream(file, path))
    own = reading.delimiter if (reading.delimiter or "\n") in header else None
    delimiter = own or sniff(header, path)
    known = reading.quoting.get(delimiter)
    has_one_column = delimiter == "\t" and not _may_be_unquoted(header, delimiter, path)
    if quoting or known is None or has_one_column:
        return open_sheets({"": (path, file)}, delimiter, quoting)[""]
    return DelimitedSheet(path, file, Dialect(delimiter, known, trained=True))


def _may_be_unquoted(header: str, delimiter: str, path: Path) -> bool:
    """Return whether tabs separate the fields; a one-column .csv file counts as comma-separated."""
    return delimiter == "\t" and ("\t" in header or not _is_csv(path))


def _is_csv(path: Path) -> bool:
    return ".csv" in map(str.lower, path.suffixes)


def _first_line(lines: Iterable[str]) -> str:
    return next((line for line in lines if line.strip("\r\n")), "")


def sniff(text: str, path: Path) -> str:
    r"""Detect the delimiter: the most frequent one in the header, or a tab if it has none.

    >>> sniff("id,text,label\\n1,a;b,0", Path("x.csv")), sniff("sep=;\\na,b;c", Path("x.csv"))
    (',', ';')
    """
    header = re.split(r"[\r\n]", text.lstrip("\r\n"), maxsplit=1)[0]
    if hint := _HINT.fullmatch(header):
        return hint[1] or hint[2]
    if not header and _is_csv(path):
        return ","  # the file is empty; messages name the delimiter
    best = max(DELIMITERS, key=header.count)
    if sum(header.count(d) == header.count(best) > 0 for d in DELIMITERS) > 1:
        raise UserError(
            f"{path}:1: cannot tell what separates the fields; use only one of tab, comma, "
            "semicolon and bar in the header (or set `delimiter` in the task file)."
        )
    return best


def read_lines(
    lines: Iterable[str], path: Path, dialect: Dialect, tally: Tally
) -> Iterator[tuple[int, list[str]]]:
    """Yield the non-blank rows, each with the number of its last physical line.

    Args:
      lines: physical lines.
      path: path of the file, for messages.
      dialect: delimiter and quoting.
      tally: updated with the counts of the rows.

    Raises:
      UserError: if quotes are misplaced, or a field is longer than the csv module allows.
    """
    # Without `strict`, a field with a misplaced quote would swallow the next lines.
    reader = csv.reader(
        _without_hint(lines),
        delimiter=dialect.delimiter,
        quoting=CSV[dialect.quoting],
        strict=True,
    )
    while True:
        before = reader.line_num
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(_misquoted(path, before + 1, reader.line_num, error)) from None
        if fields:
            tally.add(fields, reader.line_num - before, dialect.delimiter)
            yield reader.line_num, fields


def _without_hint(lines: Iterable[str]) -> Iterator[str]:
    """Blank out Excel's delimiter line, which keeps line numbers correct."""
    for number, line in enumerate(lines):
        yield "\n" if number == 0 and _HINT.fullmatch(line.rstrip("\r\n")) else line


def _misquoted(path: Path, first: int, last: int, error: csv.Error) -> str:
    # An open quote extends to the next quote, so the mistake is at the start of the row.
    what = str(error).replace("\t", "a tab")
    message = f"{path}:{first}: {what} (reached line {last}); "
    if "field larger than" in what and first == last:
        return message + "shorten the field."
    return message + (
        "look for a quote that is not closed: a field that starts with a double quote must end "
        "with one, and a double quote inside it is written twice; or, if quotes are part of the "
        "text, choose quoting none."
    )


def show_score(value: float) -> str:
    """Format a score or a probability with six significant digits, whatever its range.

    >>> show_score(3.14159265), show_score(0.00003), show_score(5.0)
    ('3.14159', '3e-05', '5')
    """
    return f"{value:.6g}"


@contextlib.contextmanager
def writing(file: IO[bytes], columns: Kinds, delimiter: str) -> Iterator[Write]:
    """Write a header and the records, without `dict` and `list` columns."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    names = [name for name, kind in columns.items() if kind not in (dict, list)]
    writer = file_system.csv_writer(text, delimiter)
    writer.writerow(names)

    def write(records: Sequence[Mapping[str, Any]]) -> None:
        writer.writerows([_show(record[name]) for name in names] for record in records)

    yield write
    text.flush()
    text.detach()


def _show(value: Any) -> str:
    if value is None:
        return ""
    return show_score(value) if isinstance(value, float) else str(value)
