"""Hostile inputs by the thousand: `python -m tests.fuzz --inputs=100000 --seed=0`."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # names of models are inputs, too

import dataclasses
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis
import tyro
from rich.console import Console
from rich.table import Table

from jaxlora.utils import process
from jaxlora.utils.errors import Note, UserError
from tests.fuzz.targets import Target, all_targets

CHUNK = 500  # inputs that hypothesis makes from one seed; it remembers them all


@dataclasses.dataclass(frozen=True)
class Flags:
    """Give every reader and parser generated and damaged inputs.

    Attributes:
      inputs: how many, over all targets.
      seed: of all of them.
      only: these targets; default: all.
    """

    inputs: int = 100_000
    seed: int = 0
    only: tuple[str, ...] = ()


@dataclasses.dataclass
class Tally:
    """What became of a target's inputs.

    Attributes:
      accepted, refused: how many.
      failure: the smallest input that raised anything else, with its seed; None if there is none.
      seconds: the time it took.
    """

    accepted: int = 0
    refused: int = 0
    failure: str | None = None
    seconds: float = 0.0


def fuzz(target: Target, count: int, seed: int, scratch: Path) -> Tally:
    """Try a target until it fails.

    Args:
      target: what to try.
      count: inputs.
      seed: chunk k has the seed `seed + k`.
      scratch: a folder for the target's files.
    """
    tally, began = Tally(), time.monotonic()
    for number in range(-(-count // CHUNK)):
        part = min(CHUNK, count - number * CHUNK)
        tally.failure = _chunk(target, part, seed + number, scratch, tally)
        if tally.failure:
            break
    tally.seconds = time.monotonic() - began
    return tally


def _chunk(target: Target, count: int, seed: int, scratch: Path, tally: Tally) -> str | None:
    smallest: list[tuple[Any, Exception]] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        verbosity=hypothesis.Verbosity.quiet,
    )
    @hypothesis.given(target.inputs)
    def attempt(value: Any) -> None:
        try:
            accepted = target.accepts(value, scratch)
        except Exception as error:
            smallest[:] = [(value, error)]
            raise
        tally.accepted += accepted
        tally.refused += not accepted

    try:
        attempt()
    except Exception:
        if not smallest:
            raise
        value, error = smallest[0]
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{target.name}, seed {seed}: {what} ({where.name})\n  input: {value!r}"
    return None


def main(flags: Flags) -> list[str]:
    """Try all targets and show what became of the inputs.

    Returns:
      The failures, each with its seed and the smallest input that shows it.

    Raises:
      UserError: for an unknown target.
    """
    console, tallies = Console(), {}
    with tempfile.TemporaryDirectory() as folder:
        targets = all_targets(Path(folder))
        unknown = set(flags.only) - targets.keys()
        if unknown:
            raise UserError(f"--only {', '.join(unknown)}: the targets are {', '.join(targets)}")
        names = flags.only or tuple(targets)
        for name in names:
            share = -(-flags.inputs // len(names))
            with tempfile.TemporaryDirectory() as scratch:
                tallies[name] = fuzz(targets[name], share, flags.seed, Path(scratch))
    console.print(_table(tallies))
    failures = [tally.failure for tally in tallies.values() if tally.failure]
    for failure in failures:
        console.print(failure, soft_wrap=True, markup=False, highlight=False)
    return failures


def _table(tallies: dict[str, Tally]) -> Table:
    table = Table("target", "inputs", "accepted", "refused", "failed", "seconds")
    total: Counter[str] = Counter()
    for name, tally in tallies.items():
        failed = int(tally.failure is not None)
        tried = {"accepted": tally.accepted, "refused": tally.refused, "failed": failed}
        total.update(tried)
        counts = (f"{n:,}" for n in (sum(tried.values()), *tried.values()))
        table.add_row(name, *counts, f"{tally.seconds:.0f}")
    seconds = sum(tally.seconds for tally in tallies.values())
    table.add_section()
    table.add_row("all", *(f"{n:,}" for n in (total.total(), *total.values())), f"{seconds:.0f}")
    return table


def cli(args: Sequence[str] | None = None) -> int:
    """Parse flags and run; 1 if a target failed, else see `host.exit_code`."""
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", hypothesis.errors.HypothesisWarning)  # of large inputs
    warnings.simplefilter("ignore", Note)  # of folders of format 1
    failures: list[str] = []
    code = process.exit_code(lambda: failures.extend(main(tyro.cli(Flags, args=args))))
    return code or int(bool(failures))


if __name__ == "__main__":
    sys.exit(cli())
