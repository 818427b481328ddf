"""The paper's claims as data, and what our runs say of each.

A claim is a quantity and the region in which it bears the claim out. Its verdict compares that
region with the quantity's interval: inside, it is reproduced; outside, it is not; else the runs
cannot decide.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

from experiments.report import statistics, times
from experiments.report.collect import Collection
from experiments.report.scores import MEAN, TITLES, Scores
from experiments.report.statistics import Interval
from jaxlora.tasks import NAMES
from jaxlora.variants import VARIANTS

Verdict = Literal["reproduced", "not reproduced", "not decidable"]
Region = tuple[float, float]
INFINITY = float("inf")
HIGHER: Region = (0.0, INFINITY)
LOWER: Region = (-INFINITY, 0.0)
MARGIN = 1.0  # points within which two scores count as equal
SAME: Region = (-MARGIN, MARGIN)
NOT_LOWER: Region = (-MARGIN, INFINITY)

NO_LABELS = "the dev predictions hold no labels: train the runs anew"
PARTS = {
    "a": "Cosine loss for STS",
    "b": "Sharing parameters between tasks",
    "c": "LoRA against full fine-tuning",
    "d": "PCGrad against summed gradients",
    "e": "Training time",
}


@dataclasses.dataclass(frozen=True)
class Claim:
    """One comparison of two studies.

    Attributes:
      part: its letter, see `PARTS`.
      text: what is claimed.
      first, second: the studies.
      measure: what is compared, see `MEASURES`.
      region: where the quantity must lie; points for scores, else percent.
      paper: what the paper's own figures give for it, None where it has none.
    """

    part: str
    text: str
    first: str
    second: str
    measure: str
    region: Region
    paper: float | None = None

    @property
    def unit(self) -> str:
        """Of the quantity."""
        return "points" if self.measure in TITLES else "%"

    @property
    def change(self) -> bool:
        """Whether the quantity is a change, and not a share."""
        return self.measure not in ("gain", "parameters")


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What the runs say of a claim.

    Attributes:
      interval: of the quantity; None where it cannot be had.
      seeds: of the study that has fewer.
      note: where it comes from, or why it is not there.
      deviation: of the quantity over seeds; None where there are fewer than two.
    """

    interval: Interval | None
    seeds: int
    note: str
    deviation: float | None = None


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim, its evidence and the verdict."""

    claim: Claim
    evidence: Evidence

    @property
    def verdict(self) -> Verdict:
        """See `judge`."""
        return judge(self.claim.region, self.evidence.interval)


@dataclasses.dataclass(frozen=True)
class Context:
    """What claims are measured on."""

    collection: Collection
    scores: Scores
    times: Mapping[str, times.Time]

    def seeds(self, *studies: str) -> int:
        """How many the poorest of them has."""
        return min(len(self.collection.studies[study]) for study in studies)


def judge(region: Region, interval: Interval | None) -> Verdict:
    """Compare an interval with the region that bears a claim out.

    >>> judge(HIGHER, Interval(1.0, 0.5, 1.5)), judge(HIGHER, Interval(0.0, 0.0, 0.0))
    ('reproduced', 'not reproduced')
    >>> judge(HIGHER, Interval(1.0, -0.5, 2.5))
    'not decidable'
    """
    if interval is None:
        return "not decidable"
    low, high = region
    if low < interval.low and interval.high < high:
        return "reproduced"
    if interval.high <= low or interval.low >= high:
        return "not reproduced"
    return "not decidable"


def examine(context: Context) -> list[Finding]:
    """Judge every claim."""
    findings = []
    for claim in CLAIMS:
        missing = [s for s in (claim.first, claim.second) if s not in context.scores]
        evidence = (
            Evidence(None, 0, f"no finished run of {' and '.join(missing)}")
            if missing
            else MEASURES.get(claim.measure, _difference)(context, claim)
        )
        findings.append(Finding(claim, evidence))
    return findings


def _difference(context: Context, claim: Claim) -> Evidence:
    pair = (claim.first, claim.second, claim.measure)
    seeds = context.seeds(*pair[:2])
    found = context.scores.difference(*pair)
    if found is None:
        return Evidence(None, seeds, NO_LABELS)
    over_seeds = context.scores.difference_over_seeds(*pair)
    deviation = over_seeds.scaled(100).deviation if over_seeds else None
    return Evidence(found.scaled(100), seeds, "paired bootstrap of dev examples", deviation)


def _gain(context: Context, claim: Claim) -> Evidence:
    """The share of the best baseline's gain over frozen heads that the first study has."""
    scores = context.scores
    best = scores.best([n for n, v in VARIANTS.items() if v.adapt == "full"])
    seeds = context.seeds(claim.first, claim.second)
    if best is None:
        return Evidence(None, seeds, "no finished run of baseline2, baseline3 or baseline4")
    whole = scores.difference(best, claim.second, MEAN)
    part = scores.difference(claim.first, claim.second, MEAN)
    if whole is None or part is None:
        return Evidence(None, seeds, NO_LABELS)
    drawn = {study: scores.resampled[study][MEAN] for study in (claim.first, best, claim.second)}
    start = drawn[claim.second]
    gained = drawn[best] - start
    if gained.min() <= 0:  # a share of it would have no meaning in every resample
        return Evidence(None, seeds, f"{best} gains nothing certain over {claim.second}")
    shares = (drawn[claim.first] - start) / gained
    found = statistics.interval(part.value / whole.value, shares).scaled(100)
    return Evidence(found, seeds, f"paired bootstrap; the best baseline on dev is {best}")


