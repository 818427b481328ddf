"""User-defined tasks: read from a TOML file with a table for each, or from a data table alone.

    [topic]
    text = "headline"                  # one column, or two: ["first", "second"]
    label = "topic"
    train = "topic-train.csv"          # paths are relative to the TOML file
    dev = "topic-dev.csv"              # or the fraction of training rows to hold out: 0.2
    kind = "classification"            # or binary, multilabel, ordinal, regression, similarity
    classes = ["sport", "science"]     # or their number: 2 means "0", "1"

If `kind`, `classes` or (for scores) `range = [low, high]` is missing, it is inferred from the data.
Without `dev`, a fifth of the training rows is held out. Other optional keys:

- `test`, `title`, `loss`, `metric`, `id` (a column), `delimiter` (a character; default: detected).
- `quoting`: `none` (quotes are part of the text) or `standard` (as in CSV); default: detected.
- `pair`: `separate` (default, one vector per text) or `joint` (one vector for both texts).
- `head`: `mlp` (default) or `classifier` (the base's own, which reads the first token's vector).
- `weight`: factor of the loss. `class_weights`: `balanced`, or a table of class names and weights.
- `threshold`: a probability, or `dev` (chosen on the dev set).
- `label_delimiter` (default: `|`), for multilabel; `label` may instead list columns of 0 and 1.
- For the task's group: `learning_rate`, `head_learning_rate`, `epochs`, `eval_every`, `patience`.

Values such as `topic.text=first,second` on the command line set or override these keys.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import tomllib
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from jaxlora.data import hub, table_formats, tables
from jaxlora.data.delimited import is_delimiter
from jaxlora.data.labels import DELIMITER, WrongLabelError, find_labels, find_set
from jaxlora.data.quoting import Quoting
from jaxlora.data.survey import find_roles
from jaxlora.data.table_formats import stem_of
from jaxlora.data.tables import Columns, Table, WrittenLabels
from jaxlora.tasks.kinds import KINDS, LOSSES, KindName
from jaxlora.tasks.task import (
    MADE_UP_TITLES,
    STS_LOSSES,
    PairEncoding,
    Task,
    TrainedHead,
    check_names,
    paper_tasks,
)
from jaxlora.utils import schema
from jaxlora.utils.errors import ConfigError, UserError, list_some, suggestion
from jaxlora.utils.files import local

MOST_LETTERS, MOST_BYTES = 64, 160  # of a task name, which is part of file names (255 bytes)
# Settings of a group that its tasks may override.
OWN = ("learning_rate", "head_learning_rate", "epochs", "eval_every", "patience")
DEV_SHARE = 0.2  # fraction of the training rows to hold out if no dev set is given
_FILES = ("train", "dev", "test")
_LISTS = ("classes", "range", "text", "label")
_NUMBERS = ("classes", "range", "weight", "dev", "threshold", *OWN)
_VALUE = re.compile(r"([^=]*)\.([^=.]*)=(.*)", re.DOTALL)  # topic.epochs=3
# Brings the cosine loss, whose labels are scaled to 0–1, to the scale of labels from 0 to 5.
COSINE_WEIGHT = 25.0
Positive = Annotated[float, Field(gt=0)]
ClassCount = Annotated[int, Field(ge=2, le=10_000)]


@dataclasses.dataclass(frozen=True)
class TaskFields:
    """A task's table in a TOML file, as written; see the module docstring.

    Raises:
      ValueError: if fields are invalid or contradict each other.
    """

    text: str | tuple[str, ...]
    label: str | tuple[str, ...]
    train: str
    dev: str | Annotated[float, Field(gt=0, lt=1)] = DEV_SHARE
    test: str | None = None
    kind: KindName | None = None
    pair: PairEncoding | None = None
    head: TrainedHead = "mlp"
    classes: ClassCount | tuple[str | int, ...] | None = None
    range: tuple[float, float] | None = None
    id: str | None = None
    delimiter: str | None = None
    quoting: Quoting | None = None
    title: str = ""
    loss: str = ""
    metric: str = ""
    weight: Positive | None = None
    label_delimiter: str | None = None
    class_weights: Literal["balanced"] | dict[str, Positive] | None = None
    threshold: Literal["dev"] | Annotated[float, Field(gt=0, lt=1)] | None = None
    learning_rate: Positive | None = None
    head_learning_rate: Positive | None = None
    epochs: Annotated[int, Field(ge=1)] | None = None
    eval_every: Annotated[int, Field(ge=1)] | None = None
    patience: Annotated[int, Field(ge=0)] | None = None

    def __post_init__(self) -> None:
        if len(self.columns) not in (1, 2):
            raise ValueError(f"text: name one column, or two for pairs, not {len(self.columns)}")
        if self.pair is not None and len(self.columns) != 2:
            raise ValueError("pair: goes with two text columns")
        if self.kind in KINDS and KINDS[self.kind].form != "score" and self.range is not None:
            raise ValueError("range: goes with regression and similarity; name the classes")
        if self.delimiter is not None and not is_delimiter(self.delimiter):
            raise ValueError(f'delimiter: {self.delimiter!r} is not one character, such as "\\t"')
        if self.classes is not None and not all(map(str.strip, self.names)):
            raise ValueError("classes: a name is blank")
        if self.classes is not None and len(self.names) < 2:
            raise ValueError("classes: name at least two, or say how many there are")
        self._check_sets()

    def _check_sets(self) -> None:
        """Check the fields that only multilabel tasks may have."""
        columns = () if isinstance(self.label, str) else self.label
        if not isinstance(self.label, str) and len(columns) < 2:
            raise ValueError("label: name one column, or two and more columns of 0 and 1")
        if columns and self.classes is not None and set(self.names) != set(columns):
            raise ValueError("classes: are the columns of the labels here; leave them out")
        sets = self.kind is None or KINDS[self.kind].form == "classes"
        if not sets and (columns or self.label_delimiter is not None):
            what = "label: several columns go" if columns else "label_delimiter: goes"
            raise ValueError(f"{what} with multilabel, not with {self.kind}")
        if columns or self.label_delimiter is not None:
            check_names(columns, self.mark)

    @property
    def mark(self) -> str:
        """Delimiter of the class names in a label set."""
        return DELIMITER if self.label_delimiter is None else self.label_delimiter

    @property
    def columns(self) -> tuple[str, ...]:
        """The text columns, as a tuple."""
        return (self.text,) if isinstance(self.text, str) else self.text

    @property
    def names(self) -> tuple[str, ...]:
        """Class names; `()`: the default of the kind."""
        if isinstance(self.classes, int):
            return tuple(map(str, range(self.classes)))
        return tuple(str(name).strip() for name in self.classes or ())

    @property
    def complete(self) -> bool:
        """Whether nothing about the labels must be inferred from the data."""
        if self.kind is None:
            return False
        return self.range is not None if KINDS[self.kind].form == "score" else bool(self.classes)

    def fill(self, table: Table) -> TaskFields:
        """Return the fields with missing kind, classes or range inferred from the data.

        Raises:
          UserError: if the table cannot be read, or its labels do not fit the kind or any kind.
        """
        if not isinstance(self.label, str):
            return dataclasses.replace(
                self,
                kind="multilabel",
                classes=self.classes or self.label,
                label_delimiter=self.mark,
            )
        if self.complete:
            return self
        written = tables.read_labels(table, self.mark)
        known = dataclasses.replace(self, kind=self.kind or self._kind_of(written))
        if known.complete:
            return known
        counts = written.counts  # its errors name their place
        try:
            found = find_labels(counts, known.kind, self.label_delimiter, lists=written.lists)
        except ValueError as error:
            place = table.train
            if isinstance(error, WrongLabelError):
                place = written.find(error.label)
            raise UserError(f"{place}: column {self.label!r}: {error}") from None
        classes = self.classes or found.classes or None
        return dataclasses.replace(
            self, kind=found.kind, classes=classes, range=self.range or found.range
        )

    def _kind_of(self, written: WrittenLabels) -> KindName | None:
        """Return the kind implied by the other fields; None if it depends on the labels alone.

        Raises:
          UserError: if cells join several of the given classes by an unusual delimiter.
        """
        if written.lists or self.label_delimiter:
            return "multilabel"
        if not self.names:
            return "regression" if self.range else None
        found = find_set(written.counts, self.names)
        if found is None:
            return "classification"
        cell, mark = found
        if mark != DELIMITER:
            raise UserError(
                f"{written.find(cell)}: column {self.label!r}: {cell[:60]!r} holds several of the "
                f'classes; write kind = "multilabel" and label_delimiter = "{mark}"'
            )
        return "multilabel"

    def task(self, name: str) -> Task:
        """Build the task; the fields must be complete.

        Raises:
          ValueError: see `Task`.
        """
        assert self.kind is not None
        low, high = self.range or (0.0, 1.0)
        given = (self.threshold,) if isinstance(self.threshold, float) else ()
        return Task(
            name, self.kind, len(self.columns) == 2, low, high, self.names,
            self.loss, self.metric, self.title, head=self.head,
            pair_encoding=self.pair or "separate", thresholds=given * max(1, self._outputs),
            tune_thresholds=True if self.threshold == "dev" else None,
            class_weights=self._weights(), label_delimiter=self.mark,
        )  # fmt: skip

    @property
    def _outputs(self) -> int:
        """Number of outputs of the kind's default loss."""
        assert self.kind is not None
        return LOSSES[KINDS[self.kind].losses[0]].outputs(len(self.names) or 2)

    def _weights(self) -> Literal["balanced"] | tuple[float, ...]:
        """Return the class weights in the order of the classes, 1 for classes not named.

        Raises:
          ValueError: if a name is not that of a class.
        """
        if self.class_weights is None or self.class_weights == "balanced":
            return self.class_weights or ()
        names = self.names or ("0", "1")
        if odd := self.class_weights.keys() - set(names):
            raise ValueError(f"class_weights: {min(odd)!r} is not one of {', '.join(names)}")
        return tuple(self.class_weights.get(name, 1.0) for name in names)


