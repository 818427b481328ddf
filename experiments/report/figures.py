"""The report's figures: training time, scores, and scores against storage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.report import curve_figures, error_figures, tables
from experiments.report.claims import PAPER_SPEED, Context, paper_score
from experiments.report.drawing import INK, KINDS, Panel, Plan, kind_of
from experiments.report.scores import MEAN, SCORES
from jaxlora.tasks.sharing import VARIANTS

HOLLOW = "Hollow: the paper, with bert-base on its own splits."


def plans(context: Context) -> list[Plan]:
    """Plan all figures for which the runs have data."""
    variants = context.collection.variants
    if not variants:
        return []
    found = [
        training_time(context),
        dev_scores(context),
        trade_off(context),
        *curve_figures.plans(variants, context.titles),
    ]
    return found + error_figures.plans(context)


def training_time(context: Context) -> Plan:
    """Draw figure 1: training time of each variant, in total and per step."""
    variants = context.collection.variants
    times = {name: context.times[name] for name in variants}

    def bars(axes: Any, values: Mapping[str, float], ranges: Any, label: str) -> None:
        colours = [kind_of(variants[name][0])[0] for name in values]
        axes.barh(list(values), list(values.values()), color=colours, xerr=ranges, ecolor=INK)
        axes.invert_yaxis()
        axes.set(xlabel=label)
        axes.grid(axis="y", visible=False)
        for row, value in enumerate(values.values()):
            end = value if ranges is None else value + ranges[1][row]
            axes.annotate(
                f" {value:,.0f}" if value >= 100 else f" {value:.1f}",
                (end, row),
                va="center",
                fontsize=9,
            )
        axes.margins(x=0.14)

    def whole(axes: Any) -> None:
        unit, seconds = _unit(max(t.total.mean for t in times.values()))
        values = {name: t.total.mean / seconds for name, t in times.items()}
        bars(axes, values, None, f"training time, {unit}")
        axes.set_title("to the end")

    def steps(axes: Any) -> None:
        values = {name: t.step.value for name, t in times.items()}
        spread = np.array([[t.step.value - t.step.low, t.step.high - t.step.value]
                           for t in times.values()]).T  # fmt: skip
        bars(axes, values, spread, "ms per step (median and range)")
        axes.set_title("a step")

    sources = " and ".join(sorted({t.source for t in times.values()}))
    caption = (
        f"Steps timed by {sources}. The paper found LoRA about {-PAPER_SPEED:.0f} % faster than "
        "full fine-tuning. Groups that train adapters or heads share each step. "
        f"{tables.ENCODING}"
    )
    title = "Figure 1: training time of each variant"
    return Plan("figure1", title, caption, (whole, steps), 3.2, 2)


def _unit(seconds: float) -> tuple[str, float]:
    return ("seconds", 1.0) if seconds < 300 else ("minutes", 60.0)


def dev_scores(context: Context) -> Plan:
    """Draw figure 2: dev scores of each variant with intervals, and the paper's scores."""
    variants, titles = context.collection.variants, context.titles
    names, beside = list(variants), not context.collection.made_up

    def panel(score: str) -> Panel:
        def paint(axes: Any) -> None:
            for row, name in enumerate(names):
                colour, marker = kind_of(variants[name][0])
                mean = 100 * context.scores.summary(name, score).mean
                found = context.scores.interval(name, score)
                if found is not None:
                    axes.plot([100 * found.low, 100 * found.high], [row, row], color=colour,
                              linewidth=2, alpha=0.55)  # fmt: skip
                axes.plot(mean, row, marker, color=colour, markersize=7)
                if beside:
                    axes.plot(paper_score(name, score), row, marker, color="none",
                              markeredgecolor=INK, markersize=6, alpha=0.7)  # fmt: skip
            axes.set_yticks(range(len(names)), names)
            axes.invert_yaxis()
            axes.set(title=titles[score], xlabel=f"% on dev (r × 100 for {titles['sts']})")

        return paint

    caption = (
        "Filled: these runs, with the 95 % interval over seeds and dev examples (with one seed "
        f"over dev examples alone). {HOLLOW if beside else ''} Grey squares: frozen, orange "
        f"diamonds: all weights trained, blue circles: LoRA. {context.data_note}"
    )
    title = "Figure 2: dev scores by variant"
    return Plan("figure2", title, " ".join(caption.split()), tuple(map(panel, SCORES)), 3.0, 2)


