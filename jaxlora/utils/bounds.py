"""What a field of a dataclass may be, written beside it: `rank: Annotated[int, AtLeast(1)]`."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any

from jaxlora.utils.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """From `low` up, and finite."""

    low: float

    def holds(self, value: float) -> bool:
        """Return whether `low ≤ value < ∞`."""
        return self.low <= value < math.inf

    @property
    def rule(self) -> str:
        """What a value must be."""
        return f"must be at least {self.low}"


@dataclasses.dataclass(frozen=True)
class Above:
    """Above `low`, and finite."""

    low: float

    def holds(self, value: float) -> bool:
        """Return whether `low < value < ∞`."""
        return self.low < value < math.inf

    @property
    def rule(self) -> str:
        """What a value must be."""
        return f"must be above {self.low}"


@dataclasses.dataclass(frozen=True)
class Between:
    """From `low` to below `high`."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Return whether `low ≤ value < high`."""
        return self.low <= value < self.high

    @property
    def rule(self) -> str:
        """What a value must be."""
        return f"must be from {self.low} to below {self.high}"


def metadata(cls: type, kind: type | tuple[type, ...]) -> dict[str, Any]:
    """Return the annotations of a kind that the fields of a dataclass have, by field.

    >>> @dataclasses.dataclass
    ... class Size:
    ...     width: typing.Annotated[int, AtLeast(1)]
    ...     name: str
    >>> metadata(Size, AtLeast)
    {'width': AtLeast(low=1)}
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
    for name, bound in metadata(type(instance), (AtLeast, Above, Between)).items():
        value = getattr(instance, name)
        if value is not None and not bound.holds(value):
            raise ConfigError(name, bound.rule, value)
