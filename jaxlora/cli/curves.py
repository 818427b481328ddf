"""The curves of a run as a PNG: losses, dev scores and gradient conflicts over time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlora.utils import files

Series = Mapping[str, tuple[list[float], list[float]]]  # label → (x, y)
Panel = tuple[str, str, Series, str]  # title, unit, lines, style

# Colours of the paper's tasks, distinguishable by colour-blind readers (Okabe & Ito 2008).
COLOURS = {"sst": "#0072B2", "para": "#D55E00", "sts": "#009E73"}

MOST_NAMED = 8  # entries of a legend; more (91 pairs of tasks) would leave no room for the lines


def draw(
    records: Iterable[Mapping[str, Any]], path: Path, title: str, metrics: Mapping[str, str]
) -> None:
    """Draw the records of a run: losses, dev scores and, of tasks that share, conflicts.

    Args:
      records: records of `metrics.jsonl`.
      path: the PNG to write.
      title: title above the panels.
      metrics: task → name of its metric; each metric has its own panel.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = list(records)
    train = [r for r in records if r["kind"] == "train"]
    losses, cosines = series(train, "loss"), series(train, "cosine")
    panels: list[Panel] = [("training loss (dots: dev)", "loss", losses, "-")]
    panels += [
        ("dev score", metric, lines, "o-") for metric, lines in _scores(records, metrics).items()
    ]
    if cosines:
        panels.append(("gradient conflicts", "cosine of two tasks' gradients", cosines, "-"))
    figure = Figure(figsize=(4.3 * len(panels), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    colours = {task: COLOURS.get(task, f"C{n}") for n, task in enumerate(losses)}
    (all_axes,) = figure.subplots(1, len(panels), squeeze=False)
    for axes, panel in zip(all_axes, panels, strict=True):
        _draw_panel(axes, panel, colours)
    for task, (x, y) in series(records, "dev_loss").items():
        all_axes[0].plot(x, y, "o", color=colours.get(task), markersize=4)
    if cosines:
        _draw_conflicts(all_axes[-1], [r for r in train if r["cosine"]])
    with files.replacing(path) as file:
        figure.savefig(file, dpi=110, format="png")


def _draw_panel(axes: Any, panel: Panel, colours: Mapping[str, str]) -> None:
    name, unit, lines, style = panel
    for label, (x, y) in lines.items():
        shown = smooth(y) if style == "-" else y
        axes.plot(x, shown, style, label=label, color=colours.get(label), markersize=4)
    axes.set(title=name, xlabel="step", ylabel=unit)
    axes.grid(alpha=0.3)
    if lines:
        named = (part[:MOST_NAMED] for part in axes.get_legend_handles_labels())
        more = len(lines) - MOST_NAMED
        axes.legend(*named, title=f"and {more} more" if more > 0 else None)


def _scores(
    records: Sequence[Mapping[str, Any]], metrics: Mapping[str, str]
) -> Mapping[str, Series]:
    """Return the dev scores of the tasks of each metric."""
    found: dict[str, dict[str, tuple[list[float], list[float]]]] = defaultdict(dict)
    for task, points in series(records, "dev").items():
        found[metrics.get(task, "score")][task] = points
    return found


def _draw_conflicts(axes: Any, shared: Sequence[Mapping[str, Any]]) -> None:
    """Draw the line at 0, below which two tasks conflict, and the number of pairs in conflict."""
    axes.axhline(0, color="black", linewidth=0.8)
    pairs = axes.twinx()
    counts = smooth([r["conflicts"] for r in shared])
    pairs.plot([r["step"] for r in shared], counts, "--", color="grey")
    pairs.set(ylabel="pairs in conflict (dashed)", ylim=(0, None))


def series(records: Iterable[Mapping[str, Any]], field: str) -> Series:
    """Return the steps and values of each key of a field, which holds a dict.

    >>> series([{"step": 1, "loss": {"sst": 2.0}}, {"step": 2}], "loss")
    {'sst': ([1], [2.0])}
    """
    found: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for record in records:
        for name, value in record.get(field, {}).items():
            found[name][0].append(record["step"])
            found[name][1].append(value)
    return dict(found)


def smooth(values: Sequence[float], keep: float = 0.8) -> list[float]:
    """Compute a bias-corrected exponential moving average.

    >>> smooth([1.0, 1.0])
    [1.0, 1.0]
    """
    total = weight = 0.0
    out = []
    for value in values:
        total = keep * total + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        out.append(total / weight)
    return out
