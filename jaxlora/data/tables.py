"""Reader of tables of examples, in any of the formats in `table_formats`."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from jaxlora.data import delimited, hub
from jaxlora.data.delimited import DelimitedSheet, Reading
from jaxlora.data.holdout import hold_out
from jaxlora.data.quoting import Quoting, Tally
from jaxlora.data.raw_examples import (
    UNLABELLED,
    Label,
    TextExample,
    is_missing,
    join_marks,
    join_names,
    parse_label,
)
from jaxlora.data.sheet import Sheet
from jaxlora.data.table_formats import find, open_sheets
from jaxlora.tasks.task import Task
from jaxlora.utils.errors import UserError


class MissingColumnsError(UserError):
    """A table lacks required columns.

    Attributes:
      names: the columns.
    """

    def __init__(self, message: str, names: Sequence[str]) -> None:
        super().__init__(message)
        self.names = names


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns to read from a table.

    Attributes:
      text: one column for single sentences, two for pairs.
      label: the label column, or for multilabel tasks several columns of 0 and 1, one per class.
      id: the id column; None: ids are the row numbers, from 0.
    """

    text: tuple[str, ...]
    label: str | tuple[str, ...]
    id: str | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """The label columns, as a tuple."""
        return (self.label,) if isinstance(self.label, str) else self.label

    @property
    def lists(self) -> tuple[str, ...]:
        """Columns that may contain lists: the label column, if there is only one."""
        return (self.label,) if isinstance(self.label, str) else ()

    def written(
        self, fields: Sequence[str], at: Mapping[str, int], mark: str, sheet: Sheet, line: int
    ) -> str:
        """Return the label of a row as one string; a list or several columns become joined names.

        Args:
          fields: fields of the row.
          at: column → index in `fields`.
          mark: separates joined names.
          sheet, line: location of the row.
        """
        cells = [fields[at[name]] for name in self.labels]
        if not isinstance(self.label, str):
            return join_marks(cells, self.label, mark, sheet.where(line))
        if self.label in sheet.lists:
            return join_names(cells[0], mark, sheet.where(line))
        return cells[0]


def split_label(label: str | None) -> str | tuple[str, ...] | None:
    """Split names of label columns at commas; a single name or None is returned unchanged.

    >>> split_label("topic"), split_label("bug,billing")
    ('topic', ('bug', 'billing'))
    """
    return tuple(label.split(",")) if label and "," in label else label


