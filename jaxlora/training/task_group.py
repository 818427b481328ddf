"""One group of tasks, assembled and ready to train, evaluate and predict."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxlora.data import batches as data_batches
from jaxlora.data.batches import Batch, PackedBatches, VectorBatches
from jaxlora.formats.huggingface import Pretrained
from jaxlora.nn.bert import EncoderConfig
from jaxlora.nn.encode import Encode, PackedTokens, make_encode
from jaxlora.serving import inference
from jaxlora.tasks.sharing import group_name
from jaxlora.tasks.task import Task
from jaxlora.training import optimizer, sharding
from jaxlora.training.adaptation import Vectors
from jaxlora.training.config import Settings
from jaxlora.training.inputs import Data, make_steps
from jaxlora.training.step import CompiledStep, TrainState, TrainStep, make_train_step
from jaxlora.utils.trees import Tree

# Compiled train programs in a run, or one for each group if there are more (a long run may have
# one more, see `batches.choose_batch_shapes`).
MOST_PROGRAMS = 3


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TaskGroup:
    """One group of tasks, ready to train.

    Attributes:
      name: see `sharing.group_name`.
      train_step: its step.
      frozen: the frozen collections.
      key: PRNG key of its first state.
      params: the base's parameters.
      batches: indexable by step.
      steps: how many there are.
      eval_every: steps between evaluations.
      vectors: `(trainable, task, split) → f32[sentences, H]`.
      data: its tasks' examples.
      mesh: the devices it runs on.
    """

    name: str
    train_step: TrainStep
    frozen: Tree
    key: jax.Array
    params: Tree
    batches: PackedBatches | VectorBatches
    steps: int
    eval_every: int
    vectors: Vectors
    data: Data
    mesh: Mesh

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Its tasks."""
        return self.train_step.tasks

    @property
    def state(self) -> TrainState:
        """Its first state, made at each call, so that only the caller holds it."""
        with sharding.on_host():
            state = self.train_step.init(self.key, self.params)
        return sharding.put(state, sharding.of_state(self.mesh, state))

    @functools.cached_property
    def state_shapes(self) -> TrainState:
        """The shapes of its state, and where it lives."""
        shapes = jax.eval_shape(self.train_step.init, self.key, self.params)
        placed: TrainState = sharding.shapes_at(shapes, sharding.of_state(self.mesh, shapes))
        return placed

    def compile(self) -> CompiledStep:
        """Return its compiled step, see `TrainStep.compile`."""
        state = jax.tree.map(lambda x: x.sharding, self.state_shapes)
        return self.train_step.compile((state, sharding.replicated(self.mesh)))

    def place(self, batch: Batch) -> Batch:
        """Put a batch on its devices."""
        return sharding.put(batch, sharding.of_batch(self.mesh, batch))

    def prefetch(self, start: int) -> Iterator[Batch]:
        """Yield its batches from a step on, on their devices."""
        return data_batches.prefetch(self.batches, start, self.steps, self.place)


def make_task_group(
    settings: Settings, base: Pretrained, data: Data, names: tuple[str, ...], mesh: Mesh
) -> TaskGroup:
    """Assemble a group: its step, its parameters, its order and its packing."""
    programs = max(1, MOST_PROGRAMS // len(settings.groups))
    settings, mine = settings.of_group(names), {name: data[name] for name in names}
    train = {name: splits["train"] for name, splits in mine.items()}
    steps = make_steps(settings, train)
    train_step = make_group_step(settings, base.config, names, steps)
    with sharding.on_host():
        frozen = train_step.freeze(base.params)
    frozen = sharding.put(frozen, sharding.of_tree(mesh, frozen))
    sizes = {name: len(examples) for name, examples in train.items()}
    order = data_batches.make_order(sizes, settings.loop.batch_size, settings.loop.seed)
    live = live_vectors(train_step.encode, frozen, mine, settings.model.max_length, mesh)
    vectors = train_step.adaptation.vectors(live)

    def pack(mixed: bool) -> PackedBatches:
        return data_batches.choose_batch_shapes(
            train, order, steps, settings.model.max_length, programs, mixed, mesh.size
        )

    batches = train_step.adaptation.batches(train, order, vectors, pack)
    name, eval_every = group_name(names), settings.loop.eval_every or -(-order.steps_per_epoch // 4)
    key = named_key(settings.loop.seed, name)
    return TaskGroup(
        name, train_step, frozen, key, base.params, batches, steps, eval_every, vectors, mine, mesh
    )


def make_group_step(
    settings: Settings, config: EncoderConfig, names: tuple[str, ...], steps: int
) -> TrainStep:
    """Return the train step of a group.

    Args:
      settings: the group's.
      config: the base's.
      names: the group's tasks.
      steps: how many will be taken, for the learning rates.
    """
    weights = {spec.task.name: spec.weight for spec in settings.tasks}
    return make_train_step(
        tuple(settings.named[name] for name in names),
        config.with_dropout(settings.model.encoder_dropout),
        settings.adaptation,
        optimizer.from_config(settings.optimizer, len(names), steps, settings.loop.seed),
        dtype=jnp.dtype(settings.dtype),
        pooling=settings.model.pooling,
        pair_features=settings.model.pair_features,
        weights=tuple(weights[name] for name in names),
    )


def named_key(seed: int, name: str) -> jax.Array:
    """A PRNG key that depends on the seed and a name alone."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def live_vectors(encode: Encode, frozen: Tree, data: Data, max_length: int, mesh: Mesh) -> Vectors:
    """Return a function that encodes a split each time it is called."""
    compiled = make_encode(encode, sharding.replicated(mesh))

    def encode_rows(frozen: Tree, trainable: Tree, rows: PackedTokens) -> jax.Array:
        return compiled(frozen, trainable, sharding.put(rows, sharding.of_rows(mesh, rows)))

    def vectors(trainable: Tree, task: str, split: str) -> np.ndarray:
        return inference.encode(encode_rows, frozen, trainable, data[task][split], max_length)

    return vectors


def evaluate_group(group: TaskGroup, state: TrainState) -> dict[str, Any]:
    """The dev record of a group: each task's metric, and their mean as the score."""
    scores = {}
    for task in group.tasks:
        dev = group.data[task.name]["dev"]
        found = outputs(group, task, state.trainable, state.heads, "dev")
        scores[task.name] = task.score(inference.decode(task, found), dev.labels)
    return {
        "kind": "eval",
        "group": group.name,
        "step": int(state.step),
        "dev": scores,
        "score": float(np.mean(list(scores.values()))),
    }


def outputs(
    group: TaskGroup, task: Task, trainable: Tree, heads: dict[str, Tree], split: str
) -> np.ndarray:
    """What a task's head says of one split, see `inference.outputs`."""
    vectors = group.vectors(trainable, task.name, split)
    return inference.outputs(
        task, heads[task.name], vectors, task.sentences, group.train_step.pair_features
    )


def untrained_scores(group: TaskGroup, trainable: Tree) -> dict[str, float]:
    """Dev scores that need no training, from the group's first tree (the base's own vectors)."""
    return {
        task.name: inference.untrained(
            task, group.data[task.name]["dev"], group.vectors(trainable, task.name, "dev")
        )
        for task in group.tasks
    }
