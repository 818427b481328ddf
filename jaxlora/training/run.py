"""The training loop: the only place that iterates, logs and saves."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxlora.data.tokenized import Examples
from jaxlora.formats import huggingface
from jaxlora.formats.huggingface import Pretrained
from jaxlora.serving import finished_run, inference, tree_files
from jaxlora.tasks.sharing import group_name
from jaxlora.tasks.task import Task
from jaxlora.training import checkpoint, inputs, parameter_count, run_folder, sharding, step
from jaxlora.training.config import Settings
from jaxlora.training.inputs import Data
from jaxlora.training.task_group import (
    TaskGroup,
    evaluate_group,
    make_task_group,
    outputs,
    untrained_scores,
)
from jaxlora.utils import distributed, files, process, trees
from jaxlora.utils.errors import Stopped, UserError
from jaxlora.utils.trees import Tree

LOG_EVERY = 10
MOST_NONFINITE = 10  # steps in a row that are not finite: more data will not mend that


class Callback(Protocol):
    """Someone who watches a run (the console does)."""

    def summary(self, summary: inputs.RunSummary) -> None:
        """Before anything is trained."""

    def group(self, name: str, start: int, steps: int) -> None:
        """A group begins, at step `start` of `steps`."""

    def record(self, record: dict[str, Any]) -> None:
        """A line of `metrics.jsonl`."""

    def note(self, text: str) -> None:
        """Something that its user should know."""


@dataclasses.dataclass
class Progress:
    """How far a group has come (plain values; kept in its checkpoint).

    Attributes:
      step: steps taken.
      seconds: time spent training.
      best_step, best_score, best_scores: the best evaluation.
      best_seconds: time spent training until then.
      stale: evaluations since then.
      untrained: dev scores that need no training (see `inference.untrained`).
      skipped: steps left out since a loss was not finite.
      unlogged: those of them that no record counts yet.
      bad: those of them since the last step that was taken.
      done: nothing is left to do.
    """

    step: int = 0
    seconds: float = 0.0
    best_step: int = 0
    best_score: float = -float("inf")
    best_scores: dict[str, float] = dataclasses.field(default_factory=dict)
    best_seconds: float = 0.0
    stale: int = 0
    untrained: dict[str, float] = dataclasses.field(default_factory=dict)
    skipped: int = 0
    nonfinite_since_log: int = 0
    nonfinite_in_a_row: int = 0
    done: bool = False

    def note(self, score: float, scores: dict[str, float], patience: int) -> bool:
        """Take an evaluation in; returns whether it is the best so far (NaN never is)."""
        if score > self.best_score:
            self.best_step, self.best_score, self.best_scores = self.step, score, scores
            self.best_seconds, self.stale = self.seconds, 0
            return True
        self.stale += 1
        self.done = 0 < patience <= self.stale
        return False


def run(
    settings: Settings,
    out: Path,
    callback: Callback,
    *,
    resume: bool = False,
    predict_test: bool = True,
    mesh: str = "auto",
    skip_nonfinite: bool = False,
    base_sha256: str | None = None,
    strict: bool = False,
) -> dict[str, Any]:
    """Train all groups of a run, keep each one's best, and write everything to `out`.

    One of many processes calls this inside `distributed.together`, so that no other process waits
    for it if it fails.

    Args:
      settings: from `config.resolve`.
      out: folder of the run.
      callback: is told what happens.
      resume: go on with the run in `out`, if there is one.
      predict_test: write predictions for the test sets, too.
      mesh: the devices, see `sharding.make_mesh`; any will do to go on with a run.
      skip_nonfinite: leave steps out whose loss is not finite, instead of ending the run, unless
        there are `MOST_NONFINITE` in a row.
      base_sha256: what the base's weights must have, see `huggingface.load`.
      strict: refuse data with blank texts, instead of leaving those rows out.

    Returns:
      The content of `result.json`.

    Raises:
      UserError: for bad input, before anything is written; for a loss that is not finite.
      Stopped: after Ctrl-C or SIGTERM, when the state has been saved.
    """
    devices = sharding.make_mesh(mesh)
    out = files.local(out)
    checkpoint.check_place(out)
    settings = inputs.name_targets(settings)
    run_folder.check(out, settings.to_json(), resume)
    base = huggingface.load(settings.base, base_sha256)
    inputs.check_base(settings, base)
    with distributed.first_before_others("data"):
        data = inputs.load_data(settings, base)
        if strict:
            inputs.refuse_blank(settings, data)
    checksums = inputs.fingerprints(base, data, settings.seed)
    run_folder.check_same_inputs(out, checksums)
    callback.summary(inputs.summarize_run(settings, out, base, data, devices))
    with run_folder.only_run(out):
        run_folder.check(out, settings.to_json(), resume)  # another may have come in between
        distributed.wait("nothing is written before all have looked")
        if not (out / finished_run.RESULT).exists():
            versions = inputs.versions()
            config = {"settings": settings.to_json(), "inputs": checksums, "versions": versions}
            if not finished_run.exists(out):
                run_folder.write_json(out / finished_run.CONFIG, config)
            splits = ("dev", "test") if predict_test else ("dev",)
            context = RunContext(settings, base, data, out, splits, devices, skip_nonfinite)
            run_folder.write_json(out / finished_run.RESULT, _train_all(context, callback))
            distributed.wait("the result is written")
        checkpoint.remove_states(out / run_folder.STATES)
        return run_folder.read_json(out / finished_run.RESULT)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RunContext:
    """What a run works on, where and how: `splits` are those to predict."""

    settings: Settings
    base: Pretrained
    data: Data
    out: Path
    splits: tuple[str, ...]
    mesh: Mesh
    skip_nonfinite: bool


def _train_all(context: RunContext, callback: Callback) -> dict[str, Any]:
    """Train the groups, with their checkpoints and the log open as long as it takes."""
    with contextlib.ExitStack() as stack:
        saved = {}
        for name in map(group_name, context.settings.groups):
            states = checkpoint.GroupCheckpoints(context.out / run_folder.STATES / name)
            saved[name] = stack.enter_context(contextlib.closing(states))
            for path in states.dropped:
                callback.note(
                    f"{path} was damaged, or not written to its end, and is left out; "
                    f"{name} goes on from step {states.latest_step()}"
                )
        steps = {name: states.latest_step() for name, states in saved.items()}
        log = stack.enter_context(contextlib.closing(run_folder.MetricsLog(context.out, steps)))
        return _train_groups(context, saved, log, callback)


def _train_groups(
    context: RunContext,
    saved: dict[str, checkpoint.GroupCheckpoints],
    log: run_folder.MetricsLog,
    callback: Callback,
) -> dict[str, Any]:
    settings = context.settings
    bank: dict[str, Any] = {"adapters": {}, "heads": {}}
    progress: dict[str, dict[str, Any]] = {}
    test: dict[str, float] = {}
    for names in settings.groups:
        name = group_name(names)
        best, progress[name], scores = _train_one(context, names, saved[name], log, callback)
        bank["adapters"][name] = best["trainable"]
        bank["heads"] |= best["heads"]
        test |= scores
    tree_files.save(context.out / finished_run.MODEL, bank)
    result = summarise(settings, inputs.count(settings, context.base), progress, test)
    return result | {"model": trees.checksum(bank)}


def _refuse_unscored(group: TaskGroup, done: Progress) -> None:
    """Raise UserError where no evaluation had a score, since there is no best then."""
    if not done.best_scores:
        raise UserError(
            f"{group.name}: predictions for its dev set were not finite (NaN) at every evaluation, "
            "so nothing is kept; lower --learning-rate or --head-learning-rate in another --out"
        )


def _train_one(
    context: RunContext,
    names: tuple[str, ...],
    saved: checkpoint.GroupCheckpoints,
    log: run_folder.MetricsLog,
    callback: Callback,
) -> tuple[dict[str, Tree], dict[str, Any], dict[str, float]]:
    """Train a group and write its predictions; nothing of it stays on the devices.

    The predictions come from the best tree where it is, so of a split one no device has it whole.

    Returns:
      The best `{"trainable", "heads"}` as NumPy arrays, the progress, the test scores.
    """
    group = make_task_group(context.settings, context.base, context.data, names, context.mesh)
    patience = context.settings.of_group(names).patience
    window = Window(group, context.skip_nonfinite)
    best, done = train_group(group, saved, log, callback, window, patience)
    _refuse_unscored(group, done)
    test = predict_splits(context.out, group, best, context.splits)
    return distributed.gather(best), dataclasses.asdict(done), test


def train_group(
    group: TaskGroup,
    saved: checkpoint.GroupCheckpoints,
    log: run_folder.MetricsLog,
    callback: Callback,
    window: Window,
    patience: int = 0,
) -> tuple[dict[str, Tree], Progress]:
    """Train one group from its checkpoint, or from the start, to its end.

    A checkpoint is written after each evaluation, so a killed run repeats at the most the steps
    since the last one, and ends with the same parameters.

    Returns:
      The best `{"trainable", "heads"}` and the final progress.

    Raises:
      UserError: for a loss that is not finite; no state that it has touched is kept.
      Stopped: after a signal; the state has been saved.
    """
    tell = functools.partial(_tell, log, callback)
    with process.stop_signals() as stopped:
        state, best, progress = _restore(group, saved)
        callback.group(group.name, progress.step, group.steps)
        if progress.done:
            return best, progress
        progress.untrained = progress.untrained or untrained_scores(group, state.trainable)
        train_step, first = group.train_step(), progress.step + 1
        window.restart()
        for batch in group.prefetch(progress.step):
            state, metrics = train_step(state, group.frozen, batch)
            progress.step += 1
            window.add(metrics)
            evaluate_now = progress.step % group.eval_every == 0 or progress.step == group.steps
            due = evaluate_now or window.full or progress.step == first
            signal = distributed.agreed_signal(stopped(), due)
            if evaluate_now or signal or window.full:
                tell(window.flush(progress))
            if evaluate_now:
                tell(record := evaluate_group(group, state))
                if progress.note(record["score"], record["dev"], patience):
                    best = _copy_of(state)
                progress.done |= progress.step == group.steps
            if evaluate_now or signal:
                # Not by a name, which would keep this best when there is a better one.
                saved.save(
                    progress.step, {"state": state, "best": best}, dataclasses.asdict(progress)
                )
                window.restart()
            if signal:
                raise _stopped(signal, group, progress)
            if progress.done:
                break
    return best, progress


def _tell(log: run_folder.MetricsLog, callback: Callback, record: dict[str, Any] | None) -> None:
    """Log a record, if there is one, and let the listener have it."""
    if record is not None:
        log.write(record)
        callback.record(record)


def _stopped(signal: int, group: TaskGroup, progress: Progress) -> Stopped:
    where = f"{group.name} at step {progress.step} of {group.steps}"
    return Stopped(signal, f"{where}, saved; go on with the same flags and --resume", saved=True)


def _copy_of(state: step.TrainState) -> dict[str, Tree]:
    """What is kept of a state; a copy, since the step takes the state's own memory."""
    return jax.tree.map(jnp.copy, {"trainable": state.trainable, "heads": state.heads})


