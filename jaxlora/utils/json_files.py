"""JSON files that may hold anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxlora.utils.errors import UserError


def loads(text: str | bytes) -> Any:
    """Any JSON, but for whole numbers that no float could hold.

    Raises:
      ValueError, RecursionError: if it is none.

    >>> loads("[1, 2.5]")
    [1, 2.5]
    """
    return json.loads(text, parse_int=_whole)


def _whole(digits: str) -> int:
    value = int(digits)
    try:
        float(value)
    except OverflowError:
        raise ValueError(f"a number of {len(digits)} digits") from None
    return value


def read(path: Path) -> Any:
    """A file's JSON.

    Raises:
      UserError: if the file cannot be read, or is not JSON.
    """
    try:
        return loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # also UTF-8, long numbers, deep nesting
        raise UserError(f"{path}: not valid JSON ({error})") from error


def read_object(path: Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
      UserError: see `read`; or if it is no object.
    """
    value = read(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value
