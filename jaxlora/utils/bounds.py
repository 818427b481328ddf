"""What a field of a dataclass may be, written beside it: `rank: Annotated[int, Bound(1)]`."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any

from jaxlora.utils.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Bound:
    """From `low` to below `high`.

    Attributes:
      low: the smallest value.
      high: what all values are below.
      open: whether `low` itself is left out.
    """

    low: float
    high: float = math.inf
    open: bool = False

    def holds(self, value: float) -> bool:
        """Return whether a value keeps it; NaN does not."""
        return self.low <= value < self.high and not (self.open and value == self.low)

    @property
    def rule(self) -> str:
        """What a value must be."""
        if self.high < math.inf:
            return f"must be from {self.low} to below {self.high}"
        return f"must be {'above' if self.open else 'at least'} {self.low}"


def metadata(cls: type, kind: type) -> dict[str, Any]:
    """Return the annotations of a kind that the fields of a dataclass have, by field.

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
    """Check the bounds of a dataclass's fields; None keeps any.

    Raises:
      ConfigError: naming the first field that does not keep its own.
    """
    for name, bound in metadata(type(instance), Bound).items():
        value = getattr(instance, name)
        if value is not None and not bound.holds(value):
            raise ConfigError(name, bound.rule, value)
