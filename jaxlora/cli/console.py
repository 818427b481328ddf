"""Console output of a run: its summary, progress bars, and the final table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)  # fmt: skip
from rich.table import Table
from rich.text import Text

from jaxlora.cli.terminal import count, say
from jaxlora.data.task_files import TaskSpec
from jaxlora.formats.huggingface import MINILM
from jaxlora.tasks.sharing import VARIANTS, PaperVariant
from jaxlora.tasks.task import MADE_UP, NAMES, Task
from jaxlora.training.config import Settings
from jaxlora.training.inputs import RunSummary

UNTRAINED = (
    "untrained: the best constant answer; for pairs, the cosine of the base's vectors (a yes or "
    "no: at the best threshold)."
)

COMBINED = {"pcgrad": "PCGrad", "none": "gradients summed"}  # by the name of the surgery
REAL = ("cs224n", "official")  # sources of the paper's data sets
SAW_QUORA = (
    "The base all-MiniLM-L6-v2 was trained on pairs that include Quora duplicates, so Quora scores "
    "with it are not those of a base that never saw the task."
)
MADE_UP_DATA = (
    f"These are scores on {MADE_UP}: they show that training works, and nothing else; the paper's "
    "are of real data."
)


def saw_quora(base: str) -> bool:
    """Return whether a base, judged by its name, is all-MiniLM, which was trained on Quora pairs.

    >>> saw_quora("minilm"), saw_quora("bert-base-uncased")
    (True, False)
    """
    return base == MINILM or "all-minilm" in base.lower()


class ConsoleCallback:
    """Shows a run on the console, see `loop.Callback`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("left  {task.fields[note]}"),
            console=console,
        )
        self._start: TaskID | None = None
        self._bars: dict[str, TaskID] = {}

    @contextmanager
    def live(self) -> Iterator[None]:
        """Show the progress bars in this context."""
        with self._bar:
            yield

    def summary(self, summary: RunSummary) -> None:
        """Print the summary of the run."""
        self._console.print(summary_table(summary))
        self._start = self._bar.add_task("preparing order and packing", note="")

    def group(self, name: str, start: int, steps: int) -> None:
        """Add a bar for a group; the first step compiles."""
        if self._start is not None:
            self._bar.remove_task(self._start)
            self._start = None
        note = "compiling …"
        self._bars[name] = self._bar.add_task(name, total=steps, completed=start, note=note)

    def record(self, record: dict[str, Any]) -> None:
        """Update the bar, or print an evaluation above it."""
        if record["kind"] == "train":
            losses = " ".join(f"{v:.3f}" for v in record["loss"].values())
            note = f"{record['steps_per_second']:.2f} steps/s  loss {losses}"
            self._bar.update(self._bars[record["group"]], completed=record["step"], note=note)
            return
        scores = "  ".join(f"{k} {v:.4f}" for k, v in record["dev"].items())
        values = list(record["dev"].values())
        # With a metric that is an error, the score is not the mean of the metrics.
        alike = len(values) > 1 and math.isclose(record["score"], sum(values) / len(values))
        mean = f"  mean {record['score']:.4f}" if alike else ""
        self._console.print(f"{record['group']} step {record['step']}: dev {scores}{mean}")

    def done(self, name: str, why: str) -> None:
        """Mark the bar of the group as finished, and print why the group ended."""
        bar = self._bars[name]
        self._bar.update(bar, description=f"✓ {name}", note="")
        self._bar.stop_task(bar)
        self._console.print(Text(f"{name} ended: {why}"))

    def note(self, text: str) -> None:
        """Print a message above the bars."""
        say(text, self._console)


