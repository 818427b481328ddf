"""How tasks share an encoder: the paper's eight variants with its results, and one for user tasks.

Fuest & Tacke, "Low Rank Adaptation for Multitask BERT": Table 1 (variants), Table 2 (scores),
Table 3 (storage).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Literal

from jaxlora.tasks.task import NAMES
from jaxlora.utils.errors import ConfigError, suggestion

Adapt = Literal["frozen", "lora", "full"]
Groups = tuple[tuple[str, ...], ...]

LONGEST_NAME = 200  # in bytes; file systems allow 255, the rest is room for suffixes
SEPARATE: Groups = (("sst",), ("para",), ("sts",))
SHARED: Groups = (("sst", "para", "sts"),)


@dataclasses.dataclass(frozen=True)
class PaperRow:
    """The paper's results for a variant; scores in percent, parameters in millions.

    `mean` and `bundled` are the printed values. `mean_recomputed` and `bundled_recomputed` follow
    from the other values of the row; they differ where the paper has an error.
    """

    sst: float
    para: float
    sts: float
    mean: float
    mean_recomputed: float
    incremental: float
    bundled: float
    bundled_recomputed: float


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to adapt BERT to tasks.

    Attributes:
      name: name in the paper's Table 1, or `own`.
      adapt: what is trained in the encoder: nothing, an adapter, or all weights.
      groups: a partition of the tasks; the tasks of a group share parameters, groups share none.
      sts_loss: loss of the STS task, `mse` or `cosine`.
      learning_rate: the paper's learning rate, or the default for `own`.
    """

    name: str
    adapt: Adapt
    groups: Groups
    sts_loss: Literal["mse", "cosine"]
    learning_rate: float


@dataclasses.dataclass(frozen=True)
class PaperVariant(Variant):
    """A variant from the paper.

    Attributes:
      paper: the paper's results.
    """

    paper: PaperRow


def _row(sst: float, para: float, sts: float, mean: float, params: tuple[float, ...]) -> PaperRow:
    incremental, bundled, bundled_recomputed = params
    recomputed = round((sst + para + sts) / 3, 2)
    return PaperRow(sst, para, sts, mean, recomputed, incremental, bundled, bundled_recomputed)


_TABLE = (
    PaperVariant("baseline1", "frozen", SEPARATE, "mse", 1e-3,
                 _row(38.42, 67.27, 24.89, 43.53, (1.78, 111.78, 111.78))),
    PaperVariant("baseline2", "full", SHARED, "mse", 1e-5,
                 _row(50.77, 78.94, 35.69, 55.13, (111.78, 111.78, 111.78))),
    PaperVariant("baseline3", "full", SHARED, "cosine", 1e-5,
                 _row(49.23, 79.31, 58.41, 63.32, (111.78, 111.78, 111.78))),
    PaperVariant("baseline4", "full", SEPARATE, "cosine", 1e-5,
                 _row(49.96, 78.46, 58.85, 62.42, (331.78, 331.78, 331.78))),
    PaperVariant("lora1", "lora", SEPARATE, "mse", 1e-5,
                 _row(49.51, 76.73, 47.61, 57.95, (5.10, 115.10, 115.10))),
    PaperVariant("lora2", "lora", SEPARATE, "cosine", 1e-5,
                 _row(48.68, 76.95, 61.61, 62.23, (5.10, 115.10, 115.10))),
    PaperVariant("lora3", "lora", SHARED, "mse", 1e-5,
                 _row(47.13, 69.10, 57.55, 57.93, (2.89, 115.10, 112.89))),
    PaperVariant("lora4", "lora", SHARED, "cosine", 1e-5,
                 _row(48.77, 69.22, 66.58, 61.52, (2.89, 112.89, 112.89))),
)  # fmt: skip

VARIANTS = {one.name: one for one in _TABLE}
# For user tasks: one adapter per task, as in the paper's lora2.
OWN = Variant("own", "lora", SEPARATE, "cosine", 1e-3)


def variant(name: str) -> Variant:
    """Look up a variant by name.

    Raises:
      UserError: if the name is unknown; the message lists the known ones.

    >>> variant("lora4").adapt
    'lora'
    """
    known = {**VARIANTS, OWN.name: OWN}
    if name not in known:
        hint = suggestion(name, known)
        raise ConfigError("variant", f"unknown (known: {', '.join(known)}){hint}", name)
    return known[name]


def groups_like(shape: Groups, names: tuple[str, ...]) -> Groups:
    """Group tasks in the way that `SHARED` or `SEPARATE` groups the paper's three.

    >>> groups_like(SHARED, ("a", "b")), groups_like(SEPARATE, ("a", "b"))
    ((('a', 'b'),), (('a',), ('b',)))
    """
    return (names,) if shape == SHARED else tuple((name,) for name in names)


def parse_groups(text: str, names: tuple[str, ...] = NAMES) -> Groups:
    """Parse a partition of the tasks: `|` separates groups, `,` the tasks of a group.

    Raises:
      UserError: if a task is unknown, in two groups, or in none.

    >>> parse_groups("sst|para,sts")
    (('sst',), ('para', 'sts'))
    """
    groups = tuple(
        tuple(name.strip() for name in part.split(",") if name.strip()) for part in text.split("|")
    )
    seen = [name for group in groups for name in group]
    example = f"for example '{'|'.join(filter(None, (names[0], ','.join(names[1:]))))}'"
    for name in seen:
        if name not in names:
            raise ConfigError(
                "groups", f"unknown task {name!r} ({', '.join(names)}; {example})", text
            )
        if seen.count(name) > 1:
            raise ConfigError("groups", f"task {name!r} is in two groups ({example})", text)
    missing = [name for name in names if name not in seen]
    if missing:
        raise ConfigError("groups", f"every task needs a group; add {', '.join(missing)}", text)
    if not all(groups):
        raise ConfigError("groups", f"has an empty group ({example})", text)
    return groups


def group_name(group: Sequence[str]) -> str:
    """Return the name of a group: the names of its tasks, joined by `+`.

    Folders, tags and parameter trees use this name, so it is limited to `LONGEST_NAME` bytes. A
    longer name is cut, and a checksum of the full name is appended.

    >>> group_name(("para", "sts")), group_name(("sst",))
    ('para+sts', 'sst')
    >>> len(group_name([f"task-{n}" for n in range(100)]))
    200
    """
    joined = "+".join(group)
    if len(joined.encode()) <= LONGEST_NAME:
        return joined
    ending = f"-{hashlib.sha256(joined.encode()).hexdigest()[:16]}"
    return joined.encode()[: LONGEST_NAME - len(ending)].decode(errors="ignore") + ending
