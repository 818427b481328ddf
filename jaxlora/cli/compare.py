"""`jaxlora compare`: show in what runs differ, and their scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.markup import escape
from rich.table import Table

from jaxlora.cli.console import duration
from jaxlora.cli.terminal import CONSOLE, print_json, say
from jaxlora.training import compare_runs
from jaxlora.training.compare_runs import Comparison, ScoreRow

BEST = " *"


def compare(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional], /, *, json: bool = False
) -> None:
    """Show the settings in which runs differ, and their scores; the best have a star.

    Args:
      runs: their --out folders; unfinished ones have no scores yet.
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
    """Return a table with a row for each run."""
    table = Table(show_lines=False)
    for name in ("run", *found.settings, *map(_title, found.scores), "parameters", "time"):
        table.add_column(escape(name), overflow="fold")
    for number, run in enumerate(found.runs):
        cells = [str(run.folder), *(_setting(values[number]) for values in found.settings.values())]
        cells += [_score(row, number) for row in found.scores]
        if run.result:
            cells.append(f"{run.result['parameters']['incremental'] / 1e6:.2f}M")
            cells.append(duration(run.result["train_seconds"]))
        table.add_row(*map(escape, cells))
    return table


def _title(row: ScoreRow) -> str:
    return f"{row.split} {row.task}" + (f"\n{row.metric}" if row.metric else "")


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_setting, value))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _score(row: ScoreRow, number: int) -> str:
    value = row.values[number]
    return "" if value is None else f"{value:.4f}" + (BEST if row.best[number] else "")


def main(words: Sequence[str]) -> None:
    """Run `compare`."""
    tyro.cli(compare, prog="jaxlora compare", args=words)
