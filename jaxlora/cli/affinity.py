"""`jaxlora affinity`: which tasks to train together, judged by their gradients in a shared run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from jaxlora.cli.flags import call
from jaxlora.cli.terminal import CONSOLE, Folder, print_json, say
from jaxlora.training import affinity
from jaxlora.training.affinity import Affinity
from jaxlora.utils import files
from jaxlora.utils.errors import ConfigError

PICTURE = "affinity.png"


def show(run: Folder, /, look_ahead: bool = False, batches: int = 20, json: bool = False) -> None:
    """Show the cosines of tasks' gradients with 95 % intervals, and propose groups.

    A heat map is written to the folder of the run.

    Args:
      run: the --out folder of a run in which tasks share parameters; a short one suffices.
      look_ahead: also measure how a step on each task alone changes the loss of every task.
      batches: number of batches over which this is averaged.
      json: print JSON.
    """
    if batches < 1:
        raise ConfigError("batches", "must be at least 1", batches)
    folder = files.local(run)
    found = affinity.measure(folder)
    groups = affinity.propose_groups(found.tasks, found.mean)
    ahead = affinity.look_ahead(folder, batches) if look_ahead else None
    draw(found, ahead, folder / PICTURE)
    if json:
        print_json(_plain(found, ahead, groups))
        return
    CONSOLE.print(_cosines(found))
    if ahead is not None:
        CONSOLE.print(_effects(found.tasks, ahead))
    text = "|".join(",".join(group) for group in groups)
    say(f'Largest sum of cosines within groups: --groups="{text}"')
    say(f"{folder / PICTURE}: the heat map")


def _cosines(found: Affinity) -> Table:
    table = Table("tasks", "cosine", "95 % interval", "", title="gradients", title_justify="left")
    for (a, first), (b, second) in itertools.combinations(enumerate(found.tasks), 2):
        if np.isnan(found.mean[a, b]):
            table.add_row(f"{first}, {second}", "", "", "not trained together")
            continue
        low, high = found.low[a, b], found.high[a, b]
        verdict = "agree" if low > 0 else "conflict" if high < 0 else "neither"
        cosine, span = f"{found.mean[a, b]:+.3f}", f"{low:+.3f} to {high:+.3f}"
        table.add_row(f"{first}, {second}", cosine, span, verdict)
    return table


def _effects(tasks: Sequence[str], ahead: np.ndarray) -> Table:
    title = "decrease of each loss by a step on one task, in percent"
    table = Table("a step on", *tasks, title=title, title_justify="left")
    for task, row in zip(tasks, ahead, strict=True):
        table.add_row(task, *(f"{100 * value:+.2f}" for value in row))
    return table


def _plain(found: Affinity, ahead: np.ndarray | None, groups: Any) -> dict[str, Any]:
    """Return JSON values, with null for pairs of tasks that shared nothing."""
    matrices = {"mean": found.mean, "low": found.low, "high": found.high}
    matrices |= {} if ahead is None else {"look_ahead": ahead}
    return {
        "tasks": found.tasks,
        "groups": groups,
        **{name: [[_number(x) for x in row] for row in m] for name, m in matrices.items()},
    }


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def draw(found: Affinity, ahead: np.ndarray | None, path: Path) -> None:
    """Draw the matrices as heat maps that show their values."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [("cosine of gradients", found.mean, 1.0)]
    if ahead is not None:
        percent = 100 * ahead
        panels.append(
            ("% of the column's loss, by a step on the row", percent, np.abs(percent).max())
        )
    figure = Figure(figsize=(1.5 + 4.5 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, matrix, most) in zip(rows, panels, strict=True):
        axes.imshow(matrix, cmap="PuOr", vmin=-most, vmax=most)
        ticks = range(len(found.tasks))
        axes.set(title=title)
        axes.set_xticks(ticks, found.tasks, rotation=30, ha="right")
        axes.set_yticks(ticks, found.tasks)
        for (row, column), value in np.ndenumerate(matrix):
            if not np.isnan(value):
                axes.text(column, row, f"{value:+.2f}", ha="center", va="center")
    with files.replacing(path) as file:
        figure.savefig(file, dpi=110, format="png")


def main(words: Sequence[str]) -> None:
    """Run `show`."""
    call(show, "jaxlora affinity", words)