def _parameters(context: Context, claim: Claim) -> Evidence:
    first, second = (
        context.collection.studies[study][0].result["parameters"]["incremental"]
        for study in (claim.first, claim.second)
    )
    share = 100 * first / second
    note = f"exact: {first:,} of {second:,} incremental parameters"
    return Evidence(Interval(share, share, share), context.seeds(claim.first, claim.second), note)


def _step_time(context: Context, claim: Claim) -> Evidence:
    first, second = context.times[claim.first], context.times[claim.second]
    seeds = context.seeds(claim.first, claim.second)
    if first.source != second.source:
        return Evidence(None, seeds, "the two were not timed in the same way")
    return Evidence(_change(times.ratio(first.step, second.step)), seeds, first.source)


def _time_to_best(context: Context, claim: Claim) -> Evidence:
    seeds = context.seeds(claim.first, claim.second)
    ranges = []
    for study in (claim.first, claim.second):
        seconds = [times.to_best(run) for run in context.collection.studies[study]]
        ranges.append(Interval(sum(seconds) / len(seconds), min(seconds), max(seconds)))
    change = _change(times.ratio(*ranges))
    if seeds < 2:
        return Evidence(
            None, seeds, f"{change.value:+.0f} % with one seed, whose spread is unknown"
        )
    return Evidence(change, seeds, "lowest to highest of the seeds")


def _change(ratio: Interval) -> Interval:
    """A ratio as a change in percent."""
    return Interval(*(100 * (x - 1) for x in (ratio.value, ratio.low, ratio.high)))


MEASURES: dict[str, Callable[[Context, Claim], Evidence]] = {
    "gain": _gain,
    "parameters": _parameters,
    "step": _step_time,
    "best": _time_to_best,
}


def paper_score(name: str, score: str) -> float:
    """A variant's score in the paper, in percent; its mean recomputed from its row."""
    row = VARIANTS[name].paper
    return row.mean_recomputed if score == MEAN else float(getattr(row, score))


def paper_gain(name: str, printed: bool = False) -> float:
    """The share of the best baseline's gain that a variant has in the paper's Table 2, in percent.

    Args:
      name: of the variant.
      printed: use the printed means instead of those that follow from the rows.

    >>> round(paper_gain("lora2"), 1)
    99.9
    """
    field = "mean" if printed else "mean_recomputed"
    means = {n: getattr(v.paper, field) for n, v in VARIANTS.items()}
    best = max(means[n] for n, v in VARIANTS.items() if v.adapt == "full")
    return 100 * (means[name] - means["baseline1"]) / (best - means["baseline1"])


def _paper_difference(first: str, second: str, score: str) -> float:
    return round(paper_score(first, score) - paper_score(second, score), 2)


def _cosine(first: str, second: str) -> Claim:
    text = "the cosine loss gives a higher r on STS-B than squared error"
    return Claim("a", text, first, second, "sts", HIGHER, _paper_difference(first, second, "sts"))


def _shared(first: str, second: str, task: str) -> Claim:
    """What the paper saw decides the direction; less than `MARGIN` counts as no change."""
    paper = _paper_difference(first, second, task)
    region, says = (
        (SAME, "hardly changes")
        if abs(paper) < MARGIN
        else (HIGHER, "raises")
        if paper > 0
        else (LOWER, "lowers")
    )
    return Claim("b", f"sharing {says} {TITLES[task]}", first, second, task, region, paper)


def _keeps_up(first: str, second: str) -> Claim:
    text = "LoRA's mean is at most a point below full fine-tuning's"
    paper = _paper_difference(first, second, MEAN)
    return Claim("c", text, first, second, MEAN, NOT_LOWER, paper)


def _small(first: str, second: str) -> Claim:
    text = "LoRA adds at most a twentieth of the parameters"
    paper = 100 * VARIANTS[first].paper.incremental / VARIANTS[second].paper.incremental
    return Claim("c", text, first, second, "parameters", (0.0, 5.0), round(paper, 1))


PAPER_SHARE = 98.0  # of the gain, as the paper's text says
PAPER_SPEED = -10.0  # change of training time by LoRA, in percent, on its A10G
_LOSSES = (("baseline3", "baseline2"), ("lora2", "lora1"), ("lora4", "lora3"))
_SHARING = (("baseline3", "baseline4"), ("lora3", "lora1"), ("lora4", "lora2"))
_LORA_OR_FULL = (("lora2", "baseline4"), ("lora3", "baseline2"), ("lora4", "baseline3"))

CLAIMS: tuple[Claim, ...] = (
    *(_cosine(*pair) for pair in _LOSSES),
    *(_shared(*pair, task) for pair in _SHARING for task in NAMES),
    *(_keeps_up(*pair) for pair in _LORA_OR_FULL),
    Claim(
        "c", "LoRA keeps 98 % or more of the best baseline's gain over frozen heads",
        "lora2", "baseline1", "gain", (PAPER_SHARE, INFINITY), round(paper_gain("lora2"), 1),
    ),
    *(_small(*pair) for pair in _LORA_OR_FULL),
    *(
        Claim("d", "PCGrad gives a higher mean than summed gradients", name, f"{name}-summed",
              MEAN, HIGHER)
        for name in ("baseline3", "lora3", "lora4")
    ),
    *(
        Claim("e", "a LoRA step takes less time than a full one", *pair, "step", LOWER, PAPER_SPEED)
        for pair in _LORA_OR_FULL
    ),
    *(
        Claim("e", "LoRA reaches its best dev score in less time", *pair, "best", LOWER)
        for pair in _LORA_OR_FULL
    ),
)  # fmt: skip