@dataclasses.dataclass(frozen=True)
class Table:
    """The files of a task and how to read them.

    Attributes:
      columns: the columns to read, the same in all files.
      train: path of the training file.
      dev: path of the dev file, or the fraction of the training rows to hold out, see `hold_out`.
      test: path of the test file, with or without labels; None: there is none.
      delimiter: field delimiter; None: detected from the header.
      quoting: meaning of double quotes; None: detected, see `delimited.open_sheets`.
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

    def open(self) -> dict[str, Sheet]:
        """Open the files, see `table_formats.open_sheets`."""
        return open_sheets(self.files, self.delimiter, self.quoting)

    def reading(self) -> Reading | None:
        """Return how the delimited files are read; None if no file is delimited text.

        Raises:
          UserError: see `open`.
        """
        sheets = self.open().values()
        found = [sheet.dialect for sheet in sheets if isinstance(sheet, DelimitedSheet)]
        known = {one.delimiter: one.quoting for one in found if self.quoting or one.is_evident}
        return Reading(self.delimiter, known) if found else None


def open_like(
    path: Path,
    reading: Reading | None,
    quoting: Quoting | None = None,
    copy: Path | None = None,
) -> Sheet:
    """Open a table, delimited text as the training tables of a task, see `delimited.open_like`.

    Args:
      path: the table, of any format.
      reading: how the training tables were read; None: unknown.
      quoting: meaning of double quotes in delimited text; None: as in training, else detected.
      copy: file to read instead of the path, which is still used in messages.

    Raises:
      UserError: if the file cannot be read, or is not a table.
    """
    path = Path(hub.find(str(path)))
    if reading is not None and find(path).open is delimited.open_sheets:
        return delimited.open_like(path, copy or path, reading, quoting)
    return open_sheets({"": path}, None, quoting, {"": copy or path})[""]


def read_splits(task: Task, table: Table) -> dict[str, list[TextExample]]:
    """Read all splits of a task; without a test file the test split is empty.

    Raises:
      UserError: see `read`; also if train or dev has no labels, or all labels of train are equal.
    """
    splits: dict[str, list[TextExample]] = {"train": [], "dev": [], "test": []}
    for split, sheet in table.open().items():
        needed = None if split == "test" else True
        splits[split] = read_sheet(task, sheet, table.columns, labelled=needed)
        if needed and sheet.lists.intersection(table.columns.lists):
            _refuse_null(sheet, splits[split])
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


def _refuse_null(sheet: Sheet, rows: Sequence[TextExample]) -> None:
    """Check that no list of labels is null, which could mean unknown or empty.

    Raises:
      UserError: if one is null; the message states the first.
    """
    for row in rows:
        if not row.labelled:
            raise UserError(
                f"{sheet.where(row.line)}: null instead of a list of labels; write [] where "
                "there is none, or leave the row out"
            )


def check_all_occur(task: Task, path: str, train: Sequence[TextExample]) -> None:
    """Check that every class of a multilabel task occurs in the training rows.

    Raises:
      UserError: if one does not; the message lists the classes.
    """
    found = {number for row in train if isinstance(row.label, tuple) for number in row.label}
    if absent := [name for n, name in enumerate(task.classes) if n not in found]:
        raise UserError(
            f"{path}: no training row has the label {', '.join(absent[:10])}; add rows, or take it "
            "out of `classes` (a held-out dev set has none of these rows)"
        )


def read_header(path: Path) -> list[str]:
    """Return the column names of a file.

    Raises:
      UserError: if the file is not a table.
    """
    return next(open_sheets({"": path})[""].rows(), (0, []))[1]


@dataclasses.dataclass(frozen=True)
class WrittenLabels:
    """The labels of a table, as written.

    Attributes:
      sheets: split → file; a test file without labels is left out.
      columns: the columns of the table.
      mark: separates joined names, see `Columns.written`.
    """

    sheets: Mapping[str, Sheet]
    columns: Columns
    mark: str

    @property
    def lists(self) -> bool:
        """Whether the labels are lists in any file."""
        return any(sheet.lists.intersection(self.columns.lists) for sheet in self.sheets.values())

    def of(self, split: str) -> Iterator[tuple[int, str]]:
        """Yield the number and the label of each row, without surrounding white space."""
        sheet, names = self.sheets[split], self.columns
        needed = [*names.text, *names.labels]
        header, rows = select(sheet, needed, "The task", lists=names.lists)
        at = {name: header.index(name) for name in names.labels}
        for line, fields in rows:
            yield line, names.written(fields, at, self.mark, sheet, line).strip()

    @functools.cached_property
    def counts(self) -> Counter[str]:
        """Label → number of rows in all files."""
        return Counter(label for split in self.sheets for _, label in self.of(split))

    def find(self, wanted: str) -> str:
        """Return the location of the first row with the label `wanted`."""
        places = (
            sheet.where(line)
            for split, sheet in self.sheets.items()
            for line, label in self.of(split)
            if label == wanted
        )
        return next(places)


def read_labels(table: Table, mark: str = "|") -> WrittenLabels:
    """Open the files of a task to read only their labels; a test file may have none.

    Args:
      table: the files.
      mark: see `WrittenLabels`.

    Raises:
      UserError: if a file is not a table; later, when labels are read, if it has no label column.
    """
    labels, sheets = set(table.columns.labels), table.open()
    if "test" in sheets and not labels <= set(next(sheets["test"].rows(), (0, []))[1]):
        del sheets["test"]
    return WrittenLabels(sheets, table.columns, mark)


def count_training_rows(table: Table, task: Task) -> int:
    """Estimate the number of training rows, at least 1; rows with blank text are counted too.

    Raises:
      UserError: see `read_labels`.
    """
    written = read_labels(table, task.label_delimiter).of("train")
    empty_counts = task.form == "classes"  # an empty set is a label
    labelled = sum(not is_missing(one) or (empty_counts and not one) for _, one in written)
    held_out = table.dev if isinstance(table.dev, float) else 0.0
    return max(1, round(labelled * (1 - held_out)))


def notes(sheets: Mapping[str, Sheet]) -> dict[str, list[str]]:
    """Read each file of a table and return notes on it, see `Sheet.describe`."""
    found = {}
    for name, sheet in sheets.items():
        tally = Tally()
        for _ in sheet.rows(tally):
            pass
        found[name] = sheet.describe(tally)
    return found


def read(
    task: Task,
    path: Path,
    columns: Columns,
    delimiter: str | None = None,
    quoting: Quoting | None = None,
    *,
    labelled: bool | None = True,
) -> list[TextExample]:
    """Read one file of examples.

    Args:
      task: determines the classes or range of the labels.
      path: the file.
      columns: the columns to read.
      delimiter: field delimiter of delimited text; None: detected from the header.
      quoting: meaning of double quotes in it; None: detected, see `delimited.open_sheets`.
      labelled: see `read_sheet`.

    Raises:
      UserError: if the file is invalid; the message states the line and a fix.
    """
    sheet = open_sheets({"": path}, delimiter, quoting)[""]
    return read_sheet(task, sheet, columns, labelled=labelled)


def read_sheet(
    task: Task,
    sheet: Sheet,
    columns: Columns,
    *,
    labelled: bool | None = True,
    tally: Tally | None = None,
) -> list[TextExample]:
    """Read the rows of one file, including rows with blank text.

    Args:
      task: determines the classes or range of the labels.
      sheet: the file.
      columns: the columns to read.
      labelled: True: the label columns are required; missing labels are NaN. None: they are
        optional. False: they are ignored, and every label is NaN.
      tally: updated with counts of the rows.

    Raises:
      UserError: if the file is invalid; the message states the line and a fix.
    """
    needed = [*([columns.id] if columns.id else []), *columns.text]
    needed += columns.labels if labelled else []
    optional = columns.labels if labelled is None else []
    lists = columns.lists if task.form == "classes" else ()
    header, found = select(sheet, needed, task.title, optional, tally, lists)
    at = {name: header.index(name) for name in header}
    if labelled is not False:
        labelled = set(columns.labels) <= set(header)
    rows: list[TextExample] = []
    for line, fields in found:
        name = fields[at[columns.id]] if columns.id else str(len(rows))
        texts = [fields[at[column]].strip() for column in columns.text]
        label: Label = UNLABELLED
        if labelled:
            written = columns.written(fields, at, task.label_delimiter, sheet, line)
            label = parse_label(written, task, sheet.where(line))
        rows.append(TextExample(name, texts[0], "".join(texts[1:]), label, line))
    if not rows:
        raise UserError(
            f"{sheet.path} is empty: it has a header but no examples; replace the file."
        )
    return rows


def select(
    sheet: Sheet,
    needed: Sequence[str],
    who: str,
    optional: Sequence[str] = (),
    tally: Tally | None = None,
    lists: Sequence[str] = (),
) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """Check the header of a file, and return it with an iterator over the rows.

    Args:
      sheet: the file.
      needed: required columns.
      who: what needs them, for messages.
      optional: columns that may be absent.
      tally: updated with counts of the rows.
      lists: columns that may contain lists of strings, see `Sheet.lists`.

    Raises:
      MissingColumnsError: if a required column is missing.
      UserError: if the file is empty, a column occurs twice, or it is not of strings.
    """
    rows = sheet.rows(tally)
    number, header = next(rows, (0, []))
    where = sheet.where(number) if number else str(sheet.path)
    for name in (*needed, *optional):
        if name in sheet.unreadable and not (name in lists and name in sheet.lists):
            is_list = "list" in sheet.unreadable[name]
            hint = "; labels of a multilabel task may be lists of strings, in all rows" * is_list
            raise UserError(
                f"{where}: column {name} is {sheet.unreadable[name]}, not strings{hint}"
            )
        if header.count(name) > 1:
            raise UserError(f"{where}: the column {name} occurs twice; rename one of them.")
    if not any(header):
        raise UserError(
            f"{sheet.path}: is empty; replace the file. {who} needs {sheet.layout(needed)}."
        )
    if missing := [name for name in needed if name not in header]:
        raise MissingColumnsError(
            f"{where}: no column {', '.join(missing)}{_hint(missing, header)}; found "
            f"{', '.join(filter(None, header))}. {who} needs {sheet.layout(needed)}.",
            missing,
        )
    return header, rows


def _hint(missing: Sequence[str], header: Sequence[str]) -> str:
    """Suggest columns whose names resemble the missing ones, ignoring case."""
    if any(f'"{name}"' in header for name in missing):
        return (
            " (double quotes are part of the text here; if they enclose fields, choose quoting "
            "standard)"
        )
    folded = {name.strip().casefold(): name for name in header if name}
    close = [difflib.get_close_matches(name.casefold(), folded, 1) for name in missing]
    found = [repr(folded[match[0]]) for match in close if match]
    return f" (did you mean {', '.join(found)}?)" if found else ""
