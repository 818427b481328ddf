"""The report's tables as plain rows; `page` and `results` format them."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.report import claims, statistics
from experiments.report.claims import Context, Finding
from experiments.report.collect import WHOLE, Run
from experiments.report.scores import MEAN, SCORES, TITLES
from experiments.report.statistics import Interval, Range, Summary
from experiments.report.times import OWN
from jaxlora.formats.huggingface import MINILM
from jaxlora.tasks.sharing import VARIANTS, Groups
from jaxlora.tasks.task import NAMES, paper_tasks
from jaxlora.training import parameter_count
from jaxlora.utils.files import csv_writer, write_text

Value = Summary | Interval | str | float | int | None
MILLION = 1e6
TASK_COUNTS = (3, 10, 100)
PCGRAD_NORMS = (
    "The PCGrad implementation that the paper used takes each task's gradient with its head's, "
    "whose dot product with another task's is zero, but which makes up nearly all of the norm: a "
    "shared adapter is 1 to 2 % of the squared norm there, so what is projected away shrinks to "
    "that part and a shared adapter is hardly touched. Here the norms are of the shared parameters "
    "alone, as in Yu et al. (2020). That PCGrad beats summed gradients is our question, not the "
    "paper's claim."
)
ENCODING = (
    "The times of baseline1 leave out that it first encodes each training set once, with the base "
    "as it is."
)


@dataclasses.dataclass(frozen=True)
class Column:
    """A column: its name in CSV, its heading, and the decimals of its numbers."""

    name: str
    title: str
    digits: int = 2


@dataclasses.dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
      name: name of its CSV file.
      title: heading of the table.
      about: text that explains the table.
      columns: the columns.
      rows: a value for each column, None if nothing was measured.
    """

    name: str
    title: str
    about: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]


def show(value: Value, digits: int = 2) -> str:
    """Format a value for display.

    >>> show(Summary(50.0, 0.25, 3)), show(Summary(50.0, None, 1)), show(None)
    ('50.00 ± 0.25', '50.00', '–')
    >>> show(Interval(1.0, -0.5, 2.5), 1), show(Range(3.0, 2.0, 4.0), 0), show(1776)
    ('+1.0 (−0.5 to +2.5)', '3 (2–4)', '1,776')
    """
    if isinstance(value, Summary):
        spread = "" if value.deviation is None else f" ± {value.deviation:,.{digits}f}"
        return f"{value.mean:,.{digits}f}{spread}"
    if isinstance(value, Interval):
        return _show_interval(value, digits)
    if isinstance(value, float):
        return f"{value:,.{digits}f}".replace("-", "−")
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else value


def _show_interval(found: Interval, digits: int) -> str:
    """Format an interval: signed unless it is a `Range`; one number if it has no width."""
    plain = isinstance(found, Range)
    middle, low, high = (
        f"{x:,.{digits}f}" if plain else signed(x, digits) for x in dataclasses.astuple(found)
    )
    if found.low == found.high:
        return middle
    return f"{middle} ({low}–{high})" if plain else f"{middle} ({low} to {high})"


def signed(value: float, digits: int = 2) -> str:
    """Format a number with its sign, using a minus sign instead of a hyphen.

    >>> signed(-1.5), signed(0.0), signed(-0.001)
    ('−1.50', '+0.00', '+0.00')
    """
    return f"{value:+z,.{digits}f}".replace("-", "−")


def to_csv(table: Table) -> str:
    """Format a table as CSV; deviations and ends of intervals get separate columns."""
    ends = [_ends(row[n] for row in table.rows) for n in range(len(table.columns))]
    text = io.StringIO()
    writer = csv_writer(text)
    writer.writerow(
        c.name + end for c, named in zip(table.columns, ends, strict=True) for end in named
    )
    for row in table.rows:
        cells = zip(row, ends, strict=True)
        writer.writerow(part for value, named in cells for part in _parts(value, len(named)))
    return text.getvalue()


def write_csv(tables: Sequence[Table], folder: Path) -> None:
    """Write one CSV file per table."""
    for table in tables:
        write_text(folder / f"{table.name}.csv", to_csv(table))


