"""Figures of errors and confidence: confusion, scatter and reliability."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np

from experiments.report import statistics
from experiments.report.claims import Context
from experiments.report.collect import Run
from experiments.report.drawing import INK, Panel, Plan, kind_of
from jaxlora.cli.curves import COLOURS
from jaxlora.tasks.sharing import VARIANTS
from jaxlora.tasks.task import NAMES, Task, paper_tasks


def plans(context: Context) -> list[Plan]:
    """Plan the figures of errors; none if no run has labelled predictions."""
    shown = examined(context)
    titles = context.titles
    return [figure(shown, titles) for figure in (confusions, scatters, reliability) if shown]


def examined(context: Context) -> dict[str, Run]:
    """Return the best adapter run and the best full fine-tuning run that have labels."""
    found = {}
    for adapt in ("lora", "full"):
        names = [n for n, v in VARIANTS.items() if v.adapt == adapt]
        best = context.scores.best(names)
        if (
            best is not None
            and set(NAMES) <= (run := context.collection.studies[best][0]).answers.keys()
        ):
            found[best] = run
    return found


def confusions(shown: Mapping[str, Run], titles: Mapping[str, str]) -> Plan:
    """Draw the confusion matrix of classes."""
    panels = [
        _confusion(run, task, titles[task.name])
        for task in paper_tasks()
        if task.classes
        for run in shown.values()
    ]
    caption = (
        "Rows are labels, columns predictions, numbers dev examples; the shade is the share of the "
        "row. The best run with adapters beside the best with all weights trained."
    )
    return Plan("confusion", "Which classes are taken for which", caption, tuple(panels), 3.6, 2)


def _confusion(run: Run, task: Task, title: str) -> Panel:
    def paint(axes: Any) -> None:
        answers = run.answers[task.name]
        counts = statistics.confusion(answers.predictions, answers.labels, len(task.classes))
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        for (row, column), count in np.ndenumerate(counts):
            box = mpl.patches.Rectangle(
                (column - 0.48, row - 0.48), 0.96, 0.96,
                facecolor=COLOURS[task.name], alpha=0.05 + 0.65 * share[row, column],
            )  # fmt: skip
            axes.add_patch(box)
            axes.text(column, row, f"{count:,}", ha="center", va="center", fontsize=9)
        ends = (-0.5, len(counts) - 0.5)
        axes.set(xlim=ends, ylim=ends[::-1], title=f"{title}, {run.study}")
        axes.set(xlabel="predicted", ylabel="label")
        axes.set_xticks(range(len(counts)), task.classes)
        axes.set_yticks(range(len(counts)), task.classes)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)

    return paint


def scatters(shown: Mapping[str, Run], titles: Mapping[str, str]) -> Plan:
    """Draw predicted against true similarity."""

    def panel(run: Run) -> Panel:
        def paint(axes: Any) -> None:
            answers = run.answers["sts"]
            axes.plot([0, 5], [0, 5], color=INK, alpha=0.4, linewidth=1)
            axes.scatter(answers.labels, answers.predictions, s=9, alpha=0.5, linewidths=0,
                         color=COLOURS["sts"], rasterized=True)  # fmt: skip
            r = run.result["dev"]["sts"]
            axes.set(title=f"{run.study}: r = {r:.3f}", xlabel="label", ylabel="predicted")
            axes.set(xlim=(-0.15, 5.15), ylim=(-0.15, 5.15))

        return paint

    name = titles["sts"]
    caption = f"{name} dev: one point per pair of sentences, on the diagonal if predicted exactly."
    panels = tuple(map(panel, shown.values()))
    return Plan("scatter", f"{name}: predicted against true similarity", caption, panels, 3.8, 2)


def reliability(shown: Mapping[str, Run], titles: Mapping[str, str]) -> Plan:
    """Draw the accuracy at each confidence."""

    def panel(task: Task) -> Panel:
        def paint(axes: Any) -> None:
            axes.plot([0, 1], [0, 1], color=INK, alpha=0.4, linewidth=1)
            for study, run in shown.items():
                answers = run.answers[task.name]
                if np.isnan(answers.confidence).any():
                    continue
                right = answers.predictions == answers.labels
                found = statistics.calibration(answers.confidence, right)
                colour, marker = kind_of(run)
                label = f"{study}: ECE {100 * found.error:.1f} %"
                axes.plot(found.confidence, found.accuracy, "-", color=colour, label=label)
                axes.scatter(found.confidence, found.accuracy, s=15 + 220 * found.share,
                             marker=marker, color=colour, alpha=0.7)  # fmt: skip
            axes.set(title=titles[task.name], xlabel="confidence", ylabel="share that is right")
            axes.set(xlim=(0, 1.03), ylim=(0, 1.05))
            axes.legend(loc="upper left", fontsize=8.5)

        return paint

    caption = (
        "On the diagonal a confidence of 0.8 is right in 80 of 100 cases; below it, the model is "
        "too sure. Ten bins; larger marks hold more examples. ECE: expected calibration error."
    )
    panels = tuple(panel(task) for task in paper_tasks() if task.classes)
    return Plan("calibration", "Calibration", caption, panels, 3.8, 2)
