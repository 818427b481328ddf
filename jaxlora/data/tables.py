"""Reads tables of examples: text files with a header, fields apart by tabs, commas or the like."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from jaxlora.data.rows import UNLABELLED, Row, check, parse_label
from jaxlora.errors import UserError
from jaxlora.tasks import Task

DELIMITERS = "\t,;|"
DELIMITER_NAMES = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "bar"}


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns of a table are read.

    Attributes:
      text: one column for a single sentence, two for a pair.
      label: the label's.
      id: the examples' own names; None: their number in the file, from 0.
    """

    text: tuple[str, ...]
    label: str
    id: str | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """The files of a task.

    Attributes:
      columns: the same in all files.
      train, dev: their paths.
      test: a third one, with labels or without; None if there is none.
      delimiter: what separates fields; None: found out from the header.
    """

    columns: Columns
    train: str
    dev: str
    test: str | None = None
    delimiter: str | None = None

    @property
    def files(self) -> dict[str, Path]:
        """Paths by split."""
        named = {"train": self.train, "dev": self.dev, "test": self.test}
        return {split: Path(path) for split, path in named.items() if path is not None}


def read_splits(task: Task, table: Table) -> dict[str, list[Row]]:
    """All splits of a task; without a test file that split is empty.

    Raises:
      UserError: see `read`; also if no row of train or dev has a label.
    """
    splits: dict[str, list[Row]] = {"test": []}
    for split, path in table.files.items():
        splits[split] = read(task, path, table.columns, table.delimiter, labelled=None)
        if split != "test" and all(math.isnan(row.label) for row in splits[split]):
            raise UserError(f"{path}: no row has a label in column {table.columns.label!r}.")
    return splits


def read(
    task: Task,
    path: Path,
    columns: Columns,
    delimiter: str | None = None,
    *,
    labelled: bool | None = True,
) -> list[Row]:
    """Read one file: standard csv quoting, UTF-8, columns found by name.

    Args:
      task: decides the labels' range.
      path: the file.
      columns: what to read.
      delimiter: what separates fields; None: found out from the header.
      labelled: True: every row needs a label. False: every label is NaN. None: a label may be
        missing, and then is NaN.

    Raises:
      UserError: anything wrong with the file; the message names the line and the remedy.
    """
    text = read_text(path)
    delimiter = delimiter or sniff(text, path)
    lines = read_lines(io.StringIO(text, newline=""), path, delimiter)
    _, header = next(lines, (0, []))
    if not header:
        raise UserError(f"{path} is empty: not even a header line; replace the file.")
    needed = [*([columns.id] if columns.id else []), *columns.text]
    needed += [columns.label] if labelled else []
    optional = [columns.label] if labelled is None else []
    find_columns(header, needed, path, delimiter, task.title, optional)
    at = {name: header.index(name) for name in header}
    rows: list[Row] = []
    for line, fields in lines:
        where = f"{path}:{line}"
        check_width(fields, header, where, delimiter)
        name = fields[at[columns.id]] if columns.id else str(len(rows))
        texts = [fields[at[column]] for column in columns.text]
        written = fields[at[columns.label]] if labelled is not False and columns.label in at else ""
        missing = labelled is False or (labelled is None and not written.strip())
        label = UNLABELLED if missing else parse_label(written, task, where)
        rows.append(check(Row(name, texts[0], "".join(texts[1:]), label), task, where))
    if not rows:
        raise UserError(f"{path} is empty: there is no example in it; replace the file.")
    return rows


def read_text(path: Path) -> str:
    """The file's text; a byte order mark, as Excel writes it, is dropped.

    Raises:
      UserError: it cannot be read, is not UTF-8, or has a NUL character.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path.") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8; save the file as UTF-8.") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(
            f"{path}:{line}: a NUL character; the file is damaged or not UTF-8 text: "
            "copy it again or save it as UTF-8."
        )
    return text


def sniff(text: str, path: Path) -> str:
    r"""The delimiter that the header line has most of; a tab where it has none (one column).

    >>> sniff("id,text,label\\n1,a;b,0", Path("x.csv"))
    ','
    """
    header = text.lstrip("\r\n").split("\n", 1)[0]
    best = max(DELIMITERS, key=header.count)
    if sum(header.count(d) == header.count(best) > 0 for d in DELIMITERS) > 1:
        raise UserError(
            f"{path}:1: cannot tell what separates the fields; of tab, comma, semicolon and bar "
            "use one alone in the header (a task's description may name its delimiter)."
        )
    return best


def read_lines(lines: Iterable[str], path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of lines of text, blank ones left out, each with its last physical line.

    Raises:
      UserError: quotes in the wrong place, a field longer than csv allows, or not UTF-8.
    """
    # Strict: a quote in the wrong place is an error instead of swallowing the lines after it.
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        first = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except UnicodeDecodeError:
            raise UserError(f"{path}:{first}: not UTF-8 from here on; save it as UTF-8.") from None
        except csv.Error as error:
            # An open quote runs on until the next one: the mistake is where the row starts.
            what = str(error).replace("\t", "a tab")
            raise UserError(
                f"{path}:{first}: {what} (reached line {reader.line_num}); "
                "look for a quote that is not closed: a field that starts with a double quote "
                "must end with one, and a double quote inside it is written twice."
            ) from None
        if fields:
            yield reader.line_num, fields


def find_columns(
    header: Sequence[str],
    needed: Sequence[str],
    path: Path,
    delimiter: str,
    who: str,
    optional: Sequence[str] = (),
) -> None:
    """Refuse a header that lacks a needed column, or has one that is read twice.

    Raises:
      UserError: naming what is missing and what there is.
    """
    if not any(header):
        raise UserError(f"{path}: is empty. {who} needs a header with {', '.join(needed)}.")
    twice = [name for name in (*needed, *optional) if header.count(name) > 1]
    if twice:
        raise UserError(f"{path}:1: the column {twice[0]} is there twice; rename one of them.")
    missing = [name for name in needed if name not in header]
    if missing:
        raise UserError(
            f"{path}:1: no column {', '.join(missing)}; found {', '.join(filter(None, header))}. "
            f"{who} needs a {_separated(delimiter)} header with {', '.join(needed)}."
        )


def check_width(fields: Sequence[str], header: Sequence[str], where: str, delimiter: str) -> None:
    """Refuse a row with more or fewer fields than the header.

    Raises:
      UserError: naming the line.
    """
    if len(fields) != len(header):
        name = DELIMITER_NAMES.get(delimiter, repr(delimiter))
        raise UserError(
            f"{where}: {len(fields)} fields where the header has {len(header)}; "
            f"separate the fields by single {name}s and put a field that contains "
            f'a {name} or a line break in "double quotes".'
        )


def _separated(delimiter: str) -> str:
    return f"{DELIMITER_NAMES.get(delimiter, repr(delimiter))}-separated"
