"""Compare train step times with the peers': `python -m benchmarks.step`."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks import floor, harness
from benchmarks.work import Ours, Work
from jaxlora.formats import huggingface
from jaxlora.formats.huggingface import Pretrained
from jaxlora.serving.task_models import Dtype
from jaxlora.training.config import VariantName
from jaxlora.training.task_group import Cohort

PeerName = Literal[
    "padded-eager", "padded-compile", "padded-graphs", "sorted", "flat", "flat-compile"
]
# Name → module and class of `benchmarks.peers`, and keyword arguments of the class.
PEERS: Mapping[PeerName, tuple[str, str, Mapping[str, Any]]] = {
    "padded-eager": ("padded", "Padded", {}),
    "padded-compile": ("padded", "Padded", {"mode": "compile"}),
    "padded-graphs": ("padded", "Padded", {"mode": "graphs"}),
    "sorted": ("sorted", "Sorted", {}),
    "flat": ("flat", "Flat", {}),
    "flat-compile": ("flat", "Flat", {"compiled": True}),
}


@dataclasses.dataclass(frozen=True)
class Flags:
    """Measure the three-task step, in turn with the peers'.

    Attributes:
      base: the base model.
      variants: variants to measure.
      batch_sizes: sentences or pairs of each task.
      dtypes: float32, bfloat16; by default those that the hardware multiplies.
      rounds: number of timed runs of each side.
      steps: steps per run.
      most_seconds: seconds per row after which no further round begins.
      peers: peers to measure, where they support the variant.
      device: the peers' device.
      name: prefix of the names of the JSON files, one for each row.
      out: folder of the JSON files.
    """

    base: str = "minilm"
    variants: tuple[VariantName, ...] = ("lora3", "lora1", "baseline2")
    batch_sizes: tuple[int, ...] = (8, 32)
    dtypes: tuple[Dtype, ...] = dataclasses.field(default_factory=harness.dtypes)
    rounds: int = 9
    steps: int = 2
    most_seconds: float = 20.0
    peers: tuple[PeerName, ...] = ("padded-eager", "sorted", "flat")
    device: str = dataclasses.field(default_factory=harness.peer_device)
    name: str = "step"
    out: Path = harness.OUT


def measure(work: Work, flags: Flags) -> tuple[dict[str, Any], harness.Spread]:
    """Measure one row of the table; also return our time."""
    names = able(flags.peers, work)
    ours = harness.Worker(make_ours, work, flags.base)
    peers = harness.Worker(make_peers, names, work, flags.base, flags.device)
    sides: dict[str, Callable[[], Any]] = {"ours": functools.partial(ours, flags.steps)}
    sides |= {name: functools.partial(peers, name, flags.steps) for name in names}
    spreads = harness.interleave(sides, flags.rounds, 1, flags.most_seconds)
    spreads = {name: spread.per(flags.steps) for name, spread in spreads.items()}
    for worker in (ours, peers):
        worker.close()
    row = {
        "variant": work.variant,
        "batch": work.batch_size,
        "dtype": work.dtype,
        **harness.against_best(spreads),
        **{f"{name} ms": spread for name, spread in spreads.items() if name != "ours"},
    }
    return row, row["ours ms"]


def able(names: tuple[PeerName, ...], work: Work) -> tuple[PeerName, ...]:
    """Return the peers that can train a variant: `flat` is written for adapters."""
    lora = work.settings.adapt == "lora"
    return tuple(name for name in names if lora or not name.startswith("flat"))


def make_ours(work: Work, base: str, together: int = 0) -> Callable[[int], Any]:
    """Build our side on JAX's default device: single steps, or `together` in one program."""
    ours = Ours(work, huggingface.load(base))
    if together:
        return lambda _: ours.run_together(together) and None
    ours.compile()
    return lambda steps: ours.run(steps) and None


@functools.cache
def make_numbers(work: Work, base: str) -> tuple[Pretrained, list[Cohort]]:
    """Load the base, and the cohorts whose initial parameters the peers copy."""
    loaded = huggingface.load(base)
    return loaded, Ours(work, loaded).cohorts


def make_peers(
    names: tuple[PeerName, ...], work: Work, base: str, device: str
) -> Callable[[PeerName, int], Any]:
    """Build some peers; return `(name, steps)`, which takes steps with one of them."""
    made = {name: make_peer(name, work, base, device) for name in names}
    return lambda name, steps: made[name](steps)


def make_peer(name: PeerName, work: Work, base: str, device: str) -> Callable[[int], Any]:
    """Build a peer, with an instance for each of our cohorts."""
    loaded, cohorts = make_numbers(work, base)
    module, kind, flags = PEERS[name]
    make = getattr(importlib.import_module(f"benchmarks.peers.{module}"), kind)
    peers = [make(work, loaded, cohort, device=device, **flags) for cohort in cohorts]
    return lambda steps: [peer.run(steps) for peer in peers] and None


def main(flags: Flags) -> None:
    """Measure all combinations; keep rows that were already measured on this machine."""
    base = huggingface.load(flags.base)
    for variant in flags.variants:
        for size in flags.batch_sizes:
            for dtype in flags.dtypes:
                work = Work(variant, size, dtype)
                name = f"{flags.name}-{variant}-{size}-{dtype}"
                if harness.is_done(name, flags.out):
                    continue
                row, ours = measure(work, flags)
                title = "The distance of our step from its floor"
                harness.show(f"floor-{name}", title, [floor.row(work, base, ours)], flags.out)
                title = "A step of all three tasks (ms: median, low–high)"
                harness.show(name, title, [row], flags.out)


if __name__ == "__main__":
    main(tyro.cli(Flags))
