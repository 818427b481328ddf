"""The text of a report: summary, commands, seeds, versions and machine."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import harness
from experiments.report import alike, statistics, tables
from experiments.report.claims import FEWEST, PARTS, Context, Finding, Verdict
from experiments.report.collect import Collection
from experiments.report.scores import MEAN
from jaxlora.tasks.sharing import VARIANTS
from jaxlora.tasks.task import MADE_UP, NAMES

VERDICTS: tuple[Verdict, ...] = ("reproduced", "not reproduced", "not decidable", "not run")
# (part, measure) → a sentence about the measured quantities; {range} is their lowest to highest
# value, and {sst}, {para} and {sts} are the titles of the tasks.
SENTENCES = {
    ("a", "sts"): "Cosine instead of squared error changes r × 100 on {sts} by {range}.",
    ("b", "sst"): "Sharing instead of separate parameters changes {sst} by {range}",
    ("b", "para"): "{para} by {range}",
    ("b", "sts"): "and {sts} by {range} points.",
    ("c", MEAN): "LoRA's mean score differs from full fine-tuning's by {range} points",
    ("c", "parameters"): "with {plain} of the incremental parameters.",
    ("d", MEAN): "An aggregator instead of summed gradients changes the mean by {range} points.",
    ("e", "step"): "LoRA changes the time of all training steps by {range} %",
    ("e", "best"): "and the time to the best dev score by {range} %.",
}
NOTHING = "Nothing measured yet."
NOT_WHOLE = "Among these are runs that were capped, failed or left steps out."
MISSES = (1 - statistics.LEVEL) / 2  # probability that an interval is above, or below, the truth


@dataclasses.dataclass(frozen=True)
class Part:
    """A group of claims with its findings and a summary sentence."""

    letter: str
    title: str
    sentence: str
    counts: Mapping[Verdict, int]
    findings: tuple[Finding, ...]


def parts(context: Context, findings: Sequence[Finding]) -> list[Part]:
    """Group the findings by the letters of their claims."""
    found = []
    for letter, title in PARTS.items():
        mine = tuple(f for f in findings if f.claim.part == letter)
        counts = Counter(f.verdict for f in mine)
        ordered = {verdict: counts[verdict] for verdict in VERDICTS if counts[verdict]}
        found.append(Part(letter, title, _sentence(context, letter, mine), ordered, mine))
    return found


def _sentence(context: Context, letter: str, findings: Sequence[Finding]) -> str:
    said = []
    for (part, measure), text in SENTENCES.items():
        values = [
            f.evidence.interval.value
            for f in findings
            if (part, measure) == (letter, f.claim.measure) and f.evidence.interval
        ]
        if values:
            ends = [tables.signed(x, 1) for x in (min(values), max(values))]
            span = " to ".join(dict.fromkeys(ends))
            plain = "–".join(dict.fromkeys(f"{x:.1f}" for x in (min(values), max(values)))) + " %"
            said.append(text.format(range=span, plain=plain, **context.titles))
    joined = ", ".join(said).replace(", and", " and")
    studies = {study for f in findings for study in (f.claim.first, f.claim.second)}
    faults = any(map(context.collection.faults, studies))
    return f"{joined.rstrip('.')}.{f' {NOT_WHOLE}' * faults}" if said else NOTHING


def chance(findings: Sequence[Finding]) -> str:
    """State how many verdicts on scores are expected by chance alone."""
    open_ = [
        f for f in findings
        if f.claim.by_seeds and f.claim.measure != "best" and f.evidence.interval
        and not f.objection and f.evidence.seeds >= min(FEWEST.values())
    ]  # fmt: skip
    if not open_:
        return "No comparison of scores can be decided, so none is decided by chance."
    wrong = {
        verdict: MISSES * sum(f.evidence.seeds >= fewest for f in open_)
        for verdict, fewest in FEWEST.items()
    }
    return (
        f"By chance: of the {len(open_)} comparisons of scores that can be decided, up to "
        f"{wrong['reproduced']:.1f} are expected to be called reproduced, and up to "
        f"{wrong['not reproduced']:.1f} not reproduced, where the truth is otherwise "
        f"({100 * MISSES:g} % of 95 % intervals are wholly above the true value, and as many "
        "below). They share runs, so such errors are correlated."
    )


def headline(context: Context) -> str:
    """State the best scores of adapters, full fine-tuning and frozen heads."""
    said = []
    for adapt, what in (
        ("lora", "adapters"),
        ("full", "all weights trained"),
        ("frozen", "a frozen encoder"),
    ):
        best = context.scores.best([n for n, v in VARIANTS.items() if v.adapt == adapt])
        if best is not None:
            mean = tables.show(context.scores.summary(best, MEAN).scaled(100), 1)
            stored = context.collection.studies[best][0].result["parameters"]["incremental"]
            faults = context.collection.faults(best)
            name = f"{best}: {faults}" if faults else best
            said.append(
                f"{mean} with {what} ({name}, {stored / tables.MILLION:,.2f}M parameters stored)"
            )
    return f"Best mean of the three dev scores: {'; '.join(said)}." if said else NOTHING


def missing(collection: Collection) -> list[str]:
    """List missing runs, one line per reason and study, and settings that differ."""
    grouped: dict[tuple[str, str], list[int]] = {}
    for run in collection.missing:
        grouped.setdefault((run.study, run.why), []).append(run.seed)
    lines = [
        f"{study}, seed {', '.join(map(str, seeds))}: {why}"
        for (study, why), seeds in grouped.items()
    ]
    lines += [
        f"{study}, {faults}: no verdict rests on this study"
        for study in collection.studies
        if (faults := collection.faults(study))
    ]
    planned = {run.study for run in collection.missing} | collection.studies.keys()
    absent = [name for name in VARIANTS if name not in planned]
    if absent:
        lines.append(f"not asked for: {', '.join(absent)}")
    unlabelled = sorted({run.study for run in collection.runs if set(NAMES) - run.answers.keys()})
    if unlabelled:
        lines.append(
            f"dev predictions without labels, so no intervals: {', '.join(unlabelled)} "
            "(written by an earlier version; train them again)"
        )
    return lines + alike.differing(collection)


def about(collection: Collection) -> dict[str, str]:
    """Return seeds, versions and time of the runs, and a machine.

    Runs do not record their machine: it is the one of `timing.json`, or else that of the report.
    """
    settings = [run.settings for run in collection.runs]
    versions = _distinct(
        ", ".join(f"{name} {version}" for name, version in run.versions.items())
        for run in collection.runs
    )
    planned = len(collection.runs) + len(collection.missing)
    trained = {run.folder.resolve(): run for run in collection.runs}  # twins are links to one run
    seconds = sum(run.result["train_seconds"] for run in trained.values())
    machine = collection.machine
    return {
        "runs": f"{len(collection.runs)} of {planned} finished",
        "preset": _distinct(s["preset"] for s in settings),
        "base model": _distinct(s["base"] for s in settings),
        "data": MADE_UP if collection.made_up else _distinct(s["source"] for s in settings),
        "matmuls": _distinct(s["dtype"] for s in settings),
        "seeds": ", ".join(map(str, collection.seeds)) or "–",
        "training time, all runs": f"{seconds / 3600:.1f} hours",
        "steps timed on" if machine else "report made on": _machine(machine or harness.machine()),
        "versions": versions,
    }


def _distinct(values: Any) -> str:
    return "; ".join(dict.fromkeys(map(str, values))) or "–"


def _machine(machine: Mapping[str, Any]) -> str:
    plain = {k: v for k, v in machine.items() if not isinstance(v, Mapping)}
    return ", ".join(f"{name} {value}" for name, value in plain.items())


def commands(collection: Collection) -> dict[str, str]:
    """Return the command of each study, from the plan."""
    return dict(collection.plan.get("commands", {}))