_FIELDS = frozenset(field.name for field in dataclasses.fields(TaskFields))


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """A task with its data files and training settings.

    Attributes:
      task: the task.
      table: files of the task; None for the paper's tasks, whose source knows them.
      weight: factor of the task's loss.
      own: settings of the task's group, see `OWN`.
    """

    task: Task
    table: Table | None = None
    weight: float = 1.0
    own: tuple[tuple[str, int | float], ...] = ()


def paper_specs(sts_loss: str, sts_weight: float) -> tuple[TaskSpec, ...]:
    """Return the paper's three tasks.

    >>> [d.weight for d in paper_specs("cosine", 25.0)]
    [1.0, 1.0, 25.0]
    """
    sts = STS_LOSSES[sts_loss]
    return tuple(
        TaskSpec(task, weight=sts_weight if task == sts else 1.0) for task in paper_tasks(sts_loss)
    )


def made_up(description: TaskSpec) -> TaskSpec:
    """Return a paper task with the title of its built-in made-up data.

    >>> [made_up(d).task.title for d in paper_specs("mse", 1.0)][0]
    'made-up sentiment'
    """
    title = MADE_UP_TITLES[description.task.name]
    return dataclasses.replace(description, task=dataclasses.replace(description.task, title=title))


def read_tasks(
    given: Sequence[str], text: str | None = None, label: str | None = None
) -> tuple[TaskSpec, ...]:
    """Read tasks from TOML files and data tables, and from values such as `topic.epochs=3`.

    Values override the keys of files, wherever they are in `given`. The task of a data table is
    named after the file, see `name_of`.

    Args:
      given: the files and values.
      text, label: columns of the data tables. A comma separates two text columns, and several
        label columns of 0 and 1.

    Raises:
      UserError: if a file or value is invalid; the message states the task, the key and a fix.
    """
    described: dict[str, Any] = {}
    origin: dict[str, str] = {}
    if (text or label) and not any(map(is_table, given)):
        raise ConfigError("text" if text else "label", "is for a table such as tickets.csv")
    for item in sorted(given, key=lambda item: _VALUE.fullmatch(item) is not None):
        match = _VALUE.fullmatch(item)
        found = _value(match) if match else _read_file(item, text, label)
        for written, fields in found.items():
            name = unicodedata.normalize("NFC", written)
            if match and name in described:
                described[name] |= fields
            elif name in described:
                raise ConfigError("tasks", f"[{name}] is defined in {origin[name]} as well", item)
            else:
                described[name], origin[name] = fields, "`tasks`" if match else item
    _check_all_known(described, {name for name, item in origin.items() if item == "`tasks`"})
    return tuple(_describe(origin[name], name, fields) for name, fields in described.items())


