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
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxlora import lora
from jaxlora.nn import bert
from jaxlora.pcgrad import PCGradState, pcgrad
from jaxlora.tasks import losses
from jaxlora.tasks.sharing import Adapt
from jaxlora.tasks.task import Task
from jaxlora.utils import trees
from jaxlora.utils.trees import Tree


class Rows(NamedTuple):
    """Packed sentences.

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
      inputs: for adapters `Rows` of T·N sentences, task t's sentence n being number `t N + n`; for
        whole encoders `Rows` with leading `[T]`; for a frozen one its vectors `f32[T, N, H]`. First
        sentences come first: example b is sentence b, its second one is sentence `B + b`.
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
      finite: `bool[]`; if not, the step changed nothing.
    """

    losses: jax.Array
    update_norm: jax.Array
    conflicts: jax.Array
    cosines: jax.Array
    finite: jax.Array


class Encode(Protocol):
    """Encodes rows with one trainable tree; see `encoder`."""

    def __call__(
        self,
        frozen: Tree,
        trainable: Tree,
        rows: Rows,
        key: jax.Array | None,
        share: jax.Array | None = None,
    ) -> jax.Array:
        """Sentence vectors `f32[N, H]`; dropout is on when a key is given."""


class EncodeTasks(Protocol):
    """Encodes the sentences of all tasks of a group with its one tree; see `task_encoder`."""

    def __call__(
        self, frozen: Tree, trainable: Tree, inputs: Any, key: jax.Array
    ) -> tuple[jax.Array, Callable[[jax.Array], Tree]]:
        """Vectors `f32[T, N, H]`, and from their cotangents to each task's gradient `[T, ...]`."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a group's step is made of.

    Attributes:
      tasks: the group's tasks, in the order of the task axis.
      encode: from `task_encoder`.
      tx: the encoder's optimizer, from `optimizers`.
      head_tx: the heads' optimizer.
      hidden_size: H.
      pair_features: see `heads.pair_vector`.
      dropout: dropout in the heads.
      weights: factor of each task's loss; `()` for 1.
    """

    tasks: tuple[Task, ...]
    encode: EncodeTasks
    tx: optax.GradientTransformation
    head_tx: optax.GradientTransformation
    hidden_size: int
    pair_features: str = "concat"
    dropout: float = 0.1
    weights: tuple[float, ...] = ()


def encoder(config: bert.BertConfig, dtype: Any, adapter: lora.LoraConfig, pooling: str) -> Encode:
    """Encode packed rows with one trainable tree.

    Returns:
      `(frozen, trainable, Rows, key or None, share=None) -> f32[N, H]`. `{**frozen, **trainable}`
      are the Flax collections (with `params` as `bert.stack_layers` takes them), so a trainable
      `params` takes the place of the frozen one; for the share see `bert.Encoder`.
    """
    module = bert.Encoder(config, dtype, adapter)

    def encode(
        frozen: Tree,
        trainable: Tree,
        rows: Rows,
        key: jax.Array | None,
        share: jax.Array | None = None,
    ) -> jax.Array:
        collections = {**frozen, **trainable}
        hidden = jnp.asarray(
            module.apply(
                collections | {"params": bert.stack_layers(collections["params"])},
                rows.tokens,
                rows.positions,
                rows.segment_ids,
                key is not None,
                share,
                rngs=None if key is None else {"dropout": key},
            )
        )
        return bert.pool(hidden, rows.segment_ids, rows.cls_index, pooling)

    return encode


def task_encoder(adapt: Adapt, encode: Encode, num_tasks: int) -> EncodeTasks:
    """How a step encodes the sentences of all its tasks.

    Args:
      adapt: `frozen`: the batch holds ready vectors. `lora`: all tasks' sentences share rows.
        `full`: each task has rows of its own.
      encode: from `encoder`.
      num_tasks: T.

    Returns:
      `(frozen, trainable, inputs, key) -> (vectors, pull)`, with the inputs of a `Batch`:
      `vectors: f32[T, N, H]` and `pull(gradient of the vectors)`, the trainable tree's gradient for
      each task: leaves `[T, ...]`.
    """
    return {"frozen": _ready, "lora": _mixed, "full": _separate}[adapt](encode, num_tasks)


def _ready(encode: Encode, num_tasks: int) -> EncodeTasks:
    del encode, num_tasks
    return lambda frozen, trainable, inputs, key: (inputs, lambda grad: {})


