"""The one train step, for every variant, over T ≥ 1 tasks.

One backward pass gives each task's own gradient of the group's trainable tree, along a task axis;
an optax chain that begins with PCGrad brings that axis down again. Heads belong to one task each:
their gradients go straight to their own optimizer.

Shapes: T tasks, R rows, S tokens a row, N sentences and B examples a task, H hidden size.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
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
from jaxlora.training.optimizer import Optimizers
from jaxlora.utils.trees import Tree

CompiledStep = Callable[["TrainState", Tree, Batch], tuple["TrainState", "StepMetrics"]]


@struct.dataclass
class TrainState:
    """All that changes in training, and all that a checkpoint needs besides the frozen base.

    Attributes:
      step: `i32[]`, steps taken.
      trainable: the group's encoder tree: `{}`, `{"lora": …}` or `{"params": …}`.
      heads: head parameters by task.
      opt_state: state of the encoder's optimizer chain (PCGrad first).
      head_opt_state: state of the heads' optimizer.
      key: PRNG key; step k uses `fold_in(key, k)`, so a resumed run repeats nothing.
    """

    step: jax.Array
    trainable: Tree
    heads: dict[str, Tree]
    opt_state: optax.OptState
    head_opt_state: optax.OptState
    key: jax.Array


class StepMetrics(NamedTuple):
    """What a step reports.

    Attributes:
      losses: `f32[T]`, mean loss of each task.
      update_norm: `f32[]`, norm of the encoder's update.
      conflicts: `i32[]`, pairs of tasks in conflict.
      cosines: `f32[T, T]`, between the tasks' gradients.
      finite: `bool[]`; if not, the step changed nothing.
    """

    losses: jax.Array
    update_norm: jax.Array
    conflicts: jax.Array
    cosines: jax.Array
    finite: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStep:
    """The train step of a group of tasks, and what it begins with; see `make_train_step`.

    Attributes:
      tasks: the group's tasks, in the order of the task axis.
      adaptation: what is trained of the encoder.
      encode: from `encoder`.
      tx: the encoder's optimizer, which takes the task axis away.
      head_tx: the heads' optimizer.
      hidden_size: H.
      dtype: dtype of matmul inputs.
      pair_features: see `heads.pair_vector`.
      dropout: dropout in the heads.
      weights: factor of each task's loss; `()` for 1.
    """

    tasks: tuple[Task, ...]
    adaptation: Adaptation
    encode: Encode
    tx: optax.GradientTransformation
    head_tx: optax.GradientTransformation
    hidden_size: int
    dtype: Any = jnp.float32
    pair_features: str = "concat"
    dropout: float = 0.1
    weights: tuple[float, ...] = ()

    def freeze(self, params: Tree) -> Tree:
        """Return the collections that no step changes, from the pretrained parameters."""
        return self.adaptation.freeze(params, self.dtype)

    def init(self, key: jax.Array, params: Tree) -> TrainState:
        """Return the state before the first step.

        Args:
          key: PRNG key; a task's head depends on it and the task's name alone.
          params: the pretrained parameters.

        Raises:
          ValueError: see `lora.targets`.
        """
        tree_key, state_key = jax.random.split(key)
        head_key, run_key = jax.random.split(state_key)
        trainable = self.adaptation.init(tree_key, params)
        heads = {task.name: self._init_head(head_key, task) for task in self.tasks}
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            trainable=trainable,
            heads=heads,
            opt_state=self.tx.init(trainable),
            head_opt_state=self.head_tx.init(heads),
            key=run_key,
        )

    def _init_head(self, key: jax.Array, task: Task) -> Tree:
        own = jax.random.fold_in(key, zlib.crc32(task.name.encode()))
        return task.init_head(own, self.hidden_size, self.pair_features)

    def losses(
        self, heads: dict[str, Tree], vectors: jax.Array, batch: Batch, keys: jax.Array
    ) -> jax.Array:
        """Return the mean loss of every task, `f32[T]`.

        Args:
          heads: head parameters by task.
          vectors: `f32[T, N, H]`, of the batch's sentences.
          batch: see `Batch`; its inputs are not read.
          keys: PRNG keys `[T]` for dropout in the heads.
        """
        size = batch.labels.shape[1]
        per_task = []
        for t, task in enumerate(self.tasks):
            outputs = task.apply_head(
                heads[task.name], vectors[t, :size], vectors[t, size:],
                pair_features=self.pair_features, dropout=self.dropout, key=keys[t],
            )  # fmt: skip
            loss = task.per_example_loss(outputs, batch.labels[t])
            per_task.append(losses.masked_mean(loss, batch.weights[t]))
        return jnp.stack(per_task)

    def __call__(
        self, state: TrainState, frozen: Tree, batch: Batch
    ) -> tuple[TrainState, StepMetrics]:
        """Take one step; jit it with `compile`.

        A step with a loss or an update that is not finite changes nothing but the step's number.
        """
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), 1 + len(self.tasks))
        per_task, grads, head_grads = self._gradients(state, frozen, batch, keys)
        # Aggregators that weight by losses read them; other transforms ignore them.
        updates, opt_state = optax.with_extra_args_support(self.tx).update(
            grads, state.opt_state, state.trainable, losses=per_task
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
        finite = jnp.isfinite(per_task).all() & jnp.isfinite(norm) & jnp.isfinite(head_norm)
        kept = state.replace(step=new.step)  # type: ignore[attr-defined]
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, kept)
        conflicts, cosines = (optax.tree.get(opt_state, name) for name in ("conflicts", "cosines"))
        return new, StepMetrics(per_task, norm, conflicts, cosines, finite)

    def _gradients(
        self, state: TrainState, frozen: Tree, batch: Batch, keys: jax.Array
    ) -> tuple[jax.Array, Tree, dict[str, Tree]]:
        """Return the losses, the tree's gradient for each task `[T, ...]`, and the heads'."""
        encode = self.adaptation.encode_tasks(self.encode, len(self.tasks))
        weights = jnp.array(self.weights or (1.0,) * len(self.tasks))
        vectors, pull = encode(frozen, state.trainable, batch.inputs, keys[0])

        def total(vectors: jax.Array, heads: dict[str, Tree]) -> tuple[jax.Array, jax.Array]:
            per_task = self.losses(heads, vectors, batch, keys[1:])
            return jnp.sum(per_task * weights), per_task

        grads, per_task = jax.grad(total, (0, 1), has_aux=True)(vectors, state.heads)
        return per_task, pull(grads[0]), grads[1]

    def compile(self, shardings: Any = None) -> CompiledStep:
        """Return the compiled step: `(state, frozen, batch) → (state, metrics)`.

        The old state's memory is given to the new one, so do not use the old state again.

        Args:
          shardings: where the new state and the metrics live; None: XLA decides.
        """
        return jax.jit(self.__call__, donate_argnums=0, out_shardings=shardings)


def make_train_step(
    tasks: tuple[Task, ...],
    config: EncoderConfig,
    adaptation: Adaptation,
    optimizers: Optimizers,
    *,
    dtype: Any = jnp.float32,
    pooling: str = "mean",
    **rest: Any,
) -> TrainStep:
    """Return the train step of a group of tasks.

    Args:
      tasks: the group's tasks.
      config: the encoder's, with the dropout that it has in training.
      adaptation: what is trained of it.
      optimizers: the encoder's and the heads', from `optimizers`.
      dtype: dtype of matmul inputs.
      pooling: see `bert.pool`.
      rest: `pair_features`, `dropout` and `weights` of `TrainStep`.
    """
    encode = encoder(config, dtype, adaptation.adapter, pooling)
    return TrainStep(
        tasks, adaptation, encode, *optimizers, config.hidden_size, jnp.dtype(dtype), **rest
    )
