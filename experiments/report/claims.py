"""The paper's claims as data, and the verdict of our runs on each.

A claim is a quantity and the region in which the claim holds. The verdict compares that region with
the interval of the quantity. If the interval is inside, the claim is reproduced; if it is outside,
it is not reproduced; otherwise it is not decidable. It is also not decidable with too few seeds, if
a run was capped, failed or skipped steps, or if the data is synthetic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

from experiments.report import statistics, times
from experiments.report.collect import Collection
from experiments.report.scores import MADE_UP, MEAN, TITLES, Scores
from experiments.report.statistics import Interval
from experiments.studies import AGGREGATORS, TOGETHER
from jaxlora.cli.console import MADE_UP_DATA, SAW_QUORA, saw_quora
from jaxlora.tasks.sharing import VARIANTS
from jaxlora.tasks.task import MADE_UP as BUILT_IN
from jaxlora.tasks.task import NAMES
from jaxlora.training import parameter_count

Verdict = Literal["reproduced", "not reproduced", "not decidable", "not run"]
Source = Literal["the paper", "its Table 2", "our question"]
Region = tuple[float, float]
INFINITY = float("inf")
HIGHER: Region = (0.0, INFINITY)
LOWER: Region = (-INFINITY, 0.0)
MARGIN = 1.0  # points within which two scores count as equal
SAME: Region = (-MARGIN, MARGIN)
NOT_LOWER: Region = (-MARGIN, INFINITY)
FEWEST = {"reproduced": 3, "not reproduced": 2}  # seeds that a verdict needs

NO_LABELS = "the dev predictions have no labels: train these runs again"
PARTS = {
    "a": "Cosine loss for similarity",
    "b": "Sharing parameters between tasks",
    "c": "LoRA against full fine-tuning",
    "d": "Gradient aggregators against summed gradients",
    "e": "Training time",
}


@dataclasses.dataclass(frozen=True)
class Claim:
    """One comparison of two studies.

    Attributes:
      part: letter of its part, see `PARTS`.
      text: the statement.
      first, second: the studies.
      measure: the quantity, see `MEASURES`.
      region: values of the quantity for which the claim holds; points for scores, else percent.
      paper: the quantity according to the paper; None if the paper has no figure.
      source: whether the paper states it, its Table 2 shows it, or it is our question.
    """

    part: str
    text: str
    first: str
    second: str
    measure: str
    region: Region
    paper: float | None = None
    source: Source = "the paper"

    @property
    def unit(self) -> str:
        """Unit of the quantity."""
        return "points" if self.measure in TITLES else "%"

    @property
    def change(self) -> bool:
        """Whether the quantity is a change rather than a share."""
        return self.measure not in ("gain", "parameters")

    @property
    def by_seeds(self) -> bool:
        """Whether the quantity depends on the seed."""
        return self.measure not in ("parameters", "step")


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The measurement of a claim's quantity.

    Attributes:
      interval: interval of the quantity; None if it cannot be measured.
      seeds: smallest number of seeds of the studies involved.
      note: source of the interval, or the reason why there is none.
      deviation: standard deviation of the quantity over seeds; None for fewer than two.
      third: a further study on which the quantity depends.
    """

    interval: Interval | None
    seeds: int
    note: str
    deviation: float | None = None
    third: str | None = None


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim, its evidence and the verdict.

    Attributes:
      claim, evidence: the claim and its measurement.
      run: whether both studies have a finished run.
      objection: reason why these runs are no evidence; empty if there is none.
    """

    claim: Claim
    evidence: Evidence
    run: bool = True
    objection: str = ""

    @property
    def verdict(self) -> Verdict:
        """The verdict of `judge`, unless these runs cannot have one."""
        if not self.run:
            return "not run"
        return "not decidable" if self.objection or self._lacks_seeds else self._judged

    @property
    def note(self) -> str:
        """The source of the quantity, and the reasons against a verdict."""
        return "; ".join(s for s in (self.objection, self._lacks_seeds, self.evidence.note) if s)

    @property
    def _judged(self) -> Verdict:
        return judge(self.claim.region, self.evidence.interval)

    @property
    def _lacks_seeds(self) -> str:
        seeds = self.evidence.seeds
        if not self.run or not self.claim.by_seeds or seeds >= FEWEST["reproduced"]:
            return ""
        if seeds < FEWEST["not reproduced"]:
            return "one seed"
        return "two seeds, and “reproduced” needs three" if self._judged == "reproduced" else ""


@dataclasses.dataclass(frozen=True)
class Context:
    """The data on which claims are measured."""

    collection: Collection
    scores: Scores
    times: Mapping[str, times.Time]

    @property
    def data_note(self) -> str:
        """A caveat for all scores of this data; empty if there is none."""
        if self.collection.made_up:
            return MADE_UP_DATA
        bases = {run.settings["base"] for run in self.collection.runs}
        return SAW_QUORA if any(map(saw_quora, bases)) else ""

    @property
    def titles(self) -> Mapping[str, str]:
        """Score → its title."""
        return MADE_UP if self.collection.made_up else TITLES

    def seeds(self, *studies: str) -> int:
        """Return the smallest number of seeds of some studies."""
        return min(len(self.collection.studies[study]) for study in studies)


def judge(region: Region, interval: Interval | None) -> Verdict:
    """Compare an interval with the region in which a claim holds.

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
    """Judge all claims about the paper's variants and about other requested studies."""
    collection = context.collection
    asked = {*VARIANTS, *collection.studies, *(run.study for run in collection.missing)}
    found = [claim for claim in CLAIMS if claim.first in asked]
    return [_examine(context, _renamed(one) if collection.made_up else one) for one in found]