def _restore(
    group: TaskGroup, saved: checkpoint.GroupCheckpoints
) -> tuple[step.TrainState, dict[str, Tree], Progress]:
    """The latest state, best and progress, or those of the start.

    Restored arrays come to where they live at once; a first state beside them would double it all.
    """
    shapes = group.state_shapes
    best = {"trainable": shapes.trainable, "heads": shapes.heads}
    found = saved.restore({"state": shapes, "best": best})
    if found is None:
        state = group.state
        return state, _copy_of(state), Progress()
    tree, progress = found
    return tree["state"], tree["best"], Progress(**progress)


class Window:
    """The steps since the last record: their metrics, fetched together, and their time.

    Fetching waits for the device, so it is done once for `LOG_EVERY` steps.

    Args:
      group: whose steps.
      skip_nonfinite: count steps that are not finite, and refuse `MOST_NONFINITE` in a row only.
    """

    def __init__(self, group: TaskGroup, skip_nonfinite: bool = False) -> None:
        self._group = group
        self._skip = skip_nonfinite
        self._metrics: list[step.StepMetrics] = []
        self.restart()

    def restart(self) -> None:
        """Start the clock (again)."""
        self._began = time.perf_counter()

    def add(self, metrics: step.StepMetrics) -> None:
        """Remember a step's metrics, still on the device."""
        self._metrics.append(metrics)

    @property
    def full(self) -> bool:
        """Whether a record is due."""
        return len(self._metrics) >= LOG_EVERY

    def flush(self, progress: Progress) -> dict[str, Any] | None:
        """The record of these steps; adds their time to `progress`.

        Returns:
          None if none of them was finite; then the next record counts them (and `progress`, which
          a checkpoint keeps, until then).

        Raises:
          UserError: if a loss is not finite.
        """
        metrics = jax.device_get(self._metrics)
        seconds = time.perf_counter() - self._began
        progress.seconds += seconds
        self._count(metrics, progress)
        self._metrics = []
        self.restart()
        finite = [one for one in metrics if one.finite]
        if not finite:
            return None
        mean = jax.tree.map(lambda *xs: np.mean(np.stack(xs), axis=0), *finite)
        names = [task.name for task in self._group.setup.tasks]
        record = {
            "kind": "train",
            "group": self._group.name,
            "step": progress.step,
            "loss": dict(zip(names, mean.losses.tolist(), strict=True)),
            "update_norm": float(mean.update_norm),
            "conflicts": float(mean.conflicts),
            "cosine": _pairs(names, mean.cosines),
            "steps_per_second": len(metrics) / seconds,
        }
        if progress.nonfinite_since_log:
            record["skipped"], progress.nonfinite_since_log = progress.nonfinite_since_log, 0
        return record

    def _count(self, metrics: list[step.StepMetrics], progress: Progress) -> None:
        """Count the steps that were left out, or refuse them."""
        for number, one in enumerate(metrics, progress.step - len(metrics)):
            if one.finite:
                progress.nonfinite_in_a_row = 0
                continue
            progress.nonfinite_in_a_row += 1
            if not self._skip or progress.nonfinite_in_a_row >= MOST_NONFINITE:
                self._refuse(number, one)
            progress.skipped += 1
            progress.nonfinite_since_log += 1

    def _refuse(self, number: int, metrics: step.StepMetrics) -> NoReturn:
        """Say which step (from 0), which task and which examples."""
        batches = self._group.batches
        named = zip(batches.examples.items(), batches.order.at(number), metrics.losses, strict=True)
        failed = [
            f"the loss of {name} is {loss} (examples {', '.join(examples.ids[drawn[:3]])}, …)"
            for (name, examples), drawn, loss in named
            if not np.isfinite(loss)
        ]
        remedy = "lower --learning-rate or --head-learning-rate in another --out"
        if self._skip:
            remedy = f"nor was any of the {MOST_NONFINITE - 1} steps before; {remedy}"
        else:
            remedy += ", or leave such steps out with --resume --skip-nonfinite"
        raise UserError(
            f"step {number + 1} of {self._group.name}: {' and '.join(failed) or 'the update'} "
            f"is not finite; {remedy}"
        )


