"""The train step of all variants: K ≥ 1 groups of tasks, T ≥ K tasks in total.

One backward pass computes the gradient of each task with respect to its group's trainable tree.
These gradients have a leading task axis. An optax chain that begins with a gradient aggregator,
such as PCGrad, combines them. A head belongs to one task, so its gradient goes directly to the
heads' optimizer. Groups share only the pass: each has its own state, optimizers and step count. (If
activations of one overflow in the pass, the updates of the others may not be finite either.)

Shapes: T tasks, R rows, S tokens per row, N sentences and B examples per task, H hidden size.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxlora.data.batches import Batch
from jaxlora.nn.bert import EncoderConfig
from jaxlora.nn.encode import Encode, encoder
from jaxlora.tasks import losses
from jaxlora.tasks.task import Task
from jaxlora.training.adaptation import Adaptation
from jaxlora.utils import trees
from jaxlora.utils.trees import Tree

CompiledStep = Callable[
    [dict[str, "TrainState"], Tree, Batch], tuple[dict[str, "TrainState"], dict[str, "StepMetrics"]]
]


@struct.dataclass
class TrainState:
    """The complete training state of a group; with the frozen base, it suffices to resume.

    Attributes:
      step: `i32[]`, number of steps taken.
      trainable: the group's encoder tree: `{}`, `{"lora": …}` or `{"params": …}`.
      heads: head parameters by task.
      opt_state: state of the encoder's optimizer chain, the aggregator's first.
      head_opt_state: state of the heads' optimizer.
      key: PRNG key; step k uses `fold_in(key, k)`, so it draws the same numbers after a resume.
    """

    step: jax.Array
    trainable: Tree
    heads: dict[str, Tree]
    opt_state: optax.OptState
    head_opt_state: optax.OptState
    key: jax.Array


class StepMetrics(NamedTuple):
    """Metrics of a step for one group, in which T is the number of its tasks.

    Attributes:
      losses: `f32[T]`, mean loss of each task, without its factor.
      grad_norm: `f32[]`, norm of the encoder's combined gradient before clipping; NaN if the
        optimizer does not store it, see `optimizer.clip_by_global_norm`.
      head_grad_norm: `f32[]`, norm of the heads' gradients.
      update_norm: `f32[]`, norm of the encoder's update.
      conflicts: `i32[]`, number of pairs of tasks whose gradients conflict.
      cosines: `f32[T, T]`, cosines between the tasks' gradients.
      finite: `bool[]`; if False, the step changed no parameters.
    """

    losses: jax.Array
    grad_norm: jax.Array
    head_grad_norm: jax.Array
    update_norm: jax.Array
    conflicts: jax.Array
    cosines: jax.Array
    finite: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class GroupStep:
    """The tasks and optimizers of a group.

    Attributes:
      tasks: the group's tasks, in the order of the task axis.
      tx: the encoder's optimizer, which maps gradients `[T, ...]` to updates `[...]`.
      head_tx: the heads' optimizer.
      weights: factor of each task's loss; `()`: all are 1.
    """

    tasks: tuple[Task, ...]
    tx: optax.GradientTransformation
    head_tx: optax.GradientTransformation
    weights: tuple[float, ...] = ()

    @property
    def factors(self) -> jax.Array:
        """The factor of each task's loss, `f32[T]`."""
        return jnp.array(self.weights or (1.0,) * len(self.tasks))

    def update(
        self, state: TrainState, losses: jax.Array, grads: Tree, head_grads: Tree, active: jax.Array
    ) -> tuple[TrainState, StepMetrics]:
        """Return the next state and the metrics.

        If a loss or an update is not finite, only the step number changes.

        Args:
          state: state of the group.
          losses: `f32[T]`, mean loss of each task, without its factor.
          grads: gradients of the trainable tree, `[T, ...]`, each times its task's factor.
          head_grads: gradients of the heads, likewise.
          active: `bool[]`, whether the group has examples in this step; if not, nothing changes.
        """
        # Aggregators that weight by losses need each with the factor that its gradient has.
        updates, opt_state = optax.with_extra_args_support(self.tx).update(
            grads, state.opt_state, state.trainable, losses=losses * self.factors
        )
        head_updates, head_opt_state = self.head_tx.update(
            head_grads, state.head_opt_state, state.heads
        )
        new = TrainState(
            step=state.step + 1,
            trainable=optax.apply_updates(state.trainable, updates),
            heads=optax.apply_updates(state.heads, head_updates),
            opt_state=opt_state,
            head_opt_state=head_opt_state,
            key=state.key,
        )
        norm, head_norm = (jnp.asarray(optax.tree.norm(u)) for u in (updates, head_updates))
        finite = jnp.isfinite(losses).all() & jnp.isfinite(norm) & jnp.isfinite(head_norm)
        kept = dataclasses.replace(state, step=state.step + active)
        new = jax.tree.map(lambda a, b: jnp.where(finite & active, a, b), new, kept)
        conflicts, cosines = (optax.tree.get(opt_state, name) for name in ("conflicts", "cosines"))
        return new, StepMetrics(
            losses,
            grad_norm=jnp.asarray(optax.tree.get(opt_state, "grad_norm", jnp.nan)),
            head_grad_norm=jnp.asarray(optax.tree.norm(head_grads)),
            update_norm=norm,
            conflicts=conflicts,
            cosines=cosines,
            finite=finite,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStep:
    """The train step of several groups and their initial states, see `make_train_step`.

    Attributes:
      groups: the groups by name.
      adaptation: which part of the encoder is trained.
      encode: encodes rows, see `encode.encoder`.
      hidden_size: H.
      dtype: dtype of matmul inputs.
      pair_features: see `heads.pair_vector`.
      dropout: dropout rate in the heads.
    """

    groups: Mapping[str, GroupStep]
    adaptation: Adaptation
    encode: Encode
    hidden_size: int
    dtype: Any = jnp.float32
    pair_features: str = "concat"
    dropout: float = 0.1

    @property
    def tasks(self) -> tuple[Task, ...]:
        """All tasks, in the order of a batch's task axis."""
        return tuple(task for group in self.groups.values() for task in group.tasks)

    @property
    def _sizes(self) -> list[int]:
        return [len(group.tasks) for group in self.groups.values()]

    def freeze(self, params: Tree) -> Tree:
        """Return the frozen collections, from the pretrained parameters."""
        return self.adaptation.freeze(params, self.dtype)

    def init(self, keys: Mapping[str, jax.Array], params: Tree) -> dict[str, TrainState]:
        """Return the initial state of each group.

        Args:
          keys: a PRNG key for each group; a task's head depends only on it and the task's name.
          params: the pretrained parameters.

        Raises:
          ValueError: see `lora.targets`.
        """
        return {name: self._init(group, keys[name], params) for name, group in self.groups.items()}

    def _init(self, group: GroupStep, key: jax.Array, params: Tree) -> TrainState:
        tree_key, state_key = jax.random.split(key)
        head_key, run_key = jax.random.split(state_key)
        trainable = self.adaptation.init(tree_key, params)
        heads = {task.name: self._init_head(head_key, task) for task in group.tasks}
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            trainable=trainable,
            heads=heads,
            opt_state=group.tx.init(trainable),
            head_opt_state=group.head_tx.init(heads),
            key=run_key,
        )

    def _init_head(self, key: jax.Array, task: Task) -> Tree:
        own = jax.random.fold_in(key, zlib.crc32(task.name.encode()))
        return task.init_head(own, self.hidden_size, self.pair_features)

    def losses(
        self,
        heads: Sequence[dict[str, Tree]],
        vectors: jax.Array,
        batch: Batch,
        keys: jax.Array,
    ) -> jax.Array:
        """Return the mean loss of every task, `f32[T]`.

        Args:
          heads: task → head parameters, for each group.
          vectors: `f32[T, N, H]`, vectors of the batch's sentences.
          batch: the labels and weights; its inputs are not read.
          keys: PRNG keys `[T]` for dropout in the heads.
        """
        size = batch.labels.shape[1]
        labels = trees.split(batch.labels, [math.prod(task.label_shape) for task in self.tasks])
        params = {name: head for group in heads for name, head in group.items()}
        per_task = []
        for t, task in enumerate(self.tasks):
            outputs = task.apply_head(
                params[task.name], vectors[t, :size], vectors[t, size:],
                pair_features=self.pair_features, dropout=self.dropout, key=keys[t],
            )  # fmt: skip
            own = labels[t].T.reshape(size, *task.label_shape)
            loss = task.per_example_loss(outputs, own)
            per_task.append(losses.masked_mean(loss, batch.weights[t]))
        return jnp.stack(per_task)

    def __call__(
        self, states: dict[str, TrainState], frozen: Tree, batch: Batch
    ) -> tuple[dict[str, TrainState], dict[str, StepMetrics]]:
        """Take one step, uncompiled; see `compile`.

        See `GroupStep.update` for groups without examples, and for steps that are not finite.
        """
        in_order = [states[name] for name in self.groups]  # jit sorts the names of a dict
        per_task, grads, head_grads = self.gradients(in_order, frozen, batch)
        parts = zip(
            self.groups.items(),
            trees.split((per_task, jnp.any(batch.weights > 0, -1)), self._sizes),
            grads, head_grads, strict=True,
        )  # fmt: skip
        new, metrics = {}, {}
        for (name, group), (own_losses, active), tree_grads, own_head_grads in parts:
            new[name], metrics[name] = group.update(
                states[name], own_losses, tree_grads, own_head_grads, active.any()
            )
        return new, metrics

    def task_losses(self, states: Sequence[TrainState], frozen: Tree, batch: Batch) -> jax.Array:
        """Return the mean loss of every task, `f32[T]`, with the same dropout as a step.

        Args:
          states: states of the groups, in order.
          frozen: frozen collections, see `freeze`.
          batch: see `Batch`.
        """
        encode = self.adaptation.encode_tasks(self.encode, self._sizes)
        encoder_key, head_keys = self._keys(states)
        trainable, heads = [s.trainable for s in states], [s.heads for s in states]
        vectors, _ = encode(frozen, trainable, batch.inputs, encoder_key)
        return self.losses(heads, vectors, batch, head_keys)

    def gradients(
        self, states: Sequence[TrainState], frozen: Tree, batch: Batch
    ) -> tuple[jax.Array, list[Tree], list[dict[str, Tree]]]:
        """Return losses `f32[T]`, and by group the gradients of its tree, `[T, ...]`, and heads.

        The losses are without their tasks' factors, the gradients with them.
        """
        encode = self.adaptation.encode_tasks(self.encode, self._sizes)
        factors = jnp.concatenate([group.factors for group in self.groups.values()])
        encoder_key, head_keys = self._keys(states)
        trainable, heads = [s.trainable for s in states], [s.heads for s in states]
        vectors, pull = encode(frozen, trainable, batch.inputs, encoder_key)

        def total(vectors: jax.Array, heads: list[dict[str, Tree]]) -> tuple[jax.Array, jax.Array]:
            per_task = self.losses(heads, vectors, batch, head_keys)
            return jnp.sum(per_task * factors), per_task

        grads, per_task = jax.grad(total, (0, 1), has_aux=True)(vectors, heads)
        # A NaN would spread to the gradients of other groups in the shared pass, as 0 · NaN.
        finite = jnp.isfinite(per_task)[:, None, None]
        return per_task, pull(jnp.where(finite, grads[0], 0)), grads[1]

    def _keys(self, states: Sequence[TrainState]) -> tuple[jax.Array, jax.Array]:
        """Return the PRNG keys of dropout at a step: one for the encoder, one for each head.

        A head's key depends on its own group only.
        """
        keys = [
            jax.random.split(jax.random.fold_in(state.key, state.step), 1 + size)
            for state, size in zip(states, self._sizes, strict=True)
        ]
        encoder_key = keys[0][0]
        for state in states[1:]:  # their step numbers still change once the first group has ended
            encoder_key = jax.random.fold_in(encoder_key, state.step)
        return encoder_key, jnp.concatenate([own[1:] for own in keys])

    def compile(self, shardings: Any = None) -> CompiledStep:
        """Return the jitted step: `(states, frozen, batch) → (states, metrics)`, by group.

        It donates the buffers of the old states, so do not use them again.

        Args:
          shardings: shardings of the new states and the metrics; None: XLA decides.
        """
        return jax.jit(self.__call__, donate_argnums=0, out_shardings=shardings)


def make_train_step(
    groups: Mapping[str, GroupStep],
    config: EncoderConfig,
    adaptation: Adaptation,
    *,
    dtype: Any = jnp.float32,
    pooling: str = "mean",
    **rest: Any,
) -> TrainStep:
    """Build the train step of several groups.

    Args:
      groups: the groups by name.
      config: configuration of the encoder, with its dropout in training.
      adaptation: which part of the encoder is trained.
      dtype: dtype of matmul inputs.
      pooling: see `bert.pool`.
      rest: `pair_features` and `dropout` of `TrainStep`.
    """
    encode = encoder(config, dtype, adaptation.adapter, pooling)
    return TrainStep(groups, adaptation, encode, config.hidden_size, jnp.dtype(dtype), **rest)
