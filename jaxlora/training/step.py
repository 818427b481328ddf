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
from jaxlora.data.batches import Batch
from jaxlora.nn import bert
from jaxlora.nn.encode import Encode, PackedTokens, encode_copies
from jaxlora.pcgrad import PCGradState
from jaxlora.tasks import losses
from jaxlora.tasks.sharing import Adapt
from jaxlora.tasks.task import Task
from jaxlora.utils import trees
from jaxlora.utils.trees import Tree


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

    def encode_tasks(frozen: Tree, stack: Tree, rows: PackedTokens, key: jax.Array) -> jax.Array:
        return encode_each(frozen, stack, rows, jax.random.split(key, num_tasks))

    return _copied(encode_tasks, num_tasks)


def _mixed(encode: Encode, num_tasks: int) -> EncodeTasks:
    """The frozen kernels are applied once to tightly packed rows.

    So is the adapter: only its gradient is parted by the tasks of the tokens.
    """

    def encode_tasks(frozen: Tree, stack: Tree, rows: PackedTokens, key: jax.Array) -> jax.Array:
        sentences = rows.cls_index.shape[0] // num_tasks
        owner = jnp.repeat(jnp.arange(num_tasks), sentences)
        vectors = encode_copies(encode, frozen, stack, rows, owner, key)
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
