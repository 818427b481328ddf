"""Step times of variants, measured in turn, so that a slow minute affects all of them alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import harness
from benchmarks.work import Steps
from experiments.runs import Run
from jaxlora.formats import huggingface
from jaxlora.tasks.sharing import Groups, group_name
from jaxlora.training import inputs, run_folder, sharding
from jaxlora.training.config import Settings
from jaxlora.training.task_group import make_cohort
from jaxlora.utils.errors import UserError

FILE = "timing.json"
ROUNDS = 10
STEPS = 4  # of each cohort per round


def timed(runs: Sequence[Run]) -> list[Run]:
    """Return the runs to be timed: one of each variant, with PCGrad and with other surgery."""
    first = {
        run.study.name: run for run in reversed(runs) if set(run.study.settings) <= {"surgery"}
    }
    return list(reversed(first.values()))


def make_side(settings: Settings) -> Callable[[int, int], None]:
    """Compile a study's steps on its data; return `(cohort index, steps) → None` to run some."""
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

    A study's time per step is the mean over its cohorts, weighted by their steps in a run. Times
    of an earlier call are replaced, since only times measured in turn are comparable.

    Raises:
      UserError: if a process dies while taking steps, for example out of memory.
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
                    counts := count_steps(run.settings.cohorts, run.steps),
                    [spreads[run, n].per(steps) for n in range(len(counts))],
                ),
                "steps": sum(counts),
            }
            for run in runs
        },
    }
    run_folder.write_json(path, found)
    return found


def count_steps(cohorts: Sequence[Groups], steps: Mapping[str, int]) -> list[int]:
    """Return the number of steps of each cohort, which is that of its longest group.

    >>> count_steps([(("sst",), ("sts",)), (("para",),)], {"sst": 7, "sts": 4, "para": 5})
    [7, 5]
    """
    return [max(steps[group_name(names)] for names in groups) for groups in cohorts]


def mean_step(counts: Sequence[int], spreads: Sequence[harness.Spread]) -> dict[str, float]:
    """Compute milliseconds per step, averaged over cohorts with weights `counts`.

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
