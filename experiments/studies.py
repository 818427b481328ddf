"""The studies as data: the paper's eight variants, and the questions that it left open."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from jaxlora.cli.flags import flag
from jaxlora.tasks.sharing import VARIANTS
from jaxlora.utils.errors import UserError, suggestion


@dataclasses.dataclass(frozen=True)
class Study:
    """A variant with fixed settings.

    Attributes:
      name: name of the study and its folder.
      variant: the variant it is based on.
      settings: the settings that define it.
      about: one-line description.
      real_data: whether it makes no sense with the built-in data.
    """

    name: str
    variant: str
    settings: Mapping[str, Any]
    about: str
    real_data: bool = False

    def asked(self, **given: Any) -> dict[str, Any]:
        """Return the settings to request: the `given` ones unless the study fixes them.

        >>> STUDIES["rank4"].asked(rank=8, seed=1)
        {'variant': 'lora4', 'rank': 4, 'seed': 1, 'alpha': 15.0}
        """
        return {"variant": self.variant, **given, **self.settings}


_ABOUT = {
    "baseline1": "frozen BERT, heads only, squared error for STS",
    "baseline2": "all weights shared, PCGrad, squared error",
    "baseline3": "all weights shared, PCGrad, cosine",
    "baseline4": "all weights, one BERT per task, cosine",
    "lora1": "one adapter per task, squared error",
    "lora2": "one adapter per task, cosine",
    "lora3": "one adapter shared, PCGrad, squared error",
    "lora4": "one adapter shared, PCGrad, cosine",
}
FIXED_ALPHA = 15.0
RANKS = (1, 4, 8, 15, 64)
TOGETHER = ("lora3", "lora4", "baseline3")  # variants whose tasks' gradients are combined
AGGREGATORS = ("gradvac", "upgrad", "cagrad", "nash_mtl", "uw")  # besides the variants' PCGrad
LORA_RATES = ("1e-5", "1e-4", "1e-3")
FULL_RATES = ("1e-5", "5e-5", "1e-4")


def _table() -> Iterable[tuple[str, str, dict[str, Any], str]]:
    for name in VARIANTS:
        yield name, name, {}, _ABOUT[name]
    for name in TOGETHER:
        about = f"{name} with its gradients only summed, no PCGrad"
        yield f"{name}-summed", name, {"surgery": "none"}, about
        for method in AGGREGATORS:
            about = f"{name} with {method} in place of PCGrad"
            yield f"{name}-{method}", name, {"surgery": method}, about
    pairs = {"groups": "sst|para,sts"}
    yield "pairs", "lora4", pairs, "an adapter for SST, one for both pair tasks"
    for name in ("lora1", "lora3"):
        about = f"{name} with both sentences read together"
        yield f"{name}-joint", name, {"pair_encoding": "joint"}, about
    slow = {"batch_size": 24, "warmup_steps": 200}
    yield "warmup24", "lora3", slow, "lora3 with batch 24 and a warm-up of 200 steps"
    for rank in RANKS:
        fixed = {"rank": rank, "alpha": FIXED_ALPHA}
        yield f"rank{rank}", "lora4", fixed, f"lora4 with rank {rank}, alpha {FIXED_ALPHA:g}"
        scaled = {"rank": rank, "alpha": float(rank)}
        yield f"rank{rank}-scaled", "lora4", scaled, f"lora4 with rank and alpha {rank}"
    for kind, variant, rates in (("lora", "lora4", LORA_RATES), ("full", "baseline3", FULL_RATES)):
        for rate in rates:
            about = f"{variant} with the encoder's learning rate {rate}"
            yield f"{kind}-lr-{rate}", variant, {"learning_rate": float(rate)}, about
    cls, concat = {"pooling": "cls"}, {"pair_features": "concat"}
    yield "cls", "lora4", cls, "lora4 on [CLS] vectors"
    yield "concat", "lora4", concat, "lora4 with pairs as u, v"
    yield "cls-concat", "lora4", cls | concat, "lora4 on [CLS] vectors, pairs as u, v"


_SYNTHETIC = Study(
    "synthetic", "lora4", {"synthetic_sts": True}, "lora4 with the demo grammar's STS pairs", True
)
STUDIES: dict[str, Study] = {row[0]: Study(*row) for row in _table()} | {"synthetic": _SYNTHETIC}
EXTRAS = tuple(name for name in STUDIES if name not in VARIANTS)


def study(name: str) -> Study:
    """Return the study with this name.

    Raises:
      UserError: for an unknown name; suggests a similar one.
    """
    if name not in STUDIES:
        hint = suggestion(name, STUDIES)
        raise UserError(f"--variants {name}: unknown (known: {', '.join(STUDIES)}){hint}")
    return STUDIES[name]


def arguments(asked: Mapping[str, Any]) -> list[str]:
    """Return the flags for these settings.

    >>> arguments({"variant": "lora3", "rank": 4, "only": ("sst", "sts"), "resume": True})
    ['--variant=lora3', '--rank=4', '--only', 'sst', 'sts', '--resume']
    """
    words = []
    for name, value in asked.items():
        if isinstance(value, bool):
            words.append(flag(name) if value else flag(f"no_{name}"))
        elif isinstance(value, tuple):
            words += [flag(name), *map(str, value)]
        else:
            words.append(f"{flag(name)}={value}")
    return words


def command(asked: Mapping[str, Any]) -> str:
    """Return the shell command for these settings.

    >>> command({"variant": "lora4", "groups": "sst|para,sts"})
    "python experiments/run.py --variant=lora4 '--groups=sst|para,sts'"
    """
    return shlex.join(["python", "experiments/run.py", *arguments(asked)])
