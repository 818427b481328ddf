"""`report.html`: one self-contained file."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.report import estimate, facts, results, tables
from experiments.report.claims import Context, Finding
from experiments.report.drawing import Drawn
from experiments.report.facts import Part
from experiments.report.statistics import Interval, Range, Summary
from experiments.report.tables import Table
from jaxlora.utils import pages

TEMPLATE = "report.html.j2"
MARKS = {"reproduced": "✓", "not reproduced": "✕", "not decidable": "?", "not run": "○"}


def html(
    context: Context,
    parts: Sequence[Part],
    found: Sequence[Table],
    drawn: Sequence[Drawn],
    command: str,
) -> str:
    """Render the page."""
    environment = pages.environment(Path(__file__).parent)
    environment.filters |= {"show": tables.show, "sort_key": sort_key, "slug": slug}
    return environment.get_template(TEMPLATE).render(
        about=facts.about(context.collection),
        command=command,
        chance=facts.chance([finding for part in parts for finding in part.findings]),
        commands=facts.commands(context.collection),
        data_note=context.data_note,
        estimate=results.estimate_table(context),
        estimate_command=estimate.command(context.collection),
        figures={figure.name: figure for figure in drawn},
        footnotes=tables.footnotes(),
        headline=facts.headline(context),
        marks=MARKS,
        missing=facts.missing(context.collection),
        parts=[(part, bars(part.findings)) for part in parts],
        tables={table.name: table for table in found},
        in_the_paper=in_the_paper,
        measured=measured,
    )


def slug(text: str) -> str:
    """Convert a name to the class of an element."""
    return text.replace(" ", "-")


def sort_key(value: Any) -> float | str:
    """Return the sort key of a cell; empty for no value, which is sorted last."""
    if value is None:
        return ""
    if isinstance(value, Summary):
        return value.mean
    return value.value if isinstance(value, Interval) else value


def measured(finding: Finding) -> str:
    """Format the quantity with its interval and unit."""
    claim, found = finding.claim, finding.evidence.interval
    if found is None:
        return "not measured"
    kind = Interval if claim.change else Range
    digits = 2 if claim.unit == "points" else 1
    return f"{tables.show(kind(*dataclasses.astuple(found)), digits)} {claim.unit}"


def in_the_paper(finding: Finding) -> str:
    """Format the paper's figure; empty if there is none."""
    claim = finding.claim
    if claim.paper is None:
        return ""
    digits = 2 if claim.unit == "points" else 1
    shown = tables.signed(claim.paper, digits) if claim.change else f"{claim.paper:.{digits}f}"
    return f"paper {shown}"


def bars(findings: Sequence[Finding]) -> list[dict[str, float] | None]:
    """Compute each finding's interval and region as percent of the width of a strip.

    Findings in the same measure and unit share a scale, so that strips can be compared.
    """
    scales: dict[str, list[float]] = {}
    for finding in findings:
        found = finding.evidence.interval
        if found is not None:
            ends = scales.setdefault(_scale(finding), [0.0])
            ends += [found.low, found.high]
    return [_bar(finding, scales.get(_scale(finding), [])) for finding in findings]


def _scale(finding: Finding) -> str:
    claim = finding.claim
    return claim.measure if claim.unit == "%" else "points"


def _bar(finding: Finding, ends: Sequence[float]) -> dict[str, float] | None:
    found = finding.evidence.interval
    if found is None:
        return None
    low, high = min(ends), max(ends)
    margin = 0.06 * (high - low) or 1.0
    low, high = low - margin, high + margin

    def at(x: float) -> float:
        return round(100 * (min(max(x, low), high) - low) / (high - low), 2)

    start, end = map(at, finding.claim.region)
    bar = {
        "region": start, "region_width": end - start, "zero": at(0.0), "value": at(found.value),
        "low": at(found.low), "width": at(found.high) - at(found.low),
    }  # fmt: skip
    paper = finding.claim.paper
    return bar if paper is None or not low < paper < high else bar | {"paper": at(paper)}
