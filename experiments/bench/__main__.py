"""All benches that a CPU can run, one after the other: `python -m experiments.bench`."""

from __future__ import annotations

import subprocess
import sys

BENCHES: dict[str, tuple[str, ...]] = {
    "step": ("--rounds", "3", "--steps", "2"),
    "pcgrad": (),
    "predict": (),
    "start": (),
    "frozen": (),
    "memory": (),
    "scaling": (),
}


def main() -> int:
    """Run each in a process of its own; returns how many failed."""
    commands = ([sys.executable, "-m", f"experiments.bench.{n}", *f] for n, f in BENCHES.items())
    return sum(subprocess.run(command, check=False).returncode != 0 for command in commands)


if __name__ == "__main__":
    sys.exit(main())