def summary_table(summary: RunSummary) -> Table:
    """Return the summary as a table of names and values."""
    s = summary.settings
    title = f"jaxlora: {s.variant}, preset {s.preset}"
    table = Table(title=title, show_header=False, title_justify="left")
    trained = s.adaptation.trains_encoder
    rates = "" if not trained else f"encoder {s.optimizer.learning_rate:g}, "
    rows = {
        "base": summary.base,
        "encoder": s.adaptation.describe(),
        **({"starts from": s.model.start_from} if s.model.start_from else {}),
        "sharing": " | ".join(",".join(group) for group in s.groups)
        + (
            f"  ({COMBINED.get(s.optimizer.surgery, s.optimizer.surgery)} within a group)"
            if trained and any(len(g) > 1 for g in s.groups)
            else ""
        ),
        "dropout": "heads 0.1" + ("" if not trained else f", encoder {s.model.encoder_dropout:g}"),
        "vectors": f"{s.model.pooling} pooling; pairs: {s.model.pair_features}" + _joint(s),
        "losses": ", ".join(f"{d.task.name}: {_loss(d)}" for d in s.tasks),
        "learning rates": f"{rates}heads {s.optimizer.head_learning_rate:g} "
        f"({_warmup(s.optimizer.warmup_steps)} warm-up, then {s.optimizer.schedule})",
        **{
            f"data {t}": "\n".join([_counts(summary, t), *_of_table(summary, t), *summary.notes[t]])
            for t in summary.examples
        },
        "parameters": f"{summary.storage.incremental:,} trained and stored "
        f"(encoder {summary.storage.encoder:,}, heads {summary.storage.heads:,}); "
        f"base {summary.storage.base:,}",
        "steps": ", ".join(f"{g}: {n:,}" for g, n in summary.steps.items())
        + f" (batch {s.loop.batch_size} of each task)",
        "device": summary.device,
        "out": str(summary.out),
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))  # a str would be parsed as markup, such as [v2] in a path
    return table


def _warmup(steps: float) -> str:
    return f"{steps:.0%} of the steps" if 0 < steps < 1 else f"{steps:g} steps"


def _labels(task: Task) -> str:
    """Describe what a task predicts; for a binary task with its positive class."""
    if task.form == "score":
        return f"scores from {task.low:g} to {task.high:g}"
    if task.positive is not None:
        return f"{task.classes[0]} or {task.positive} (the positive class)"
    shown = ", ".join(task.classes[:12]) + (", …" if len(task.classes) > 12 else "")
    return f"{'any' if task.form == 'classes' else 'one'} of {len(task.classes)} classes: {shown}"


def _joint(settings: Settings) -> str:
    """List the tasks that read pairs jointly."""
    names = [name for name, task in settings.named.items() if task.joint]
    return f"; read together: {', '.join(names)}" if names else ""


def _loss(description: TaskSpec) -> str:
    weight = "" if description.weight == 1 else f" × {description.weight:g}"
    return description.task.loss.replace("_", " ") + weight


def _counts(summary: RunSummary, task: str) -> str:
    counts = ", ".join(f"{split} {n:,}" for split, n in summary.examples[task].items())
    cut = summary.truncated[task]
    most = summary.settings.model.max_length
    note = f"; {count(cut, 'sentence')} truncated to {most} tokens" if cut else ""
    left_out = summary.unlabelled[task]
    note += f"; {left_out} without a label left out" if left_out else ""
    extra = (
        " (with the demo grammar's pairs)"
        if summary.settings.data.synthetic_sts and task == "sts"
        else ""
    )
    source = MADE_UP if summary.settings.data.source == "demo" else summary.settings.data.source
    return f"{source}: {counts}{extra}{note}"


def _of_table(summary: RunSummary, task: str) -> list[str]:
    """Describe what one of the user's own tasks predicts, and where its dev set comes from."""
    table = next(spec.table for spec in summary.settings.tasks if spec.task.name == task)
    if table is None:
        return []
    lines = [_labels(summary.settings.named[task])]
    if isinstance(table.dev, float):
        lines.append(f"dev: {table.dev:.0%} of the training rows, held out")
    return lines


