"""The training loop: the only place that takes steps, evaluates and writes checkpoints."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any, NoReturn, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.data.batches import Batch
from jaxlora.training import checkpoint, inputs, metrics_log
from jaxlora.training.step import StepMetrics, TrainState
from jaxlora.training.task_group import Cohort, TaskGroup, evaluate_group, untrained_scores
from jaxlora.utils import distributed, process
from jaxlora.utils.errors import Stopped, UserError
from jaxlora.utils.trees import Tree

LOG_EVERY = 10
MOST_NONFINITE = 10  # non-finite steps in a row that end a run even if such steps are skipped


class Callback(Protocol):
    """Callbacks during a run, for example to show it on a console."""

    def summary(self, summary: inputs.RunSummary) -> None:
        """Receive the summary, before training."""

    def group(self, name: str, start: int, steps: int) -> None:
        """Receive the start of a group, at step `start` of `steps`."""

    def record(self, record: dict[str, Any]) -> None:
        """Receive a record of `metrics.jsonl`."""

    def done(self, name: str, why: str) -> None:
        """Receive the end of a group, with the reason."""

    def note(self, text: str) -> None:
        """Receive a message for the user."""


@dataclasses.dataclass
class Progress:
    """Progress of a group, as plain values that its checkpoint stores.

    Attributes:
      step: number of steps taken.
      seconds: time spent training; groups that take a step together share it equally.
      best_step, best_score, best_scores: step, score and dev scores of the best evaluation.
      best_seconds: time spent training up to the best evaluation.
      stale: number of evaluations since the best one.
      untrained: dev scores that need no training, see `inference.untrained`.
      skipped: number of steps skipped because they were not finite.
      nonfinite_since_log: number of those since the last record that counted them.
      nonfinite_in_a_row: number of those since the last finite step.
      done: whether the group has ended.
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
        """Register an evaluation, and return whether it is the best so far (NaN never is)."""
        if score > self.best_score:
            self.best_step, self.best_score, self.best_scores = self.step, score, scores
            self.best_seconds, self.stale = self.seconds, 0
            return True
        self.stale += 1
        self.done = 0 < patience <= self.stale
        return False


Best = dict[str, dict[str, Tree]]
"""Group → its best `{"trainable", "heads"}`."""


