"""Groups of tasks that train in one step, with all that training and evaluation need."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxlora.data import batches as data_batches
from jaxlora.data.batches import Batch, PackedBatches, VectorBatches
from jaxlora.data.order import JointOrder, make_order
from jaxlora.data.tokenized import Examples
from jaxlora.formats.huggingface import Pretrained
from jaxlora.nn.encode import Encode, PackedTokens, make_encode
from jaxlora.serving import inference
from jaxlora.tasks.sharing import Groups, group_name
from jaxlora.tasks.task import Task
from jaxlora.training import optimizer, sharding
from jaxlora.training.adaptation import Vectors
from jaxlora.training.config import Settings
from jaxlora.training.inputs import Data, count_steps
from jaxlora.training.start import Start, begin
from jaxlora.training.step import CompiledStep, GroupStep, TrainState, TrainStep, make_train_step
from jaxlora.utils.trees import Tree

# Number of compiled train steps in a run. Groups that train one after another share this number,
# with at least one for each. A long run may add one, see `batches.choose_batch_shapes`.
MOST_PROGRAMS = 3


@dataclasses.dataclass(frozen=True)
class TaskGroup:
    """A group of tasks that share one trainable tree.

    Attributes:
      name: see `sharing.group_name`.
      tasks: the tasks, in the order of the task axis.
      steps: number of steps that the group takes.
      eval_every: number of these steps between evaluations.
      patience: evaluations without a better score after which the group ends; 0: never.
      rates: learning rate of each update, for `encoder` (if it is trained) and `heads`.
    """

    name: str
    tasks: tuple[Task, ...]
    steps: int
    eval_every: int
    patience: int
    rates: Mapping[str, np.ndarray] = dataclasses.field(compare=False)

    def rates_at(self, updates: int) -> dict[str, float]:
        """Return the learning rates of the last of `updates` updates."""
        return {name: float(rates[max(0, updates - 1)]) for name, rates in self.rates.items()}

    def evaluates_at(self, step: int) -> bool:
        """Return whether the group is evaluated after `step` steps."""
        return step == self.steps or step % self.eval_every == 0


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Cohort:
    """Groups that train in one step, with all that training and evaluation need.

    Attributes:
      groups: the groups, in the order of `train_step.groups`.
      train_step: their train step.
      frozen: the frozen collections, on the devices.
      keys: group → PRNG key of its initial state.
      params: pretrained parameters of the base.
      batches: training batches, indexed by step.
      vectors: encodes a split: `(trainable, task, split) → f32[sentences, H]`.
      data: task → split → examples.
      mesh: the devices.
      start: initial parameters of groups that do not start from fresh ones.
    """

    groups: tuple[TaskGroup, ...]
    train_step: TrainStep
    frozen: Tree
    keys: dict[str, jax.Array]
    params: Tree
    batches: PackedBatches | VectorBatches
    vectors: Vectors
    data: Data
    mesh: Mesh
    start: Start = dataclasses.field(default_factory=dict)

    @property
    def states(self) -> dict[str, TrainState]:
        """The initial states, created at each access, so that only the caller holds them."""
        with sharding.on_host():
            states = begin(self.train_step.init(self.keys, self.params), self.start)
        return sharding.put(states, self._shardings(states))

    @functools.cached_property
    def state_shapes(self) -> dict[str, TrainState]:
        """The shapes, dtypes and shardings of the states."""
        shapes = jax.eval_shape(self.train_step.init, self.keys, self.params)
        placed: dict[str, TrainState] = sharding.shapes_at(shapes, self._shardings(shapes))
        return placed

    def _shardings(self, states: dict[str, TrainState]) -> dict[str, TrainState]:
        return {name: sharding.of_state(self.mesh, state) for name, state in states.items()}

    def compile(self) -> CompiledStep:
        """Return the compiled step, see `TrainStep.compile`."""
        states = jax.tree.map(lambda x: x.sharding, self.state_shapes)
        return self.train_step.compile((states, sharding.replicated(self.mesh)))

    def place(self, batch: Batch) -> Batch:
        """Put a batch on the devices."""
        return sharding.put(batch, sharding.of_batch(self.mesh, batch))

    def prefetch(self, start: int, stops: tuple[int, ...] = ()) -> Iterator[tuple[int, Batch]]:
        """Yield `(step, batch)` from a step on, with batches on the devices.

        Args:
          start: the first step.
          stops: number of its own steps after which each group ends; empty: as planned.
        """
        order = dataclasses.replace(self.batches.order, stops=stops)
        return data_batches.prefetch(
            dataclasses.replace(self.batches, order=order), start, self.place
        )


def make_cohort(
    settings: Settings,
    base: Pretrained,
    data: Data,
    groups: Groups,
    mesh: Mesh,
    start: Start = MappingProxyType({}),
) -> Cohort:
    """Build a cohort: train step, frozen parameters, order of examples, and packing."""
    data = {name: data[name] for group in groups for name in group}
    settings = _with_weights(settings, data)
    train = {name: splits["train"] for name, splits in data.items()}
    steps = count_steps(settings, data, groups)
    train_step = make_cohort_step(settings, base, steps, groups)
    with sharding.on_host():
        frozen = train_step.freeze(base.params)
    frozen = sharding.put(frozen, sharding.of_tree(mesh, frozen))
    order = _joint_order(settings, train, groups, steps)
    live = live_vectors(train_step.encode, frozen, data, settings.model.max_length, mesh)
    vectors = train_step.adaptation.vectors(live)
    block = train_step.adaptation.block(len(groups))
    programs = max(1, MOST_PROGRAMS // len(settings.cohorts))

    def pack(mixed: bool) -> PackedBatches:
        return data_batches.choose_batch_shapes(
            train, order, settings.model.max_length, programs, mixed, mesh.size, block
        )

    made = tuple(
        _make_task_group(settings, names, number, own.steps_per_epoch)
        for names, number, own in zip(groups, order.counts, order.orders, strict=True)
    )
    return Cohort(
        groups=made,
        train_step=train_step,
        frozen=frozen,
        keys={group.name: named_key(settings.loop.seed, group.name) for group in made},
        params=base.params,
        batches=train_step.adaptation.batches(train, order, vectors, pack),
        vectors=vectors,
        data=data,
        mesh=mesh,
        start=start,
    )


def _with_weights(settings: Settings, data: Data) -> Settings:
    """Compute the class weights of all tasks from their labels, see `Task.weighted`."""
    specs = tuple(
        dataclasses.replace(
            spec, task=spec.task.weighted(data[spec.task.name]["train"].labels)
        ) if spec.task.name in data else spec
        for spec in settings.tasks
    )  # fmt: skip
    return dataclasses.replace(settings, tasks=specs)


def _joint_order(
    settings: Settings, train: Mapping[str, Examples], groups: Groups, steps: Mapping[str, int]
) -> JointOrder:
    """Return the order in which the groups draw their examples."""
    loop, sizes = settings.loop, [{name: len(train[name]) for name in group} for group in groups]
    orders = tuple(make_order(own, loop.batch_size, loop.seed) for own in sizes)
    return JointOrder(orders, tuple(steps.values()))


def _make_task_group(
    settings: Settings, names: tuple[str, ...], steps: int, steps_per_epoch: int
) -> TaskGroup:
    own = settings.of_group(names)
    loop, rates = own.loop, optimizer.rates_by_step(own.optimizer, steps)
    if not settings.adaptation.trains_encoder:
        del rates["encoder"]
    return TaskGroup(
        name=group_name(names),
        tasks=tuple(settings.named[name] for name in names),
        steps=steps,
        eval_every=loop.eval_every or -(-steps_per_epoch // 4),
        patience=loop.patience,
        rates=rates,
    )


def make_cohort_step(
    settings: Settings, base: Pretrained, steps: dict[str, int], groups: Groups
) -> TrainStep:
    """Build the train step of several groups.

    Args:
      settings: settings of the run.
      base: the base.
      steps: group → number of steps, for the learning rate schedules.
      groups: names of the tasks of each group.
    """
    return make_train_step(
        {group_name(names): _make_group_step(settings, names, steps) for names in groups},
        base.config.with_dropout(settings.model.encoder_dropout),
        settings.adaptation,
        dtype=jnp.dtype(settings.dtype),
        pooling=settings.model.pooling,
        pair_features=settings.model.pair_features,
    )


def _make_group_step(
    settings: Settings, names: tuple[str, ...], steps: dict[str, int]
) -> GroupStep:
    weights = {spec.task.name: spec.weight for spec in settings.tasks}
    chain, head_chain = optimizer.from_config(
        settings.of_group(names).optimizer, len(names), steps[group_name(names)], settings.loop.seed
    )
    return GroupStep(
        tasks=tuple(settings.named[name] for name in names),
        tx=chain,
        head_tx=head_chain,
        weights=tuple(weights[name] for name in names),
    )


def named_key(seed: int, name: str) -> jax.Array:
    """Return a PRNG key that depends only on a seed and a name."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def live_vectors(encode: Encode, frozen: Tree, data: Data, max_length: int, mesh: Mesh) -> Vectors:
    """Return a function that encodes a split at every call."""
    compiled = make_encode(encode, sharding.replicated(mesh))

    def encode_rows(frozen: Tree, trainable: Tree, rows: PackedTokens) -> jax.Array:
        return compiled(frozen, trainable, sharding.put(rows, sharding.of_rows(mesh, rows)))

    def vectors(trainable: Tree, task: str, split: str) -> np.ndarray:
        return inference.encode(
            encode_rows, frozen, trainable, data[task][split], max_length, few_programs=True
        )

    return vectors