def _ends(values: Any) -> tuple[str, ...]:
    """Return the suffixes of a column's CSV columns, by the type of its values."""
    for value in values:
        if isinstance(value, Summary):
            return ("", "_deviation", "_seeds")
        if isinstance(value, Interval):
            return ("", "_low", "_high")
    return ("",)


def _parts(value: Value, count: int) -> tuple[Any, ...]:
    if isinstance(value, Summary | Interval):
        return dataclasses.astuple(value)
    return (value, *[None] * (count - 1))


STATE = Column("runs", "runs")


def make(context: Context, findings: Sequence[Finding]) -> list[Table]:
    """Build all tables; leave out those without rows."""
    every = [
        verdicts(context, findings), variants(context), scores(context), parameters(context),
        training_time(context), storage_table(context), extras(context), calibrations(context),
    ]  # fmt: skip
    return [table for table in every if table.rows]


def verdicts(context: Context, findings: Sequence[Finding]) -> Table:
    """Build the table of claims with their numbers."""
    columns = (
        Column("claim", ""), Column("text", "claim or question"), Column("source", "whose"),
        Column("first", "study"), Column("second", "against"), Column("verdict", "verdict"),
        Column("measured", "measured (interval)"), Column("unit", "unit"),
        Column("over_seeds", "sd over seeds"),
        Column("paper", "paper"), Column("seeds", "seeds", 0), Column("note", "from"), STATE,
    )  # fmt: skip
    rows = tuple(
        (
            f.claim.part, f.claim.text, f.claim.source, f.claim.first, f.claim.second, f.verdict,
            f.evidence.interval, f.claim.unit, f.evidence.deviation, f.claim.paper,
            f.evidence.seeds, f.note, _states(context, f.claim.first, f.claim.second),
        )
        for f in findings
    )  # fmt: skip
    about = (
        "Study minus other study in points of the score (percent of accuracy, r × 100), or as a "
        "share or change in percent. Reproduced: the interval is where the claim says; not "
        "reproduced: none of it is; otherwise the runs cannot decide (for a question of ours, "
        "reproduced means yes). Intervals of scores are 95 % ones, and say what other seeds and "
        "other dev examples might have given; with one seed they are over dev examples alone. "
        "What seeds can change gets no verdict with one seed, and is called reproduced with three "
        "or more only; runs that were capped, failed or left steps out give no verdict. "
        "Intervals of times are as wide as the two ranges allow: of a step, the lowest "
        "to the highest round in timing.json, or the middle 90 % of the logged windows in "
        f"{OWN}; of the best dev score, the lowest to the highest seed."
    )
    return Table("claims", "Claims and verdicts", about, columns, rows)


def _states(context: Context, *studies: str) -> str:
    """List the studies whose state is not `WHOLE`, with their states; `WHOLE` if there are none."""
    found = {study: context.collection.state(study) for study in studies}
    return "; ".join(f"{study}: {said}" for study, said in found.items() if said != WHOLE) or WHOLE


def variants(context: Context) -> Table:
    """Build table 1: how each variant adapts BERT, with our and the paper's learning rates."""
    columns = (
        Column("variant", "variant"), Column("bert", "BERT"),
        Column("together", "trained together"), Column("surgery", "gradients"),
        Column("sts_loss", "STS loss"), Column("rate", "learning rate"),
        Column("paper_rate", "paper's"), Column("seeds", "seeds", 0), STATE,
    )  # fmt: skip
    rows = []
    for name, variant in VARIANTS.items():
        runs = context.collection.variants.get(name, ())
        settings = runs[0].settings if runs else {}
        rate = settings.get("head_learning_rate" if variant.adapt == "frozen" else "learning_rate")
        rows.append((
            name,
            {"frozen": "frozen", "full": "trained", "lora": "frozen + LoRA"}[variant.adapt],
            "–" if variant.adapt == "frozen" else _sharing(variant.groups),
            "PCGrad" if max(map(len, variant.groups)) > 1 else "–",
            {"mse": "squared error", "cosine": "cosine"}[variant.sts_loss],
            None if rate is None else f"{rate:g}",
            f"{variant.learning_rate:g}",
            len(runs),
            context.collection.state(name),
        ))  # fmt: skip
    about = "What each variant trains, and the learning rate of these runs beside the paper's."
    return Table("table1", "Table 1: the variants", about, columns, tuple(rows))


