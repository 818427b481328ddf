"""The report's figures, each drawn wide for a desk and narrow for a phone.

Axes and text are drawn in `INK`, which the page replaces by its own text colour, so that a figure
is legible on light and on dark; the colours of data stand out on both.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.report import statistics, tables
from experiments.report.claims import PAPER_SPEED, Context, paper_score
from experiments.report.collect import Run
from experiments.report.scores import MEAN, SCORES, TITLES
from jaxlora.curves import COLOURS, series, smooth
from jaxlora.rundir import write_text
from jaxlora.tasks import NAMES, Task, paper_tasks
from jaxlora.variants import VARIANTS

INK = "#010203"
WIDE, NARROW = 11.0, 4.6  # inches
POINTS = 160  # of a curve; more cannot be told apart
# A colour and a marker for each way of adapting, a line style for each variant of it.
KINDS = {"frozen": ("#8a8f98", "s"), "full": ("#e07b39", "D"), "lora": ("#2f86d1", "o")}
KIND_NAMES = {"frozen": "frozen", "full": "all weights", "lora": "LoRA"}
LINES = {
    "baseline1": "#8a8f98", "baseline2": "#f0a35e", "baseline3": "#d9622b", "baseline4": "#a8434f",
    "lora1": "#7fb8ec", "lora2": "#2f86d1", "lora3": "#46b08c", "lora4": "#8b6fd0",
}  # fmt: skip
STYLE: dict[Any, Any] = {  # of matplotlib, whose keys are a long list of literals
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.13,
    "axes.grid": True,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}

Panel = Callable[[Any], None]  # draws into axes


@dataclasses.dataclass(frozen=True)
class Plan:
    """A figure before it is drawn.

    Attributes:
      name: of its files.
      title: above it.
      caption: below it; also read out in its place.
      panels: side by side when wide, one below the other when narrow.
      height: inches of a panel.
      columns: panels in a row when wide.
    """

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    height: float = 3.4
    columns: int = 3


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A figure as SVG texts, to be put into a page."""

    name: str
    title: str
    caption: str
    wide: str
    narrow: str


