"""Measure the time from process start to the first step: `python -m benchmarks.start`."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tyro

from benchmarks import harness
from jaxlora.training.config import VariantName

CHILD = "import benchmarks.start as s, sys; s.child(*sys.argv[1:])"


@dataclasses.dataclass(frozen=True)
class Flags:
    """Measure the time to the first step, with and without cached programs.

    Attributes:
      base: the base model.
      variants: variants to measure.
      rounds: number of warm starts.
      out: folder of the JSON file.
    """

    base: str = "minilm"
    variants: tuple[VariantName, ...] = ("lora3", "baseline2")
    rounds: int = 3
    out: Path = harness.OUT


def child(variant: VariantName, base: str, cache: str, began: str) -> None:
    """Import, load, compile and take a step in a new process; print its times as JSON."""
    import jax

    from benchmarks.work import Ours, Work
    from jaxlora.formats import huggingface
    from jaxlora.utils import process as host

    host.reuse_memory()
    host.keep_programs(Path(cache))
    seconds = {"programs": 0, "compile s": 0.0}

    def count(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds["programs"] += 1
            seconds["compile s"] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(count)
    ours = Ours(Work(variant, 8, "float32", examples=512), huggingface.load(base))
    ours.run(1)
    print(json.dumps({"seconds": time.time() - float(began)} | seconds))


def start(variant: VariantName, base: str, cache: str) -> dict[str, Any]:
    """Measure one start."""
    arguments = (variant, base, cache, str(time.time()))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments],
        check=True, capture_output=True, text=True, env=harness.environment(),
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def measure(variant: VariantName, flags: Flags) -> dict[str, Any]:
    """Measure one row of the table."""
    with tempfile.TemporaryDirectory() as cache:
        cold = start(variant, flags.base, cache)
        warm = [start(variant, flags.base, cache) for _ in range(flags.rounds)]
    return {
        "variant": variant,
        "cold s": cold["seconds"],
        "programs": cold["programs"],
        "compile s": cold["compile s"],
        "warm ms": harness.Spread.of([w["seconds"] for w in warm]),
    }


def main(flags: Flags) -> None:
    """Measure each variant."""
    rows = [measure(variant, flags) for variant in flags.variants]
    harness.show("start", "Process start to the first finished step, batch 8", rows, flags.out)


if __name__ == "__main__":
    main(tyro.cli(Flags))