def _pairs(names: list[str], matrix: np.ndarray) -> dict[str, float]:
    return {
        f"{a}-{b}": float(matrix[i, j])
        for i, a in enumerate(names)
        for j, b in enumerate(names)
        if i < j
    }


def predict_splits(
    out: Path, group: TaskGroup, best: dict[str, Tree], splits: tuple[str, ...]
) -> dict[str, float]:
    """Write predictions of a group's tasks; returns the scores of the test sets with labels."""
    scores = {}
    for task in group.setup.tasks:
        for split in splits:
            examples = group.data[task.name][split]
            if not len(examples):
                continue
            found = outputs(group, task, best["trainable"], best["heads"], split)
            predictions = inference.decode(task, found)
            path = out / "predictions" / f"{task.name}-{split}.csv"
            shown = [f"{p:.0f}" if task.integer else f"{p:.4f}" for p in predictions]
            columns: dict[str, Iterable[str]] = {"id": examples.ids, "prediction": shown}
            if split == "dev":
                columns |= _compared(task, examples, found)
            run_folder.write_table(
                path, _with_blank(columns, examples) if split == "test" else columns
            )
            if split == "test" and examples.labelled:
                scores[task.name] = task.score(predictions, examples.labels)
    return scores


def _with_blank(
    columns: Mapping[str, Iterable[str]], examples: Examples
) -> Mapping[str, Iterable[str]]:
    """A line for each row of the test file: a blank one has no prediction, but a reason."""
    if not examples.blank:
        return columns
    rows = [[*row, ""] for row in zip(*columns.values(), strict=True)]
    for blank in examples.blank:
        rows.insert(blank.at, [blank.id, "", "blank text"])
    return dict(zip([*columns, "reason"], zip(*rows, strict=True), strict=True))


