"""Drawing of figures: wide for desktops, narrow for phones, legible in light and dark mode.

Axes and text are drawn in `INK`, which the page replaces by its own text colour. The colours of
data stand out on both backgrounds.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.report.collect import Run
from jaxlora.utils.files import write_text

INK = "#010203"
WIDE, NARROW = 11.0, 4.6  # inches
# A colour and a marker for each way of adapting.
KINDS = {"frozen": ("#8a8f98", "s"), "full": ("#e07b39", "D"), "lora": ("#2f86d1", "o")}
STYLE: dict[Any, Any] = {
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
    """A figure to be drawn.

    Attributes:
      name: name of its files.
      title: heading of the figure.
      caption: text below it; also its description for screen readers.
      panels: panels, side by side when wide, one below the other when narrow.
      height: height of a panel in inches.
      columns: number of panels per row when wide.
    """

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    height: float = 3.4
    columns: int = 3


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A figure as SVG strings, to be embedded in a page."""

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
    """Write each figure as PNG and SVG, and return the figures for the page."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for plan in plans:
        with mpl.rc_context(STYLE | {"svg.hashsalt": plan.name}):
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
    """Save a figure as SVG without the date, so that equal figures are equal files."""
    file = io.StringIO()
    unsaid = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=unsaid)
    return file.getvalue()


def for_page(svg: str, name: str) -> str:
    """Adapt an SVG file to a page: no prolog, unique ids, the page's text colour.

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


def kind_of(run: Run) -> tuple[str, str]:
    """Return the colour and marker of a run."""
    return KINDS[run.settings["adapt"]]
