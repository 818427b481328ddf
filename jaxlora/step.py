"""The one train step, for every variant, over T ≥ 1 tasks.

The group's trainable tree is broadcast along a task axis, so one backward pass gives each task's
own gradient; an optax chain that begins with PCGrad brings the task axis down again. Heads belong
to one task each: their gradients go straight to their own optimizer.

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

from jaxlora import bert, lora, losses, trees
from jaxlora.pcgrad import PCGradState, pcgrad
from jaxlora.tasks import Task
from jaxlora.trees import Tree
from jaxlora.variants import Adapt


class Rows(NamedTuple):
    """Packed sentences (with a leading `[T]` in a training batch).

    Attributes:
      tokens: `i32[R, S]`.
      positions: `i32[R, S]`, counted from 0 within each sentence.
      segment_ids: `i32[R, S]`, `n + 1` for the tokens of sentence n, 0 for padding.
      cls_index: `i32[N]`, where sentence n starts in the flattened rows.
    """

    tokens: Any
    positions: Any
    segment_ids: Any
    cls_index: Any


class Batch(NamedTuple):
    """One step's examples of every task of a group.

    Attributes:
      inputs: `Rows` with leading `[T]`, or ready sentence vectors `f32[T, N, H]`. First sentences
        come first: example b is sentence b, and its second sentence is sentence `B + b`.
      labels: `f32[T, B]`.
      weights: `f32[T, B]`, 1 for a real example, 0 for padding.
    """

    inputs: Any
    labels: Any
    weights: Any


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
    """

    losses: jax.Array
    update_norm: jax.Array
    conflicts: jax.Array
    cosines: jax.Array


Encode = Callable[[Tree, Tree, Any, jax.Array | None], jax.Array]


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a group's step is made of.

    Attributes:
      tasks: the group's tasks, in the order of the task axis.
      encode: `(frozen, trainable, inputs, key or None) -> f32[N, H]`.
      tx: the encoder's optimizer, from `optimizers`.
      head_tx: the heads' optimizer.
      hidden_size: H.
      pair_features: see `heads.pair_vector`.
      dropout: dropout in the heads.
      weights: factor of each task's loss; `()` for 1.
    """

    tasks: tuple[Task, ...]
    encode: Encode
    tx: optax.GradientTransformation
    head_tx: optax.GradientTransformation
    hidden_size: int
    pair_features: str = "concat"
    dropout: float = 0.1
    weights: tuple[float, ...] = ()


def encoder(config: bert.BertConfig, dtype: Any, lora_scale: float, pooling: str) -> Encode:
    """Encode packed rows: dropout is on when a key is given.

    Returns:
      `(frozen, trainable, Rows, key or None) -> f32[N, H]`. `{**frozen, **trainable}` are the
      Flax collections, so a trainable `params` takes the place of the frozen one.
    """
    module = bert.Encoder(config, dtype, lora_scale)

    def encode(frozen: Tree, trainable: Tree, rows: Rows, key: jax.Array | None) -> jax.Array:
        hidden = jnp.asarray(
            module.apply(
                {**frozen, **trainable},
                rows.tokens,
                rows.positions,
                rows.segment_ids,
                key is not None,
                rngs=None if key is None else {"dropout": key},
            )
        )
        return bert.pool(hidden, rows.segment_ids, rows.cls_index, pooling)

    return encode


def cached(frozen: Tree, trainable: Tree, vectors: jax.Array, key: jax.Array | None) -> jax.Array:
    """The `encode` of a frozen encoder: the batch holds the sentence vectors already."""
    del frozen, trainable, key
    return vectors


def split_params(
    adapt: Adapt, params: Tree, config: lora.LoraConfig, key: jax.Array, dtype: Any
) -> tuple[Tree, Tree]:
    """Pretrained parameters → (frozen, trainable) collections.

    Args:
      adapt: `frozen` trains nothing, `lora` an adapter, `full` everything.
      params: the pretrained `params` collection.
      config: the adapter, used by `lora`.
      key: PRNG key of the adapter's start.
      dtype: dtype of matmul inputs; frozen kernels are cast to it once, here.

    Raises:
      ValueError: see `lora.targets`.
    """
    if adapt == "full":
        return {}, {"params": jax.tree.map(jnp.asarray, params)}
    frozen = {"params": bert.matmul_ready(params, dtype)}
    return frozen, {"lora": lora.init(key, params, config)} if adapt == "lora" else {}


def optimizers(
    num_tasks: int,
    learning_rate: optax.ScalarOrSchedule,
    head_learning_rate: optax.ScalarOrSchedule,
    *,
    clip: float = 1.0,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """The encoder's chain (PCGrad → clip → AdamW) and the heads' (AdamW).

    Clipping comes after projection, on the combined gradient, and sees no head. Biases and
    LayerNorm are not decayed.
    """
    tx = optax.chain(
        pcgrad(num_tasks, seed),
        optax.clip_by_global_norm(clip),
        optax.adamw(learning_rate, weight_decay=weight_decay, mask=_decayed),
    )
    return tx, optax.adamw(head_learning_rate, weight_decay=weight_decay, mask=_decayed)


def _decayed(tree: Tree) -> Tree:
    return jax.tree_util.tree_map_with_path(lambda p, _: p[-1].key not in ("bias", "scale"), tree)


def init_state(setup: Setup, trainable: Tree, key: jax.Array) -> TrainState:
    """The state before the first step; a task's head depends on the key and the task alone."""
    head_key, run_key = jax.random.split(key)
    heads = {
        task.name: task.init_head(
            jax.random.fold_in(head_key, zlib.crc32(task.name.encode())),
            setup.hidden_size,
            setup.pair_features,
        )
        for task in setup.tasks
    }
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        heads=heads,
        opt_state=setup.tx.init(trainable),
        head_opt_state=setup.head_tx.init(heads),
        key=run_key,
    )