def _compared(task: Task, examples: Examples, found: np.ndarray) -> dict[str, list[str]]:
    """The labels, and the probability of each predicted class (none for scores)."""
    confidence = [""] * len(examples)
    if task.integer:
        confidence = [f"{p:.4f}" for p in inference.probabilities(task, found).max(-1)]
    return {"label": [f"{label:g}" for label in examples.labels], "confidence": confidence}


def summarise(
    settings: Settings,
    stored: parameter_count.ParameterCount,
    progress: dict[str, dict[str, Any]],
    test: dict[str, float],
) -> dict[str, Any]:
    """The content of `result.json`."""
    dev: dict[str, float] = {}
    untrained: dict[str, float] = {}
    for group in progress.values():
        dev |= group.pop("best_scores")
        untrained |= group.pop("untrained")
        del group["nonfinite_since_log"], group["nonfinite_in_a_row"]
        group["steps_per_second"] = group["step"] / group["seconds"]
    return {
        "variant": settings.variant,
        "preset": settings.preset,
        "source": settings.source,
        "base": settings.base,
        "metrics": {name: f"{t.title} {t.metric_name}" for name, t in settings.named.items()},
        "dev": dev,
        "dev_mean": float(np.mean(list(dev.values()))),
        "test": test,
        "untrained": untrained,
        "parameters": stored._asdict(),
        "train_seconds": sum(group["seconds"] for group in progress.values()),
        "groups": progress,
    }