def _check_all_known(described: Mapping[str, Any], by_values: Collection[str]) -> None:
    """Check that values without a training file are for tasks of the files, if there are any."""
    files = described.keys() - by_values
    for name in sorted(by_values) if files else ():
        check_name(name, "`tasks`")
        owner, _, field = name.rpartition(".")
        if owner in files and field in _FIELDS:
            raise ConfigError("tasks", f"{field} has no keys here; write it in [{owner}] of a file")
        if "train" not in described[name]:
            hint = suggestion(name, files) or f"; there are {list_some(sorted(files))}"
            raise ConfigError("tasks", f"there is no task {name}{hint}")


def is_table(item: str) -> bool:
    """Return whether an item names a data table.

    >>> is_table("tickets.csv"), is_table("topics.toml"), is_table("topic.dev=x.csv")
    (True, False, False)
    """
    return table_formats.is_table(Path(item)) and not _VALUE.fullmatch(item)


def is_value(item: str) -> bool:
    """Return whether an item sets a field of a task (possibly misspelt) and is not a file.

    >>> is_value("topic.epochs=3"), is_value("runs/topic.epochs=3"), is_value("topics.toml")
    (True, False, False)
    """
    match = _VALUE.fullmatch(item)
    if match is None or not (match[2] in _FIELDS or suggestion(match[2], _FIELDS)):
        return False
    return match[1][:1].isalnum() and all(map(_fits_name, match[1]))


