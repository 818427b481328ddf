"""Which tasks to train together, judged by their gradients in a run that shares parameters.

Shapes: T tasks.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

from jaxlora.data.batches import Batch
from jaxlora.formats import huggingface
from jaxlora.serving import bank, finished_run
from jaxlora.tasks.sharing import Groups, group_name
from jaxlora.training import inputs, sharding
from jaxlora.training.config import Settings
from jaxlora.training.metrics_log import read_records
from jaxlora.training.step import TrainState, TrainStep
from jaxlora.training.task_group import make_cohort
from jaxlora.utils.errors import ConfigError, UserError
from jaxlora.utils.trees import Tree

BLOCKS = 20  # most consecutive parts of a run; their means are assumed to be independent
LEVEL = 0.95
MOST_ENUMERATED = 8  # number of tasks up to which all partitions (4,140) are compared


@dataclasses.dataclass(frozen=True)
class Affinity:
    """Cosine similarities between the gradients of tasks that were trained together.

    Attributes:
      tasks: names of the tasks.
      mean: `f64[T, T]`, mean cosines over the steps of a run; NaN for tasks that shared nothing.
      low, high: `f64[T, T]`, ends of the 95 % intervals of the means.
    """

    tasks: tuple[str, ...]
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def measure(run: Path) -> Affinity:
    """Read the cosines between the tasks' gradients from the log of a run.

    Successive steps are correlated, so the intervals come from the means of up to `BLOCKS`
    consecutive parts of the run (batch means with Student's t).

    Raises:
      UserError: if no tasks share parameters in this run, or its log is too short.
    """
    settings = read_settings(run)
    tasks = tuple(settings.named)
    series = _series(read_records(run), settings)
    if not series and any(len(group) > 1 for group in settings.groups):
        raise UserError(f"{run}: its log has no step of tasks in one group yet; train it longer")
    if not series:
        raise UserError(
            f"{run}: no tasks share parameters in this run; train some together for a while, for "
            "example all of them in one of the `groups`"
        )
    mean, low, high = (np.full((len(tasks),) * 2, np.nan) for _ in range(3))
    for (first, second), means in series.items():
        if len(means) < 2:
            raise UserError(
                f"{run}: its log has only one record of {first} and {second}; train it longer"
            )
        found = interval(means)
        for a, b in itertools.permutations((tasks.index(first), tasks.index(second))):
            low[a, b], mean[a, b], high[a, b] = found
    for matrix in (mean, low, high):
        np.fill_diagonal(matrix, 1.0)
    return Affinity(tasks, mean, low, high)


def _series(
    records: Sequence[Mapping[str, Any]], settings: Settings
) -> dict[tuple[str, str], list[tuple[float, int]]]:
    """Return the mean cosine of each pair in every record, and its steps since the last record."""
    groups = {group_name(names): names for names in settings.groups}
    series: dict[tuple[str, str], list[tuple[float, int]]] = {}
    last = dict.fromkeys(groups, 0)
    for record in (r for r in records if r["kind"] == "train"):
        steps = record["step"] - last[record["group"]]
        last[record["group"]] = record["step"]
        for pair in itertools.combinations(groups[record["group"]], 2):
            found = record["cosine"]
            cosine = found.get("+".join(pair), found.get("-".join(pair)))  # "-" in earlier logs
            if np.isfinite(cosine):  # a gradient of 0 has no direction
                series.setdefault(pair, []).append((cosine, steps))
    return series


def interval(means: Sequence[tuple[float, int]]) -> tuple[float, float, float]:
    """Return the lower end, the mean and the upper end of its interval, by batch means.

    Parts are made of whole records: steps of one record share its mean, so they would look alike.

    Args:
      means: the mean of each record and its number of steps.

    >>> [round(x, 3) for x in interval([(0.1, 10), (0.3, 10)] * 40)]
    [0.2, 0.2, 0.2]
    """
    parts = np.array_split(np.array(means), min(BLOCKS, len(means)))
    sums, steps = np.array([(part[:, 0] @ part[:, 1], part[:, 1].sum()) for part in parts]).T
    mean = sums.sum() / steps.sum()
    # Parts may differ in their steps, so this is the error of a ratio; of equal ones, of a mean.
    error = np.std(sums - mean * steps, ddof=1) * math.sqrt(len(parts)) / steps.sum()
    half = stats.t.ppf((1 + LEVEL) / 2, len(parts) - 1) * error
    return float(mean - half), float(mean), float(mean + half)


def propose_groups(tasks: Sequence[str], mean: np.ndarray) -> Groups:
    """Return the partition of the tasks with the largest sum of cosines within groups.

    For up to `MOST_ENUMERATED` tasks, all partitions are compared. For more, the search is greedy:
    the two groups with the largest positive sum are merged until none is left. Pairs that shared
    nothing count as 0.

    >>> cosines = np.array([[1.0, 0.3, -0.2], [0.3, 1.0, 0.1], [-0.2, 0.1, 1.0]])
    >>> propose_groups(("a", "b", "c"), cosines)
    (('a', 'b'), ('c',))
    """
    gain = np.nan_to_num(mean)
    numbers = tuple(range(len(tasks)))
    if len(tasks) <= MOST_ENUMERATED:
        best = max(_partitions(numbers), key=lambda groups: _within(groups, gain))
    else:
        best = _joined([(n,) for n in numbers], gain)
    return tuple(tuple(tasks[n] for n in group) for group in best)


Parts = Sequence[tuple[int, ...]]


def _within(groups: Parts, gain: np.ndarray) -> float:
    return sum(float(gain[a, b]) for group in groups for a, b in itertools.combinations(group, 2))


def _partitions(numbers: tuple[int, ...]) -> Iterator[Parts]:
    """Yield all partitions; all singletons come first, so that they win a tie."""
    if not numbers:
        yield []
        return
    first, rest = numbers[0], numbers[1:]
    for groups in _partitions(rest):
        yield [(first,), *groups]
        for n, group in enumerate(groups):
            yield [*groups[:n], (first, *group), *groups[n + 1 :]]


def _joined(groups: list[tuple[int, ...]], gain: np.ndarray) -> Parts:
    while True:
        found = [
            (float(gain[np.ix_(a, b)].sum()), a, b) for a, b in itertools.combinations(groups, 2)
        ]
        most, a, b = max(found, default=(0.0, (), ()))
        if most <= 0:
            return groups
        groups = [group for group in groups if group not in (a, b)] + [tuple(sorted(a + b))]


# ---- how a step on one task affects the others


def look_ahead(run: Path, batches: int = 20) -> np.ndarray:
    """Measure how a step on each task alone changes the loss of every task.

    A step against the gradient of task i, from the run's best parameters, changes the loss of task
    j on the same batch from `L_j` to `L_j'`. The step is as long as the mean step of the run. The
    result is `1 − L_j' / L_j`; if it is positive, task i helps task j (Fifty et al. 2021,
    "Efficiently Identifying Task Groupings for Multi-Task Learning", equation 1).

    Args:
      run: folder of a finished run whose tasks all share one tree.
      batches: number of training batches to average over.

    Returns:
      `f32[T, T]`: row i, column j, in the order of the tasks in the settings.

    Raises:
      UserError: if the tasks do not share one tree, or the run is not finished.
    """
    settings = read_settings(run)
    if batches < 1:
        raise ConfigError("batches", "must be at least 1", batches)
    if len(settings.groups) != 1 or not settings.adaptation.trains_encoder:
        raise UserError(f"{run}: its tasks do not share one trained tree; take a run of lora3")
    trained, base = bank.load(run), huggingface.load(settings.model.base)
    data = inputs.load_data(settings, base)
    cohort = make_cohort(settings, base, data, settings.groups, sharding.make_mesh("data=1"))
    name = group_name(settings.groups[0])
    (tree,) = trained.trees.values()
    heads = {task: one.head for task, one in trained.models.items()}
    state = dataclasses.replace(cohort.states[name], trainable=tree, heads=heads)
    lengths = [r["update_norm"] for r in read_records(run) if r["kind"] == "train"]
    effect = jax.jit(
        lambda state, batch: _effect(
            cohort.train_step, state, cohort.frozen, batch, float(np.mean(lengths))
        )
    )
    steps = itertools.islice(cohort.prefetch(0), batches)
    mean = np.mean([np.asarray(effect(state, batch)) for _, batch in steps], 0)
    order = [settings.groups[0].index(task) for task in settings.named]
    return np.asarray(mean[np.ix_(order, order)])


def _effect(
    step: TrainStep, state: TrainState, frozen: Tree, batch: Batch, length: float
) -> jax.Array:
    before, (grads,), _ = step.gradients([state], frozen, batch)

    def after(grad: Tree) -> jax.Array:
        norm = optax.tree.norm(grad)
        scale = jnp.where(norm > 0, -length / norm, 0)  # no step for a gradient of 0
        moved = jax.tree.map(lambda x, g: x + scale * g, state.trainable, grad)
        return step.task_losses([dataclasses.replace(state, trainable=moved)], frozen, batch)

    return 1 - jax.lax.map(after, grads) / before[None]


def read_settings(run: Path) -> Settings:
    """Read the settings of a run.

    Raises:
      UserError: if the folder holds no run, or its settings cannot be read.
    """
    return Settings.from_json(finished_run.read_config(run)["settings"])