def trade_off(context: Context) -> Plan:
    """Draw scores against stored parameters, the paper's main trade-off."""
    studies = context.collection.studies

    def ours(axes: Any) -> None:
        points = {
            name: (
                runs[0].result["parameters"]["incremental"] / tables.MILLION,
                100 * context.scores.summary(name, MEAN).mean,
                *kind_of(runs[0]),
            )
            for name, runs in studies.items()
        }
        _pareto(axes, points, "these runs")

    def paper(axes: Any) -> None:
        points = {
            name: (v.paper.incremental, v.paper.mean_recomputed, *KINDS[v.adapt])
            for name, v in VARIANTS.items()
        }
        _pareto(axes, points, "the paper (means recomputed)")

    caption = (
        "Mean of the three dev scores against what is stored beside the base, on a logarithmic "
        "scale. The line joins what nothing else beats with fewer parameters (the Pareto front)."
    )
    title = "Accuracy against stored parameters"
    panels = (ours,) if context.collection.made_up else (ours, paper)
    return Plan("pareto", title, caption, panels, 3.8, 2)


def _pareto(axes: Any, points: Mapping[str, tuple[float, float, str, str]], title: str) -> None:
    front = pareto({name: point[:2] for name, point in points.items()})
    axes.plot(*zip(*(points[name][:2] for name in front), strict=True), color=INK, alpha=0.4)
    for name, (x, y, colour, marker) in points.items():
        extra = name not in VARIANTS
        axes.plot(
            x, y, marker, color=colour, markersize=5 if extra else 8, alpha=0.6 if extra else 1
        )
    axes.set(title=title, xscale="log", xlabel="incremental parameters, millions")
    axes.set_ylabel("mean score, %")
    axes.margins(x=0.22, y=0.12)
    _label({n: p[:2] for n, p in points.items() if n in VARIANTS}, axes)
    low, high = axes.get_xlim()
    ticks = [t for t in (0.1, 0.3, 1, 3, 10, 30, 100, 300) if low <= t <= high]
    axes.set_xticks(ticks, [f"{t:g}M" for t in ticks])
    axes.minorticks_off()


# Possible places of a name relative to its point: alignment, and offset in points (right, up).
_PLACES = (("center", 0, 9), ("left", 8, -3), ("right", -8, -3), ("center", 0, -17))
_SIDES = {"center": 0, "left": 1, "right": -1}


def _label(points: Mapping[str, tuple[float, float]], axes: Any) -> None:
    """Place names beside points so that they overlap few other names and points."""
    pixels = axes.figure.dpi / 72
    taken = [(*axes.transData.transform(at), 6 * pixels) for at in points.values()]
    for name, at in sorted(points.items(), key=lambda item: -item[1][1]):
        x, y = axes.transData.transform(at)
        half = 2.4 * len(name) * pixels

        def box(place: tuple[str, int, int], x: float = x, y: float = y, half: float = half) -> Box:
            align, right, up = place
            return x + right * pixels + half * _SIDES[align], y + (up + 3) * pixels, half

        place = min(_PLACES, key=lambda place: _crowd(taken, box(place)))
        taken.append(box(place))
        align, *offset = place
        axes.annotate(name, at, offset, textcoords="offset points", ha=align, fontsize=8.5)


Box = tuple[float, float, float]  # the middle of a name in pixels, and half its width


def _crowd(taken: Sequence[Box], box: Box) -> int:
    """Count the taken places that a name would overlap."""
    x, y, half = box
    return sum(abs(x - cx) < half + c_half and abs(y - cy) < 15 for cx, cy, c_half in taken)


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the Pareto front, sorted by x: no other point has less x and a higher y.

    >>> pareto({"a": (1, 50.0), "b": (2, 40.0), "c": (3, 60.0)})
    ['a', 'c']
    """
    front: list[str] = []
    for name, (_, y) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if not front or y > points[front[-1]][1]:
            front.append(name)
    return front