def _separate(encode: Encode, num_tasks: int) -> EncodeTasks:
    """A kernel's gradient is wanted for each task, so each has rows and a copy of its own."""
    encode_each = jax.vmap(encode, in_axes=(None, 0, 0, 0))

    def encode_tasks(frozen: Tree, stack: Tree, rows: Rows, key: jax.Array) -> jax.Array:
        return encode_each(frozen, stack, rows, jax.random.split(key, num_tasks))

    return _copied(encode_tasks, num_tasks)


def _mixed(encode: Encode, num_tasks: int) -> EncodeTasks:
    """The frozen kernels are applied once to tightly packed rows.

    So is the adapter: only its gradient is parted by the tasks of the tokens.
    """

    def encode_tasks(frozen: Tree, stack: Tree, rows: Rows, key: jax.Array) -> jax.Array:
        sentences = rows.cls_index.shape[0] // num_tasks
        owner = jnp.repeat(jnp.arange(num_tasks), sentences)
        vectors = _encode_mixed(encode, frozen, stack, rows, owner, key)
        return vectors.reshape(num_tasks, sentences, -1)

    return _copied(encode_tasks, num_tasks)


def _copied(encode_tasks: Callable[..., jax.Array], num_tasks: int) -> EncodeTasks:
    """Each task uses a copy of the trainable tree: the copies' gradients are the tasks'."""

    def encode(
        frozen: Tree, trainable: Tree, inputs: Any, key: jax.Array
    ) -> tuple[jax.Array, Callable[[jax.Array], Tree]]:
        stack = trees.broadcast(trainable, num_tasks)
        vectors, pull = jax.vjp(lambda stack: encode_tasks(frozen, stack, inputs, key), stack)
        return vectors, lambda grad: pull(grad)[0]

    return encode


def _encode_mixed(
    encode: Encode, frozen: Tree, stack: Tree, rows: Rows, owner: jax.Array, key: jax.Array | None
) -> jax.Array:
    count = jax.tree.leaves(stack)[0].shape[0]
    # Padding belongs to adapter -1, that is to none.
    task = jnp.where(rows.segment_ids > 0, owner[rows.segment_ids - 1], -1)
    by_layer = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), stack)
    return encode(frozen, by_layer, rows, key, jax.nn.one_hot(task, count))


def split_params(
    adapt: Adapt, params: Tree, config: lora.LoraConfig, key: jax.Array, dtype: Any
) -> tuple[Tree, Tree]:
    """Pretrained parameters → (frozen, trainable) collections.

    Args:
      adapt: `frozen` trains nothing, `lora` an adapter, `full` everything.
      params: the pretrained `params` collection.
      config: the adapter, used by `lora`.
      key: PRNG key of the adapter's start.
      dtype: dtype of matmul inputs, for which `bert.matmul_ready` prepares what is frozen.

    Raises:
      ValueError: see `lora.targets`.
    """
    return frozen_params(adapt, params, dtype), trainable_params(adapt, params, config, key)


def frozen_params(adapt: Adapt, params: Tree, dtype: Any) -> Tree:
    """Return the collections that no step changes, see `split_params`."""
    return {} if adapt == "full" else {"params": bert.matmul_ready(params, dtype)}


def trainable_params(adapt: Adapt, params: Tree, config: lora.LoraConfig, key: jax.Array) -> Tree:
    """Return the collections that are trained, as they are at the start, see `split_params`."""
    if adapt == "full":
        return {"params": jax.tree.map(jnp.asarray, params)}
    return {"lora": lora.init(key, params, config)} if adapt == "lora" else {}