def _sharing(groups: Groups) -> str:
    return " | ".join(", ".join(group) for group in groups)


def scores(context: Context) -> Table:
    """Build table 2: dev scores in percent, next to the paper's unless the data is synthetic."""
    beside = not context.collection.made_up
    columns = (
        Column("variant", "variant"),
        *(Column(f"{name}", context.titles[name]) for name in SCORES),
        *(_PAPER_SCORES if beside else ()),
        STATE,
    )
    rows = []
    for name, variant in VARIANTS.items():
        paper = variant.paper
        ours = [
            context.scores.summary(name, score).scaled(100) if name in context.scores else None
            for score in SCORES
        ]
        theirs = (paper.sst, paper.para, paper.sts, paper.mean, paper.mean_recomputed)
        rows.append((name, *ours, *(theirs if beside else ()), context.collection.state(name)))
    titles = context.titles
    small = any(run.settings["base"] == MINILM for run in context.collection.runs)
    about = (
        f"Accuracy on {titles['sst']} and {titles['para']} and Pearson's r × 100 on "
        f"{titles['sts']}, all on dev: mean ± standard deviation over seeds. "
        f"{context.data_note or ''} {_OTHER_BASE if beside and small else ''}"
    )
    return Table("table2", "Table 2: dev scores", " ".join(about.split()), columns, tuple(rows))


_PAPER_SCORES = (
    *(Column(f"paper_{name}", f"paper: {TITLES[name]}") for name in NAMES),
    Column("paper_mean_printed", "paper: mean as printed"),
    Column("paper_mean_recomputed", "paper: mean recomputed"),
)
_OTHER_BASE = (
    "The paper used bert-base, five times as large as MiniLM, and its own splits, so compare "
    "orders and differences rather than values."
)


def parameters(context: Context) -> Table:
    """Build table 3: stored parameters of the runs, of bert-base, and in the paper."""
    columns = (
        Column("variant", "variant"),
        Column("incremental", "incremental, M"), Column("bundled", "bundled, M"),
        Column("base_incremental", "bert-base: incremental, M"),
        Column("base_bundled", "bert-base: bundled, M"),
        Column("paper_incremental", "paper: incremental, M"),
        Column("paper_bundled_printed", "paper: bundled as printed, M"),
        Column("paper_bundled_recomputed", "paper: bundled recomputed, M"), STATE,
    )  # fmt: skip
    rows = []
    for name, variant in VARIANTS.items():
        runs = context.collection.variants.get(name, ())
        stored = runs[0].result["parameters"] if runs else {}
        ours = [stored[k] / MILLION if runs else None for k in ("incremental", "bundled")]
        exact = parameter_count.of_variant(variant)
        paper = variant.paper
        rows.append((
            name, *ours, exact.incremental / MILLION, exact.bundled / MILLION,
            paper.incremental, paper.bundled, paper.bundled_recomputed,
            context.collection.state(name),
        ))  # fmt: skip
    about = (
        "Incremental: what a disk that holds the base must add; bundled: all that is needed to "
        "answer all three tasks. The middle columns are bert-base with the paper's heads, counted "
        "from shapes: they lack the STS head that the cosine loss does not use, and the paper "
        "rounds BERT up to 110M."
    )
    return Table("table3", "Table 3: stored parameters", about, columns, tuple(rows))


def training_time(context: Context) -> Table:
    """Build figure 1 as a table."""
    columns = (
        Column("study", "study"), Column("ms_per_step", "ms per step (range)", 1),
        Column("steps", "steps"), Column("seconds", "training, s", 0),
        Column("best_seconds", "to the best dev score, s", 0), Column("source", "steps timed by"),
        STATE,
    )  # fmt: skip
    rows = tuple(
        (study, t.step, t.steps, t.total, t.best, t.source, context.collection.state(study))
        for study, t in context.times.items()
    )
    about = (
        "A step takes one batch of every task of a group. Groups that train whole encoders take "
        "turns; groups that train adapters or heads share each step, of which there are as many as "
        f"the longest group has. {ENCODING} The paper found LoRA about 10 % faster than full "
        "fine-tuning on an A10G."
    )
    return Table("time", "Training time", about, columns, rows)


