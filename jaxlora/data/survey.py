"""Survey of data tables for a new task: columns, labels, duplicates and text lengths."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxlora.data import arrow, hub, tables
from jaxlora.data.labels import (
    DELIMITER,
    FoundLabels,
    WrongLabelError,
    count_sets,
    find_labels,
)
from jaxlora.data.raw_examples import is_blank, is_missing
from jaxlora.data.sheet import Sheet
from jaxlora.data.table_formats import open_sheets, stem_of
from jaxlora.data.tokenized import tokenize
from jaxlora.tasks.kinds import KINDS
from jaxlora.utils.errors import ConfigError, Note, UserError, list_some

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPLITS = {"train": "train", "dev": "dev", "valid": "dev", "validation": "dev", "val": "dev"}
SPLITS |= {"test": "test"}
# A file name that ends with a split, after a separator: topic-dev, but not contest. The colon is
# that of a Hub address.
_SPLIT = re.compile(
    rf"(?:(.*)[-_. :])?({'|'.join(sorted(SPLITS, key=len, reverse=True))})", re.IGNORECASE
)
# Common names of label columns, the most specific first.
LABELS = (
    "label", "labels", "class", "category", "target", "topic", "intent", "sentiment", "score",
    "rating", "stars", "similarity", "is_duplicate", "tags", "y",
)  # fmt: skip
MISSING = "nan"  # stands for a missing label
_PAIR = re.compile(r"(.*?)[-_ ]?([12ab])", re.I)  # question1 and question2, text_a and text_b
PAIRS = (("first", "second"), ("premise", "hypothesis"), ("query", "passage"))


class Row(NamedTuple):
    """A row of a table: its texts and label as written, and its line."""

    texts: tuple[str, ...]
    label: str
    line: int = 0


@dataclasses.dataclass(frozen=True)
class Survey:
    """Findings about the tables of one task.

    Attributes:
      files: split → file.
      header: names of all columns of the training file.
      text: the text columns.
      label: the label column, or several columns of 0 and 1.
      labels: the inferred kind, and the classes or range.
      rows: split → rows.
      lengths: `i64[sentences]`, number of tokens of each sentence in all splits.
      lists: whether the labels are lists of names.
      other_texts, other_labels: columns that were not guessed, but are similar to those that were.
    """

    files: Mapping[str, Path]
    header: tuple[str, ...]
    text: tuple[str, ...]
    label: str | tuple[str, ...]
    labels: FoundLabels
    rows: Mapping[str, Sequence[Row]]
    lengths: np.ndarray
    lists: bool = False
    other_texts: tuple[str, ...] = ()
    other_labels: tuple[str, ...] = ()

    @property
    def blank(self) -> int:
        """Number of rows with a blank text, in all splits."""
        return sum(any(map(is_blank, row.texts)) for rows in self.rows.values() for row in rows)

    @property
    def repeated(self) -> int:
        """Number of training rows that repeat the texts of an earlier row."""
        return len(self.rows["train"]) - len({row.texts for row in self.rows["train"]})

    @property
    def contradicted(self) -> int:
        """Number of training texts with more than one label, without rows that are left out."""
        empty_counts = KINDS[self.labels.kind].form == "classes"  # an empty set is a label
        pairs = {
            (row.texts, row.label)
            for row in self.rows["train"]
            if (not is_missing(row.label) or (empty_counts and not row.label))
            and not any(map(is_blank, row.texts))
        }
        return sum(count > 1 for count in Counter(texts for texts, _ in pairs).values())

    def leaked(self, split: str) -> int:
        """Count the rows of a split that have the texts of a training row."""
        known = {row.texts for row in self.rows["train"]}
        return sum(row.texts in known for row in self.rows[split])

    def cut(self, max_length: int) -> float:
        """Return the fraction of sentences longer than `max_length` tokens."""
        return float(np.mean(self.lengths > max_length)) if len(self.lengths) else 0.0


def group_files(paths: Sequence[Path]) -> dict[str, dict[str, Path]]:
    """Group files by task and split; `topic-dev.csv` is the dev file of the task `topic`.

    Raises:
      UserError: if a split has two files, or a task has no training file.

    >>> list(group_files([Path("a-train.csv"), Path("a_test.csv"), Path("b.csv")]))
    ['a', 'b']
    """
    found: dict[str, dict[str, Path]] = {}
    for path in paths:
        match = _SPLIT.fullmatch(stem_of(path))
        name, split = (
            (match[1] or "task", SPLITS[match[2].lower()]) if match else (stem_of(path), "train")
        )
        files = found.setdefault(name, {})
        for role, part in (find_roles(path) or {split: path}).items():
            if role in files:
                raise UserError(
                    f"{path}: {files[role]} is the {role} file of {name} already; rename one of "
                    "them, or leave it out"
                )
            files[role] = part
    for name, files in found.items():
        if "train" not in files:
            first = next(iter(files.values()))
            raise UserError(f"{first}: there is no training file of {name}; name it as well")
    return found


def find_roles(path: Path) -> dict[str, Path]:
    """Return the splits (train, dev, test) in a folder saved by `datasets` or in a Hub dataset.

    The splits of a Hub dataset are addresses, such as hub:owner/name:train. The result is empty for
    any other path. A note lists the splits that are not used.

    Raises:
      UserError: if two splits have the same role, a Hub dataset cannot be loaded, or the file with
        the split names is damaged.
    """
    splits = arrow.find_splits(Path(hub.find(str(path))))
    if str(path).startswith(hub.PREFIX):
        splits = {name: Path(f"{path}:{name}") for name in splits}
    names: dict[str, str] = {}
    for name in filter(SPLITS.__contains__, splits):
        role = SPLITS[name]
        if role in names:
            raise UserError(
                f"{path}: the splits {names[role]} and {name} are both {role} data; describe the "
                f'task in a TOML file that names one: {role} = "{splits[name]}"'
            )
        names[role] = name
    unused = [name for name in splits if name not in SPLITS]
    if names and unused:
        warnings.warn(
            f"{path}: not used: {list_some(unused)}; only splits named {', '.join(SPLITS)} are. To "
            f'use another, name it in a TOML file, such as dev = "{splits[unused[0]]}"',
            Note,
            stacklevel=2,
        )
    return {role: splits[name] for role, name in names.items()}


def survey(
    files: Mapping[str, Path],
    tokenizer: Tokenizer,
    text: str | None = None,
    label: str | None = None,
) -> Survey:
    """Read the tables of a task; determine its columns, labels and text lengths.

    Args:
      files: split → file; `train` is required.
      tokenizer: counts the tokens; must not truncate.
      text, label: names of columns, separated by commas: one or two text columns, and one label
        column or several of 0 and 1; None: guessed.

    Raises:
      UserError: if a file is not a table, or the labels do not fit any kind of task.
    """
    sheets = open_sheets(files)
    header, *train = [fields for _, fields in sheets["train"].rows()] or [[]]
    if not train:
        raise UserError(f"{files['train']} is empty: it has no rows; replace the file")
    named = tables.split_label(label) or guess_label(header, train)
    no_texts = (*((named,) if isinstance(named, str) else named), *sheets["train"].lists)
    chosen = tuple(text.split(",")) if text else guess_text(header, train, no_texts)
    columns = tables.Columns(chosen, named)
    rows = {split: _rows(sheet, columns, split != "test") for split, sheet in sheets.items()}
    lists = any(sheet.lists.intersection(columns.lists) for sheet in sheets.values())
    labels = _find(columns, sheets, rows, lists)
    sentences = [one for part in rows.values() for row in part for one in row.texts]
    lengths = np.diff(tokenize(tokenizer, sentences)[1])
    left = {n: name for n, name in enumerate(header) if name not in (*chosen, *columns.labels)}
    return Survey(
        files, tuple(header), chosen, columns.label, labels, rows, lengths, lists,
        () if text else tuple(name for n, name in left.items() if _is_text(n, train)),
        () if label else tuple(name for n, name in left.items() if _is_label(n, train)),
    )  # fmt: skip


def _is_text(column: int, rows: Sequence[Sequence[str]]) -> bool:
    """Return whether most values of a column are different, and of several words."""
    values = {row[column].strip() for row in rows}
    return len(values) > len(rows) // 2 and sum(" " in v for v in values) > len(values) // 2


def _is_label(column: int, rows: Sequence[Sequence[str]]) -> bool:
    """Return whether the values of a column recur ten times on average, and are not all equal."""
    return 1 < len({row[column].strip() for row in rows}) <= max(2, len(rows) // 10)


def _find(
    columns: tables.Columns,
    sheets: Mapping[str, Sheet],
    rows: Mapping[str, Sequence[Row]],
    lists: bool,
) -> FoundLabels:
    written = Counter(row.label for part in rows.values() for row in part)
    if not isinstance(columns.label, str):
        return count_sets(written, DELIMITER, columns.label)
    try:
        return find_labels(written, lists=lists)
    except ValueError as error:
        place = str(sheets["train"].path)
        if isinstance(error, WrongLabelError):
            place = next(
                sheets[split].where(row.line)
                for split, part in rows.items()
                for row in part
                if row.label == error.label
            )
        raise UserError(f"{place}: column {columns.label!r}: {error}") from None


def _rows(sheet: Sheet, columns: tables.Columns, labelled: bool) -> list[Row]:
    needed = [*columns.text, *columns.labels] if labelled else [*columns.text]
    header, rows = tables.select(sheet, needed, "The task", columns.labels, lists=columns.lists)
    at = {name: header.index(name) for name in header}
    labelled = set(columns.labels) <= set(header)
    found = []
    for line, fields in rows:
        texts = tuple(fields[at[name]].strip() for name in columns.text)
        label = columns.written(fields, at, DELIMITER, sheet, line) if labelled else MISSING
        found.append(Row(texts, label.strip(), line))
    return found


def guess_label(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Guess the label column: one with a common name, else the one with the fewest distinct values.

    Raises:
      ConfigError: if every column has only one value or too many.

    >>> guess_label(["t", "x"], [["a b", "0"], ["c", "1"], ["d", "1"]])
    'x'
    """
    by_name = {name.strip().casefold(): name for name in header}
    for usual in LABELS:
        if usual in by_name:
            return by_name[usual]
    kinds = {name: len({row[n] for row in rows}) for n, name in enumerate(header)}
    several = {name: count for name, count in kinds.items() if 1 < count <= max(2, len(rows) // 2)}
    if not several:
        raise ConfigError("label", f"name the column of labels; there are {', '.join(header)}")
    return min(several, key=several.__getitem__)


def guess_text(
    header: Sequence[str], rows: Sequence[Sequence[str]], label: str | Sequence[str]
) -> tuple[str, ...]:
    """Guess the text columns: the column with the most text, and its counterpart if it has one.

    Counterparts are named like question1 and question2, or as in `PAIRS`.

    Raises:
      ConfigError: if there is no other column with text.

    >>> guess_text(["text_a", "text_b", "n"], [["a", "b", "0"]], "n")
    ('text_a', 'text_b')
    """
    labels = (label,) if isinstance(label, str) else label
    lengths = {
        name: sum(len(row[n]) for row in rows)
        for n, name in enumerate(header)
        if name not in labels
    }
    if not any(lengths.values()):
        raise ConfigError("text", f"name the column of text; there are {', '.join(header)}")
    longest = max(lengths, key=lengths.__getitem__)
    for pair in PAIRS:
        if longest in pair and set(pair) <= set(lengths):
            return pair
    stems = {name: match[1] for name in lengths if (match := _PAIR.fullmatch(name))}
    numbered = tuple(name for name in stems if stems[name] == stems.get(longest))
    return numbered if len(numbered) == 2 else (longest,)
