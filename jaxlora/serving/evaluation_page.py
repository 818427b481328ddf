"""Render evaluations, such as those of a run's dev sets, as a self-contained HTML page."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jaxlora.serving.evaluate_table import Report, show_names
from jaxlora.tasks.evaluation import Evaluation
from jaxlora.utils import pages

if TYPE_CHECKING:
    import jinja2

TEMPLATE = "evaluation_page.html.j2"
MOST_CLASSES = 40  # in a readable confusion matrix
MOST_POINTS = 2000  # in a plot of scores
LARGEST, SMALLEST = 12.0, 3.0  # radius of a mark, in a plot of 250 × 250


class Plot(NamedTuple):
    """A square scatter plot with its diagonal.

    Attributes:
      x, y: axis labels.
      low, high: limits of both axes.
      marks: x, y (scaled to 0 … 1) and radius of each point.
    """

    x: str
    y: str
    low: float
    high: float
    marks: list[tuple[float, float, float]]


def page(parts: Sequence[tuple[Report, Evaluation]], title: str = "") -> str:
    """Return the HTML page of reports.

    Args:
      parts: the report of each task and the evaluation it was made from.
      title: title of the page; default: that of the first task.
    """
    return _template().render(
        title=title or parts[0][0].title,
        parts=[(report, _plot(report, evaluation)) for report, evaluation in parts],
        most_classes=MOST_CLASSES,
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = pages.environment(Path(__file__).parent)
    environment.filters |= {"show": show, "names": show_names}
    return environment.get_template(TEMPLATE)


def show(value: str | float | None) -> str:
    """Format a cell; None becomes an empty string.

    >>> show(1200), show(0.25), show("a"), show(None)
    ('1,200', '0.2500', 'a', '')
    """
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _plot(report: Report, evaluation: Evaluation) -> Plot:
    """Plot calibration, with mark areas by rows per bin; for scores, predictions by labels."""
    if report.calibration_error is None:
        low, high = evaluation.task.low, evaluation.task.high
        shown = evaluation.labels[:MOST_POINTS], evaluation.predictions[:MOST_POINTS]
        points = [(float(x), float(y), 0.0) for x, y in zip(*shown, strict=True)]
        return Plot("label", "prediction", low, high, _marks(points, low, high))
    total = sum(one.rows for one in report.calibration)  # multilabel: one decision per class
    bins = [(b.confidence, b.accuracy, b.rows / total) for b in report.calibration if b.rows]
    return Plot("confidence", "share that is right", 0, 1, _marks(bins, 0, 1))


def _marks(
    points: Iterable[tuple[float, float, float]], low: float, high: float
) -> list[tuple[float, float, float]]:
    def share(value: float) -> float:
        return (min(max(value, low), high) - low) / (high - low)

    return [
        (share(x), share(y), SMALLEST + (LARGEST - SMALLEST) * area**0.5) for x, y, area in points
    ]
