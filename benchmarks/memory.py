"""Measure peak memory, ours and the peer's: `python -m benchmarks.memory`."""

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
from benchmarks.step import make_numbers, make_ours, make_peer
from benchmarks.work import Work
from jaxlora.training.config import VariantName


@dataclasses.dataclass(frozen=True)
class Flags:
    """Measure peak memory: each side in a new process.

    Attributes:
      base: the base model.
      variants: which variants.
      batch_sizes: sentences or pairs of each task.
      steps: steps of a run.
      device: the peer's device.
      out: folder of the JSON file.
    """

    base: str = "minilm"
    variants: tuple[VariantName, ...] = ("lora3", "baseline2")
    batch_sizes: tuple[int, ...] = (8, 32)
    steps: int = 3
    device: str = dataclasses.field(default_factory=harness.peer_device)
    out: Path = harness.OUT


def make_side(name: str, work: Work, flags: Flags) -> Callable[[], float]:
    """Run a side's steps in its process; print what they added to its memory, in MB.

    What is there before the side loads its weights (the libraries, and for the peer the numbers
    that it starts from) is not counted; compiling is. What the peer's numbers took and left free it
    may use again uncounted, so its figure is rather too low.
    """
    if name == "peer":
        make_numbers(work, flags.base)
    before = megabytes(name, flags.device)
    if name == "peer":
        run = make_peer(work, flags.base, flags.device)
    else:
        run = make_ours(work, flags.base)

    def added() -> float:
        run(flags.steps)
        return megabytes(name, flags.device) - before

    return added


def megabytes(name: str, device: str) -> float:
    """Return the peak memory so far: of the accelerator if there is one, else resident."""
    if name == "ours" and jax.default_backend() != "cpu":
        return (jax.devices()[0].memory_stats() or {})["peak_bytes_in_use"] / 1e6
    if name == "peer" and device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1e6 if sys.platform == "darwin" else 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure(work: Work, flags: Flags) -> dict[str, Any]:
    """Measure one row of the table."""
    peaks = {}
    for name in ("ours", "peer"):
        side = harness.Worker(make_side, name, work, flags)
        peaks[name] = side()
        side.close()
    return {
        "variant": work.variant,
        "batch": work.batch_size,
        **{f"{name} MB": round(peak) for name, peak in peaks.items()},
        "ours / peer": peaks["ours"] / peaks["peer"],
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
