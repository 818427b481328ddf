"""The curves of a run as a PNG: loss, dev metric and gradient conflicts over time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlora.utils import files

Series = Mapping[str, tuple[list[float], list[float]]]  # label → (x, y)

# Colours of the paper's tasks, distinguishable by colour-blind readers (Okabe & Ito 2008).
COLOURS = {"sst": "#0072B2", "para": "#D55E00", "sts": "#009E73"}

MOST_NAMED = 8  # entries of a legend; more (91 pairs of tasks) would leave no room for the lines


def draw(
    records: Iterable[Mapping[str, Any]], path: Path, title: str, metrics: Mapping[str, str]
) -> None:
    """Draw the records of a run: losses, dev metrics and gradient conflicts.

    Args:
      records: records of `metrics.jsonl`.
      path: the PNG to write.
      title: title above the panels.
      metrics: task → name of its metric.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = list(records)
    train = [r for r in records if r["kind"] == "train"]
    panels: Sequence[tuple[str, str, Series, str]] = (
        ("training loss (dots: dev)", "loss", series(train, "loss"), "-"),
        (
            "dev metric",
            " or ".join(dict.fromkeys(metrics.values())),
            _scores(records, metrics),
            "o-",
        ),
        ("gradient conflicts", "cosine of two tasks' gradients", series(train, "cosine"), "-"),
    )
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, (name, unit, lines, style) in zip(figure.subplots(1, 3), panels, strict=True):
        for label, (x, y) in lines.items():
            shown = smooth(y) if style == "-" else y
            axes.plot(x, shown, style, label=label, color=_colour(label), markersize=4)
        axes.set(title=name, xlabel="step", ylabel=unit)
        axes.grid(alpha=0.3)
        if lines:
            named = (part[:MOST_NAMED] for part in axes.get_legend_handles_labels())
            more = len(lines) - MOST_NAMED
            axes.legend(*named, title=f"and {more} more" if more > 0 else None)
    _dev_losses(figure.axes[0], series(records, "dev_loss"))
    _conflict_panel(figure.axes[2], train)
    with files.replacing(path) as file:
        figure.savefig(file, dpi=110, format="png")


def _scores(records: Sequence[Mapping[str, Any]], metrics: Mapping[str, str]) -> Series:
    """Return the dev scores, labelled by their metrics if there are several."""
    several = len(set(metrics.values())) > 1
    return {
        f"{task}: {metrics[task]}" if several and task in metrics else task: points
        for task, points in series(records, "dev").items()
    }


def _colour(label: str) -> str | None:
    return COLOURS.get(label.partition(":")[0])


def _dev_losses(axes: Any, losses: Series) -> None:
    """Draw dev losses as dots on the training losses, in the colour of each task."""
    colours = {line.get_label(): line.get_color() for line in axes.get_lines()}
    for task, (x, y) in losses.items():
        axes.plot(x, y, "o", color=colours.get(task), markersize=4)


def _conflict_panel(axes: Any, train: Sequence[Mapping[str, Any]]) -> None:
    """Draw the line at 0, below which two tasks conflict, and the number of pairs in conflict."""
    shared = [r for r in train if r["cosine"]]
    if not shared:
        axes.text(0.5, 0.5, "no task shares parameters", ha="center", transform=axes.transAxes)
        return
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
