"""What a group trains of its encoder: nothing, an adapter, or all weights. One class for each.

Shapes: T tasks, N sentences a task, H hidden size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import lora
from jaxlora.data.batches import Order, PackedBatches, VectorBatches
from jaxlora.data.tokenized import Examples
from jaxlora.lora import LoraConfig
from jaxlora.nn import bert
from jaxlora.nn.encode import Encode, PackedTokens, encode_mixed
from jaxlora.tasks.sharing import Adapt
from jaxlora.utils import trees
from jaxlora.utils.trees import Tree

_NO_ADAPTER = LoraConfig()

Vectors = Callable[[Tree, str, str], np.ndarray]
"""`(trainable, task, split) → f32[sentences, H]`."""


class EncodeTasks(Protocol):
    """Encodes the sentences of all tasks of a group with its one trainable tree."""

    def __call__(
        self, frozen: Tree, trainable: Tree, inputs: Any, key: jax.Array
    ) -> tuple[jax.Array, Callable[[jax.Array], Tree]]:
        """Vectors `f32[T, N, H]`, and from their cotangents to each task's gradient `[T, ...]`."""


class Adaptation(Protocol):
    """How an encoder is adapted: `Frozen`, `Lora` or `Full`."""

    @property
    def adapter(self) -> LoraConfig:
        """Configuration of the adapters; not used without any."""

    def freeze(self, params: Tree, dtype: Any) -> Tree:
        """Return the collections that no step changes, with kernels ready for matmuls in `dtype`.

        Args:
          params: the pretrained `params` collection.
          dtype: dtype of matmul inputs, see `bert.matmul_ready`.
        """

    def init(self, key: jax.Array, params: Tree) -> Tree:
        """Return the collections that are trained, as they are before the first step.

        Raises:
          ValueError: see `lora.targets`.
        """

    def encode_tasks(self, encode: Encode, num_tasks: int) -> EncodeTasks:
        """Return how a step encodes the sentences of all its tasks, from how it encodes one's."""

    def vectors(self, live: Vectors) -> Vectors:
        """Return how a split is encoded for evaluation, from a function that does so each time."""

    def batches(
        self,
        train: Mapping[str, Examples],
        order: Order,
        vectors: Vectors,
        pack: Callable[[bool], PackedBatches],
    ) -> PackedBatches | VectorBatches:
        """Return the batches of a group.

        Args:
          train: task → examples.
          order: which of them each step sees.
          vectors: see `vectors`.
          pack: packs sentences into rows; tasks share rows if its argument is true.
        """

    def row_sets(self, num_tasks: int) -> int:
        """Return how many sets of rows a step encodes."""


@dataclasses.dataclass(frozen=True)
class Frozen:
    """The encoder stays as it is, so each sentence is encoded once; only heads are trained."""

    adapter: ClassVar[LoraConfig] = _NO_ADAPTER

    def freeze(self, params: Tree, dtype: Any) -> Tree:
        """Return all parameters."""
        return {"params": bert.matmul_ready(params, dtype)}

    def init(self, key: jax.Array, params: Tree) -> Tree:
        """Return nothing."""
        del key, params
        return {}

    def encode_tasks(self, encode: Encode, num_tasks: int) -> EncodeTasks:
        """Take the vectors from the batch."""
        del encode, num_tasks
        return lambda frozen, trainable, inputs, key: (inputs, lambda grad: {})

    def vectors(self, live: Vectors) -> Vectors:
        """Encode a split when it is first needed, and keep it."""
        table = functools.cache(lambda task, split: live({}, task, split))
        return lambda trainable, task, split: table(task, split)

    def batches(
        self,
        train: Mapping[str, Examples],
        order: Order,
        vectors: Vectors,
        pack: Callable[[bool], PackedBatches],
    ) -> VectorBatches:
        """Look the vectors up."""
        del pack
        return VectorBatches(train, order, {name: vectors({}, name, "train") for name in train})

    def row_sets(self, num_tasks: int) -> int:
        """Return 0: a step encodes nothing."""
        del num_tasks
        return 0