def _examine(context: Context, claim: Claim) -> Finding:
    missing = [s for s in (claim.first, claim.second) if s not in context.scores]
    if missing:
        evidence = Evidence(None, 0, f"no finished run of {' and '.join(missing)}")
        return Finding(claim, evidence, run=False)
    evidence = MEASURES.get(claim.measure, _difference)(context, claim)
    return Finding(claim, evidence, objection=_objection(context.collection, claim, evidence))


def _objection(collection: Collection, claim: Claim, evidence: Evidence) -> str:
    studies = dict.fromkeys(s for s in (claim.first, claim.second, evidence.third) if s)
    said = [f"{study}: {why}" for study in studies if (why := collection.faults(study))]
    if collection.made_up and claim.by_seeds:
        said.insert(0, BUILT_IN)
    return "; ".join(said)


def _renamed(claim: Claim) -> Claim:
    """Use the titles of made-up data in a claim, and drop the paper's figure."""
    text = claim.text
    for name in NAMES:
        text = text.replace(TITLES[name], MADE_UP[name])
    paper = claim.paper if claim.measure == "parameters" else None
    return dataclasses.replace(claim, text=text, paper=paper)


def _difference(context: Context, claim: Claim) -> Evidence:
    pair = (claim.first, claim.second, claim.measure)
    seeds = context.seeds(*pair[:2])
    found = context.scores.difference(*pair)
    if found is None:
        return Evidence(None, seeds, NO_LABELS)
    over_seeds = context.scores.difference_over_seeds(*pair)
    deviation = over_seeds.scaled(100).deviation if over_seeds else None
    return Evidence(found.scaled(100), seeds, _drawn_over(seeds), deviation)


def _drawn_over(seeds: int) -> str:
    """Describe what the interval of a score covers."""
    return f"paired bootstrap of {'seeds and ' if seeds > 1 else ''}dev examples"


