"""The training loop: the only place that iterates, logs and saves."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import checkpoint, curves, pretrained, rundir, step, storage
from jaxlora import plan as planning
from jaxlora.data import batches as data_batches
from jaxlora.errors import UserError
from jaxlora.group import Group, evaluate_group, make_group, predict, untrained_scores
from jaxlora.plan import Data
from jaxlora.pretrained import Pretrained
from jaxlora.settings import Settings
from jaxlora.trees import Tree
from jaxlora.variants import group_name

LOG_EVERY = 10


class Listener(Protocol):
    """Someone who watches a run (the console does)."""

    def plan(self, plan: planning.Plan) -> None:
        """Before anything is trained."""

    def group(self, name: str, start: int, steps: int) -> None:
        """A group begins, at step `start` of `steps`."""

    def record(self, record: dict[str, Any]) -> None:
        """A line of `metrics.jsonl`."""


@dataclasses.dataclass
class Progress:
    """How far a group has come (plain values; kept in its checkpoint).

    Attributes:
      step: steps taken.
      seconds: time spent training.
      best_step, best_score, best_scores: the best evaluation.
      stale: evaluations since then.
      untrained: dev scores that need no training (see `evaluate.untrained`).
      done: nothing is left to do.
    """

    step: int = 0
    seconds: float = 0.0
    best_step: int = 0
    best_score: float = -float("inf")
    best_scores: dict[str, float] = dataclasses.field(default_factory=dict)
    stale: int = 0
    untrained: dict[str, float] = dataclasses.field(default_factory=dict)
    done: bool = False

    def note(self, score: float, scores: dict[str, float], patience: int) -> bool:
        """Take an evaluation in; returns whether it is the best so far."""
        if score > self.best_score:
            self.best_step, self.best_score, self.best_scores = self.step, score, scores
            self.stale = 0
            return True
        self.stale += 1
        self.done = 0 < patience <= self.stale
        return False


def run(
    settings: Settings,
    out: Path,
    listener: Listener,
    *,
    resume: bool = False,
    predict_test: bool = True,
) -> dict[str, Any]:
    """Train all groups of a run, keep each one's best, and write everything to `out`.

    Args:
      settings: from `settings.resolve`.
      out: folder of the run.
      listener: is told what happens.
      resume: go on with the run in `out`, if there is one.
      predict_test: write predictions for the test sets, too.

    Returns:
      The content of `result.json`.

    Raises:
      UserError: for bad input, before anything is written; for a loss that is not finite.
    """
    rundir.check(out, settings.to_json(), resume)
    base = pretrained.load(settings.base)
    planning.check_base(settings, base)
    data = planning.load_data(settings, base)
    inputs = planning.fingerprints(base, data, settings.seed)
    rundir.check_same_inputs(out, inputs)
    listener.plan(planning.make_plan(settings, out, base, data))
    if (out / rundir.RESULT).exists():
        checkpoint.remove_states(out / rundir.STATES)
        return rundir.read_json(out / rundir.RESULT)
    if not (out / rundir.CONFIG).exists():
        config = {"settings": settings.to_json(), "inputs": inputs, "versions": planning.versions()}
        rundir.write_json(out / rundir.CONFIG, config)
    splits = ("dev", "test") if predict_test else ("dev",)
    result = _train_all(Job(settings, base, data, out, splits), listener)
    rundir.write_json(out / rundir.RESULT, result)
    checkpoint.remove_states(out / rundir.STATES)
    return result


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Job:
    """What a run works on, and where: `splits` are those to predict."""

    settings: Settings
    base: Pretrained
    data: Data
    out: Path
    splits: tuple[str, ...]


def _train_all(job: Job, listener: Listener) -> dict[str, Any]:
    """Train the groups, with their checkpoints and the log open as long as it takes."""
    with contextlib.ExitStack() as stack:
        saved = {}
        for name in map(group_name, job.settings.groups):
            states = checkpoint.GroupCheckpoints(job.out / rundir.STATES / name)
            saved[name] = stack.enter_context(contextlib.closing(states))
        steps = {name: states.latest_step() for name, states in saved.items()}
        log = stack.enter_context(contextlib.closing(rundir.MetricsLog(job.out, steps)))
        return _train_groups(job, saved, log, listener)


def _train_groups(
    job: Job,
    saved: dict[str, checkpoint.GroupCheckpoints],
    log: rundir.MetricsLog,
    listener: Listener,
) -> dict[str, Any]:
    settings = job.settings
    bank: dict[str, Any] = {"adapters": {}, "heads": {}}
    progress: dict[str, dict[str, Any]] = {}
    test: dict[str, float] = {}
    for names in settings.groups:
        group = make_group(settings, job.base, job.data, names)
        patience = settings.of_group(names).patience
        best, done = train_group(group, saved[group.name], log, listener, patience)
        bank["adapters"][group.name] = best["trainable"]
        bank["heads"] |= best["heads"]
        progress[group.name] = dataclasses.asdict(done)
        test |= predict_splits(job.out, group, best, job.splits)
    checkpoint.save_tree(job.out / rundir.MODEL, bank)
    curves.draw(log.records, job.out / "curves.png", settings.variant)
    return summarise(settings, planning.count(settings, job.base), progress, test)


def train_group(
    group: Group,
    saved: checkpoint.GroupCheckpoints,
    log: rundir.MetricsLog,
    listener: Listener,
    patience: int = 0,
) -> tuple[dict[str, Tree], Progress]:
    """Train one group from its checkpoint, or from the start, to its end.

    A checkpoint is written after each evaluation, so a killed run repeats at the most the steps
    since the last one, and ends with the same parameters.

    Returns:
      The best `{"trainable", "heads"}` and the final progress.
    """
    state, best, progress = _restore(group, saved)
    listener.group(group.name, progress.step, group.steps)
    if progress.done:
        return best, progress
    progress.untrained = progress.untrained or untrained_scores(group, state.trainable)
    train_step = step.make_train_step(group.setup)
    window = Window(group)
    for batch in data_batches.prefetch(group.batches, progress.step, group.steps):
        state, metrics = train_step(state, group.frozen, batch)
        progress.step += 1
        window.add(metrics)
        evaluate_now = progress.step % group.eval_every == 0 or progress.step == group.steps
        if evaluate_now or window.full:
            record = window.flush(progress)
            log.write(record)
            listener.record(record)
        if not evaluate_now:
            continue
        record = evaluate_group(group, state)
        log.write(record)
        listener.record(record)
        if progress.note(record["score"], record["dev"], patience):
            best = jax.tree.map(jnp.copy, {"trainable": state.trainable, "heads": state.heads})
        progress.done |= progress.step == group.steps
        saved.save(progress.step, {"state": state, "best": best}, dataclasses.asdict(progress))
        window.restart()
        if progress.done:
            break
    return best, progress


def _restore(
    group: Group, saved: checkpoint.GroupCheckpoints
) -> tuple[step.TrainState, dict[str, Tree], Progress]:
    state = group.state
    # A copy: the step takes the state's own memory.
    best = jax.tree.map(jnp.copy, {"trainable": state.trainable, "heads": state.heads})
    found = saved.restore({"state": state, "best": best})
    if found is None:
        return state, best, Progress()
    tree, progress = found
    return tree["state"], tree["best"], Progress(**progress)


class Window:
    """The steps since the last record: their metrics, fetched together, and their time.

    Fetching waits for the device, so it is done once for `LOG_EVERY` steps.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
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

    def flush(self, progress: Progress) -> dict[str, Any]:
        """The record of these steps; adds their time to `progress`.

        Raises:
          UserError: if a loss is not finite.
        """
        metrics = jax.device_get(self._metrics)
        seconds = time.perf_counter() - self._began
        progress.seconds += seconds
        mean = jax.tree.map(lambda *xs: np.mean(np.stack(xs), axis=0), *metrics)
        names = [task.name for task in self._group.setup.tasks]
        if not np.all(np.isfinite([*mean.losses, mean.update_norm])):
            raise UserError(
                f"the loss of {self._group.name} is not finite near step {progress.step}; "
                "lower --learning-rate or --head-learning-rate, in another --out"
            )
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
        self._metrics = []
        self.restart()
        return record


