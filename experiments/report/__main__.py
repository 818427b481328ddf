"""Build the report without training: `python -m experiments.report --from ROOT --out report`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from experiments import report
from experiments.report import statistics
from jaxlora.cli.flags import exit_code
from jaxlora.cli.terminal import say
from jaxlora.utils import files


@dataclasses.dataclass(frozen=True)
class Flags:
    """Write the report of finished runs; it lists missing ones.

    Attributes:
      root: folder that experiments/reproduce.py wrote, with runs in <study>/seed<k>/.
      out: folder for report.html, results.md, tables/ and figures/.
      resamples: number of bootstrap resamples.
      seed: seed of the bootstrap.
    """

    root: Annotated[Path, tyro.conf.arg(name="from")]
    out: Path = Path("report")
    resamples: int = statistics.RESAMPLES
    seed: int = 0


def main(flags: Flags) -> None:
    """Build the report and print its path."""
    root, out = files.local(flags.root), files.local(flags.out)
    path = report.build(root, out, resamples=flags.resamples, seed=flags.seed)
    say(f"The report is {path}")


def cli(args: Sequence[str] | None = None) -> int:
    """Parse flags, build the report and return the exit code of `flags.exit_code`."""
    return exit_code(main, Flags, args)


if __name__ == "__main__":
    sys.exit(cli())
