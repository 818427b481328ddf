"""Run all benchmarks for CPUs, one after another: `python -m benchmarks`."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import tyro

BENCHES = (
    "step --batch-sizes 8 --rounds 3 --steps 2",
    "step --batch-sizes 32 --rounds 3 --steps 2 --variants lora3 --name step-32",
    "share --dtypes float32 --rounds 3",
    "pcgrad",
    "predict --rounds 7",
    "adapters",
    "start",
    "frozen --examples 1024 --rounds 3",
    "memory",
    "scaling --rounds 5",
)


def main() -> int:
    """Run all benchmarks for CPUs, each in its own process, and return how many failed."""
    quiet = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    failed = 0
    for bench in BENCHES:
        module, *flags = bench.split()
        command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{module}", *flags]
        began = time.monotonic()
        failed += subprocess.run(command, check=False, env=quiet).returncode != 0
        print(f"{bench}: {time.monotonic() - began:.0f} s\n", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
