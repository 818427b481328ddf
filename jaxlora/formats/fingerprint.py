"""What decides the vectors of a base model, as checksums: weights, config and tokenizer."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from jaxlora.utils import schema
from jaxlora.utils.errors import Note

# Names of the parts among the inputs of a run.
INPUTS = {
    "weights": "the base model",
    "config": "the base model's config",
    "tokenizer": "the base model's tokenizer",
    "pairs": "how the base model's tokenizer joins pairs",
}
_FAMILY = "the base model's family"  # is not there for a BERT


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """sha256 of each part of a base model.

    Attributes:
      weights: of the bytes of its safetensors files.
      config: of the fields of its config that change its output; None: not known, as in banks and
        runs of format 1.
      tokenizer: of what decides the tokenizer's ids; None: not known.
      model_type: the base's family, by which an adapter's modules are named in files of others.
      pairs: of what the tokenizer puts around two texts that are read together; None: not known.
    """

    weights: str
    config: str | None = None
    tokenizer: str | None = None
    model_type: str = "bert"
    pairs: str | None = None

    def differing(self, other: Fingerprint, *, joint: bool = False) -> list[str]:
        """Return names of the parts that both know and that are not the same.

        Args:
          other: of another base.
          joint: whether pairs are read together; otherwise it does not matter how they are joined.

        >>> Fingerprint("1", "2", "3").differing(Fingerprint("1", "0", None))
        ['config']
        """
        compared = [part for part in INPUTS if joint or part != "pairs"]
        both = {part: (getattr(self, part), getattr(other, part)) for part in compared}
        return [part for part, (a, b) in both.items() if None not in (a, b) and a != b]

    def completed(self, other: Fingerprint) -> Fingerprint:
        """Return the same, with what is not known here taken from another.

        >>> Fingerprint("1").completed(Fingerprint("1", "2", "3"))
        Fingerprint(weights='1', config='2', tokenizer='3', model_type='bert', pairs=None)
        """
        known = {part: value for part, value in dataclasses.asdict(self).items() if value}
        return Fingerprint(**(dataclasses.asdict(other) | known))

    def note_if_partial(self, origin: str) -> None:
        """Warn, if a part is not known; `origin` is the bank or the run that this comes from."""
        if None in (self.config, self.tokenizer):
            note_partial(origin)

    def to_inputs(self) -> dict[str, str]:
        """As entries among the inputs of a run."""
        values = {name: getattr(self, part) for part, name in INPUTS.items()}
        family = {} if self.model_type == "bert" else {_FAMILY: self.model_type}
        return {name: value for name, value in values.items() if value is not None} | family

    @classmethod
    def from_inputs(cls, inputs: Mapping[str, Any]) -> Fingerprint:
        """Return the inverse of `to_inputs`.

        Raises:
          ValueError: if an entry is of a wrong type, or the weights' is missing.
        """
        family = {"model_type": inputs[_FAMILY]} if _FAMILY in inputs else {}
        return schema.build(cls, {part: inputs.get(name) for part, name in INPUTS.items()} | family)


def another(parts: Iterable[str]) -> str:
    """Name parts that differ, for an error.

    >>> another(["config", "tokenizer", "pairs"])
    'another config, another tokenizer and another pair template'
    """
    *first, last = ["another " + ("pair template" if part == "pairs" else part) for part in parts]
    return f"{', '.join(first)} and {last}" if first else last


def note_partial(origin: str) -> None:
    """Warn that a bank or a run of format 1 cannot tell its base from one of the same weights."""
    warnings.warn(
        f"{origin}: was written by an older jaxlora and knows its base by the weights alone; "
        "make sure that config.json and the tokenizer are the same",
        Note,
        stacklevel=3,
    )