@dataclasses.dataclass(frozen=True)
class Stored:
    """The storage of a study, in parameters or in bytes.

    Attributes:
      base: the pretrained encoder.
      tree: one trainable tree of the encoder; 0 if there is none.
      head: a task's head, on average.
      apart: whether each further task adds its own tree.
      full: whether the trees replace the base.
    """

    base: float
    tree: float
    head: float
    apart: bool
    full: bool

    def incremental(self, tasks: int) -> float:
        """Return the storage for some tasks, without the base."""
        return self.tree * (tasks if self.apart else 1) + self.head * tasks

    def bundled(self, tasks: int) -> float:
        """Return the storage for some tasks, including the base if it is still used."""
        return self.incremental(tasks) + (0 if self.full else self.base)

    def scaled(self, factor: float) -> Stored:
        """Convert to another unit; the base is float32, 4 bytes per parameter, for any factor."""
        return Stored(
            4.0 * self.base, self.tree * factor, self.head * factor, self.apart, self.full
        )


def stored(run: Run) -> Stored:
    """Compute the storage of a run in parameters."""
    count, groups = run.result["parameters"], run.settings["groups"]
    tasks = sum(map(len, groups))
    return Stored(
        base=count["base"],
        tree=count["encoder"] / len(groups),
        head=count["heads"] / tasks,
        apart=len(groups) == tasks,
        full=run.settings["adapt"] == "full",
    )


def storage_table(context: Context) -> Table:
    """Build the table of parameters and bytes for 3, 10 and 100 tasks."""
    kinds = {"incremental": "added", "bundled": "in all"}
    units = {"m": "M parameters", "mb": "MB"}
    columns = [
        Column(f"{kind}_{unit}_{tasks}", f"{tasks} tasks: {kinds[kind]}, {units[unit]}", 1)
        for unit in units
        for kind in kinds
        for tasks in TASK_COUNTS
    ]
    rows = []
    for name, runs in context.collection.variants.items():
        numbers = stored(runs[0])
        on_disk = numbers.scaled(runs[0].disk_bytes / numbers.incremental(3))
        rows.append((
            name,
            *(
                getattr(sizes, kind)(tasks) / MILLION
                for sizes in (numbers, on_disk)
                for kind in kinds
                for tasks in TASK_COUNTS
            ),
            context.collection.state(name),
        ))  # fmt: skip
    about = (
        "Added: what a disk that holds the base must add (incremental); in all: with the base "
        "where it is still used (bundled). Three tasks are measured: the files of the run's model, "
        "and the base in float32. Ten and a hundred are extrapolated: a head of average size for "
        "each task, and a tree of its own where tasks have one each; tasks that share a tree still "
        "share it. Trained models are compressed on disk, the base is not."
    )
    title = "Storage for 3, 10 and 100 tasks"
    named = (Column("variant", "variant"), *columns, STATE)
    return Table("storage", title, about, named, tuple(rows))


def extras(context: Context) -> Table:
    """Build the table of extra studies, next to the variants they are based on."""
    columns = (
        Column("study", "study"), Column("variant", "based on"),
        Column("differs", "differs in"),
        *(Column(name, context.titles[name]) for name in SCORES),
        Column("change", "mean against its variant (95 % interval)"),
        Column("incremental", "incremental, M"), Column("seconds", "training, s", 0),
        STATE,
    )  # fmt: skip
    rows = []
    for name, runs in context.collection.extras.items():
        variant = runs[0].settings["variant"]
        change = (
            context.scores.difference(name, variant, MEAN) if variant in context.scores else None
        )
        rows.append((
            name, variant, differs(runs[0], context.collection.variants.get(variant, ())),
            *(context.scores.summary(name, score).scaled(100) for score in SCORES),
            change.scaled(100) if change else None,
            runs[0].result["parameters"]["incremental"] / MILLION,
            context.times[name].total,
            _states(context, name, variant),
        ))  # fmt: skip
    about = (
        "Named studies beyond the paper's eight; scores in percent on dev, changes in points. "
        f"{context.data_note}"
    ).strip()
    return Table("extras", "Beyond the paper", about, columns, tuple(rows))


