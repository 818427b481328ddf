"""Validation of untrusted data: plain values become typed objects, or raise an error.

Types are dataclasses (or any other type hints), validated by Pydantic in strict mode: exact types,
finite numbers, no unknown fields, strings of bounded length. The dataclasses themselves do not
depend on Pydantic. A ValueError from their `__post_init__` is a validation error, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from jaxlora.utils.errors import UserError, suggestion

T = TypeVar("T")
LONGEST_STRING = 10_000  # a path has at most 4,096 bytes
_STRICT = ConfigDict(
    strict=True, extra="forbid", allow_inf_nan=False, str_max_length=LONGEST_STRING
)
_PLAINER = {
    "Input should be": "must be",
    "a valid tuple": "a list",
    "a valid array": "a list",
    "a valid integer": "a whole number",
    "a valid boolean": "true or false",
    "a valid": "a",
    "Tuple should": "must",
    "String should": "must",
}  # Pydantic's wording → JSON's
_MUST = "must be "
_UNKNOWN = "unexpected_keyword_argument"


def build(kind: type[T], value: Any) -> T:
    """Build a typed value from a plain one, the inverse of `dataclasses.asdict`, even through JSON.

    Args:
      kind: a dataclass, or any type hint: `tuple[str, ...]`, a `Literal`, an `Annotated` type.
      value: JSON-like; fields with a default may be missing.

    Raises:
      ValueError: if the value is invalid; the message is one line that names the field.

    >>> @dataclasses.dataclass
    ... class Point:
    ...     at: tuple[float, float]
    ...     name: str | None = None
    >>> build(Point, {"at": [1, 2.5]})
    Point(at=(1.0, 2.5), name=None)
    >>> build(Point, {"at": [1, "2"]})
    Traceback (most recent call last):
    ...
    ValueError: at.1: must be a number, not '2'
    >>> build(Point, {"at": [1, 2], "nam": "x"})
    Traceback (most recent call last):
    ...
    ValueError: nam: unknown field; did you mean name?
    """
    try:
        content = json.dumps([value], default=_refuse, ensure_ascii=False)
        # The first test may also match a literal "\\u0000", which `_check_strings` accepts.
        if "\\u0000" in content or not encodable(content):
            _check_strings(value)
        found: T = _adapter(kind).validate_json(content)[0]  # type: ignore[arg-type]
        return found
    except ValidationError as error:
        raise ValueError(_line(error, kind, value)) from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def plain(kind: Any, value: Any) -> Any:
    """Convert a typed value to a plain one, the inverse of `build`; faster than `asdict`.

    >>> @dataclasses.dataclass
    ... class Point:
    ...     at: tuple[float, float]
    >>> plain(Point, Point((1.0, 2.5)))
    {'at': [1.0, 2.5]}
    """
    return _adapter(kind).dump_python((value,), mode="json")[0]


def parse(kind: type[T], value: Any, where: str | Path, remedy: str = "") -> T:
    """Build a typed value from the content of a file.

    Args:
      kind, value: see `build`.
      where: the file, and the part of it, for error messages.
      remedy: what the user can do about an error, if its reason does not say so.

    Raises:
      UserError: if the value is invalid; one line with the place, the field and the remedy.
    """
    try:
        return build(kind, value)
    except ValueError as error:
        raise UserError(f"{where}: {error}{'; ' if remedy else ''}{remedy}") from error


def encodable(string: str) -> bool:
    r"""Return whether a string can be encoded as UTF-8, that is, has no lone surrogates.

    >>> encodable("né"), encodable("\ud800")
    (True, False)
    """
    try:
        string.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: Any) -> str:
    """Return the repr of a value in printable ASCII, truncated to 60 characters."""
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or deep nesting
        return "a value too large to show"
    return text if len(text) <= 60 else text[:60] + "…"


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[tuple[Any]]:
    # In a tuple, because Pydantic accepts no config for a standard-library dataclass alone.
    return TypeAdapter(tuple[kind], config=_STRICT)


def _refuse(value: Any) -> Any:
    raise ValueError(f"{shown(value)} is no JSON value")


def _check_strings(value: Any) -> None:
    """Refuse strings with null characters or lone surrogates."""
    for where, string in _strings(value):
        if "\0" in string or not encodable(string):
            raise ValueError(f"{_joined(where)}{shown(string)} is not text")


def _strings(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Yield the location and content of every string in a plain value, including keys."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key, where)
            yield from _strings(item, (*where, key))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _strings(item, (*where, number))


def _line(error: ValidationError, kind: Any, value: Any) -> str:
    """Return the most informative error as one line."""
    found = [
        (tuple(_inside(value, one["loc"][1:])), one)
        for one in error.errors(include_url=False, include_context=False)
    ]
    # For a field with several possible types, the innermost error is from the intended type.
    where, first = max(found, key=lambda pair: (pair[1]["type"] == _UNKNOWN, len(pair[0])))
    if first["type"] == _UNKNOWN:
        known = _fields(kind)
        hint = suggestion(str(where[-1]), known) or f" (known: {', '.join(sorted(known))})"
        return f"{_joined(where)}unknown field{hint}"
    if first["type"] == "missing":
        *outer, last = first["loc"][1:]
        return (
            _joined(outer) + "has too few items"
            if isinstance(last, int)
            else (_joined((*outer, last)) + "missing")
        )
    reasons = dict.fromkeys(_reason(one) for place, one in found if place == where)
    if not all(reason.startswith(_MUST) for reason in reasons):
        return _joined(where) + _reason(first)
    allowed = " or ".join(reason.removeprefix(_MUST) for reason in reasons)
    return f"{_joined(where)}{_MUST}{allowed}, not {shown(first['input'])}"


def _reason(error: ErrorDetails) -> str:
    message = error["msg"].removeprefix("Value error, ")
    for theirs, ours in _PLAINER.items():
        message = message.replace(theirs, ours)
    return message


def _inside(value: Any, where: tuple[Any, ...]) -> Iterator[Any]:
    """Yield the keys and indices in a Pydantic location, without the names of types."""
    for part in where:
        with contextlib.suppress(KeyError, IndexError, TypeError):
            value = value[part]
            yield part


def _joined(where: Iterable[Any]) -> str:
    parts = [part if str(part).isidentifier() else shown(part) for part in where]
    return ".".join(map(str, parts)) + ": " if parts else ""


@functools.cache
def _fields(kind: Any) -> frozenset[str]:
    """Return the names of all fields of a type, and of the types nested in it."""
    names: set[str] = set()
    if dataclasses.is_dataclass(kind):
        names |= {field.name for field in dataclasses.fields(kind)}
        inner = tuple(typing.get_type_hints(kind).values())
    else:
        inner = typing.get_args(kind)
    return frozenset(names.union(*map(_fields, inner)))