def draw(plan: Plan, narrow: bool) -> Figure:
    """Draw a figure."""
    across = 1 if narrow else min(plan.columns, len(plan.panels))
    down = -(-len(plan.panels) // across)
    figure = Figure((NARROW if narrow else WIDE, plan.height * down), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for one, panel in zip(axes, plan.panels, strict=False):
        panel(one)
    for unused in axes[len(plan.panels) :]:
        unused.remove()
    return figure


def render(plans: Sequence[Plan], folder: Path) -> list[Drawn]:
    """Write each figure as PNG and SVG, and return what a page shows."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for plan in plans:
        with mpl.rc_context({**STYLE, "svg.hashsalt": plan.name}):
            wide, narrow = (to_svg(draw(plan, narrow)) for narrow in (False, True))
            draw(plan, narrow=False).savefig(folder / f"{plan.name}.png", dpi=120, facecolor="w")
        write_text(folder / f"{plan.name}.svg", wide)
        inline = [
            for_page(svg, f"{plan.name}-{size}")
            for svg, size in ((wide, "wide"), (narrow, "narrow"))
        ]
        drawn.append(Drawn(plan.name, plan.title, plan.caption, *inline))
    return drawn


def to_svg(figure: Figure) -> str:
    """A figure as an SVG file without the date, so that equal figures are equal files."""
    file = io.StringIO()
    unsaid = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=unsaid)
    return file.getvalue()


def for_page(svg: str, name: str) -> str:
    """An SVG file made fit for a page: no prolog, ids of its own, the page's text colour.

    >>> for_page('<?xml?><svg xmlns="u" width="9pt"><g id="a" style="fill: #010203"/></svg>', "f")
    '<svg aria-hidden="true"><g id="f-a" style="fill: currentColor"/></svg>'
    """
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, rest = svg.split(">", 1)
    head = re.sub(r'\s(xmlns(:\w+)?|width|height|version)="[^"]*"', "", head)
    rest = re.sub(r'\bid="', f'id="{name}-', rest)
    rest = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", rest)
    return f'{head} aria-hidden="true">{rest.replace(INK, "currentColor")}'


def plans(context: Context) -> list[Plan]:
    """All figures that the runs have something to show in."""
    variants = context.collection.variants
    if not variants:
        return []
    found = [training_time(context), dev_scores(context), trade_off(context), *curves(variants)]
    shown = examined(context)
    if shown:
        found += [confusions(shown), scatters(shown), reliability(shown)]
    return found


def kind_of(run: Run) -> tuple[str, str]:
    """Colour and marker of a run."""
    return KINDS[run.settings["adapt"]]


def training_time(context: Context) -> Plan:
    """Figure 1: training time of each variant, in all and by step."""
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
            axes.annotate(f" {value:,.3g}", (end, row), va="center", fontsize=9)
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
        bars(axes, values, spread, "ms a step (median and range)")
        axes.set_title("a step")

    sources = " and ".join(sorted({t.source for t in times.values()}))
    caption = (
        f"Steps timed by {sources}. The paper found LoRA about {-PAPER_SPEED:.0f} % faster than "
        "full fine-tuning. Variants whose tasks are apart take more, smaller steps."
    )
    title = "Figure 1: training time of each variant"
    return Plan("figure1", title, caption, (whole, steps), 3.2, 2)


def _unit(seconds: float) -> tuple[str, float]:
    return ("seconds", 1.0) if seconds < 300 else ("minutes", 60.0)


def dev_scores(context: Context) -> Plan:
    """Figure 2: each variant's dev scores, ours with intervals beside the paper's."""
    variants = context.collection.variants
    names = list(variants)

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
                axes.plot(paper_score(name, score), row, marker, color="none",
                          markeredgecolor=INK, markersize=6, alpha=0.7)  # fmt: skip
            axes.set_yticks(range(len(names)), names)
            axes.invert_yaxis()
            axes.set(title=TITLES[score], xlabel="% on dev (r × 100 for STS-B)")

        return paint

    caption = (
        "Filled: these runs, with the 95 % interval over dev examples; hollow: the paper, with "
        "bert-base on its own splits. Grey squares: frozen, orange diamonds: all weights trained, "
        "blue circles: LoRA."
    )
    title = "Figure 2: dev scores by variant"
    return Plan("figure2", title, caption, tuple(map(panel, SCORES)), 3.0, 2)


def trade_off(context: Context) -> Plan:
    """Scores against stored parameters: the paper's main trade-off."""
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
    return Plan("pareto", title, caption, (ours, paper), 3.8, 2)


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
    _label({n: p[:2] for n, p in points.items() if n in VARIANTS or n in front}, axes)
    low, high = axes.get_xlim()
    ticks = [t for t in (0.1, 0.3, 1, 3, 10, 30, 100, 300) if low <= t <= high]
    axes.set_xticks(ticks, [f"{t:g}M" for t in ticks])
    axes.minorticks_off()


def _label(points: Mapping[str, tuple[float, float]], axes: Any) -> None:
    """Names beside points; of two close ones in height, the lower goes below."""
    low, high = axes.get_ylim()
    near = 0.06 * (high - low)
    placed: list[float] = []
    for name, (x, y) in sorted(points.items(), key=lambda item: -item[1][1]):
        crowded = any(abs(y - other) < near for other in placed)
        offset = (0, -14) if crowded else (0, 8)
        placed.append(y)
        axes.annotate(name, (x, y), offset, textcoords="offset points", ha="center", fontsize=8.5)


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Those that no other beats: none has at most as much x and a higher y; by x.

    >>> pareto({"a": (1, 50.0), "b": (2, 40.0), "c": (3, 60.0)})
    ['a', 'c']
    """
    front: list[str] = []
    for name, (_, y) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if not front or y > points[front[-1]][1]:
            front.append(name)
    return front


def curves(variants: Mapping[str, Sequence[Run]]) -> Iterator[Plan]:
    """Loss, dev scores, cosines and conflicts over the steps, of each variant's first seed."""
    runs = {name: found[0] for name, found in variants.items()}
    seed = "Each variant's lowest seed. "

    def panel(kind: str, field: str, key: str, title: str, label: str) -> Panel:
        def paint(axes: Any) -> None:
            for name, run in runs.items():
                records = [r for r in run.records if r["kind"] == kind]
                if key in (lines := series(records, field)):
                    x, y = lines[key]
                    smoothed = y if kind == "eval" else smooth(y)
                    style = ".-" if kind == "eval" else "-"
                    axes.plot(*thin(x, smoothed), style, color=LINES[name], label=name, lw=1.4)
            axes.set(title=title, xlabel="step", ylabel=label)
            if axes.lines:
                axes.legend(fontsize=8, ncols=2)

        return paint

    losses = [panel("train", "loss", n, TITLES[n], "training loss (smoothed)") for n in NAMES]
    dev = [panel("eval", "dev", n, TITLES[n], "dev score") for n in NAMES]
    yield Plan("curves-dev", "Dev scores while training", seed.strip(), tuple(dev))
    caption = seed + "The two STS losses have different scales (the cosine loss is weighted)."
    yield Plan("curves-loss", "Training loss", caption, tuple(losses))
    shared = [run for run in runs.values() if any(r.get("cosine") for r in run.records)]
    if shared:
        yield gradients(panel, shared, seed)


def gradients(panel: Callable[..., Panel], shared: Sequence[Run], seed: str) -> Plan:
    """How two tasks' gradients stand to each other, where parameters are shared."""
    pairs = list(
        dict.fromkeys(p for run in shared for r in run.records for p in r.get("cosine", ()))
    )

    def conflicts(axes: Any) -> None:
        for run in shared:
            records = [r for r in run.records if r.get("cosine")]
            x, y = [r["step"] for r in records], [r["conflicts"] for r in records]
            axes.plot(*thin(x, smooth(y)), color=LINES[run.study], label=run.study, lw=1.4)
        axes.set(title="conflicts", xlabel="step", ylabel="pairs in conflict (smoothed)")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8, ncols=2)

    def with_zero(paint: Panel) -> Panel:
        def both(axes: Any) -> None:
            axes.axhline(0, color=INK, linewidth=0.8)
            paint(axes)

        return both

    cosines = [
        with_zero(panel("train", "cosine", p, p.replace("-", " and "), "cosine")) for p in pairs
    ]
    caption = (
        seed
        + "Cosine of two tasks' gradients of the shared parameters: below 0 they conflict, and "
        "PCGrad projects. A conflict counts once for each of the two."
    )
    return Plan(
        "curves-gradients", "Gradient cosines and conflicts", caption, (*cosines, conflicts), 3.2, 2
    )


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """At most about `POINTS` of a curve's points, the last among them."""
    keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), POINTS)).round().astype(int))
    return np.asarray(x)[keep], np.asarray(y)[keep]