def _gain(context: Context, claim: Claim) -> Evidence:
    """Measure the first study's share of the best baseline's gain over frozen heads."""
    scores = context.scores
    best = scores.best([n for n, v in VARIANTS.items() if v.adapt == "full"])
    if best is None:
        seeds = context.seeds(claim.first, claim.second)
        return Evidence(None, seeds, "no finished run of baseline2, baseline3 or baseline4")
    seeds = context.seeds(claim.first, claim.second, best)
    whole = scores.difference(best, claim.second, MEAN)
    part = scores.difference(claim.first, claim.second, MEAN)
    if whole is None or part is None:
        return Evidence(None, seeds, NO_LABELS, third=best)
    drawn = {study: scores.resampled[study][MEAN] for study in (claim.first, best, claim.second)}
    start = drawn[claim.second]
    gained = drawn[best] - start
    if min(whole.value, gained.min()) <= ROUNDING:  # a share of nothing has no meaning
        note = f"{best} gains nothing certain over {claim.second}"
        return Evidence(None, seeds, note, third=best)
    shares = (drawn[claim.first] - start) / gained
    found = statistics.interval(part.value / whole.value, shares).scaled(100)
    note = f"{_drawn_over(seeds)}; the best baseline on dev is {best}"
    return Evidence(found, seeds, note, third=best)


def _parameters(context: Context, claim: Claim) -> Evidence:
    first, second = (
        context.collection.studies[study][0].result["parameters"]["incremental"]
        for study in (claim.first, claim.second)
    )
    share = 100 * first / second
    large = 100 * _of_bert_base(claim.first) / _of_bert_base(claim.second)
    note = (
        f"exact: {first:,} of {second:,} incremental parameters; with bert-base and the paper's "
        f"heads {large:.1f} %"
    )
    return Evidence(Interval(share, share, share), context.seeds(claim.first, claim.second), note)


def _of_bert_base(name: str) -> int:
    """Count a variant's incremental parameters with bert-base, paper adapters and heads."""
    return parameter_count.of_variant(VARIANTS[name]).incremental


def _step_time(context: Context, claim: Claim) -> Evidence:
    first, second = context.times[claim.first], context.times[claim.second]
    seeds = context.seeds(claim.first, claim.second)
    if first.source != second.source:
        return Evidence(None, seeds, "the two were not timed in the same way")
    change = _change(times.ratio(first.all_steps, second.all_steps))
    if any(time.step.low == time.step.high for time in (first, second)):  # measured once
        return Evidence(None, seeds, f"{change.value:+.0f} %, whose spread is unknown")
    return Evidence(change, seeds, first.source)


def _time_to_best(context: Context, claim: Claim) -> Evidence:
    seeds = context.seeds(claim.first, claim.second)
    ranges = []
    for study in (claim.first, claim.second):
        seconds = [times.to_best(run) for run in context.collection.studies[study]]
        ranges.append(Interval(sum(seconds) / len(seconds), min(seconds), max(seconds)))
    change = _change(times.ratio(*ranges))
    if seeds < 2:
        return Evidence(None, seeds, f"{change.value:+.0f} %, whose spread over seeds is unknown")
    return Evidence(change, seeds, "lowest to highest of the seeds")


def _change(ratio: Interval) -> Interval:
    """Convert a ratio to a change in percent."""
    return Interval(*(100 * (x - 1) for x in (ratio.value, ratio.low, ratio.high)))


MEASURES: dict[str, Callable[[Context, Claim], Evidence]] = {
    "gain": _gain,
    "parameters": _parameters,
    "step": _step_time,
    "best": _time_to_best,
}


def paper_score(name: str, score: str) -> float:
    """Return a variant's score in the paper, in percent; its mean recomputed from its row."""
    row = VARIANTS[name].paper
    return row.mean_recomputed if score == MEAN else float(getattr(row, score))


def paper_gain(name: str, printed: bool = False) -> float:
    """Compute a variant's share of the best baseline's gain in the paper's Table 2, in percent.

    Args:
      name: name of the variant.
      printed: whether to use the printed means instead of recomputed ones.

    >>> round(paper_gain("lora2"), 1)
    99.9
    """
    field = "mean" if printed else "mean_recomputed"
    means = {n: getattr(v.paper, field) for n, v in VARIANTS.items()}
    best = max(means[n] for n, v in VARIANTS.items() if v.adapt == "full")
    return 100 * (means[name] - means["baseline1"]) / (best - means["baseline1"])


