"""The page of an evaluation: one HTML file that needs no other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

from jaxlora.serving.evaluate_table import Report, show_names
from jaxlora.tasks.evaluation import Evaluation, Interval

MOST_CLASSES = 40  # in a confusion matrix that can be read
MOST_POINTS = 2000  # in a picture of scores
_SIZE = 300  # of a picture

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; color: CanvasText; max-width: 60rem; margin: auto;
  padding: 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p { color: GrayText; margin: .3rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .5rem; border-bottom: 1px solid rgb(128 128 128 / .4); text-align: left; }
th { font-weight: 600; } .n { text-align: right; } .text { min-width: 14rem; }
svg { width: 100%; max-width: 22rem; height: auto; }
svg text { fill: GrayText; font-size: 11px; } svg .axis { stroke: GrayText; fill: none; }
svg .mark { fill: rgb(0 114 178); }
svg .even { stroke: rgb(128 128 128 / .4); stroke-dasharray: 4; }
"""


def page(found: Report, evaluation: Evaluation) -> str:
    """Return the page of a report.

    Args:
      found: the report.
      evaluation: what it was made from.
    """
    about = f"{found.rows:,} labelled rows of {escape(found.source)}{_left_out(found)}"
    title, content = escape(found.title), "\n".join(_sections(found, evaluation))
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n"
        f"<body>\n<h1>{title}</h1>\n<p>{about}</p>\n{content}\n</body>\n</html>\n"
    )


def _sections(found: Report, evaluation: Evaluation) -> Iterator[str]:
    yield _section("Scores", "with 95 % bootstrap intervals", _scores(found.scores))
    if found.against is not None:
        about = f"this model minus {escape(found.against)}, on the same rows, with 95 % intervals"
        yield _section("Difference", about, _scores(found.differences))
    if found.classes:
        head = ("class", "precision", "recall", "F1", "rows")
        yield _section("Classes", "", table(head, found.classes))
    if found.thresholds:
        about = "a class is predicted where its probability is above"
        yield _section("Thresholds", about, table(("class", "threshold"), found.thresholds.items()))
    if 0 < len(found.confusion) <= MOST_CLASSES:
        yield _section("Confusion", "labels down, predictions across", _confusion(found))
    if found.calibration_error is not None:
        about = f"expected calibration error {found.calibration_error:.3f}"
        yield _section("Calibration", about, _draw_calibration(found))
    else:
        yield _section("Predictions", "", _draw_scores(evaluation))
    if found.best_threshold is not None:
        line = f"{found.best_threshold:.3f} on the positive class gives F1 {found.best_f1:.3f}"
        yield _section("Best threshold", "chosen on these rows", line)
    rows = [
        (m.line, " ‖ ".join(m.texts), show_names(m.label), show_names(m.prediction), m.confidence)
        for m in found.mistakes
    ]
    head = ("line", "text", "label", "prediction", "confidence")
    yield _section("Worst mistakes", "", table(head, rows))


def _draw_calibration(found: Report) -> str:
    bins = [one for one in found.calibration if one.rows]
    total = sum(one.rows for one in bins)  # of a set, a decision for each class
    points = [(one.confidence, one.accuracy, one.rows / total) for one in bins]
    return draw(points, (0, 1), "confidence", "share that is right")


def _draw_scores(evaluation: Evaluation) -> str:
    labels, predictions = evaluation.labels[:MOST_POINTS], evaluation.predictions[:MOST_POINTS]
    points = [(float(x), float(y), 0.0) for x, y in zip(labels, predictions, strict=True)]
    return draw(points, (evaluation.task.low, evaluation.task.high), "label", "prediction")


def _left_out(found: Report) -> str:
    counts = {"without a label": found.unlabelled, "with a blank text": found.blank}
    told = [f"{count:,} {what}" for what, count in counts.items() if count]
    return f"; left out: {', '.join(told)}" if told else ""


def _section(title: str, about: str, content: str) -> str:
    note = f"<p>{about}</p>" if about else ""
    return f'<h2>{title}</h2>{note}<div class="scroll">{content}</div>'


def _scores(scores: dict[str, Interval]) -> str:
    rows = [(name, one.value, f"{one.low:.4f} to {one.high:.4f}") for name, one in scores.items()]
    return table(("metric", "value", "interval"), rows)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return rows as an HTML table; numbers are aligned to the right, None is an empty cell."""
    titles = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = ("".join(map(_cell, row)) for row in rows)
    return f"<table><tr>{titles}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _cell(value: str | float | None) -> str:
    if isinstance(value, str):
        return f'<td class="{"text" if len(value) > 40 else ""}">{escape(value)}</td>'
    shown = "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
    return f'<td class="n">{shown}</td>'


def _confusion(found: Report) -> str:
    """Return the matrix; a cell is as dark as its share of its row."""
    names = [row.name for row in found.classes]
    lines = []
    for name, counts in zip(names, found.confusion, strict=True):
        total = max(1, sum(counts))
        cells = "".join(
            f'<td class="n" style="background: rgb(0 114 178 / {0.7 * count / total:.2f})">'
            f"{count:,}</td>"
            for count in counts
        )
        lines.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    return f"<table><tr><th></th>{head}</tr>{''.join(lines)}</table>"


def draw(
    points: Iterable[tuple[float, float, float]], span: tuple[float, float], x: str, y: str
) -> str:
    """Return points in a square with its diagonal, as SVG.

    Args:
      points: x, y, and a share 0 … 1 that is the area of its mark.
      span: lowest and highest value of both axes.
      x, y: titles of the axes.
    """
    low, high = span
    inner, edge = _SIZE - 50, 40

    def at(value: float) -> float:
        return inner * (min(max(value, low), high) - low) / (high - low)

    marks = "".join(
        f'<circle class="mark" cx="{edge + at(a):.1f}" cy="{10 + inner - at(b):.1f}" '
        f'r="{3 + 9 * share**0.5:.1f}" opacity="0.6"/>'
        for a, b, share in points
    )
    bottom, right = 10 + inner, edge + inner
    return (
        f'<svg viewBox="0 0 {_SIZE} {_SIZE + 10}" role="img" aria-label="{y} by {x}">'
        f'<path class="axis" d="M{edge} 10V{bottom}H{right}"/>'
        f'<line class="even" x1="{edge}" y1="{bottom}" x2="{right}" y2="10"/>{marks}'
        f'<text x="{edge}" y="{bottom + 14}">{low:g}</text>'
        f'<text x="{right}" y="{bottom + 14}" text-anchor="end">{high:g}</text>'
        f'<text x="{edge + inner / 2}" y="{bottom + 28}" text-anchor="middle">{x}</text>'
        f'<text x="{edge - 6}" y="18" text-anchor="end">{high:g}</text>'
        f'<text transform="translate(12 {10 + inner / 2}) rotate(-90)" '
        f'text-anchor="middle">{y}</text></svg>'
    )
