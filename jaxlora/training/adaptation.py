"""What a group trains of its encoder: nothing, an adapter, or all weights. One class for each.

Shapes: T tasks, N sentences a task, H hidden size.
"""

from __future__ import annotations

import abc
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
from jaxlora.nn.encode import Encode, PackedTokens, encode_copies
from jaxlora.tasks.sharing import Adapt
from jaxlora.utils import trees
from jaxlora.utils.trees import Tree

Vectors = Callable[[Tree, str, str], np.ndarray]
"""`(trainable, task, split) → f32[sentences, H]`."""


class EncodeTasks(Protocol):
    """Encodes the sentences of all tasks of a group with its one trainable tree."""

    def __call__(
        self, frozen: Tree, trainable: Tree, inputs: Any, key: jax.Array
    ) -> tuple[jax.Array, Callable[[jax.Array], Tree]]:
        """Vectors `f32[T, N, H]`, and from their cotangents to each task's gradient `[T, ...]`."""


class Adaptation(abc.ABC):
    """How an encoder is adapted: `Frozen`, `Lora` or `Full`.

    Attributes:
      adapter: configuration of the adapters; not used without any.
      trains_encoder: whether a step changes anything but heads.
      keeps_base: whether the trained tasks need the base's own weights.
      tasks_share_rows: whether sentences of several tasks are packed into one row.
    """

    adapter: LoraConfig
    trains_encoder: ClassVar[bool] = True
    keeps_base: ClassVar[bool] = True
    tasks_share_rows: ClassVar[bool] = False

    @abc.abstractmethod
    def describe(self) -> str:
        """Return a few words for people."""

    def check(self, params: Tree) -> None:  # noqa: B027 - most need no check
        """Refuse a base that cannot be adapted so.

        Raises:
          ConfigError: naming the setting.
        """

    def freeze(self, params: Tree, dtype: Any) -> Tree:
        """Return the collections that no step changes, with kernels ready for matmuls in `dtype`.

        Args:
          params: the pretrained `params` collection.
          dtype: dtype of matmul inputs, see `bert.matmul_ready`.
        """
        return {"params": bert.matmul_ready(params, dtype)}

    @abc.abstractmethod
    def init(self, key: jax.Array, params: Tree) -> Tree:
        """Return the collections that are trained, as they are before the first step.

        Raises:
          ConfigError: see `lora.targets`.
        """

    @abc.abstractmethod
    def encode_tasks(self, encode: Encode, num_tasks: int) -> EncodeTasks:
        """Return how a step encodes the sentences of all its tasks, from how it encodes one's."""

    def vectors(self, live: Vectors) -> Vectors:
        """Return how a split is encoded for evaluation, from a function that does so each time."""
        return live

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
        del train, order, vectors
        return pack(self.tasks_share_rows)

    @abc.abstractmethod
    def row_sets(self, num_tasks: int) -> int:
        """Return how many sets of rows a step encodes."""


@dataclasses.dataclass(frozen=True)
class Frozen(Adaptation):
    """The encoder stays as it is, so each sentence is encoded once; only heads are trained."""

    adapter: LoraConfig = LoraConfig()
    trains_encoder = False

    def describe(self) -> str:
        """Return a few words for people."""
        return "frozen"

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


@dataclasses.dataclass(frozen=True)
class Lora(Adaptation):
    """One adapter is trained for all tasks of the group; the tasks' sentences share rows."""

    adapter: LoraConfig
    tasks_share_rows = True

    def describe(self) -> str:
        """Return a few words for people."""
        config = self.adapter
        modules = ", ".join(config.target_modules)
        return f"frozen, LoRA rank {config.rank}, alpha {config.alpha:g} on {modules}"

    def check(self, params: Tree) -> None:
        """Refuse ranks and modules that do not fit."""
        lora.targets(params, self.adapter)

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
            vectors = encode_copies(encode, frozen, stack, rows, owner, key)
            return vectors.reshape(num_tasks, sentences, -1)

        return _with_copies(encode_rows, num_tasks)

    def row_sets(self, num_tasks: int) -> int:
        """Return 1: all tasks share rows."""
        del num_tasks
        return 1


@dataclasses.dataclass(frozen=True)
class Full(Adaptation):
    """All weights of one encoder are trained; each task has rows of its own."""

    adapter: LoraConfig = LoraConfig()
    keeps_base = False

    def describe(self) -> str:
        """Return a few words for people."""
        return "trained"

    def freeze(self, params: Tree, dtype: Any) -> Tree:
        """Return nothing."""
        del params, dtype
        return {}

    def init(self, key: jax.Array, params: Tree) -> Tree:
        """Return all parameters."""
        del key
        return {"params": jax.tree.map(jnp.asarray, params)}

    def encode_tasks(self, encode: Encode, num_tasks: int) -> EncodeTasks:
        """Encode each task's rows with a copy of the encoder: kernels have a gradient a task."""
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