def optimizers(
    num_tasks: int,
    learning_rate: optax.ScalarOrSchedule,
    head_learning_rate: optax.ScalarOrSchedule,
    *,
    clip: float = 1.0,
    weight_decay: float = 0.0,
    seed: int = 0,
    lora_plus_ratio: float = 1.0,
    surgery: bool = True,
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """The encoder's chain (PCGrad → clip → AdamW) and the heads' (AdamW).

    Clipping comes after projection, on the combined gradient, and sees no head. Biases and
    LayerNorm are not decayed. With a `lora_plus_ratio` the adapters' B has so many times the
    learning rate of A (Hayou et al. 2024, "LoRA+", section 4). Without `surgery` the tasks'
    gradients are only summed.
    """
    steps = [
        pcgrad(num_tasks, seed, surgery=surgery),
        optax.clip_by_global_norm(clip),
        optax.adamw(learning_rate, weight_decay=weight_decay, mask=_decayed),
    ]
    if lora_plus_ratio != 1:
        steps.append(optax.masked(optax.scale(lora_plus_ratio), _is_b))
    return optax.chain(*steps), optax.adamw(
        head_learning_rate, weight_decay=weight_decay, mask=_decayed
    )


def _decayed(tree: Tree) -> Tree:
    return jax.tree_util.tree_map_with_path(lambda p, _: p[-1].key not in ("bias", "scale"), tree)


def _is_b(tree: Tree) -> Tree:
    return jax.tree_util.tree_map_with_path(lambda p, _: p[-1].key == "B", tree)


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
    setup: Setup, heads: dict[str, Tree], vectors: jax.Array, batch: Batch, keys: jax.Array
) -> jax.Array:
    """Mean loss of every task, `f32[T]`.

    Args:
      setup: the group's tasks.
      heads: head parameters by task.
      vectors: `f32[T, N, H]`, of the batch's sentences.
      batch: see `Batch`; its inputs are not read.
      keys: PRNG keys `[T]` for dropout in the heads.
    """
    size = batch.labels.shape[1]
    per_task = []
    for t, task in enumerate(setup.tasks):
        outputs = task.apply_head(
            heads[task.name], vectors[t, :size], vectors[t, size:],
            pair_features=setup.pair_features, dropout=setup.dropout, key=keys[t],
        )  # fmt: skip
        per_task.append(
            losses.masked_mean(task.per_example_loss(outputs, batch.labels[t]), batch.weights[t])
        )
    return jnp.stack(per_task)


def train_step(
    setup: Setup, state: TrainState, frozen: Tree, batch: Batch
) -> tuple[TrainState, StepMetrics]:
    """One update of a group; jit it with `make_train_step`.

    A step with a loss or an update that is not finite changes nothing but the step's number.
    """
    keys = jax.random.split(jax.random.fold_in(state.key, state.step), 1 + len(setup.tasks))
    weights = jnp.array(setup.weights or (1.0,) * len(setup.tasks))
    vectors, pull = setup.encode(frozen, state.trainable, batch.inputs, keys[0])

    def total(vectors: jax.Array, heads: dict[str, Tree]) -> tuple[jax.Array, jax.Array]:
        per_task = task_losses(setup, heads, vectors, batch, keys[1:])
        return jnp.sum(per_task * weights), per_task

    (grad, head_grads), per_task = jax.grad(total, (0, 1), has_aux=True)(vectors, state.heads)
    updates, opt_state = setup.tx.update(pull(grad), state.opt_state, state.trainable)
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
    norm, head_norm = (jnp.asarray(optax.tree.norm(u)) for u in (updates, head_updates))
    finite = jnp.isfinite(per_task).all() & jnp.isfinite(norm) & jnp.isfinite(head_norm)
    kept = state.replace(step=new.step)  # type: ignore[attr-defined]
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, kept)
    return new, StepMetrics(per_task, norm, surgery.conflicts, surgery.cosines, finite)


def make_train_step(
    setup: Setup, shardings: Any = None
) -> Callable[[TrainState, Tree, Batch], tuple[TrainState, StepMetrics]]:
    """`train_step` compiled for a setup: `(state, frozen, batch) → (state, metrics)`.

    The old state's memory is given to the new one, so do not use the old state again.

    Args:
      setup: what the step is made of.
      shardings: where the new state and the metrics live; None: XLA decides.
    """
    return jax.jit(
        lambda state, frozen, batch: train_step(setup, state, frozen, batch),
        donate_argnums=0,
        out_shardings=shardings,
    )


def make_encode(encode: Encode, sharding: Any = None) -> Callable[[Tree, Tree, Rows], jax.Array]:
    """The evaluation step: `(frozen, trainable, Rows) → f32[N, H]`, compiled, without dropout."""
    return jax.jit(
        lambda frozen, trainable, rows: encode(frozen, trainable, rows, None),
        out_shardings=sharding,
    )


def make_mixed_encode(encode: Encode) -> Callable[[Tree, Tree, Rows, jax.Array], jax.Array]:
    """Evaluation with an adapter for each sentence, compiled.

    Returns:
      `(frozen, {"lora": leaves [T, L, ...]}, Rows, owner i32[N]) → f32[N, H]`: sentence n uses
      adapter `owner[n]`.
    """
    return jax.jit(
        lambda frozen, stack, rows, owner: _encode_mixed(encode, frozen, stack, rows, owner, None)
    )
