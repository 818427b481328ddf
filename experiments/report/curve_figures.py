"""Loss, dev scores, gradient cosines and conflicts over the steps of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.report.collect import Run
from experiments.report.drawing import INK, Panel, Plan
from jaxlora.cli.curves import series, smooth
from jaxlora.tasks.task import NAMES

POINTS = 160  # per curve; more are not distinguishable
LINES = {
    "baseline1": "#8a8f98", "baseline2": "#f0a35e", "baseline3": "#d9622b", "baseline4": "#a8434f",
    "lora1": "#7fb8ec", "lora2": "#2f86d1", "lora3": "#46b08c", "lora4": "#8b6fd0",
}  # fmt: skip
SEED = "Each variant's lowest seed."


def plans(variants: Mapping[str, Sequence[Run]], titles: Mapping[str, str]) -> list[Plan]:
    """Plan the figures of each variant's first seed; `titles` are the names of the tasks."""
    runs = {name: found[0] for name, found in variants.items()}
    dev = [_panel(runs, "eval", "dev", name, titles[name], "dev score") for name in NAMES]
    loss = [_panel(runs, "train", "loss", name, titles[name], "training loss") for name in NAMES]
    scales = f"{SEED} Smoothed. The two STS losses have different scales."
    found = [
        Plan("curves-dev", "Dev scores while training", SEED, tuple(dev)),
        Plan("curves-loss", "Training loss", scales, tuple(loss)),
    ]
    shared = {n: run for n, run in runs.items() if any(r.get("cosine") for r in run.records)}
    return [*found, gradients(shared, titles)] if shared else found


def _panel(
    runs: Mapping[str, Run], kind: str, field: str, key: str, title: str, label: str
) -> Panel:
    """Draw one key of a dict field, such as the loss of a task, with one line per run."""

    def paint(axes: Any) -> None:
        for name, run in runs.items():
            lines = series([r for r in run.records if r["kind"] == kind], field)
            if key in lines:
                x, y = lines[key]
                line, style = (y, ".-") if kind == "eval" else (smooth(y), "-")
                axes.plot(*thin(x, line), style, color=LINES[name], label=name, lw=1.4)
        axes.set(title=title, xlabel="step", ylabel=label)
        if axes.lines:
            axes.legend(fontsize=8, ncols=2)

    return paint


def gradients(shared: Mapping[str, Run], titles: Mapping[str, str]) -> Plan:
    """Plan the figure of gradient cosines and conflicts, for runs with shared parameters."""
    records = [r for run in shared.values() for r in run.records]
    pairs = list(dict.fromkeys(pair for r in records for pair in r.get("cosine", ())))

    def conflicts(axes: Any) -> None:
        for name, run in shared.items():
            counted = [r for r in run.records if r.get("cosine")]
            x, y = [r["step"] for r in counted], smooth([r["conflicts"] for r in counted])
            axes.plot(*thin(x, y), color=LINES[name], label=name, lw=1.4)
        axes.set(title="pairs in conflict", xlabel="step", ylabel="pairs of tasks")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8, ncols=2)

    panels = [_cosines(shared, pair, titles) for pair in pairs]
    caption = (
        f"{SEED} Smoothed. Cosine of two tasks' gradients of the shared parameters: below 0 they "
        "conflict, and PCGrad projects. The last panel counts the pairs that do."
    )
    title = "Gradient cosines and conflicts"
    return Plan("curves-gradients", title, caption, (*panels, conflicts), 3.2, 2)


def _cosines(shared: Mapping[str, Run], pair: str, titles: Mapping[str, str]) -> Panel:
    title = " and ".join(titles[name] for name in pair.split("-"))
    paint = _panel(shared, "train", "cosine", pair, title, "cosine")

    def both(axes: Any) -> None:
        paint(axes)
        axes.axhline(0, color=INK, linewidth=0.8)

    return both


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Thin a curve to about `POINTS` points, including the last."""
    keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), POINTS)).round().astype(int))
    return np.asarray(x)[keep], np.asarray(y)[keep]