def task_losses(
    setup: Setup, stack: Tree, heads: dict[str, Tree], frozen: Tree, batch: Batch, key: jax.Array
) -> jax.Array:
    """Mean loss of every task, `f32[T]`, each through its own copy of the trainable tree.

    Args:
      setup: the group's tasks and encoder.
      stack: trainable tree with leading `[T]` (`trees.broadcast`).
      heads: head parameters by task.
      frozen: the frozen collections, shared by all tasks.
      batch: see `Batch`.
      key: PRNG key for dropout.
    """
    encode_keys, head_keys = jax.random.split(key, (2, len(setup.tasks)))
    vectors = jax.vmap(setup.encode, in_axes=(None, 0, 0, 0))(
        frozen, stack, batch.inputs, encode_keys
    )
    size = batch.labels.shape[1]
    per_task = []
    for t, task in enumerate(setup.tasks):
        outputs = task.apply_head(
            heads[task.name], vectors[t, :size], vectors[t, size:],
            pair_features=setup.pair_features, dropout=setup.dropout, key=head_keys[t],
        )  # fmt: skip
        per_task.append(losses.masked_mean(task.loss(outputs, batch.labels[t]), batch.weights[t]))
    return jnp.stack(per_task)


def train_step(
    setup: Setup, state: TrainState, frozen: Tree, batch: Batch
) -> tuple[TrainState, StepMetrics]:
    """One update of a group; jit it with `make_train_step`."""
    key = jax.random.fold_in(state.key, state.step)
    stack = trees.broadcast(state.trainable, len(setup.tasks))
    weights = jnp.array(setup.weights or (1.0,) * len(setup.tasks))

    def total(stack: Tree, heads: dict[str, Tree]) -> tuple[jax.Array, jax.Array]:
        per_task = task_losses(setup, stack, heads, frozen, batch, key)
        return jnp.sum(per_task * weights), per_task

    (grads, head_grads), per_task = jax.grad(total, (0, 1), has_aux=True)(stack, state.heads)
    updates, opt_state = setup.tx.update(grads, state.opt_state, state.trainable)
    head_updates, head_opt_state = setup.head_tx.update(
        head_grads, state.head_opt_state, state.heads
    )
    surgery: PCGradState = opt_state[0]
    new = TrainState(
        step=state.step + 1,
        trainable=optax.apply_updates(state.trainable, updates),
        heads=optax.apply_updates(state.heads, head_updates),
        opt_state=opt_state,
        head_opt_state=head_opt_state,
        key=state.key,
    )
    norm = jnp.asarray(optax.tree.norm(updates))
    return new, StepMetrics(per_task, norm, surgery.conflicts, surgery.cosines)


def make_train_step(
    setup: Setup,
) -> Callable[[TrainState, Tree, Batch], tuple[TrainState, StepMetrics]]:
    """`train_step` compiled for a setup: `(state, frozen, batch) → (state, metrics)`.

    The old state's memory is given to the new one, so do not use the old state again.
    """
    return jax.jit(
        lambda state, frozen, batch: train_step(setup, state, frozen, batch), donate_argnums=0
    )


def make_encode(encode: Encode) -> Callable[[Tree, Tree, Rows], jax.Array]:
    """The evaluation step: `(frozen, trainable, Rows) → f32[N, H]`, compiled, without dropout."""
    return jax.jit(lambda frozen, trainable, rows: encode(frozen, trainable, rows, None))
