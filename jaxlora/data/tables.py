"""Reader of tables of examples: text files with a header, separated by tabs, commas or similar."""

from __future__ import annotations

import csv
import dataclasses
import difflib
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxlora.data import foreign
from jaxlora.data.holdout import hold_out
from jaxlora.data.quoting import CSV, Quotes, Quoting, Tally, find_quotes
from jaxlora.data.raw_examples import (
    UNLABELLED,
    Label,
    TextExample,
    is_missing,
    join_marks,
    parse_label,
)
from jaxlora.tasks.task import Task
from jaxlora.utils.errors import UserError

DELIMITERS = "\t,;|"
DELIMITER_NAMES = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "bar"}
# A line before the header in which Excel may state the delimiter.
_HINT = re.compile(r"""sep=([^"\r\n])|"sep=([^"\r\n])"[^"\r\n]*""", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of a table that are read.

    Attributes:
      text: one column for single sentences, two for pairs.
      label: the column of labels, or several columns of 0 and 1, one for each class of a set.
      id: the column of ids; None: ids are the row numbers, from 0.
    """

    text: tuple[str, ...]
    label: str | tuple[str, ...]
    id: str | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """The columns that labels are read from."""
        return (self.label,) if isinstance(self.label, str) else self.label

    def written(self, fields: Sequence[str], at: Mapping[str, int], mark: str, where: str) -> str:
        """Return the label of a row as written; several columns become the names that are set.

        Args:
          fields: of the row.
          at: column → its place among the fields.
          mark: separates the names.
          where: `file:line`, for the message.
        """
        cells = [fields[at[name]] for name in self.labels]
        return (
            cells[0] if isinstance(self.label, str) else join_marks(cells, self.label, mark, where)
        )


def split_label(label: str | None) -> str | tuple[str, ...] | None:
    """Return the column of labels, or several that are separated by commas.

    >>> split_label("topic"), split_label("bug,billing")
    ('topic', ('bug', 'billing'))
    """
    return tuple(label.split(",")) if label and "," in label else label


@dataclasses.dataclass(frozen=True)
class Table:
    """The files of a task and how to read them.

    Attributes:
      columns: the columns, the same in all files.
      train: path of the training file.
      dev: path of the dev file, or the share of the training rows to hold out, see `hold_out`.
      test: path of the test file, with or without labels; None: there is none.
      delimiter: delimiter of fields; None: detected from the header.
      quoting: meaning of double quotes; None: detected, see `open_sheets`.
    """

    columns: Columns
    train: str
    dev: str | float
    test: str | None = None
    delimiter: str | None = None
    quoting: Quoting | None = None

    @property
    def files(self) -> dict[str, Path]:
        """Paths of the files by split."""
        named = {"train": self.train, "dev": self.dev, "test": self.test}
        return {split: Path(path) for split, path in named.items() if isinstance(path, str)}


class Dialect(NamedTuple):
    """How the fields of a file are separated and quoted.

    Attributes:
      delimiter: delimiter of fields.
      quoting: meaning of double quotes.
      found: the quotes from which it was detected; None if it was given, or follows from the
        delimiter.
    """

    delimiter: str
    quoting: Quoting
    found: Quotes | None = None


class Sheet(NamedTuple):
    """One file of a table.

    Attributes:
      path: its path, for messages.
      lines: returns an iterator over its physical lines; may be called several times.
      dialect: delimiter and quoting.
    """

    path: Path
    lines: Callable[[], Iterable[str]]
    dialect: Dialect

    def rows(self, tally: Tally | None = None) -> Iterator[tuple[int, list[str]]]:
        """Yield the rows that are not blank, each with its last physical line, from 1."""
        return read_lines(self.lines(), self.path, self.dialect, tally or Tally())


def open_sheets(
    texts: Mapping[str, tuple[Path, Callable[[], Iterable[str]]]],
    delimiter: str | None = None,
    quoting: Quoting | None = None,
) -> dict[str, Sheet]:
    """Detect the delimiter and quoting of the files of a table.

    Quotes have one meaning in all files. Unless it is given, fields separated by commas,
    semicolons or bars are quoted as in standard CSV. Many programs write tab-separated files
    without quoting, where a sentence may begin with a quote. Fields separated by tabs therefore
    count as quoted only if every field that begins with a double quote also ends with one on the
    same line, and doubles the quotes inside.

    Args:
      texts: name → path, and a function that returns the lines.
      delimiter: delimiter of fields; None: detected from each header.
      quoting: none or standard; None: detected.

    Raises:
      UserError: if the delimiter cannot be detected from a header.
    """
    headers = {name: _first_line(lines()) for name, (_, lines) in texts.items()}
    delimiters = {n: delimiter or sniff(headers[n], path) for n, (path, _) in texts.items()}
    found: dict[str, Quotes] = {}
    for name, (path, lines) in texts.items():
        if quoting is None and _may_be_unquoted(headers[name], delimiters[name], path):
            found[name] = find_quotes(lines(), delimiters[name])
    unquoted = any(quotes.open for quotes in found.values())
    return {
        name: Sheet(path, lines, Dialect(
            delimiters[name],
            quoting or ("none" if unquoted and name in found else "standard"),
            found.get(name),
        ))
        for name, (path, lines) in texts.items()
    }  # fmt: skip


def _may_be_unquoted(header: str, delimiter: str, path: Path) -> bool:
    """Return whether tabs separate the fields; a .csv file with one column counts as commas."""
    return delimiter == "\t" and ("\t" in header or path.suffix.lower() != ".csv")


def _first_line(lines: Iterable[str]) -> str:
    return next((line for line in lines if line.strip("\r\n")), "")


def load_sheets(
    files: Mapping[str, Path], delimiter: str | None = None, quoting: Quoting | None = None
) -> dict[str, Sheet]:
    """Read the files of a table into memory, see `open_sheets`.

    Raises:
      UserError: if a file cannot be read, or is not a table.
    """
    return open_sheets({n: (p, _in_memory(p)) for n, p in files.items()}, delimiter, quoting)


def _in_memory(path: Path) -> Callable[[], Iterable[str]]:
    text = read_text(path)
    return lambda: io.StringIO(text, newline="")


def read_splits(task: Task, table: Table) -> dict[str, list[TextExample]]:
    """Read all splits of a task; without a test file the test split is empty.

    Raises:
      UserError: see `read`; also if no row of train or of dev has a label.
    """
    splits: dict[str, list[TextExample]] = {"train": [], "dev": [], "test": []}
    for split, sheet in load_sheets(table.files, table.delimiter, table.quoting).items():
        needed = None if split == "test" else True
        splits[split] = read_sheet(task, sheet, table.columns, labelled=needed)
        labels = {row.label for row in splits[split] if row.labelled}
        column = f"column {', '.join(map(repr, table.columns.labels))}"
        if needed and not labels:
            raise UserError(f"{sheet.path}: no row has a label in {column}.")
        if split == "train" and len(labels) == 1:
            raise UserError(
                f"{sheet.path}: every row has the same label in {column}; nothing to learn."
            )
    if isinstance(table.dev, float):
        splits["train"], splits["dev"] = hold_out(splits["train"], table.dev, task)
    if task.form == "classes":
        check_all_occur(task, table.train, splits["train"])
    return splits


def check_all_occur(task: Task, path: str, train: Sequence[TextExample]) -> None:
    """Refuse training rows that have no example of a class, of which nothing could be learned.

    Raises:
      UserError: naming the classes.
    """
    found = {number for row in train if isinstance(row.label, tuple) for number in row.label}
    if absent := [name for n, name in enumerate(task.classes) if n not in found]:
        raise UserError(
            f"{path}: no training row has the label {', '.join(absent[:10])}; add rows, or take it "
            "out of `classes` (a held-out dev set has none of these rows)"
        )


def read_header(path: Path) -> list[str]:
    """Return the names of the columns of a file.

    Raises:
      UserError: if the file is not a table.
    """
    return next(load_sheets({"": path})[""].rows(), (0, []))[1]


def read_labels(table: Table, mark: str = "|") -> dict[str, list[str]]:
    """Return the labels of each split as written; a test file may have none.

    Args:
      table: the files.
      mark: separates the names of several columns of labels, see `Columns.written`.

    Raises:
      UserError: if a file is not a table, or train or dev has no column of labels.
    """
    found: dict[str, list[str]] = {}
    for split, sheet in load_sheets(table.files, table.delimiter, table.quoting).items():
        rows = sheet.rows()
        _, header = next(rows, (0, []))
        if split == "test" and not set(table.columns.labels) <= set(header):
            continue
        needed = [*table.columns.text, *table.columns.labels]
        find_columns(header, needed, sheet.path, sheet.dialect.delimiter, "The task")
        at = {name: header.index(name) for name in table.columns.labels}
        found[split] = []
        for line, fields in rows:
            where = f"{sheet.path}:{line}"
            check_width(fields, header, where, sheet.dialect)
            found[split].append(table.columns.written(fields, at, mark, where))
    return found


def count_training_rows(table: Table, task: Task) -> int:
    """Return how many rows there are to train on, at least 1; blank texts are not looked at.

    Raises:
      UserError: see `read_labels`.
    """
    written = (label.strip() for label in read_labels(table, task.label_delimiter)["train"])
    empty_counts = task.form == "classes"  # an empty set is a label
    labelled = sum(not is_missing(one) or (empty_counts and not one) for one in written)
    held_out = table.dev if isinstance(table.dev, float) else 0.0
    return max(1, round(labelled * (1 - held_out)))


def notes(sheets: Mapping[str, Sheet]) -> dict[str, list[str]]:
    """Return notes for each file of a table, see `describe`."""
    found = {}
    for name, sheet in sheets.items():
        tally = Tally()
        for _ in sheet.rows(tally):
            pass
        found[name] = describe(sheet.dialect, tally)
    return found


def describe(dialect: Dialect, tally: Tally) -> list[str]:
    """Describe the meaning of quotes where it was detected, and what quoted fields contain."""
    found = []
    if dialect.found and dialect.found.open:
        found.append(
            f"double quotes are part of the text (line {dialect.found.open} opens one only)"
        )
    elif dialect.found and dialect.quoting == "none":
        found.append("double quotes are part of the text, as in the other files")
    elif dialect.found and dialect.found.quoted:
        found.append(f"{dialect.found.quoted:,} fields are in double quotes, as in standard CSV")
    special = tally.note(DELIMITER_NAMES.get(dialect.delimiter, repr(dialect.delimiter)))
    return [*found, special] if special else found


def read(
    task: Task,
    path: Path,
    columns: Columns,
    delimiter: str | None = None,
    quoting: Quoting | None = None,
    *,
    labelled: bool | None = True,
) -> list[TextExample]:
    """Read one UTF-8 file by the names of its columns.

    Args:
      task: determines the range of the labels.
      path: the file.
      columns: the columns to read.
      delimiter: delimiter of fields; None: detected from the header.
      quoting: meaning of double quotes; None: detected, see `open_sheets`.
      labelled: see `read_sheet`.

    Raises:
      UserError: if the file is invalid; the message names the line and the remedy.
    """
    sheet = load_sheets({"": path}, delimiter, quoting)[""]
    return read_sheet(task, sheet, columns, labelled=labelled)


def read_sheet(
    task: Task, sheet: Sheet, columns: Columns, *, labelled: bool | None = True
) -> list[TextExample]:
    """Read the rows of one file, including rows with blank text.

    Args:
      task: determines the range of the labels.
      sheet: the file.
      columns: the columns to read.
      labelled: True: the column of labels is required; missing labels are NaN. False: every label
        is NaN. None: the column of labels is optional.

    Raises:
      UserError: if the file is invalid; the message names the line and the remedy.
    """
    lines, path, dialect = sheet.rows(), sheet.path, sheet.dialect
    _, header = next(lines, (0, []))
    if not header:
        raise UserError(f"{path} is empty: not even a header line; replace the file.")
    needed = [*([columns.id] if columns.id else []), *columns.text]
    needed += columns.labels if labelled else []
    optional = columns.labels if labelled is None else []
    find_columns(header, needed, path, dialect.delimiter, task.title, optional)
    at = {name: header.index(name) for name in header}
    if labelled is not False:
        labelled = set(columns.labels) <= set(header)
    rows: list[TextExample] = []
    for line, fields in lines:
        where = f"{path}:{line}"
        check_width(fields, header, where, dialect)
        name = fields[at[columns.id]] if columns.id else str(len(rows))
        texts = [fields[at[column]].strip() for column in columns.text]
        label: Label = UNLABELLED
        if labelled:
            written = columns.written(fields, at, task.label_delimiter, where)
            label = parse_label(written, task, where)
        rows.append(TextExample(name, texts[0], "".join(texts[1:]), label, line))
    if not rows:
        raise UserError(f"{path} is empty: it has a header but no examples; replace the file.")
    return rows


def read_text(path: Path) -> str:
    """Read a file as text, without the byte order mark that Excel writes.

    Raises:
      UserError: if it cannot be read, is another kind of file, is not UTF-8, or contains NUL.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path.") from None
    foreign.refuse(raw[: foreign.HEAD], path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8; save the file as UTF-8.") from None
    if "\0" in text:
        raise _nul(path, text.count("\n", 0, text.index("\0")) + 1)
    return text


def _nul(path: Path, line: int) -> UserError:
    return UserError(
        f"{path}:{line}: a NUL character; the file is damaged or not UTF-8 text: "
        "copy it again or save it as UTF-8."
    )


def stream(file: Path, path: Path) -> Iterator[str]:
    """Yield the physical lines of a file, decoded as by `read_text`, without loading all of it.

    Args:
      file: the file to read.
      path: its path in messages.

    Raises:
      UserError: if it cannot be read, is another kind of file, is not UTF-8, or contains NUL.
    """
    number = 0
    try:
        with file.open("rb") as raw:
            foreign.refuse(raw.read(foreign.HEAD), path)
        with file.open(encoding="utf-8-sig", newline="") as lines:
            for number, line in enumerate(lines, 1):
                if "\0" in line:
                    raise _nul(path, number)
                yield line
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}:{number + 1}: not UTF-8 from here on; save it as UTF-8.") from None


def sniff(text: str, path: Path) -> str:
    r"""Detect the delimiter: the most frequent one in the header, or a tab if there is none.

    >>> sniff("id,text,label\\n1,a;b,0", Path("x.csv")), sniff("sep=;\\na,b;c", Path("x.csv"))
    (',', ';')
    """
    header = re.split(r"[\r\n]", text.lstrip("\r\n"), maxsplit=1)[0]
    if hint := _HINT.fullmatch(header):
        return hint[1] or hint[2]
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
    """Yield the rows that are not blank, each with the number of its last physical line.

    Args:
      lines: physical lines.
      path: path of the file, for messages.
      dialect: delimiter and quoting.
      tally: counts the rows.

    Raises:
      UserError: if quotes are misplaced, or a field is longer than the csv module allows.
    """
    # Strict: a misplaced quote is an error; otherwise its field would swallow the next lines.
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
    """Blank out the line in which Excel states the delimiter, so that line numbers stay right."""
    for number, line in enumerate(lines):
        yield "\n" if number == 0 and _HINT.fullmatch(line.rstrip("\r\n")) else line


def _misquoted(path: Path, first: int, last: int, error: csv.Error) -> str:
    # An open quote extends to the next one, so the mistake is at the start of the row.
    what = str(error).replace("\t", "a tab")
    message = f"{path}:{first}: {what} (reached line {last}); "
    if "field larger than" in what and first == last:
        return message + "shorten the field."
    return message + (
        "look for a quote that is not closed: a field that starts with a double quote must end "
        "with one, and a double quote inside it is written twice; or, if quotes are part of the "
        "text, choose quoting none."
    )


def find_columns(
    header: Sequence[str],
    needed: Sequence[str],
    path: Path,
    delimiter: str,
    who: str,
    optional: Sequence[str] = (),
) -> None:
    """Refuse a header that lacks a needed column, or contains one twice.

    Raises:
      UserError: naming the missing columns and those found.
    """
    if not any(header):
        raise UserError(f"{path}: is empty. {who} needs a header with {', '.join(needed)}.")
    twice = [name for name in (*needed, *optional) if header.count(name) > 1]
    if twice:
        raise UserError(f"{path}:1: the column {twice[0]} is there twice; rename one of them.")
    missing = [name for name in needed if name not in header]
    if missing:
        raise UserError(
            f"{path}:1: no column {', '.join(missing)}{_hint(missing, header)}; found "
            f"{', '.join(filter(None, header))}. "
            f"{who} needs a {_separated(delimiter)} header with {', '.join(needed)}."
        )


def _hint(missing: Sequence[str], header: Sequence[str]) -> str:
    """Suggest existing columns with names similar to the missing ones, ignoring case."""
    if any(f'"{name}"' in header for name in missing):
        return (
            " (double quotes are part of the text here, since a field opens one and does not close "
            "it on its line; if they enclose fields, choose quoting standard)"
        )
    folded = {name.strip().casefold(): name for name in header if name}
    close = [difflib.get_close_matches(name.casefold(), folded, 1) for name in missing]
    found = [repr(folded[match[0]]) for match in close if match]
    return f" (did you mean {', '.join(found)}?)" if found else ""


def check_width(fields: Sequence[str], header: Sequence[str], where: str, dialect: Dialect) -> None:
    """Refuse a row with more or fewer fields than the header.

    Raises:
      UserError: naming the line.
    """
    if len(fields) == len(header):
        return
    name = DELIMITER_NAMES.get(dialect.delimiter, repr(dialect.delimiter))
    remedy = f'put a field that contains a {name} or a line break in "double quotes".'
    if dialect.quoting == "none":
        remedy = (
            f"double quotes are part of the text here: if they enclose fields with a {name} or a "
            "line break, choose quoting standard."
        )
    raise UserError(
        f"{where}: {len(fields)} fields where the header has {len(header)}; "
        f"separate the fields by single {name}s, and {remedy}"
    )


def _separated(delimiter: str) -> str:
    return f"{DELIMITER_NAMES.get(delimiter, repr(delimiter))}-separated"
