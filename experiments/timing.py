"""Step times of variants, measured in turn: a slow minute of the machine harms all alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import harness
from benchmarks.work import Steps
from experiments.runs import Run
from jaxlora.formats import huggingface
from jaxlora.tasks.sharing import group_name
from jaxlora.training import inputs, run_folder, sharding
from jaxlora.training.config import Settings
from jaxlora.training.task_group import make_cohort
from jaxlora.utils.errors import UserError

FILE = "timing.json"
ROUNDS = 10
STEPS = 4  # in a round, of each cohort


def timed(runs: Sequence[Run]) -> list[Run]:
    """The runs whose time is asked about: the variants, with PCGrad and without, once each."""
    first = {
        run.study.name: run for run in reversed(runs) if set(run.study.settings) <= {"surgery"}
    }
    return list(reversed(first.values()))


def make_side(settings: Settings) -> Callable[[int, int], None]:
    """A study's steps on its own data, compiled: `(number of the cohort, steps)` takes some."""
    base = huggingface.load(settings.model.base)
    data, devices = inputs.load_data(settings, base), sharding.make_mesh("auto")
    steps = Steps(
        [make_cohort(settings, base, data, groups, devices) for groups in settings.cohorts]
    )
    steps.compile()

    def side(number: int, count: int) -> None:
        steps.run_cohort(number, count)

    return side


def measure(
    runs: Sequence[Run], path: Path, rounds: int = ROUNDS, steps: int = STEPS
) -> dict[str, Any]:
    """Time the steps of each cohort of each study, and write `timing.json`.

    A study's time a step is the mean over its cohorts' steps, as many as each takes in a run. Times
    of an earlier call are replaced: only what is measured in turn can be compared.

    Raises:
      UserError: if a process that takes steps dies, e.g. for want of memory.
    """
    runs = timed(runs)
    Console().print(f"timing {len(runs)} variants in turn: they get ready first …")
    workers = {run: harness.Worker(make_side, run.settings) for run in runs}
    sides = {
        (run, number): lambda w=worker, n=number: w(n, steps)
        for run, worker in workers.items()
        for number in range(len(run.settings.cohorts))
    }
    try:
        spreads = harness.interleave(sides, rounds, warmups=1)
    except (EOFError, ConnectionError) as error:
        raise UserError(
            "--timing: a process that takes a variant's steps died; each holds a model of its own, "
            "so give the same command with fewer --variants"
        ) from error
    for worker in workers.values():
        worker.close()
    found = {
        "machine": harness.machine(),
        "rounds": rounds,
        "studies": {
            run.study.name: {
                "ms_per_step": mean_step(
                    counts := count_steps(run),
                    [spreads[run, n].per(steps) for n in range(len(counts))],
                ),
                "steps": sum(counts),
            }
            for run in runs
        },
    }
    run_folder.write_json(path, found)
    return found


def count_steps(run: Run) -> list[int]:
    """Return how many steps each cohort takes: as many as its longest group."""
    return [
        max(run.steps[group_name(names)] for names in groups) for groups in run.settings.cohorts
    ]


def mean_step(counts: Sequence[int], spreads: Sequence[harness.Spread]) -> dict[str, float]:
    """Milliseconds a step, of cohorts with so many steps each.

    >>> quick, slow = harness.Spread(0.01, 0.01, 0.02), harness.Spread(0.03, 0.05, 0.06)
    >>> mean_step([3, 1], [quick, slow])
    {'low': 15.0, 'median': 20.0, 'high': 30.0}
    """
    parts = [dataclasses.asdict(spread) for spread in spreads]
    return {
        name: round(
            1e3 * sum(n * part[name] for n, part in zip(counts, parts, strict=True)) / sum(counts),
            6,
        )
        for name in parts[0]
    }
