"""Checksums of all that determines the vectors of a base: weights, config and tokenizer."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from jaxlora.utils import schema
from jaxlora.utils.errors import Note

# Part of a fingerprint → its name among the inputs of a run.
INPUTS = {
    "weights": "the base model",
    "config": "the base model's config",
    "tokenizer": "the base model's tokenizer",
    "pairs": "how the base model's tokenizer joins pairs",
}
_FAMILY = "the base model's family"  # omitted for BERT


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """The sha256 of each part of a base model; None where unknown, as in banks of format 1.

    Attributes:
      weights: checksum of the bytes of its safetensors files.
      config: checksum of the config fields that change its output.
      tokenizer: checksum of all that determines the tokenizer's ids.
      model_type: family of the base, which determines module names in third-party files.
      pairs: checksum of how the tokenizer joins two texts that are read together.
    """

    weights: str
    config: str | None = None
    tokenizer: str | None = None
    model_type: str = "bert"
    pairs: str | None = None

    def differing(self, other: Fingerprint, *, joint: bool = False) -> list[str]:
        """Return the names of the parts that are known in both and differ.

        Args:
          other: the fingerprint to compare with.
          joint: whether to compare how pairs are joined, too.

        >>> Fingerprint("1", "2", "3").differing(Fingerprint("1", "0", None))
        ['config']
        """
        compared = [part for part in INPUTS if joint or part != "pairs"]
        both = {part: (getattr(self, part), getattr(other, part)) for part in compared}
        return [part for part, (a, b) in both.items() if None not in (a, b) and a != b]

    def completed(self, other: Fingerprint) -> Fingerprint:
        """Return a copy in which unknown parts are taken from `other`.

        >>> Fingerprint("1").completed(Fingerprint("1", "2", "3"))
        Fingerprint(weights='1', config='2', tokenizer='3', model_type='bert', pairs=None)
        """
        known = {part: value for part, value in dataclasses.asdict(self).items() if value}
        return Fingerprint(**(dataclasses.asdict(other) | known))

    def note_if_partial(self, origin: str) -> None:
        """Warn if the config or tokenizer is unknown; `origin` is the bank or run."""
        if None in (self.config, self.tokenizer):
            note_partial(origin)

    def to_inputs(self) -> dict[str, str]:
        """Return the known parts as entries for the inputs of a run."""
        values = {name: getattr(self, part) for part, name in INPUTS.items()}
        family = {} if self.model_type == "bert" else {_FAMILY: self.model_type}
        return {name: value for name, value in values.items() if value is not None} | family

    @classmethod
    def from_inputs(cls, inputs: Mapping[str, Any]) -> Fingerprint:
        """Invert `to_inputs`.

        Raises:
          ValueError: if an entry has a wrong type, or that of the weights is missing.
        """
        family = {"model_type": inputs[_FAMILY]} if _FAMILY in inputs else {}
        return schema.build(cls, {part: inputs.get(name) for part, name in INPUTS.items()} | family)


def another(parts: Iterable[str]) -> str:
    """Return a phrase that names differing parts, for an error message.

    >>> another(["config", "tokenizer", "pairs"])
    'another config, another tokenizer and another pair template'
    """
    *first, last = ["another " + ("pair template" if part == "pairs" else part) for part in parts]
    return f"{', '.join(first)} and {last}" if first else last


def note_partial(origin: str) -> None:
    """Warn that a bank or run of format 1 identifies its base only by the weights."""
    warnings.warn(
        f"{origin}: was written by an older jaxlora and knows its base by the weights alone; "
        "make sure that config.json and the tokenizer are the same",
        Note,
        stacklevel=3,
    )
