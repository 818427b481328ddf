"""One group of tasks, assembled and ready to train, evaluate and predict."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxlora.data import batches as data_batches
from jaxlora.data.batches import Batch
from jaxlora.formats.huggingface import Pretrained
from jaxlora.nn.encode import Encode, PackedTokens, encoder, make_encode
from jaxlora.serving import inference
from jaxlora.tasks.sharing import group_name
from jaxlora.tasks.task import Task
from jaxlora.training import optimizer, sharding, step
from jaxlora.training.config import Settings
from jaxlora.training.inputs import Data, make_steps
from jaxlora.utils.trees import Tree

# Compiled train programs in a run, or one for each group if there are more (a long run may have
# one more, see `batches.choose_batch_shapes`).
MOST_PROGRAMS = 3

Vectors = Callable[[Tree, str, str], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TaskGroup:
    """One group of tasks, ready to train.

    Attributes:
      name: see `sharing.group_name`.
      setup: its tasks and optimizers.
      frozen: the frozen collections.
      start: makes its first state, from the base's parameters.
      params: those.
      batches: indexable by step.
      steps: how many there are.
      eval_every: steps between evaluations.
      vectors: `(trainable, task, split) → f32[sentences, H]`.
      data: its tasks' examples.
      mesh: the devices it runs on.
    """

    name: str
    setup: step.Setup
    frozen: Tree
    start: Callable[[Tree], step.TrainState]
    params: Tree
    batches: data_batches.PackedBatches | data_batches.VectorBatches
    steps: int
    eval_every: int
    vectors: Vectors
    data: Data
    mesh: Mesh

    @property
    def state(self) -> step.TrainState:
        """Its first state, made at each call: whoever wants it alone holds it."""
        with sharding.on_host():
            state = self.start(self.params)
        return sharding.put(state, sharding.of_state(self.mesh, state))

    @functools.cached_property
    def state_shapes(self) -> step.TrainState:
        """The shapes of its state, and where it lives."""
        shapes = jax.eval_shape(self.start, self.params)
        placed: step.TrainState = sharding.shapes_at(shapes, sharding.of_state(self.mesh, shapes))
        return placed

    def train_step(self) -> Callable[..., tuple[step.TrainState, step.StepMetrics]]:
        """Its compiled step, see `step.make_train_step`."""
        state = jax.tree.map(lambda x: x.sharding, self.state_shapes)
        shardings = (state, sharding.replicated(self.mesh))
        return step.make_train_step(self.setup, shardings)

    def place(self, batch: Batch) -> Batch:
        """A batch, on its devices."""
        return sharding.put(batch, sharding.of_batch(self.mesh, batch))

    def prefetch(self, start: int) -> Iterator[Batch]:
        """Its batches from a step on, on their devices."""
        return data_batches.prefetch(self.batches, start, self.steps, self.place)


def make_task_group(
    settings: Settings, base: Pretrained, data: Data, names: tuple[str, ...], mesh: Mesh
) -> TaskGroup:
    """Assemble a group: its parameters, its order, its packing and its optimizers."""
    dtype = jnp.dtype(settings.dtype)
    settings = settings.of_group(names)
    chosen = tuple(settings.named[name] for name in names)
    name = group_name(names)
    tree_key, state_key = jax.random.split(named_key(settings.seed, name))
    with sharding.on_host():
        frozen = step.frozen_params(settings.adapt, base.params, dtype)
    frozen = sharding.put(frozen, sharding.of_tree(mesh, frozen))
    config = base.config.with_dropout(settings.encoder_dropout)
    encode = encoder(config, dtype, settings.lora, settings.pooling)
    mine = {n: data[n] for n in names}
    train = {n: splits["train"] for n, splits in mine.items()}
    sizes = {n: len(examples) for n, examples in train.items()}
    steps = make_steps(settings, train)
    order = data_batches.make_order(sizes, settings.batch_size, settings.seed)
    vectors = live_vectors(encode, frozen, mine, settings.max_length, mesh)
    batches: data_batches.PackedBatches | data_batches.VectorBatches
    if settings.adapt == "frozen":
        vectors = cached_vectors(vectors)
        ready = {n: vectors({}, n, "train") for n in names}
        batches = data_batches.VectorBatches(train, order, ready)
    else:
        most, mixed = max(1, MOST_PROGRAMS // len(settings.groups)), settings.adapt == "lora"
        batches = data_batches.choose_batch_shapes(
            train, order, steps, settings.max_length, most, mixed, mesh.size
        )
    rate = functools.partial(
        optimizer.schedule, steps=steps, warmup=settings.warmup_steps, decay=settings.schedule
    )
    weights = {d.task.name: d.weight for d in settings.tasks}
    setup = step.Setup(
        chosen,
        step.task_encoder(settings.adapt, encode, len(chosen)),
        *optimizer.optimizers(
            len(chosen),
            rate(settings.learning_rate),
            rate(settings.head_learning_rate),
            clip=settings.clip,
            weight_decay=settings.weight_decay,
            seed=settings.seed,
            lora_plus_ratio=settings.lora_plus_ratio,
            surgery=settings.surgery == "pcgrad",
        ),
        base.config.hidden_size,
        settings.pair_features,
        weights=tuple(weights[name] for name in names),
    )

    def start(params: Tree) -> step.TrainState:
        trainable = step.trainable_params(settings.adapt, params, settings.lora, tree_key)
        return step.init_state(setup, trainable, state_key)

    eval_every = settings.eval_every or -(-order.steps_per_epoch // 4)
    return TaskGroup(
        name, setup, frozen, start, base.params, batches, steps, eval_every, vectors, mine, mesh
    )


def named_key(seed: int, name: str) -> jax.Array:
    """A PRNG key that depends on the seed and a name alone."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def live_vectors(encode: Encode, frozen: Tree, data: Data, max_length: int, mesh: Mesh) -> Vectors:
    """Encode a split anew at each call."""
    compiled = make_encode(encode, sharding.replicated(mesh))

    def encode_rows(frozen: Tree, trainable: Tree, rows: PackedTokens) -> jax.Array:
        return compiled(frozen, trainable, sharding.put(rows, sharding.of_rows(mesh, rows)))

    def vectors(trainable: Tree, task: str, split: str) -> np.ndarray:
        return inference.encode(encode_rows, frozen, trainable, data[task][split], max_length)

    return vectors


def cached_vectors(live: Vectors) -> Vectors:
    """Encode a split when it is first asked for, and keep it: this encoder never changes."""
    table = functools.cache(lambda task, split: live({}, task, split))
    return lambda trainable, task, split: table(task, split)


def evaluate_group(group: TaskGroup, state: step.TrainState) -> dict[str, Any]:
    """The dev record of a group: each task's metric, and their mean as the score."""
    scores = {}
    for task in group.setup.tasks:
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
        task, heads[task.name], vectors, task.sentences, group.setup.pair_features
    )


def untrained_scores(group: TaskGroup, trainable: Tree) -> dict[str, float]:
    """Dev scores that need no training, from the group's first tree (the base's own vectors)."""
    return {
        task.name: inference.untrained(
            task, group.data[task.name]["dev"], group.vectors(trainable, task.name, "dev")
        )
        for task in group.setup.tasks
    }
