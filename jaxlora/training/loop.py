"""The training loop: the only place that takes steps, evaluates and saves."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.training import checkpoint, inputs, metrics_log
from jaxlora.training.step import StepMetrics, TrainState
from jaxlora.training.task_group import TaskGroup, evaluate_group, untrained_scores
from jaxlora.utils import distributed, process
from jaxlora.utils.errors import Stopped, UserError
from jaxlora.utils.trees import Tree

LOG_EVERY = 10
MOST_NONFINITE = 10  # steps in a row that are not finite: more data will not mend that


class Callback(Protocol):
    """Callbacks during a run, such as the console's."""

    def summary(self, summary: inputs.RunSummary) -> None:
        """Called before training."""

    def group(self, name: str, start: int, steps: int) -> None:
        """Called when a group begins, at step `start` of `steps`."""

    def record(self, record: dict[str, Any]) -> None:
        """Called with each line of `metrics.jsonl`."""

    def note(self, text: str) -> None:
        """Called with what the user should know."""


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
      nonfinite_since_log: those of them that no record counts yet.
      nonfinite_in_a_row: those of them since the last step that was taken.
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


def train_group(
    group: TaskGroup,
    saved: checkpoint.GroupCheckpoints,
    log: metrics_log.MetricsLog,
    callback: Callback,
    window: Window,
    patience: int = 0,
) -> tuple[dict[str, Tree], Progress]:
    """Train one group from its checkpoint, or the start, to its end.

    A checkpoint is written after each evaluation, so a killed run repeats at most the steps
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
        train_step, first = group.compile(), progress.step + 1
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
                best = _evaluate(group, state, progress, patience, tell) or best
            if evaluate_now or signal:
                # Not by a name, which would keep this best when there is a better one.
                saved.save(progress.step, {"state": state, "best": best}, vars(progress))
                window.restart()
            if signal:
                raise _stopped(signal, group, progress)
            if progress.done:
                break
    return best, progress


def _evaluate(
    group: TaskGroup,
    state: TrainState,
    progress: Progress,
    patience: int,
    tell: Callable[[dict[str, Any]], None],
) -> dict[str, Tree] | None:
    """Evaluate and note the scores; return what is kept of the state if it is the best so far."""
    tell(record := evaluate_group(group, state))
    is_best = progress.note(record["score"], record["dev"], patience)
    progress.done |= progress.step == group.steps
    return _copy_of(state) if is_best else None


def _tell(log: metrics_log.MetricsLog, callback: Callback, record: dict[str, Any] | None) -> None:
    """Log a record, if there is one, and pass it to the callback."""
    if record is not None:
        log.write(record)
        callback.record(record)


def _stopped(signal: int, group: TaskGroup, progress: Progress) -> Stopped:
    where = f"{group.name} at step {progress.step} of {group.steps}"
    return Stopped(
        signal, f"{where}, saved; go on with the same settings and `resume=True`", saved=True
    )


def _copy_of(state: TrainState) -> dict[str, Tree]:
    """What is kept of a state; a copy, since the step takes the state's own memory."""
    return jax.tree.map(jnp.copy, {"trainable": state.trainable, "heads": state.heads})


def _restore(
    group: TaskGroup, saved: checkpoint.GroupCheckpoints
) -> tuple[TrainState, dict[str, Tree], Progress]:
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
        self._metrics: list[StepMetrics] = []
        self.restart()

    def restart(self) -> None:
        """Start the clock (again)."""
        self._began = time.perf_counter()

    def add(self, metrics: StepMetrics) -> None:
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
        names = [task.name for task in self._group.tasks]
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

    def _count(self, metrics: list[StepMetrics], progress: Progress) -> None:
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

    def _refuse(self, number: int, metrics: StepMetrics) -> NoReturn:
        """Say which step (from 0), which task and which examples."""
        batches = self._group.batches
        named = zip(batches.examples.items(), batches.order.at(number), metrics.losses, strict=True)
        failed = [
            f"the loss of {name} is {loss} (examples {', '.join(examples.ids[drawn[:3]])}, …)"
            for (name, examples), drawn, loss in named
            if not np.isfinite(loss)
        ]
        remedy = "lower `learning_rate` or `head_learning_rate` in another `out`"
        if self._skip:
            remedy = f"nor was any of the {MOST_NONFINITE - 1} steps before; {remedy}"
        else:
            remedy += ", or leave such steps out with `resume=True` `skip_nonfinite=True`"
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