def paper_difference(first: str, second: str, score: str) -> float:
    """Compute first minus second in the paper's Table 2, in points."""
    return round(paper_score(first, score) - paper_score(second, score), 2)


def _cosine(first: str, second: str) -> Claim:
    text = "the cosine loss gives a higher r on STS-B than squared error"
    paper = paper_difference(first, second, "sts")
    return Claim("a", text, first, second, "sts", HIGHER, paper, "its Table 2")


def _shared(first: str, second: str, task: str) -> Claim:
    """Claim the direction that the paper measured; less than `MARGIN` counts as no change."""
    paper = paper_difference(first, second, task)
    region, says = (
        (SAME, "hardly changes")
        if abs(paper) < MARGIN
        else (HIGHER, "raises")
        if paper > 0
        else (LOWER, "lowers")
    )
    text = f"sharing {says} {TITLES[task]}"
    return Claim("b", text, first, second, task, region, paper, "its Table 2")


def _keeps_up(first: str, second: str) -> Claim:
    text = "LoRA's mean is at most a point below full fine-tuning's"
    paper = paper_difference(first, second, MEAN)
    return Claim("c", text, first, second, MEAN, NOT_LOWER, paper, "its Table 2")


def paper_share(first: str, second: str) -> float:
    """Compute the ratio of incremental parameters in the paper's Table 3, in percent.

    >>> round(paper_share("lora2", "baseline3"), 2)
    4.56
    """
    return 100 * VARIANTS[first].paper.incremental / VARIANTS[second].paper.incremental


def _small(first: str, second: str) -> Claim:
    text = "does LoRA add at most a twentieth of the parameters?"
    paper = round(paper_share(first, second), 1)
    return Claim("c", text, first, second, "parameters", SMALL, paper, "our question")


PAPER_SHARE = 98.0  # of the gain, as the paper's text says
PAPER_SIZE = 4.5  # percent of the parameters, as the paper's text says
SMALL: Region = (0.0, 5.0)
ROUNDING = 1e-9  # gains below this are zero
PAPER_SPEED = -10.0  # change of training time by LoRA, in percent, on its A10G
_LOSSES = (("baseline3", "baseline2"), ("lora2", "lora1"), ("lora4", "lora3"))
SHARING = (("baseline3", "baseline4"), ("lora3", "lora1"), ("lora4", "lora2"))
_LORA_OR_FULL = (("lora2", "baseline4"), ("lora3", "baseline2"), ("lora4", "baseline3"))

CLAIMS: tuple[Claim, ...] = (
    *(_cosine(*pair) for pair in _LOSSES),
    *(_shared(*pair, task) for pair in SHARING for task in NAMES),
    *(_keeps_up(*pair) for pair in _LORA_OR_FULL),
    Claim(
        "c", "LoRA keeps 98 % or more of the best baseline's gain over frozen heads",
        "lora2", "baseline1", "gain", (PAPER_SHARE, INFINITY), round(paper_gain("lora2"), 1),
    ),
    Claim(
        "c", "LoRA needs 4.5 % of full fine-tuning's parameters (at most a twentieth)",
        "lora2", "baseline3", "parameters", SMALL, PAPER_SIZE,
    ),
    *(_small(*pair) for pair in _LORA_OR_FULL),
    *(
        Claim("d", f"does {title} give a higher mean than summed gradients?",
              f"{name}{suffix}", f"{name}-summed", MEAN, HIGHER, source="our question")
        for title, suffix in (("PCGrad", ""), *((method, f"-{method}") for method in AGGREGATORS))
        for name in TOGETHER
    ),
    *(
        Claim("e", "LoRA's steps take less time than full ones", *pair, "step", LOWER, PAPER_SPEED)
        for pair in _LORA_OR_FULL
    ),
    *(
        Claim("e", "does LoRA reach its best dev score in less time?", *pair, "best", LOWER,
              source="our question")
        for pair in _LORA_OR_FULL
    ),
)  # fmt: skip