_NOT_SHOWN = {"seed", "data_dir", "variant"}


def differs(run: Run, base: Sequence[Run]) -> str:
    """List the settings in which a run differs from its variant, as flags.

    Without a run of the variant, groups and rank are listed instead.
    """
    if not base:
        return f"groups {_sharing(run.settings['groups'])}; rank {run.settings['rank']}"
    before, after = (_flat(settings) for settings in (base[0].settings, run.settings))
    changed = [
        f"{name.replace('_', ' ')} {_flag(name, value)}"
        for name, value in after.items()
        if name not in _NOT_SHOWN and value != before.get(name)
    ]
    return ", ".join(changed) or "nothing"


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with those of each task as `task field`."""
    flat = {name: value for name, value in settings.items() if name != "tasks"}
    for task in settings.get("tasks", ()):
        fields = {**task, **task["task"]}
        name = fields.pop("name")
        flat |= {f"{name} {field}": fields[field] for field in fields if field != "task"}
    return flat


def _flag(name: str, value: Any) -> str:
    if name == "groups":
        return _sharing(value)
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def calibrations(context: Context) -> Table:
    """Build the table of expected calibration errors."""
    named = [task.name for task in paper_tasks() if task.classes]
    columns = (
        Column("study", "study"),
        *(Column(f"{name}_ece", f"{context.titles[name]}: ECE, %") for name in named),
        STATE,
    )
    rows = []
    for study, runs in context.collection.studies.items():
        found = [_calibration_error(runs, name) for name in named]
        if any(error is not None for error in found):
            rows.append((study, *found, context.collection.state(study)))
    about = (
        "Expected calibration error on dev in percent, ten bins: how far the confidence in an "
        "answer is from how often such answers are right. Lower is better."
    )
    return Table("calibration", "Calibration", about, columns, tuple(rows))


def _calibration_error(runs: Sequence[Run], task: str) -> Summary | None:
    answers = [run.answers[task] for run in runs if task in run.answers]
    errors = [
        statistics.calibration(a.confidence, a.predictions == a.labels).error
        for a in answers
        if not (a.confidence != a.confidence).any()
    ]
    return Summary.of(errors).scaled(100) if errors else None


def footnotes() -> list[str]:
    """Return a sentence for each error in the paper, with printed and recomputed values."""
    notes = [
        f"The paper prints {name}'s {what} as {printed:.2f}{unit}; its own row gives "
        f"{recomputed:.2f}{unit}."
        for what, unit in (("mean", ""), ("bundled", "M"))
        for name, variant in VARIANTS.items()
        if (printed := getattr(variant.paper, what))
        != (recomputed := getattr(variant.paper, f"{what}_recomputed"))
    ]
    means = {name: v.paper.mean for name, v in VARIANTS.items()}
    share = 100 * means["lora2"] / max(means.values())
    apart, shared = (
        " and ".join(signed(claims.paper_difference(*pair, "para")) for pair in pairs)
        for pairs in (claims.SHARING[1:], claims.SHARING[:1])
    )
    return [
        *notes,
        f"The paper's text says that sharing helps paraphrase; by its own Table 2 sharing an "
        f"adapter changes Quora by {apart} points (lora3 against lora1, lora4 against lora2); only "
        f"sharing a whole BERT changes it by {shared} (baseline3 against baseline4).",
        f"The paper's 4.5 % of the parameters is lora2's increment over baseline3's "
        f"({claims.paper_share('lora2', 'baseline3'):.2f} %). Of baseline4, which like lora2 has "
        f"an encoder for each task, it is {claims.paper_share('lora2', 'baseline4'):.1f} %.",
        f"The paper says that LoRA keeps 98 % of the performance gain: that is lora2's printed "
        f"mean over baseline3's ({share:.1f} %), not a gain. From the rows, lora2 has "
        f"{claims.paper_gain('lora2'):.1f} % of the best baseline's gain over baseline1 (with the "
        f"printed means {claims.paper_gain('lora2', printed=True):.1f} %).",
        PCGRAD_NORMS,
        "The paper counts an STS head also where the cosine loss does not use one; jaxlora stores "
        "none there.",
    ]