def _pairs(names: list[str], matrix: np.ndarray) -> dict[str, float]:
    return {
        f"{a}-{b}": float(matrix[i, j])
        for i, a in enumerate(names)
        for j, b in enumerate(names)
        if i < j
    }


def predict_splits(
    out: Path, group: Group, best: dict[str, Tree], splits: tuple[str, ...]
) -> dict[str, float]:
    """Write predictions of a group's tasks; returns the scores of the test sets with labels."""
    scores = {}
    for task in group.setup.tasks:
        for split in splits:
            examples = group.data[task.name][split]
            if not len(examples):
                continue
            predictions = predict(group, task, best["trainable"], best["heads"], split)
            path = out / "predictions" / f"{task.name}-{split}.csv"
            shown = [f"{p:.0f}" if task.integer else f"{p:.4f}" for p in predictions]
            rundir.write_predictions(path, examples.ids, shown)
            if split == "test" and examples.labelled:
                scores[task.name] = task.score(predictions, examples.labels)
    return scores


def summarise(
    settings: Settings,
    stored: storage.Storage,
    progress: dict[str, dict[str, Any]],
    test: dict[str, float],
) -> dict[str, Any]:
    """The content of `result.json`."""
    dev: dict[str, float] = {}
    untrained: dict[str, float] = {}
    for group in progress.values():
        dev |= group.pop("best_scores")
        untrained |= group.pop("untrained")
        group["steps_per_second"] = group["step"] / group["seconds"]
    return {
        "variant": settings.variant,
        "preset": settings.preset,
        "source": settings.source,
        "metrics": {name: f"{t.title} {t.metric_name}" for name, t in settings.named.items()},
        "dev": dev,
        "dev_mean": float(np.mean(list(dev.values()))),
        "test": test,
        "untrained": untrained,
        "parameters": stored._asdict(),
        "train_seconds": sum(group["seconds"] for group in progress.values()),
        "groups": progress,
    }