class _Trained:
    """What `Lora` and `Full` have in common: sentences are encoded in each step."""

    tasks_share_rows: bool

    def vectors(self, live: Vectors) -> Vectors:
        """Encode a split each time."""
        return live

    def batches(
        self,
        train: Mapping[str, Examples],
        order: Order,
        vectors: Vectors,
        pack: Callable[[bool], PackedBatches],
    ) -> PackedBatches:
        """Pack the sentences."""
        del train, order, vectors
        return pack(self.tasks_share_rows)


@dataclasses.dataclass(frozen=True)
class Lora(_Trained):
    """One adapter is trained for all tasks of the group; the tasks' sentences share rows."""

    adapter: LoraConfig
    tasks_share_rows = True

    def freeze(self, params: Tree, dtype: Any) -> Tree:
        """Return all parameters."""
        return {"params": bert.matmul_ready(params, dtype)}

    def init(self, key: jax.Array, params: Tree) -> Tree:
        """Return a new adapter."""
        return {"lora": lora.init(key, params, self.adapter)}

    def encode_tasks(self, encode: Encode, num_tasks: int) -> EncodeTasks:
        """Apply the frozen kernels and the adapter once to tightly packed rows.

        Only the adapter's gradient is split by task.
        """

        def encode_rows(frozen: Tree, stack: Tree, rows: PackedTokens, key: jax.Array) -> jax.Array:
            sentences = rows.cls_index.shape[0] // num_tasks
            owner = jnp.repeat(jnp.arange(num_tasks), sentences)
            vectors = encode_mixed(encode, frozen, stack, rows, owner, key)
            return vectors.reshape(num_tasks, sentences, -1)

        return _with_copies(encode_rows, num_tasks)

    def row_sets(self, num_tasks: int) -> int:
        """Return 1: all tasks share rows."""
        del num_tasks
        return 1


@dataclasses.dataclass(frozen=True)
class Full(_Trained):
    """All weights of one encoder are trained; each task has rows of its own."""

    adapter: ClassVar[LoraConfig] = _NO_ADAPTER
    tasks_share_rows = False

    def freeze(self, params: Tree, dtype: Any) -> Tree:
        """Return nothing."""
        del params, dtype
        return {}

    def init(self, key: jax.Array, params: Tree) -> Tree:
        """Return all parameters."""
        del key
        return {"params": jax.tree.map(jnp.asarray, params)}

    def encode_tasks(self, encode: Encode, num_tasks: int) -> EncodeTasks:
        """Encode each task's rows with a copy of the encoder, since each needs all gradients."""
        encode_each = jax.vmap(encode, in_axes=(None, 0, 0, 0))

        def encode_rows(frozen: Tree, stack: Tree, rows: PackedTokens, key: jax.Array) -> jax.Array:
            return encode_each(frozen, stack, rows, jax.random.split(key, num_tasks))

        return _with_copies(encode_rows, num_tasks)

    def row_sets(self, num_tasks: int) -> int:
        """Return one for each task."""
        return num_tasks


def _with_copies(encode_rows: Callable[..., jax.Array], num_tasks: int) -> EncodeTasks:
    """Give each task a copy of the trainable tree: the copies' gradients are the tasks'."""

    def encode(
        frozen: Tree, trainable: Tree, inputs: Any, key: jax.Array
    ) -> tuple[jax.Array, Callable[[jax.Array], Tree]]:
        stack = trees.broadcast(trainable, num_tasks)
        vectors, pull = jax.vjp(lambda stack: encode_rows(frozen, stack, inputs, key), stack)
        return vectors, lambda grad: pull(grad)[0]

    return encode


def make_adaptation(adapt: Adapt, adapter: LoraConfig) -> Adaptation:
    """Return the adaptation of this name.

    Args:
      adapt: `frozen`, `lora` or `full`.
      adapter: configuration of `lora`'s adapters.

    >>> make_adaptation("full", LoraConfig()).row_sets(3)
    3
    """
    if adapt == "lora":
        return Lora(adapter)
    return Frozen() if adapt == "frozen" else Full()