def examined(context: Context) -> dict[str, Run]:
    """The best run with adapters and the best with all weights trained, if they have labels."""
    found = {}
    for adapt in ("lora", "full"):
        names = [n for n, v in VARIANTS.items() if v.adapt == adapt]
        best = context.scores.best(names)
        if (
            best is not None
            and set(NAMES) <= (run := context.collection.studies[best][0]).answers.keys()
        ):
            found[best] = run
    return found


def confusions(shown: Mapping[str, Run]) -> Plan:
    """Which classes are taken for which."""
    panels = [
        _confusion(run, task) for task in paper_tasks() if task.integer for run in shown.values()
    ]
    caption = (
        "Rows are labels, columns predictions, numbers dev examples; shade is the share of the "
        "row. The best run with adapters beside the best with all weights trained."
    )
    return Plan("confusion", "Which classes are taken for which", caption, tuple(panels), 3.6, 2)


def _confusion(run: Run, task: Task) -> Panel:
    def paint(axes: Any) -> None:
        answers = run.answers[task.name]
        counts = statistics.confusion(answers.predictions, answers.labels, len(task.classes))
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        for (row, column), count in np.ndenumerate(counts):
            box = mpl.patches.Rectangle(
                (column - 0.48, row - 0.48), 0.96, 0.96,
                facecolor=COLOURS[task.name], alpha=0.05 + 0.65 * share[row, column],
            )  # fmt: skip
            axes.add_patch(box)
            axes.text(column, row, f"{count:,}", ha="center", va="center", fontsize=9)
        ends = (-0.5, len(counts) - 0.5)
        axes.set(xlim=ends, ylim=ends[::-1], title=f"{task.title}, {run.study}")
        axes.set(xlabel="predicted", ylabel="label")
        axes.set_xticks(range(len(counts)), task.classes)
        axes.set_yticks(range(len(counts)), task.classes)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)

    return paint


def scatters(shown: Mapping[str, Run]) -> Plan:
    """Predicted against true similarity."""

    def panel(run: Run) -> Panel:
        def paint(axes: Any) -> None:
            answers = run.answers["sts"]
            axes.plot([0, 5], [0, 5], color=INK, alpha=0.4, linewidth=1)
            axes.scatter(answers.labels, answers.predictions, s=9, alpha=0.35, linewidths=0,
                         color=COLOURS["sts"], rasterized=True)  # fmt: skip
            r = run.result["dev"]["sts"]
            axes.set(title=f"{run.study}: r = {r:.3f}", xlabel="label", ylabel="predicted")
            axes.set(xlim=(-0.15, 5.15), ylim=(-0.15, 5.15))

        return paint

    caption = "STS-B dev: a point a pair of sentences, on the diagonal when predicted exactly."
    panels = tuple(map(panel, shown.values()))
    return Plan("scatter", "STS-B: predicted against true similarity", caption, panels, 3.8, 2)


def reliability(shown: Mapping[str, Run]) -> Plan:
    """How often answers of each confidence are right."""

    def panel(task: Task) -> Panel:
        def paint(axes: Any) -> None:
            axes.plot([0, 1], [0, 1], color=INK, alpha=0.4, linewidth=1)
            for study, run in shown.items():
                answers = run.answers[task.name]
                if np.isnan(answers.confidence).any():
                    continue
                right = answers.predictions == answers.labels
                found = statistics.calibration(answers.confidence, right)
                colour, marker = kind_of(run)
                label = f"{study}: ECE {100 * found.error:.1f} %"
                axes.plot(found.confidence, found.accuracy, "-", color=colour, label=label)
                axes.scatter(found.confidence, found.accuracy, s=15 + 220 * found.share,
                             marker=marker, color=colour, alpha=0.7)  # fmt: skip
            axes.set(title=task.title, xlabel="confidence", ylabel="share that is right")
            axes.set(xlim=(0, 1.03), ylim=(0, 1.05))
            axes.legend(loc="upper left", fontsize=8.5)

        return paint

    caption = (
        "On the diagonal a confidence of 0.8 is right in 80 of 100 cases; below it, the model is "
        "too sure. Ten bins; larger marks hold more examples. ECE: expected calibration error."
    )
    panels = tuple(panel(task) for task in paper_tasks() if task.integer)
    return Plan("calibration", "Calibration", caption, panels, 3.8, 2)