def evaluate_group(cohort: Cohort, group: TaskGroup, state: TrainState) -> dict[str, Any]:
    """Evaluate a group on dev: metric and loss of each task, and the mean `Task.gain` as score."""
    scores, losses = {}, {}
    for task in group.tasks:
        dev = cohort.data[task.name]["dev"]
        found = outputs(cohort, task, state.trainable, state.heads, "dev")
        tuned = task.tuned(found, dev.labels)
        scores[task.name] = tuned.score(inference.decode(tuned, found), dev.labels)
        losses[task.name] = float(np.mean(inference.losses(task, found, dev.labels)))
    return {
        "kind": "eval",
        "group": group.name,
        "step": int(state.step),
        "dev": scores,
        "dev_loss": losses,
        "score": float(np.mean([task.gain(scores[task.name]) for task in group.tasks])),
    }


def tuned(cohort: Cohort, task: Task, best: dict[str, Tree]) -> Task:
    """Choose the thresholds of a task on its dev set, if it tunes them, see `Task.tuned`."""
    if not task.tune_thresholds:
        return task
    found = outputs(cohort, task, best["trainable"], best["heads"], "dev")
    return task.tuned(found, cohort.data[task.name]["dev"].labels)


def outputs(
    cohort: Cohort, task: Task, trainable: Tree, heads: dict[str, Tree], split: str
) -> np.ndarray:
    """Return the outputs of a task's head for a split, see `inference.outputs`."""
    vectors = cohort.vectors(trainable, task.name, split)
    return inference.outputs(task, heads[task.name], vectors, cohort.train_step.pair_features)


def untrained_scores(cohort: Cohort, group: TaskGroup, trainable: Tree) -> dict[str, float]:
    """Return dev scores without training, from the group's initial tree (the base's vectors)."""
    return {
        task.name: inference.untrained(
            task, cohort.data[task.name]["dev"], cohort.vectors(trainable, task.name, "dev")
        )
        for task in group.tasks
    }
