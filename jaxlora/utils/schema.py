"""Dataclasses from their JSON, where each value must be of its field's type.

Files that others wrote pass through here, so nothing of a wrong type goes further.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")
# Metadata of a field that files of earlier versions lack: it has its default there.
ADDED = {"added": True}


def build(cls: type[T], value: Any) -> T:
    """The inverse of `dataclasses.asdict`, also after JSON made lists of tuples.

    Args:
      cls: a dataclass; its fields are plain values, tuples, choices, or such dataclasses.
      value: a dict with all of its fields (but for `ADDED` ones) and no others.

    Raises:
      ValueError: naming the field that is wrong; from the dataclass's own checks.

    >>> @dataclasses.dataclass
    ... class Point:
    ...     at: tuple[float, float]
    ...     name: str | None
    >>> build(Point, {"at": [1, 2.5], "name": None})
    Point(at=(1.0, 2.5), name=None)
    >>> build(Point, {"at": [1, "2"], "name": None})
    Traceback (most recent call last):
    ...
    ValueError: at: '2' is not a finite number
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{_shown(value)} is not an object with fields")
    hints = _fields(cls)  # type: ignore[arg-type]
    value = {**_added(cls), **value}  # type: ignore[arg-type]
    if odd := value.keys() ^ hints.keys():
        raise ValueError(f"fields missing or unknown: {', '.join(sorted(odd))}")
    found = {}
    for name, hint in hints.items():
        try:
            found[name] = read(hint, value[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return cls(**found)


@functools.cache
def _fields(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@functools.cache
def _added(cls: type) -> dict[str, Any]:
    return {f.name: f.default for f in dataclasses.fields(cls) if f.metadata.get("added")}


def read(hint: Any, value: Any) -> Any:
    """A value of a type, e.g. `int`, `tuple[str, ...]`, `str | None`.

    Raises:
      ValueError: if it is not.

    >>> read(tuple[tuple[str, float], ...], [["query", 2]])
    (('query', 2.0),)
    """
    if dataclasses.is_dataclass(hint):
        return build(hint, value)  # type: ignore[arg-type]
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if value not in inner:
            raise ValueError(f"{_shown(value)} is not one of {', '.join(map(str, inner))}")
        return value
    if origin in (typing.Union, types.UnionType):
        return _first(inner, value)
    if origin is tuple:
        return _tuple(inner, value)
    return _SIMPLE[hint](value)


def _first(kinds: tuple[Any, ...], value: Any) -> Any:
    """As the first of the types that it can be."""
    *others, last = [kind for kind in kinds if kind is not types.NoneType]
    if value is None and types.NoneType in kinds:
        return None
    for kind in others:
        with contextlib.suppress(ValueError):
            return read(kind, value)
    return read(last, value)


def _tuple(inner: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{_shown(value)} is not a list")
    kinds = inner[:1] * len(value) if inner[1:] == (...,) else inner
    if len(kinds) != len(value):
        raise ValueError(f"{_shown(value)} has not {len(kinds)} items")
    return tuple(map(read, kinds, value))


def number(value: Any) -> float:
    """A finite number.

    Raises:
      ValueError: if it is not.
    """
    try:
        fits = type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # a whole number that no float can be
        fits = False
    if not fits:
        raise ValueError(f"{_shown(value)} is not a finite number")
    return float(value)


def text(value: Any) -> str:
    """A text that can be written to a file.

    Raises:
      ValueError: if it is none, or has half a surrogate pair or a NUL in it.
    """
    if not isinstance(value, str) or "\0" in value or not encodable(value):
        raise ValueError(f"{_shown(value)} is not a text")
    return value


def encodable(value: str) -> bool:
    r"""Whether UTF-8 has all of a text's characters; it lacks the halves of surrogate pairs.

    >>> encodable("né"), encodable("\ud800")
    (True, False)
    """
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _exactly(kind: type, what: str) -> Any:
    def check(value: Any) -> Any:
        if type(value) is not kind:
            raise ValueError(f"{_shown(value)} is not {what}")
        return value

    return check


_SIMPLE: dict[Any, Any] = {
    int: _exactly(int, "a whole number"),
    bool: _exactly(bool, "true or false"),
    float: number,
    str: text,
}


def _shown(value: Any) -> str:
    """The value's repr, if it is short and can be printed."""
    try:
        shown = ascii(value)
    except ValueError:  # a whole number of thousands of digits
        return "a very long number"
    return shown if len(shown) <= 60 else shown[:60] + "…"
