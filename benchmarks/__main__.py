"""Run the CPU benchmarks, one after another: `python -m benchmarks`.

Results in `runs/bench` from this machine and these versions are kept, so that a stopped run can be
continued. Delete the folder to measure everything again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import tyro

from benchmarks import harness

# Name of the JSON file whose presence means done ("": the benchmark checks by row), command.
QUICK = (
    ("", "step --variants lora3 --batch-sizes 8"),
    ("", "step --variants lora3 --batch-sizes 32 --steps 1"),
    ("", "step --variants lora1 baseline2 --batch-sizes 8 --dtypes float32"),
    ("", "predict"),
)
BENCHES = (
    *QUICK,
    ("", "step --variants lora1 baseline2 --batch-sizes 8"),
    ("", "step --variants baseline2 --batch-sizes 32 --dtypes float32 --steps 1"),
    ("families", "families --rounds 5"),
    ("memory", "memory"),
    ("share", "share --dtypes float32 --rounds 3 --steps 5"),
    ("pcgrad", "pcgrad --limit 200"),
    ("adapters-bank", "adapters --rounds 3 --steps 2"),
    ("start", "start --rounds 2"),
    ("frozen", "frozen --examples 1024 --rounds 3"),
    ("scaling", "scaling --axes batch tasks --rounds 3"),
)


def main(quick: bool = False) -> int:
    """Run the benchmarks, each in its own process; return the number of failures.

    Args:
      quick: only measure train steps and inference, with the peers.
    """
    settings = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    failed = 0
    for name, bench in QUICK if quick else BENCHES:
        if name and harness.is_done(name):
            continue
        module, *flags = bench.split()
        command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{module}", *flags]
        began = time.monotonic()
        failed += subprocess.run(command, check=False, env=os.environ | settings).returncode != 0
        print(f"{bench}: {time.monotonic() - began:.0f} s\n", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
