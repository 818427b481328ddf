"""Tasks of one's own: a TOML file with a table for each, read and checked.

    [topic]
    kind = "classification"            # or binary, regression, similarity
    classes = ["sport", "science"]     # or how many there are: 2 means "0", "1"
    text = "headline"                  # one column, or two: ["first", "second"]
    label = "topic"
    train = "topic-train.csv"          # paths as seen from the TOML file
    dev = "topic-dev.csv"

`range = [low, high]` is needed by regression and similarity. Optional: `test`, `id` (a column),
`delimiter` (one character; default: found out), `quoting` (`none`: a double quote is part of the
text, `standard`: as in any CSV; default: found out), `title`, `loss`, `metric`, `weight` (factor of
the loss beside the group's other tasks'), and of the task's group `learning_rate`,
`head_learning_rate`, `epochs` and `patience`. On the command line `topic.kind=classification`,
`topic.text=first,second` and so on say the same, or change what a file says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlora.data.quoting import QUOTINGS
from jaxlora.data.tables import Columns, Table
from jaxlora.tasks.task import MADE_UP_TITLES, STS_LOSSES, Task, paper_tasks
from jaxlora.utils import schema
from jaxlora.utils.errors import ConfigError, UserError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
# Settings of a group that its tasks may bring along, with their smallest value.
OWN = {"learning_rate": 0.0, "head_learning_rate": 0.0, "epochs": 1, "patience": 0}
NEEDED = ("kind", "text", "label", "train", "dev")
_FILES = ("train", "dev", "test")
_LISTS = ("classes", "range", "text")
_VALUE = re.compile(r"([^=]*)\.([^=.]*)=(.*)", re.DOTALL)  # topic.epochs=3
OPTIONAL = (
    "classes", "range", "test", "id", "delimiter", "quoting", "title", "loss", "metric", "weight",
)  # fmt: skip
# The cosine loss lives on 0–1: this brings it to the scale of the other losses' labels, 0–5.
COSINE_WEIGHT = 25.0
MOST_CLASSES = 10_000


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """A task, where its examples are, and how it wants to be trained.

    Attributes:
      task: what it is.
      table: its files; None where a source knows them (the paper's tasks).
      weight: factor of its loss.
      own: settings of its group, see `OWN`.
    """

    task: Task
    table: Table | None = None
    weight: float = 1.0
    own: tuple[tuple[str, int | float], ...] = ()


def paper_specs(sts_loss: str, sts_weight: float) -> tuple[TaskSpec, ...]:
    """The paper's three tasks.

    >>> [d.weight for d in paper_specs("cosine", 25.0)]
    [1.0, 1.0, 25.0]
    """
    sts = STS_LOSSES[sts_loss]
    return tuple(
        TaskSpec(task, weight=sts_weight if task == sts else 1.0) for task in paper_tasks(sts_loss)
    )


def made_up(description: TaskSpec) -> TaskSpec:
    """Rename one of the paper's tasks, whose examples are the built-in made-up ones.

    >>> [made_up(d).task.title for d in paper_specs("mse", 1.0)][0]
    'made-up sentiment'
    """
    title = MADE_UP_TITLES[description.task.name]
    return dataclasses.replace(description, task=dataclasses.replace(description.task, title=title))


def read_tasks(given: Sequence[str]) -> tuple[TaskSpec, ...]:
    """Read tasks from TOML files, and from values such as `topic.epochs=3`, which come last.

    Raises:
      UserError: naming the file, the task, the key and the remedy.
    """
    tables: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for item in sorted(given, key=lambda item: _VALUE.fullmatch(item) is not None):
        match = _VALUE.fullmatch(item)
        found = _value(match) if match else _read_toml(Path(item))
        for name, fields in found.items():
            if match and name in tables:
                tables[name] |= fields
            elif name in tables:
                raise ConfigError("tasks", f"[{name}] is in {origin[name]}, too", item)
            else:
                tables[name], origin[name] = fields, "`tasks`" if match else item
    return tuple(_describe(origin[name], name, fields) for name, fields in tables.items())


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError("tasks", f"cannot be read ({error.strerror})", path) from None
    except (ValueError, RecursionError) as error:  # also UTF-8, long numbers, deep nesting
        raise ConfigError("tasks", f"not a TOML file ({error})", path) from None
    if not content:
        raise ConfigError("tasks", "describes no task; add a table such as [topic]", path)
    for name, fields in content.items():
        if not isinstance(fields, dict):
            raise UserError(
                f"{path}: {name!r} stands outside of a task's table; begin with [{name}]"
            )
        for split in fields.keys() & _FILES:
            fields[split] = str(path.parent / _string(f"{path}: [{name}]", split, fields[split]))
    return content


def _value(match: re.Match[str]) -> dict[str, Any]:
    """`topic.range=0,5` → `{"topic": {"range": [0, 5]}}`."""
    name, key, text = match.groups()
    parts = [part.strip() for part in text.split(",")] if key in _LISTS else [text]
    if len(parts) == 1:
        return {name: {key: _plain(key, text)}}
    # The names of classes stay as they are, a single number says how many there are.
    return {name: {key: parts if key == "classes" else [_plain(key, part) for part in parts]}}


def _plain(key: str, text: str) -> Any:
    """Columns and files keep their text; of the rest what looks like a number is one."""
    if key in _LISTS[:-1] or key in OWN or key == "weight":
        with contextlib.suppress(ValueError):
            return int(text)
        with contextlib.suppress(ValueError):
            return float(text)
    return text


def check_name(name: str, where: str) -> str:
    """Refuse a name that cannot stand in file names and flags.

    Raises:
      UserError: saying what a name may be.

    >>> check_name("topic-2", "x")
    'topic-2'
    """
    if not NAME.fullmatch(name):
        shown = name if len(name) <= 40 else name[:40] + "…"
        raise UserError(
            f"{where}: {shown!r} cannot be a name; use up to 64 letters, digits, '_', '-' and '.', "
            "a letter or a digit first"
        )
    return name


def _describe(origin: str, name: str, fields: dict[str, Any]) -> TaskSpec:
    where = f"{origin}: [{name}]"
    check_name(name, origin)
    known = (*NEEDED, *OPTIONAL, *OWN)
    for key in fields:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {close[0]}?" if close else f" (known: {', '.join(known)})"
            raise UserError(f"{where} unknown key {key!r}{hint}")
    missing = [key for key in NEEDED if key not in fields]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}")
    text = _texts(where, "text", fields["text"])
    if len(text) not in (1, 2):
        raise UserError(f"{where} text: name one column, or two for pairs, not {len(text)}")
    kind: Any = _string(where, "kind", fields["kind"])
    low, high = _range(where, fields)
    classes = _classes(where, fields.get("classes", ()))
    named = [_string(where, key, fields.get(key, "")) for key in ("loss", "metric", "title")]
    try:
        task = Task(name, kind, len(text) == 2, low, high, classes, *named)
    except ValueError as error:
        raise UserError(f"{where} {error}") from None
    weight = 1.0 if task.loss != "cosine" else COSINE_WEIGHT
    weight = _number(where, "weight", fields.get("weight", weight), 0.0)
    own = tuple((k, _number(where, k, fields[k], low)) for k, low in OWN.items() if k in fields)
    return TaskSpec(task, _table(where, fields, text), weight, own)


def _table(where: str, fields: dict[str, Any], text: tuple[str, ...]) -> Table:
    files = {
        split: str(Path(_string(where, split, fields[split])).absolute())
        for split in _FILES
        if split in fields
    }
    for split, file in files.items():
        if not os.path.isfile(file):  # Path.is_file raises for names that no file can have
            raise UserError(f"{where} {split}: there is no file {file}")
    delimiter = fields.get("delimiter")
    if delimiter is not None and (
        len(_string(where, "delimiter", delimiter)) != 1 or delimiter in '"\r\n'
    ):
        raise UserError(f'{where} delimiter: {delimiter!r} is not one character, such as "\\t"')
    quoting = fields.get("quoting")
    if quoting not in (None, *QUOTINGS):
        raise UserError(f"{where} quoting: {quoting!r} is not {' or '.join(QUOTINGS)}")
    name = fields.get("id")
    label = _string(where, "label", fields["label"])
    columns = Columns(text, label, None if name is None else _string(where, "id", name))
    return Table(columns, files["train"], files["dev"], files.get("test"), delimiter, quoting)


def _range(where: str, fields: dict[str, Any]) -> tuple[float, float]:
    scored = fields["kind"] in ("regression", "similarity")
    if not scored and "range" in fields:
        raise UserError(f"{where} range: goes with regression and similarity; name the classes")
    if scored and "range" not in fields:
        raise UserError(f"{where} lacks range, the lowest and the highest label: range = [0, 5]")
    ends = fields.get("range", [0, 1])
    if not isinstance(ends, list) or len(ends) != 2:
        raise UserError(f"{where} range: give two numbers, the lowest and the highest label")
    low, high = (_number(where, "range", end, -float("inf")) for end in ends)
    return low, high


def _classes(where: str, value: Any) -> tuple[str, ...]:
    """Names of the classes, or from their number; `()` leaves it to the kind."""
    if value == ():
        return ()
    if isinstance(value, int) and not isinstance(value, bool) and 2 <= value <= MOST_CLASSES:
        return tuple(map(str, range(value)))
    if not isinstance(value, list) or len(value) < 2:
        raise UserError(
            f"{where} classes: {value!r} is not a list of two or more names, or their number (from "
            f"2 to {MOST_CLASSES:,})"
        )
    named = [str(v) if type(v) is int else v for v in value]
    names = tuple(name.strip() for name in _texts(where, "classes", named))
    if "" in names:
        raise UserError(f"{where} classes: a name is blank")
    return names


def _texts(where: str, key: str, value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not values:
        raise UserError(f"{where} {key}: give a name, or a list of names, not {value!r}")
    return tuple(_string(where, key, v) for v in values)


def _string(where: str, key: str, value: Any) -> str:
    try:
        return schema.text(value)
    except ValueError:
        raise UserError(f"{where} {key}: {value!r} is not a text in quotes") from None


def _number(where: str, key: str, value: Any, low: float) -> Any:
    whole = isinstance(low, int)
    try:
        found = schema.read(int if whole else float, value)
    except ValueError:
        found = math.nan
    if not (found >= low if whole else found > low):  # NaN fails the comparison
        least = f"a whole number from {low}" if whole else f"a number above {low:g}"
        raise UserError(f"{where} {key}: {value!r} is not {least}")
    return found
