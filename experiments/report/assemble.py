"""Assemble the report from the runs on disk."""

from __future__ import annotations

from pathlib import Path

from experiments.report import (
    claims,
    drawing,
    facts,
    figures,
    page,
    results,
    scores,
    statistics,
    tables,
    times,
)
from experiments.report.collect import collect
from jaxlora.utils.files import write_text

PAGE, MARKDOWN, TABLES, FIGURES = "report.html", "results.md", "tables", "figures"


def build(root: Path, out: Path, *, resamples: int = statistics.RESAMPLES, seed: int = 0) -> Path:
    """Write the report of a root folder; the report lists missing runs.

    Args:
      root: folder that `experiments/reproduce.py` wrote; see `collect`.
      out: folder for `report.html`, `results.md`, `tables/*.csv` and `figures/*.{png,svg}`.
      resamples, seed: number of resamples and seed of the bootstrap.

    Returns:
      The path of `report.html`.

    Raises:
      UserError: if the root has no runs, or a file in it is invalid.
    """
    collection = collect(root)
    context = claims.Context(
        collection, scores.score(collection, resamples, seed), times.measure(collection)
    )
    findings = claims.examine(context)
    parts, found = facts.parts(context, findings), tables.make(context, findings)
    command = f"python -m experiments.report --from {root} --out {out}"
    drawn = drawing.render(figures.plans(context), out / FIGURES)
    tables.write_csv(found, out / TABLES)
    write_text(out / MARKDOWN, results.markdown(context, parts, found, command))
    write_text(out / PAGE, page.html(context, parts, found, drawn, command))
    return out / PAGE
