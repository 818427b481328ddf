"""Measure peak memory, ours and the peers': `python -m benchmarks.memory`."""

from __future__ import annotations

import dataclasses
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import tyro

from benchmarks import harness
from benchmarks.step import PEERS, PeerName, able, make_numbers, make_ours, make_peer
from benchmarks.work import Work
from jaxlora.training.config import VariantName


@dataclasses.dataclass(frozen=True)
class Flags:
    """Measure peak memory, each side in a new process; the peers use malloc's default settings.

    Attributes:
      base: the base model.
      variants: variants to measure.
      batch_sizes: sentences or pairs of each task.
      steps: steps per run.
      peers: peers to measure.
      device: the peers' device.
      out: folder of the JSON file.
    """

    base: str = "minilm"
    variants: tuple[VariantName, ...] = ("lora3", "baseline2")
    batch_sizes: tuple[int, ...] = (8, 32)
    steps: int = 3
    peers: tuple[PeerName, ...] = ("padded-eager", "sorted", "flat")
    device: str = dataclasses.field(default_factory=harness.peer_device)
    out: Path = harness.OUT


def make_side(name: Any, work: Work, flags: Flags) -> Callable[[], float]:
    """Build a side that runs its steps and returns by how many MB its peak memory has grown.

    Memory in use before the side loads its weights (libraries and, for a peer, the initial values)
    is not counted; compilation is. A peer can reuse memory that its initial values have freed
    without it being counted, so its figure tends to be too low.
    """
    if name in PEERS:
        make_numbers(work, flags.base)
    before = megabytes(name, flags.device)
    if name in PEERS:
        run = make_peer(name, work, flags.base, flags.device)
    else:
        run = make_ours(work, flags.base)

    def added() -> float:
        run(flags.steps)
        return megabytes(name, flags.device) - before

    return added


def megabytes(name: str, device: str) -> float:
    """Return the peak memory so far in MB: the accelerator's if there is one, else resident."""
    if name == "ours" and jax.default_backend() != "cpu":
        return (jax.devices()[0].memory_stats() or {})["peak_bytes_in_use"] / 1e6
    if name != "ours" and device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated() / 1e6
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return harness.peak_megabytes(Path("/proc/self/status").read_text(encoding="utf-8"))


def measure(work: Work, flags: Flags) -> dict[str, Any]:
    """Measure one row of the table; the sides start concurrently."""
    workers = {
        name: harness.Worker(make_side, name, work, flags, keep_memory=name == "ours")
        for name in ("ours", *able(flags.peers, work))
    }
    peaks = {name: worker() for name, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    ours = peaks.pop("ours")
    best = min(peaks, key=peaks.__getitem__)
    return {
        "variant": work.variant,
        "batch": work.batch_size,
        "ours MB": round(ours),
        "best peer": best,
        "best peer MB": round(peaks[best]),
        "ours / best peer": ours / peaks[best],
        **{f"{name} MB": round(peaks[name]) if name in peaks else "" for name in flags.peers},
    }


def main(flags: Flags) -> None:
    """Measure all combinations."""
    rows = [
        measure(Work(variant, size, "float32"), flags)
        for variant in flags.variants
        for size in flags.batch_sizes
    ]
    harness.show("memory", "Peak memory that training steps add, float32", rows, flags.out)


if __name__ == "__main__":
    main(tyro.cli(Flags))
