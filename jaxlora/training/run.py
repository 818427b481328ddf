"""A run: read the inputs, train the groups, write the results."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxlora.data.order import JointOrder
from jaxlora.formats import huggingface
from jaxlora.formats.huggingface import Pretrained
from jaxlora.serving import bank, finished_run
from jaxlora.tasks.evaluation import Evaluation
from jaxlora.tasks.sharing import Groups, group_name
from jaxlora.tasks.task import Task
from jaxlora.training import (
    checkpoint,
    dev_page,
    inputs,
    parameter_count,
    run_folder,
    sharding,
    trained,
)
from jaxlora.training.config import Settings
from jaxlora.training.inputs import Data
from jaxlora.training.loop import Best, Callback, Progress, train_cohort
from jaxlora.training.metrics_log import MetricsLog
from jaxlora.training.predictions import predict_splits
from jaxlora.training.start import Start, fingerprints, load_start
from jaxlora.training.task_group import make_cohort, tuned
from jaxlora.utils import distributed, files
from jaxlora.utils.errors import UserError
from jaxlora.utils.extras import MissingExtraError
from jaxlora.utils.trees import Tree


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """How to execute a run; its `Settings` say what it computes.

    Attributes:
      resume: continue the run in the folder, if there is one.
      predict_test: also write predictions for the test sets.
      strict: refuse tables with blank texts instead of leaving those rows out.
      mesh: devices: "data=4,fsdp=2" splits rows over all eight and the encoder's trees in two;
        auto splits rows over all devices. A run can be resumed on another mesh.
      skip_nonfinite: skip and count steps whose loss is not finite; ten in a row still end the run.
      base_sha256: refuse the base if its weights have another checksum than this; the config.json
        of a run contains it.
    """

    resume: bool = False
    predict_test: bool = True
    strict: bool = False
    mesh: str = "auto"
    skip_nonfinite: bool = False
    base_sha256: str | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits whose predictions are written."""
        return ("dev", "test") if self.predict_test else ("dev",)


def run(
    settings: Settings,
    out: Path,
    callback: Callback,
    options: RunOptions = RunOptions(),
) -> dict[str, Any]:
    """Train all groups of a run, keep the best parameters of each, and write everything to `out`.

    With several processes, call this inside `distributed.together`, so that the others do not wait
    for one that fails.

    Args:
      settings: from `presets.make_settings`.
      out: folder of the run.
      callback: receives the events of the run.
      options: how to run it.

    Returns:
      The content of `result.json`.

    Raises:
      UserError: for bad input, before anything is written; for a loss that is not finite.
      Stopped: after Ctrl-C or SIGTERM, once the state has been saved.
    """
    devices = sharding.make_mesh(options.mesh)
    out = files.local(out)
    checkpoint.check_place(out)
    settings = inputs.fit_to_base(settings)
    run_folder.check(out, settings.to_json(), options.resume)
    base = huggingface.load(settings.model.base, options.base_sha256)
    inputs.check_base(settings, base)
    with distributed.first_before_others("data"):
        data = inputs.load_data(settings, base)
        if options.strict:
            inputs.refuse_blank(settings, data)
    start = load_start(settings, base) if _needs_start(settings, out) else {}
    checksums = inputs.fingerprints(base, data, settings.loop.seed) | fingerprints(start)
    run_folder.check_same_inputs(out, checksums)
    callback.summary(inputs.summarize_run(settings, out, base, data, devices))
    with run_folder.only_run(out):
        run_folder.check(
            out, settings.to_json(), options.resume
        )  # another run may have written there since the first check
        distributed.wait("nothing is written before all have looked")
        if not (out / finished_run.RESULT).exists():
            context = RunContext(settings, base, data, checksums, out, devices, options, start)
            _train(context, callback)
        checkpoint.remove_states(out / run_folder.STATES)
        return run_folder.read_json(out / finished_run.RESULT)


def _states_of(out: Path, groups: Groups) -> Path:
    """Return the folder with the checkpoints of groups that train in one step."""
    return out / run_folder.STATES / group_name([group_name(names) for names in groups])


def _needs_start(settings: Settings, out: Path) -> bool:
    """Return whether `start_from` is set and some groups have no checkpoint yet."""
    if settings.model.start_from is None or (out / finished_run.RESULT).exists():
        return False
    return not all(checkpoint.has_state(_states_of(out, groups)) for groups in settings.cohorts)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RunContext:
    """The inputs, folder and options of a run.

    Attributes:
      checksums: checksums of the base, the data and the start.
      start: initial parameters of the groups; empty if they are fresh or come from checkpoints.
    """

    settings: Settings
    base: Pretrained
    data: Data
    checksums: dict[str, str]
    out: Path
    mesh: Mesh
    options: RunOptions
    start: Start


def _train(context: RunContext, callback: Callback) -> None:
    """Write `config.json`, train, and write `result.json`."""
    out, settings, versions = context.out, context.settings.to_json(), inputs.versions()
    config = {"settings": settings, "inputs": context.checksums, "versions": versions}
    if not finished_run.exists(out):
        run_folder.write_json(out / finished_run.CONFIG, config)
    run_folder.write_json(out / finished_run.RESULT, _train_all(context, callback))
    distributed.wait("the result is written")


