"""`jaxlora compare`: show the settings in which runs differ, and their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.markup import escape
from rich.table import Table

from jaxlora.cli.console import duration
from jaxlora.cli.flags import call, flag
from jaxlora.cli.terminal import CONSOLE, print_json, say
from jaxlora.training import compare_runs
from jaxlora.training.compare_runs import Comparison, ScoreRow
from jaxlora.training.setting_names import show

BEST = " *"


def compare(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional], /, *, json: bool = False
) -> None:
    """Show the settings in which runs differ, and their scores; a star marks the best.

    Args:
      runs: the --out folders of the runs; unfinished runs have no scores.
      json: print JSON.
    """
    found = compare_runs.compare(runs)
    if json:
        print_json(compare_runs.to_json(found))
        return
    CONSOLE.print(make_table(found))
    for note in found.notes:
        say(note)


def make_table(found: Comparison) -> Table:
    """Return a table with a column for each run: settings, then scores."""
    table = Table("run", *(escape(str(run.folder)) for run in found.runs))
    for column in table.columns:
        column.overflow = "fold"
    for name, values in found.settings.items():
        table.add_row(*map(escape, (_name(name), *map(show, values))))
    table.add_section()
    for row in found.scores:
        scores = (_score(row, number) for number in range(len(found.runs)))
        table.add_row(*map(escape, (_title(row), *scores)))
    for name, shown in (("parameters", _parameters), ("time", _time)):
        table.add_row(name, *(shown(run.result) if run.result else "" for run in found.runs))
    return table


def _parameters(result: Mapping[str, Any]) -> str:
    return f"{result['parameters']['incremental'] / 1e6:.2f}M"


def _time(result: Mapping[str, Any]) -> str:
    return duration(result["train_seconds"])


def _title(row: ScoreRow) -> str:
    return f"{row.split} {row.task}" + (f": {row.metric}" if row.metric else "")


def _name(setting: str) -> str:
    """Return a setting as it is typed: a flag, or a field of a task such as `topic.epochs`."""
    return flag(setting) if setting.isidentifier() else setting


def _score(row: ScoreRow, number: int) -> str:
    value = row.values[number]
    return "" if value is None else f"{value:.4f}" + (BEST if row.best[number] else "")


def main(words: Sequence[str]) -> None:
    """Run `compare`."""
    call(compare, "jaxlora compare", words)
