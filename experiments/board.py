"""Progress display of a reproduction: a total bar, a bar per running process, a line per result."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from experiments import fleet
from experiments.runs import Run
from jaxlora.cli.console import duration
from jaxlora.tasks.task import MADE_UP


class Board:
    """Displays the progress of a fleet of runs (see `fleet.Watcher`).

    Args:
      runs: all runs, including finished ones.
      at_once: number of concurrent runs.
      console: console to print to.
    """

    def __init__(self, runs: Sequence[Run], at_once: int, console: Console) -> None:
        self._runs, self._at_once, self._console = runs, at_once, console
        self._began: dict[Run, tuple[float, int]] = {}  # start time and start step
        self._failed: set[Run] = set()
        self._bars: dict[Run, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        total = sum(run.total for run in runs)
        self._all = self._progress.add_task("all steps", total=total, note="")

    @contextmanager
    def live(self) -> Iterator[None]:
        """Show the bars within this context."""
        with self._progress:
            self.look()
            yield

    def started(self, run: Run) -> None:
        """Add a bar for a run."""
        done = run.done()
        self._began[run] = (time.monotonic(), done)
        self._bars[run] = self._progress.add_task(
            run.name, total=run.total, completed=done, note="starting …"
        )

    def ended(self, run: Run, code: int) -> None:
        """Remove a run's bar and print its result."""
        self._progress.remove_task(self._bars.pop(run))
        took = duration(time.monotonic() - self._began[run][0])
        if code == 0 and run.finished:
            self.say(f"{run.name}: done in {took}, dev {_scores(run)}")
        else:
            self._failed.add(run)
            self.say(f"{run.name}: failed after {took}: {fleet.reason(run.log, code)}")

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def look(self) -> None:
        """Update the bars."""
        done = {run: run.done() for run in self._runs}
        for run, bar in self._bars.items():
            note = "" if done[run] > self._began[run][1] else "starting …"
            self._progress.update(bar, completed=done[run], note=note)
        finished = sum(run.finished for run in self._runs)
        waiting = len(self._runs) - finished - len(self._bars) - len(self._failed)
        note = f"{finished} done, {len(self._bars)} running, {waiting} waiting"
        note += f", {len(self._failed)} failed" if self._failed else ""
        left = self._left(done)
        note += "" if left is None else f"; about {duration(left)} left"
        self._progress.update(self._all, completed=sum(done.values()), note=note)

    def _left(self, done: dict[Run, int]) -> float | None:
        rates = {run: rate for run in self._runs if (rate := self._seconds_a_step(run, done[run]))}
        todo = [run for run in self._runs if not run.finished and run not in self._failed]
        if not rates or not todo:
            return None
        each = [(run.total - done[run]) * _expected(run, rates) for run in todo]
        return max(*each, sum(each) / self._at_once)

    def _seconds_a_step(self, run: Run, done: int) -> float | None:
        if run.finished:
            return float(run.result()["train_seconds"]) / run.total
        if run not in self._bars:
            return None
        began, at = self._began[run]
        return (time.monotonic() - began) / (done - at) if done > at else None


def _expected(run: Run, rates: dict[Run, float]) -> float:
    """Estimate seconds per step: the run's, its study's, its kind's, or else the slowest known."""
    for known in (
        [rates[run]] if run in rates else [],
        [rate for other, rate in rates.items() if other.study == run.study],
        [rate for other, rate in rates.items() if other.settings.adapt == run.settings.adapt],
    ):
        if known:
            return statistics.fmean(known)
    return max(rates.values())


def _scores(run: Run) -> str:
    result = run.result()
    scores = "  ".join(f"{task} {score:.4f}" for task, score in result["dev"].items())
    of = f"  ({MADE_UP})" if run.settings.data.source == "demo" else ""
    return f"{scores}  mean {result['dev_mean']:.4f}{of}"