def _train_all(context: RunContext, callback: Callback) -> dict[str, Any]:
    """Open the checkpoints and the log, and train all groups."""
    planned = inputs.count_steps(context.settings, context.data)
    with contextlib.ExitStack() as stack:
        saved: dict[Groups, checkpoint.StateCheckpoints] = {}
        steps: dict[str, int] = {}
        for groups in context.settings.cohorts:
            folder = _states_of(context.out, groups)
            states = checkpoint.StateCheckpoints(folder)
            saved[groups] = stack.enter_context(contextlib.closing(states))
            _check_start(context, states)
            own = {name: planned[name] for name in map(group_name, groups)}
            taken = JointOrder((), tuple(own.values())).taken(states.latest_step())
            steps |= zip(own, taken, strict=True)
            for path in states.dropped:
                callback.note(
                    f"{path} was damaged, or not written to its end, and is left out; "
                    f"{folder.name} goes on from step {states.latest_step()}"
                )
        log = stack.enter_context(contextlib.closing(MetricsLog(context.out, steps)))
        return _train_cohorts(context, saved, log, callback)


def _check_start(context: RunContext, states: checkpoint.StateCheckpoints) -> None:
    """Refuse to train from fresh parameters if `start_from` is set and the checkpoint is gone."""
    asked = context.settings.model.start_from
    if asked is not None and not context.start and not states.latest_step():
        raise UserError(f"{context.out}: its checkpoints were deleted just now; resume it again")


def _train_cohorts(
    context: RunContext,
    saved: dict[Groups, checkpoint.StateCheckpoints],
    log: MetricsLog,
    callback: Callback,
) -> dict[str, Any]:
    settings = context.settings
    best: Best = {}
    progress: dict[str, dict[str, Any]] = {}
    test: dict[str, float] = {}
    dev: dict[str, Evaluation] = {}
    for groups, states in saved.items():
        trees, done, scores, own = _train_cohort(context, groups, states, log, callback)
        best, progress, test, dev = best | trees, progress | done, test | scores, dev | own
    result = summarize_result(settings, inputs.count(settings, context.base), progress, test)
    keep_models(context, best, result["dev"], {name: one.task for name, one in dev.items()})
    if distributed.is_primary():
        _write_page(context, dev, callback)
    return result


def _write_page(context: RunContext, dev: Mapping[str, Evaluation], callback: Callback) -> None:
    """Write the page of the dev sets, or a note if Jinja is not installed."""
    path = context.out / dev_page.PAGE
    try:
        dev_page.write(path, context.settings.title, dev, context.data, context.base.tokenizer)
    except MissingExtraError as error:
        callback.note(f"{path} is not written: {error}")


def keep_models(
    context: RunContext,
    best: Mapping[str, Mapping[str, Tree]],
    dev: Mapping[str, float],
    tasks: Mapping[str, Task],
) -> None:
    """Write the trained tasks as a bank into the run's folder, in the primary process only."""
    models = trained.task_models(context.settings, context.checksums, best, dev, tasks)
    if distributed.is_primary():
        bank.write(context.out / finished_run.MODEL, models)


def _refuse_unscored(progress: Mapping[str, Progress]) -> None:
    """Raise an error for a group without any finite score, which has no best parameters."""
    for name, one in progress.items():
        if not one.best_scores:
            raise UserError(
                f"{name}: predictions for its dev set were not finite (NaN) at every evaluation, "
                "so nothing is kept; lower `learning_rate` or `head_learning_rate` in another `out`"
            )


def _train_cohort(
    context: RunContext,
    groups: Groups,
    saved: checkpoint.StateCheckpoints,
    log: MetricsLog,
    callback: Callback,
) -> tuple[Best, dict[str, dict[str, Any]], dict[str, float], dict[str, Evaluation]]:
    """Train groups and write their predictions; nothing of them stays on the devices.

    Predictions use the best tree as it is sharded, so no device has to hold all of it.

    Returns:
      The best trees as NumPy arrays, the progress of each group, the test scores, and the
      evaluations of the dev sets, whose tasks have their final thresholds.
    """
    cohort = make_cohort(
        context.settings, context.base, context.data, groups, context.mesh, context.start
    )
    best, done = train_cohort(cohort, saved, log, callback, context.options.skip_nonfinite)
    _refuse_unscored(done)
    test: dict[str, float] = {}
    dev: dict[str, Evaluation] = {}
    for group in cohort.groups:
        tasks = [tuned(cohort, task, best[group.name]) for task in group.tasks]
        scores, own = predict_splits(
            context.out, cohort, tasks, best[group.name], context.options.splits
        )
        test, dev = test | scores, dev | own
    progress = {name: dataclasses.asdict(one) for name, one in done.items()}
    return distributed.gather(best), progress, test, dev


# Fields of `loop.Progress` that `result.json` merges over groups, or that only training needs.
_NOT_BY_GROUP = ("best_scores", "untrained", "nonfinite_since_log", "nonfinite_in_a_row")


def summarize_result(
    settings: Settings,
    stored: parameter_count.ParameterCount,
    progress: Mapping[str, Mapping[str, Any]],
    test: dict[str, float],
) -> dict[str, Any]:
    """Return the content of `result.json`."""
    dev: dict[str, float] = {}
    untrained: dict[str, float] = {}
    for group in progress.values():
        dev |= group["best_scores"]
        untrained |= group["untrained"]
    errors = [name for name, task in settings.named.items() if not task.greater_is_better]
    return {
        "variant": settings.variant,
        "preset": settings.preset,
        "source": settings.data.source,
        "base": settings.model.base,
        "metrics": {name: f"{t.title} {t.metric_name}" for name, t in settings.named.items()},
        "dev": dev,
        "lower_is_better": errors,
        # A mean of errors and of scores such as accuracy would be meaningless.
        "dev_mean": None if errors else float(np.mean(list(dev.values()))),
        "test": test,
        "untrained": untrained,
        "parameters": stored._asdict(),
        "train_seconds": sum(group["seconds"] for group in progress.values()),
        "groups": {
            name: {key: value for key, value in group.items() if key not in _NOT_BY_GROUP}
            for name, group in progress.items()
        },
    }