def name_of(path: Path) -> str:
    """Derive the name of a task from the path of its data table.

    >>> name_of(Path("data/my tickets (new).csv")), name_of(Path("Anfragen für März.csv.gz"))
    ('my-tickets-new', 'Anfragen-für-März')
    """
    stem = unicodedata.normalize("NFC", stem_of(path))
    parts = "".join(c if _fits_name(c) else " " for c in stem).split()
    name = "-".join(parts).lstrip("-._")[:MOST_LETTERS].rstrip("-._")
    try:
        return check_name(name, str(path))
    except UserError:  # it is empty, does not begin with a letter or digit, or has too many bytes
        return "task"


def _fits_name(character: str) -> bool:
    """Return whether a task name may contain a character: letters, marks and digits, or `_.-`."""
    return character in "_.-" or unicodedata.category(character)[0] in "LMN"


def _read_file(item: str, text: str | None, label: str | None) -> dict[str, Any]:
    if not is_table(item):
        return _read_toml(local(item))
    table = str(local(item))
    files = {split: str(path) for split, path in find_roles(Path(table)).items()}
    files = files or {"train": table}
    if "train" not in files:
        raise ConfigError("tasks", f"has no split train, only {', '.join(files)}", item)
    columns = {"text": text.split(",") if text else None, "label": tables.split_label(label)}
    missing = [name for name, value in columns.items() if value is None]
    if missing:
        names = ", ".join(tables.read_header(Path(files["train"])))
        if not names:
            raise UserError(f"{item} is empty: it has no header; replace the file")
        raise ConfigError(
            missing[0],
            f"name the column of {item} (there are {names}), or describe the task in a file: "
            f"jaxlora init {item}",
        )
    return {name_of(Path(item)): {**files, **columns}}


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError("tasks", f"cannot be read ({error.strerror})", path) from None
    except (ValueError, RecursionError) as error:  # also not UTF-8, long numbers, deep nesting
        raise ConfigError("tasks", f"not a TOML file ({error})", path) from None
    if not content:
        raise ConfigError("tasks", "describes no task; add a table such as [topic]", path)
    for name, fields in content.items():
        if not isinstance(fields, dict):
            raise UserError(f"{path}: {name!r} is outside a task's table; begin with [{name}]")
        for split in fields.keys() & _FILES:
            file = fields[split]
            if isinstance(file, str) and file.strip() and not file.startswith(hub.PREFIX):
                fields[split] = str(path.parent / local(file))
    return content


