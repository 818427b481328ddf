"""Tables in JSON Lines: one object per line, whose keys are the columns."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from jaxlora.data import foreign
from jaxlora.data.quoting import Quoting, Tally
from jaxlora.data.sheet import Kinds, Sheet, Write, refuse_options
from jaxlora.data.text_lines import stream
from jaxlora.utils.errors import UserError
from jaxlora.utils.schema import encodable

NAME = "JSON lines"
_NESTED: dict[type, str] = {dict: "an object", list: "a list"}
_REFUSED = tuple(kind for kind in foreign.KINDS if kind is not foreign.JSON)


@dataclasses.dataclass
class _Column:
    """The types of the values of one key.

    Attributes:
      nested: describes the first value that is a list or an object; empty if there is none.
      lists: whether all values are lists of strings or numbers, or null.
    """

    nested: str = ""
    lists: bool = True


@dataclasses.dataclass(frozen=True)
class JsonLines:
    """A `Sheet` in JSON Lines. A value is missing if its key is absent or its value is null.

    Attributes:
      path: path for messages.
      file: the file to read.
    """

    path: Path
    file: Path

    @functools.cached_property
    def _columns(self) -> dict[str, _Column]:
        """All columns, in the order of their first occurrence."""
        found: dict[str, _Column] = {}
        for line, record in self._records():
            for name, value in record.items():
                column = found.setdefault(name, _Column())
                column.lists &= value is None or _is_list_of_names(value)
                if not column.nested and type(value) in _NESTED:
                    column.nested = f"{_NESTED[type(value)]} in line {line}"
        return found

    @property
    def unreadable(self) -> Mapping[str, str]:
        """Columns that contain lists or objects."""
        return {name: column.nested for name, column in self._columns.items() if column.nested}

    @functools.cached_property
    def lists(self) -> frozenset[str]:
        """Columns that contain only lists of strings or numbers."""
        columns = self._columns.items()
        return frozenset(name for name, column in columns if column.nested and column.lists)

    def rows(self, tally: Tally | None = None) -> Iterator[tuple[int, list[str]]]:
        """Yield the header and the rows, each with its line number."""
        hidden = self.unreadable.keys() - self.lists
        header = [name for name in self._columns if name not in hidden]
        yield 0, header
        for line, record in self._records():
            yield line, [_show(record.get(name)) for name in header]

    def where(self, number: int) -> str:
        """Return `file:line`."""
        return f"{self.path}:{number}"

    def layout(self, columns: Sequence[str]) -> str:
        """Return the required keys as text for messages."""
        return f"objects with the keys {', '.join(columns)}"

    def describe(self, tally: Tally) -> list[str]:
        """Return no notes, since nothing about JSON is guessed."""
        return []

    def _records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in enumerate(stream(self.file, self.path, _REFUSED), 1):
            if line.strip():
                yield number, _parse(line, f"{self.path}:{number}")


def open_sheets(
    files: Mapping[str, tuple[Path, Path]], delimiter: str | None, quoting: Quoting | None
) -> dict[str, Sheet]:
    """Open JSON Lines files; `files` maps names to a path for messages and the file to read."""
    refuse_options(NAME, delimiter, quoting)
    return {name: JsonLines(path, file) for name, (path, file) in files.items()}


def _parse(line: str, where: str) -> dict[str, Any]:
    """Parse an object; numbers keep their spelling, as strings."""
    try:
        record = json.loads(
            line, object_pairs_hook=_unique, parse_int=str, parse_float=str, parse_constant=str
        )
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: not JSON ({error}); write one object on each line, such as "
            '{"text": "…", "label": "…"}'
        ) from None
    if not isinstance(record, dict):
        what = _NESTED.get(type(record), "a single value")
        raise UserError(f"{where}: is {what}; write one object with a key for each column")
    if "\\u" in line:
        _refuse_odd(record, where)
    return record


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {max(names, key=names.count)!r} occurs twice")
    return record


def _refuse_odd(record: dict[str, Any], where: str) -> None:
    """Raise an error for characters that escapes can express but UTF-8 text files cannot hold."""
    for name, value in record.items():
        for text in (name, *(value if _is_list_of_names(value) else (value,))):
            if isinstance(text, str) and ("\0" in text or not encodable(text)):
                raise UserError(
                    f"{where}: {name!a}: a NUL character, or half of a surrogate pair; remove it"
                )


def _is_list_of_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _show(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    return str(value).lower() if isinstance(value, bool) else str(value)


@contextlib.contextmanager
def writing(file: IO[bytes], columns: Kinds) -> Iterator[Write]:
    """Write one object per record."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")

    def write(records: Sequence[Mapping[str, Any]]) -> None:
        for record in records:
            plain = {name: record[name] for name in columns}
            text.write(json.dumps(plain, ensure_ascii=False) + "\n")

    yield write
    text.flush()
    text.detach()