def result_table(result: dict[str, Any]) -> Table:
    """Return a table of a run's scores, with those of the paper if they are comparable."""
    stored, named = result["parameters"], result["metrics"]
    errors = result.get("lower_is_better", [])
    columns = {
        "this run": [
            *_scores(result["dev"], named, errors),
            f"{stored['incremental'] / 1e6:.2f}M",
            f"{stored['bundled'] / 1e6:.2f}M",
            duration(result["train_seconds"]),
        ],
        "untrained": [
            *_scores(result["untrained"], named, errors), "0", f"{stored['base'] / 1e6:.2f}M", "",
        ],
    }  # fmt: skip
    if _is_papers(result):
        paper = VARIANTS[result["variant"]].paper
        percent = {"sst": paper.sst / 100, "para": paper.para / 100, "sts": paper.sts / 100}
        columns["the paper"] = [
            *_scores(percent, named),
            f"{paper.incremental:.2f}M",
            f"{paper.bundled_recomputed:.2f}M",
            "",
        ]
    labels = [*named.values(), "mean"]
    labels += ["parameters, incremental", "parameters, bundled", "training time"]
    table = Table(title=f"{result['variant']}: best on dev", title_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for label, *cells in zip(labels, *columns.values(), strict=True):
        table.add_row(*map(Text, (label, *cells)))
    return table


def _is_papers(result: dict[str, Any]) -> bool:
    """Return whether results are comparable with the paper's: the same tasks, on real data."""
    return set(result["metrics"]) == set(NAMES) and result["source"] in REAL


def _has_quora(result: dict[str, Any]) -> bool:
    return "para" in result["metrics"] and result["source"] in REAL


def _scores(
    scores: dict[str, float], names: Iterable[str], errors: Sequence[str] = ()
) -> list[str]:
    """Format the scores, and their mean if none of them is an error."""
    values = [scores[name] for name in names]
    mean = "" if errors else f"{sum(values) / len(values):.4f}"
    return [f"{v:.4f}" for v in values] + [mean]


def notes(result: dict[str, Any]) -> list[str]:
    """Return remarks that are needed to interpret the table of results."""
    lines = _papers_notes(VARIANTS[result["variant"]]) if _is_papers(result) else [UNTRAINED]
    if result["source"] == "demo":
        lines.append(MADE_UP_DATA)
    elif _has_quora(result) and saw_quora(result.get("base", "")):
        lines.append(SAW_QUORA)
    if result["test"]:
        scores = [f"{k} {v:.4f}" for k, v in result["test"].items()]
        lines.append(f"On the labelled test sets: {', '.join(scores)}.")
    return [*lines, kept(result["groups"])]


def kept(groups: Mapping[str, Mapping[str, Any]]) -> str:
    """Describe which step of each group is kept.

    >>> kept({"a": {"best_step": 8, "step": 12}, "b": {"best_step": 9, "step": 9}})
    'Kept: a step 8 of 12, b step 9 of 9 (the last is the best: more epochs may be better).'
    """
    each = []
    for name, found in groups.items():
        best, last = found["best_step"], found["step"]
        hint = " (the last is the best: more epochs may be better)" if best == last else ""
        each.append(f"{name} step {best} of {last}{hint}")
    return f"Kept: {', '.join(each)}."


def _papers_notes(chosen: PaperVariant) -> list[str]:
    paper = chosen.paper
    lines = [UNTRAINED, "the paper: bert-base on its own splits, so compare with care."]
    if paper.mean != paper.mean_recomputed:
        lines.append(
            f"The paper prints a mean of {paper.mean:.2f}; its row gives "
            f"{paper.mean_recomputed:.2f}."
        )
    if paper.bundled != paper.bundled_recomputed:
        lines.append(
            f"The paper prints {paper.bundled:.2f}M bundled; its row gives "
            f"{paper.bundled_recomputed:.2f}M."
        )
    if chosen.sts_loss == "cosine":
        lines.append("The paper counts an STS head that the cosine loss does not use.")
    return lines


def duration(seconds: float) -> str:
    """Format seconds as minutes and seconds.

    >>> duration(75.4)
    '1m 15s'
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m {rest:02d}s"