def _value(match: re.Match[str]) -> dict[str, Any]:
    """Parse a value: `topic.range=0,5` → `{"topic": {"range": [0, 5]}}`."""
    name, key, text = match.groups()
    parts = [part.strip() for part in text.split(",")] if key in _LISTS else [text]
    if len(parts) == 1:
        return {name: {key: _plain(key, text)}}
    # Class names stay strings; a single number is the number of classes.
    return {name: {key: parts if key == "classes" else [_plain(key, part) for part in parts]}}


def _plain(key: str, text: str) -> Any:
    """Convert the text of a numeric field to a number if possible; leave other text unchanged."""
    if key in _NUMBERS:
        with contextlib.suppress(ValueError):
            return int(text)
        with contextlib.suppress(ValueError):
            return float(text)
    return text


def check_name(name: str, where: str) -> str:
    """Return the name if it is valid in file names and flags.

    Raises:
      UserError: if it is not; the message states the rule.

    >>> check_name("topic-2", "x"), check_name("тема", "x")
    ('topic-2', 'тема')
    """
    fits = 0 < len(name) <= MOST_LETTERS and all(map(_fits_name, name))
    if not fits or not name[0].isalnum() or len(name.encode()) > MOST_BYTES:
        shown = name if len(name) <= 40 else name[:40] + "…"
        raise UserError(
            f"{where}: {shown!r} cannot be a name; use up to {MOST_LETTERS} letters (and "
            f"{MOST_BYTES} bytes), digits, '_', '-' and '.', a letter or a digit first"
        )
    if name != unicodedata.normalize("NFC", name):
        raise UserError(f"{where}: {name!a} cannot be a name; write its letters composed (NFC)")
    return name


def _describe(origin: str, name: str, values: dict[str, Any]) -> TaskSpec:
    where = f"{origin}: [{name}]"
    check_name(name, origin)
    fields = schema.parse(TaskFields, values, where)
    table = _table(where, fields)
    try:
        fields = fields.fill(table)
        task = fields.task(name)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where} {error}") from None
    weight = 1.0 if task.loss != "cosine" else COSINE_WEIGHT
    own = tuple((key, value) for key in OWN if (value := getattr(fields, key)) is not None)
    return TaskSpec(task, table, fields.weight or weight, own)


def _table(where: str, fields: TaskFields) -> Table:
    given = {split: getattr(fields, split) for split in _FILES}
    if blank := [
        split for split, file in given.items() if isinstance(file, str) and not file.strip()
    ]:
        raise UserError(f"{where} {blank[0]}: is empty; name a table")
    files = {
        split: str(local(hub.find(file)).absolute())
        for split, file in given.items()
        if isinstance(file, str)
    }
    for split, file in files.items():
        if not os.path.exists(file):  # Path.exists raises for names that no file can have
            raise UserError(f"{where} {split}: there is no file {file}")
    columns = Columns(fields.columns, fields.label, fields.id)
    dev = files.get("dev", fields.dev)
    return Table(columns, files["train"], dev, files.get("test"), fields.delimiter, fields.quoting)
