"""What is trained of an encoder: nothing, an adapter, or all weights. One class for each.

Shapes: T tasks in K groups, N sentences a task, H hidden size.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import lora
from jaxlora.data.batches import PackedBatches, VectorBatches
from jaxlora.data.order import JointOrder
from jaxlora.data.tokenized import Examples
from jaxlora.lora import LoraConfig
from jaxlora.nn import bert
from jaxlora.nn.encode import Encode, PackedTokens, encode_tasks
from jaxlora.tasks.sharing import Adapt, Groups
from jaxlora.utils import trees
from jaxlora.utils.trees import Tree

# Adapters that are computed side by side, for sentences in any order; of more, each block of tokens
# gets its own (measured, see benchmarks/LOG.md).
MOST_SIDE_BY_SIDE, BLOCK = 4, 16

Vectors = Callable[[Tree, str, str], np.ndarray]
"""`(trainable, task, split) → f32[sentences, H]`."""


class EncodeTasks(Protocol):
    """Encodes the sentences of all tasks, those of each group with its own trainable tree."""

    def __call__(
        self, frozen: Tree, trainable: Sequence[Tree], inputs: Any, key: jax.Array
    ) -> tuple[jax.Array, Callable[[jax.Array], list[Tree]]]:
        """Return vectors `f32[T, N, H]`, and the way from their cotangents to gradients.

        A group's gradient has one of each of its tasks, along a first axis.
        """


class Adaptation(abc.ABC):
    """How an encoder is adapted: `Frozen`, `Lora` or `Full`.

    Attributes:
      adapter: configuration of the adapters; not used without any.
      trains_encoder: whether a step changes anything but heads.
      keeps_base: whether the trained tasks need the base's own weights.
      tasks_share_rows: whether sentences of several tasks are packed into one row.
      groups_share_steps: whether groups train in one step; otherwise one after another.
    """

    adapter: LoraConfig
    trains_encoder: ClassVar[bool] = True
    keeps_base: ClassVar[bool] = True
    tasks_share_rows: ClassVar[bool] = False
    groups_share_steps: ClassVar[bool] = True

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
    def encode_tasks(self, encode: Encode, sizes: Sequence[int]) -> EncodeTasks:
        """Return how a step encodes the sentences of all its tasks, from how it encodes one's.

        Args:
          encode: from `encode.encoder`.
          sizes: how many tasks each of K groups has.
        """

    def vectors(self, live: Vectors) -> Vectors:
        """Return how a split is encoded for evaluation, from a function that does so each time."""
        return live

    def batches(
        self,
        train: Mapping[str, Examples],
        order: JointOrder,
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

    def block(self, num_groups: int) -> int:
        """Return how many consecutive tokens of a row belong to one task; 1: any order.

        Args:
          num_groups: K.
        """
        del num_groups
        return 1

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

    def encode_tasks(self, encode: Encode, sizes: Sequence[int]) -> EncodeTasks:
        """Take the vectors from the batch."""
        del encode
        return lambda frozen, trainable, inputs, key: (inputs, lambda grad: [{} for _ in sizes])

    def vectors(self, live: Vectors) -> Vectors:
        """Encode a split when it is first needed, and keep it."""
        table = functools.cache(lambda task, split: live({}, task, split))
        return lambda trainable, task, split: table(task, split)

    def batches(
        self,
        train: Mapping[str, Examples],
        order: JointOrder,
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
    """One adapter is trained for each group; the sentences of all tasks share rows."""

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

    def encode_tasks(self, encode: Encode, sizes: Sequence[int]) -> EncodeTasks:
        """Apply the frozen kernels once to tightly packed rows, with each task's own adapter.

        Only the adapters' gradients are split by task.
        """
        adapter_of_task = tuple(k for k, size in enumerate(sizes) for _ in range(size))
        block = self.block(len(sizes))

        def encode_rows(frozen: Tree, stack: Tree, rows: PackedTokens, key: jax.Array) -> jax.Array:
            vectors = encode_tasks(encode, frozen, stack, rows, adapter_of_task, block, key)
            return vectors.reshape(len(adapter_of_task), -1, vectors.shape[-1])

        return _with_copies(encode_rows, sizes)

    def block(self, num_groups: int) -> int:
        """Return `BLOCK` where so many adapters side by side would cost more than it."""
        return BLOCK if num_groups > MOST_SIDE_BY_SIDE else 1

    def row_sets(self, num_tasks: int) -> int:
        """Return 1: all tasks share rows."""
        del num_tasks
        return 1


@dataclasses.dataclass(frozen=True)
class Full(Adaptation):
    """All weights of one encoder are trained; each task has rows of its own.

    Several whole encoders with their moments would not fit together, so groups take turns.
    """

    adapter: LoraConfig = LoraConfig()
    keeps_base = False
    groups_share_steps = False

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

    def encode_tasks(self, encode: Encode, sizes: Sequence[int]) -> EncodeTasks:
        """Encode each task's rows with a copy of the encoder: kernels have a gradient a task."""
        encode_each = jax.vmap(encode, in_axes=(None, 0, 0, 0))

        def encode_rows(frozen: Tree, stack: Tree, rows: PackedTokens, key: jax.Array) -> jax.Array:
            return encode_each(frozen, stack, rows, jax.random.split(key, sum(sizes)))

        return _with_copies(encode_rows, sizes)

    def row_sets(self, num_tasks: int) -> int:
        """Return one for each task."""
        return num_tasks


def _with_copies(encode_rows: Callable[..., jax.Array], sizes: Sequence[int]) -> EncodeTasks:
    """Give each task a copy of its group's tree: the copies' gradients are the tasks'."""

    def encode(
        frozen: Tree, trainable: Sequence[Tree], inputs: Any, key: jax.Array
    ) -> tuple[jax.Array, Callable[[jax.Array], list[Tree]]]:
        copies = map(trees.broadcast, trainable, sizes)
        stack = jax.tree.map(lambda *x: jnp.concatenate(x), *copies)
        vectors, pull = jax.vjp(lambda stack: encode_rows(frozen, stack, inputs, key), stack)
        return vectors, lambda grad: trees.split(pull(grad)[0], sizes)

    return encode


def cohorts(groups: Groups, adaptation: Adaptation) -> tuple[Groups, ...]:
    """Return which groups train in one step: all, or each by itself.

    >>> cohorts((("sst",), ("sts",)), Full())
    ((('sst',),), (('sts',),))
    """
    return (groups,) if adaptation.groups_share_steps else tuple((group,) for group in groups)


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
