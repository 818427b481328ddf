"""Bounds of dataclass fields, written as annotations: `rank: Annotated[int, Bound(1)]`."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any

from jaxlora.utils.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Bound:
    """The interval from `low` to below `high`.

    Attributes:
      low: lower bound.
      high: upper bound, excluded.
      open: whether `low` is excluded, too.
    """

    low: float
    high: float = math.inf
    open: bool = False

    def holds(self, value: float) -> bool:
        """Return whether a value is within the bounds; NaN is not."""
        return self.low <= value < self.high and not (self.open and value == self.low)

    @property
    def rule(self) -> str:
        """The bounds in words, for error messages."""
        if self.high < math.inf:
            return f"must be from {self.low} to below {self.high}"
        return f"must be {'above' if self.open else 'at least'} {self.low}"


def metadata(cls: type, kind: type) -> dict[str, Any]:
    """Return the annotations of type `kind` on the fields of a dataclass, by field.

    >>> @dataclasses.dataclass
    ... class Size:
    ...     width: typing.Annotated[int, Bound(1)]
    ...     name: str
    >>> metadata(Size, Bound)
    {'width': Bound(low=1, high=inf, open=False)}
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    return {
        field.name: note
        for field in dataclasses.fields(cls)
        for note in getattr(hints[field.name], "__metadata__", ())
        if isinstance(note, kind)
    }


def check(instance: Any) -> None:
    """Check the bounds of a dataclass's fields; None is within any bounds.

    Raises:
      ConfigError: if a field is out of bounds; the error names the first one.
    """
    for name, bound in metadata(type(instance), Bound).items():
        value = getattr(instance, name)
        if value is not None and not bound.holds(value):
            raise ConfigError(name, bound.rule, value)