def train_cohort(
    cohort: Cohort,
    saved: checkpoint.StateCheckpoints,
    log: metrics_log.MetricsLog,
    callback: Callback,
    skip_nonfinite: bool = False,
) -> tuple[Best, dict[str, Progress]]:
    """Train groups to their end, from their latest checkpoint if there is one.

    A checkpoint is written after every evaluation, so a run that was killed repeats at most the
    steps since the last evaluation, and ends with the same parameters.

    Args:
      cohort: the groups.
      saved: their checkpoints.
      log, callback: receive each record.
      skip_nonfinite: skip and count non-finite steps, unless `MOST_NONFINITE` come in a row.

    Returns:
      The best trees and the final progress of each group.

    Raises:
      UserError: if a step is not finite; its state is not saved.
      Stopped: after a signal, once the states have been saved.
    """
    with process.stop_signals() as stopped:
        states, best, progress = _restore(cohort, saved)
        run = _Run(cohort, progress, log, callback, Window(cohort, skip_nonfinite))
        run.begin(states)
        train_step, start, first = cohort.compile(), saved.latest_step(), True
        run.window.restart()
        for step, batch in run.batches(start):
            states, metrics = train_step(states, cohort.frozen, batch)
            due = [group for group in run.take(step, metrics) if run.is_due(group)]
            look, first = bool(due) or run.window.full or first, False
            signal = distributed.agreed_signal(stopped(), look)
            if due or signal or run.window.full:
                run.flush()
            for group in due:
                # Bind no name to the best tree: it would keep the memory of one that is replaced.
                best[group.name] = run.evaluate(group, states[group.name]) or best[group.name]
            if due or signal:
                saved.save(step, {"states": states, "best": best}, run.plain_progress)
                run.window.restart()
            if signal:
                raise run.stopped(signal)
        # During the last evaluation, or while groups that had ended were restored.
        if signal := distributed.agreed_signal(stopped(), True):
            raise run.stopped(signal)
    return best, progress


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
    """Bookkeeping of a cohort: progress, records and evaluations of its groups."""

    cohort: Cohort
    progress: dict[str, Progress]
    log: metrics_log.MetricsLog
    callback: Callback
    window: Window

    @property
    def active(self) -> list[TaskGroup]:
        """The groups that have not ended."""
        return [group for group in self.cohort.groups if not self.progress[group.name].done]

    @property
    def plain_progress(self) -> dict[str, dict[str, Any]]:
        """The progress of each group as plain values, for its checkpoint."""
        return {name: vars(one) for name, one in self.progress.items()}

    def begin(self, states: dict[str, TrainState]) -> None:
        """Announce the groups, and compute their scores before training."""
        fresh = states
        if self.cohort.start and not all(one.untrained for one in self.progress.values()):
            # The states to start from are trained already.
            fresh = dataclasses.replace(self.cohort, start={}).states
        for group in self.cohort.groups:
            one = self.progress[group.name]
            self.callback.group(group.name, one.step, group.steps)
            if not one.done and not one.untrained:
                one.untrained = untrained_scores(self.cohort, group, fresh[group.name].trainable)

    def batches(self, start: int) -> Iterator[tuple[int, Batch]]:
        """Yield `(step, batch)`, with steps counted from 1, of which `start` are taken already.

        Once a group has ended early, batches contain no examples of it.
        """
        while active := self.active:
            progress = [self.progress[group.name] for group in self.cohort.groups]
            ended = any(one.done for one in progress)
            stops = [
                one.step if one.done else group.steps
                for group, one in zip(self.cohort.groups, progress, strict=True)
            ]
            for step, batch in self.cohort.prefetch(start, tuple(stops) if ended else ()):
                start = step + 1
                yield start, batch
                if self.active != active:
                    break

    def take(self, step: int, metrics: dict[str, StepMetrics]) -> list[TaskGroup]:
        """Register a step, and return the groups that took part in it."""
        taken = self.cohort.batches.order.takes_part(step - 1)
        groups = [g for g, there in zip(self.cohort.groups, taken, strict=True) if there]
        groups = [group for group in groups if group in self.active]
        for group in groups:
            self.progress[group.name].step += 1
        self.window.add({group.name: metrics[group.name] for group in groups})
        return groups

    def is_due(self, group: TaskGroup) -> bool:
        """Return whether to evaluate a group that has just taken a step."""
        return group.evaluates_at(self.progress[group.name].step)

    def flush(self) -> None:
        """Write a record of the steps since the last one."""
        for record in self.window.flush(self.progress):
            self._tell(record)

    def evaluate(self, group: TaskGroup, state: TrainState) -> dict[str, Tree] | None:
        """Evaluate a group, and return a copy of its parameters if the score is the best so far."""
        record, one = evaluate_group(self.cohort, group, state), self.progress[group.name]
        self._tell(record)
        is_best = one.note(record["score"], record["dev"], group.patience)
        if one.done:
            self.callback.done(group.name, f"no better score in {one.stale} evaluations")
        elif one.step == group.steps:
            one.done = True
            self.callback.done(group.name, f"all {group.steps} steps taken")
        return _copy_of(state) if is_best else None

    def _tell(self, record: dict[str, Any]) -> None:
        self.log.write(record)
        self.callback.record(record)

    def stopped(self, signal: int) -> Stopped:
        """Return the error that ends a run after a signal."""
        where = ", ".join(
            f"{one.name} at step {self.progress[one.name].step} of {one.steps}"
            for one in self.active
        )
        return Stopped(
            signal,
            f"{where or 'at the end'}, saved; go on with the same settings and `resume=True`",
            saved=True,
        )


def _copy_of(state: TrainState) -> dict[str, Tree]:
    """Copy the parameters of a state, whose own memory is donated to the next step."""
    return jax.tree.map(jnp.copy, {"trainable": state.trainable, "heads": state.heads})


def _restore(
    cohort: Cohort, saved: checkpoint.StateCheckpoints
) -> tuple[dict[str, TrainState], Best, dict[str, Progress]]:
    """Return the latest states, best trees and progress, or initial ones without a checkpoint.

    Arrays are restored from shapes: initial states beside them would double the memory.
    """
    shapes = cohort.state_shapes
    best = {n: {"trainable": s.trainable, "heads": s.heads} for n, s in shapes.items()}
    found = saved.restore({"states": shapes, "best": best})
    if found is None:
        states = cohort.states
        copies = {name: _copy_of(state) for name, state in states.items()}
        return states, copies, {group.name: Progress() for group in cohort.groups}
    tree, plain = found
    progress = {group.name: Progress(**plain[group.name]) for group in cohort.groups}
    return tree["states"], tree["best"], progress


class Window:
    """Metrics and time of the steps since the last record.

    Fetching metrics waits for the device, so it is done once for `LOG_EVERY` steps.

    Args:
      cohort: the groups that take the steps.
      skip_nonfinite: see `train_cohort`.
    """

    def __init__(self, cohort: Cohort, skip_nonfinite: bool = False) -> None:
        self._cohort = cohort
        self._skip = skip_nonfinite
        self._metrics: list[dict[str, StepMetrics]] = []
        self.restart()

    def restart(self) -> None:
        """Restart the clock."""
        self._began = time.perf_counter()

    def add(self, metrics: dict[str, StepMetrics]) -> None:
        """Add the metrics of a step, without fetching them from the device."""
        self._metrics.append(metrics)

    @property
    def full(self) -> bool:
        """Whether a record is due."""
        return len(self._metrics) >= LOG_EVERY

    def flush(self, progress: dict[str, Progress]) -> list[dict[str, Any]]:
        """Return a record of these steps for each group, and add their time to its `progress`.

        `steps_per_second` counts the steps of all groups together, also those in which this one
        took no part. A group without a finite step gets no record. Its next record counts the
        skipped steps, which its progress keeps until then.

        Raises:
          UserError: if a step is not finite, see `train_cohort`.
        """
        metrics = jax.device_get(self._metrics)
        seconds = time.perf_counter() - self._began
        self._metrics = []
        self.restart()
        records = []
        for group in sorted(self._cohort.groups, key=lambda group: not _overflows(group, metrics)):
            self._count(group, _taken(group, metrics), progress[group.name])
        for group in self._cohort.groups:
            one, took = progress[group.name], _taken(group, metrics)
            one.seconds += sum(1 / len(step) for step in took) * seconds / max(1, len(metrics))
            if finite := [step[group.name] for step in took if step[group.name].finite]:
                rate = len(metrics) / seconds
                records.append(_record(group, finite, one) | {"steps_per_second": rate})
                if one.nonfinite_since_log:
                    records[-1]["skipped"], one.nonfinite_since_log = one.nonfinite_since_log, 0
        return records

    def _count(
        self, group: TaskGroup, steps: list[dict[str, StepMetrics]], progress: Progress
    ) -> None:
        """Count the steps of a group that are not finite, or raise an error about them."""
        for number, step in enumerate(steps, progress.step - len(steps)):
            if step[group.name].finite:
                progress.nonfinite_in_a_row = 0
                continue
            progress.nonfinite_in_a_row += 1
            if not self._skip or progress.nonfinite_in_a_row >= MOST_NONFINITE:
                self._refuse(group, number, step)
            progress.skipped += 1
            progress.nonfinite_since_log += 1

    def _refuse(self, group: TaskGroup, number: int, step: dict[str, StepMetrics]) -> NoReturn:
        """Raise an error with the step (the group's own, from 0), the tasks and the examples."""
        metrics = step[group.name]
        others = [name for name, one in step.items() if not one.finite and name != group.name]
        batches, names = self._cohort.batches, [task.name for task in group.tasks]
        order = batches.order.orders[self._cohort.groups.index(group)]
        drawn = dict(zip(names, order.at(number), strict=True))
        failed = [
            f"the loss of {task.name} is {loss} (examples "
            f"{', '.join(batches.examples[task.name].ids[drawn[task.name][:3]])}, …)"
            for task, loss in zip(group.tasks, metrics.losses, strict=True)
            if not np.isfinite(loss)
        ]
        remedy = "lower `learning_rate` or `head_learning_rate` in another `out`"
        if self._skip:
            remedy = f"nor was any of the {MOST_NONFINITE - 1} steps before; {remedy}"
        else:
            remedy += ", or leave such steps out with `resume=True` `skip_nonfinite=True`"
        with_it = f" (nor is {', '.join(others)}, trained in the same step)" if others else ""
        raise UserError(
            f"step {number + 1} of {group.name}: {' and '.join(failed) or 'the update'} "
            f"is not finite{with_it}; {remedy}"
        )


def _taken(group: TaskGroup, metrics: list[dict[str, StepMetrics]]) -> list[dict[str, StepMetrics]]:
    """Return the metrics of the steps in which a group took part."""
    return [step for step in metrics if group.name in step]


def _overflows(group: TaskGroup, metrics: list[dict[str, StepMetrics]]) -> bool:
    """Return whether a loss of a group is not finite.

    In the shared pass this may make the gradients of others NaN, whose own losses are finite.
    """
    steps = _taken(group, metrics)
    return not all(np.isfinite(step[group.name].losses).all() for step in steps)


def _record(group: TaskGroup, metrics: list[StepMetrics], progress: Progress) -> dict[str, Any]:
    """Return the record of a group's steps: mean metrics, and the last learning rates."""
    mean = jax.tree.map(lambda *xs: np.mean(np.stack(xs), axis=0), *metrics)
    names = [task.name for task in group.tasks]
    return {
        "kind": "train",
        "group": group.name,
        "step": progress.step,
        "loss": dict(zip(names, mean.losses.tolist(), strict=True)),
        "learning_rate": group.rates_at(progress.step - progress.skipped),
        "grad_norm": float(mean.grad_norm),
        "head_grad_norm": float(mean.head_grad_norm),
        "update_norm": float(mean.update_norm),
        "conflicts": float(mean.conflicts),
        "cosine": _pairs(names, mean.cosines),
    }


def _pairs(names: list[str], matrix: np.ndarray) -> dict[str, float]:
    return {
        f"{a}+{b}": float(matrix[i, j])
        for i, a in enumerate(names)
        for j, b in enumerate(names)
        if i < j
    }
