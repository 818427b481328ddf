"""What is trained in an encoder: nothing, an adapter, or all weights. Each is a class.

Shapes: T tasks in K groups, N sentences per task, H hidden size.
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

# Up to this many adapters are computed side by side for every token, so sentences may be in any
# order. Beyond it, each block of tokens uses one adapter (measured, see benchmarks/LOG.md).
MOST_SIDE_BY_SIDE, BLOCK = 4, 16

Vectors = Callable[[Tree, str, str], np.ndarray]
"""`(trainable, task, split) → f32[sentences, H]`."""


class EncodeTasks(Protocol):
    """Encodes the sentences of all tasks, with one trainable tree per group."""

    def __call__(
        self, frozen: Tree, trainable: Sequence[Tree], inputs: Any, key: jax.Array
    ) -> tuple[jax.Array, Callable[[jax.Array], list[Tree]]]:
        """Return vectors `f32[T, N, H]`, and the function from their cotangents to gradients.

        It returns one tree per group. Its leaves are `[tasks, ...]`: a gradient for each task.
        """


class Adaptation(abc.ABC):
    """How an encoder is adapted: `Frozen`, `Lora` or `Full`.

    Attributes:
      adapter: configuration of the adapters; only `Lora` uses it.
      trains_encoder: whether anything but the heads is trained.
      keeps_base: whether trained tasks still need the base's weights.
      tasks_share_rows: whether a row may hold sentences of several tasks.
      groups_share_steps: whether all groups train in one step, rather than one after another.
    """

    adapter: LoraConfig
    trains_encoder: ClassVar[bool] = True
    keeps_base: ClassVar[bool] = True
    tasks_share_rows: ClassVar[bool] = False
    groups_share_steps: ClassVar[bool] = True

    @abc.abstractmethod
    def describe(self) -> str:
        """Return a short description for the run's summary."""

    def check(self, params: Tree) -> None:  # noqa: B027 - most need no check
        """Check that a base can be adapted in this way.

        Raises:
          ConfigError: if it cannot; the error names the setting.
        """

    def freeze(self, params: Tree, dtype: Any) -> Tree:
        """Return the frozen collections, with kernels ready for matmuls in `dtype`.

        Args:
          params: the pretrained `params` collection.
          dtype: dtype of matmul inputs, see `bert.matmul_ready`.
        """
        return {"params": bert.matmul_ready(params, dtype)}

    @abc.abstractmethod
    def init(self, key: jax.Array, params: Tree) -> Tree:
        """Return the initial values of the trainable collections.

        Raises:
          ConfigError: see `lora.targets`.
        """

    @abc.abstractmethod
    def encode_tasks(self, encode: Encode, sizes: Sequence[int]) -> EncodeTasks:
        """Return the function by which a step encodes the sentences of all its tasks.

        Args:
          encode: encodes rows with a single trainable tree, see `encode.encoder`.
          sizes: number of tasks in each of the K groups.
        """

    def vectors(self, live: Vectors) -> Vectors:
        """Return the function that encodes a split for evaluation.

        Args:
          live: encodes the split at every call.
        """
        return live

    def batches(
        self,
        train: Mapping[str, Examples],
        order: JointOrder,
        vectors: Vectors,
        pack: Callable[[bool], PackedBatches],
    ) -> PackedBatches | VectorBatches:
        """Return the training batches, indexed by step.

        Args:
          train: task → examples.
          order: the examples that each step draws.
          vectors: see the method `vectors`.
          pack: packs sentences into rows; tasks share rows if its argument is true.
        """
        del train, order, vectors
        return pack(self.tasks_share_rows)

    def block(self, num_groups: int) -> int:
        """Return the length of the blocks of tokens that belong to one task; 1: no blocks."""
        del num_groups
        return 1

    @abc.abstractmethod
    def row_sets(self, num_tasks: int) -> int:
        """Return the number of sets of rows that a step encodes."""


@dataclasses.dataclass(frozen=True)
class Frozen(Adaptation):
    """Only heads are trained. The encoder is fixed, so each sentence is encoded once."""

    adapter: LoraConfig = LoraConfig()
    trains_encoder = False

    def describe(self) -> str:
        """Return a short description for the run's summary."""
        return "frozen"

    def init(self, key: jax.Array, params: Tree) -> Tree:
        """Return an empty tree."""
        del key, params
        return {}

    def encode_tasks(self, encode: Encode, sizes: Sequence[int]) -> EncodeTasks:
        """Return a function that takes the vectors from the batch."""
        del encode
        return lambda frozen, trainable, inputs, key: (inputs, lambda grad: [{} for _ in sizes])

    def vectors(self, live: Vectors) -> Vectors:
        """Encode each split at its first use and cache the vectors."""
        table = functools.cache(lambda task, split: live({}, task, split))
        return lambda trainable, task, split: table(task, split)

    def batches(
        self,
        train: Mapping[str, Examples],
        order: JointOrder,
        vectors: Vectors,
        pack: Callable[[bool], PackedBatches],
    ) -> VectorBatches:
        """Return batches of cached vectors."""
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
        """Return a short description for the run's summary."""
        config = self.adapter
        modules = ", ".join(config.target_modules)
        return f"frozen, LoRA rank {config.rank}, alpha {config.alpha:g} on {modules}"

    def check(self, params: Tree) -> None:
        """Check that the ranks and modules fit the base."""
        lora.targets(params, self.adapter)

    def init(self, key: jax.Array, params: Tree) -> Tree:
        """Return a new adapter."""
        return {"lora": lora.init(key, params, self.adapter)}

    def encode_tasks(self, encode: Encode, sizes: Sequence[int]) -> EncodeTasks:
        """Apply the frozen kernels once to the packed rows of all tasks.

        Only the adapters get a gradient per task.
        """
        adapter_of_task = tuple(k for k, size in enumerate(sizes) for _ in range(size))
        block = self.block(len(sizes))

        def encode_rows(frozen: Tree, stack: Tree, rows: PackedTokens, key: jax.Array) -> jax.Array:
            vectors = encode_tasks(encode, frozen, stack, rows, adapter_of_task, block, key)
            return vectors.reshape(len(adapter_of_task), -1, vectors.shape[-1])

        return _with_adapter_copies(encode_rows, sizes)

    def block(self, num_groups: int) -> int:
        """Return `BLOCK` if there are more than `MOST_SIDE_BY_SIDE` groups, else 1."""
        return BLOCK if num_groups > MOST_SIDE_BY_SIDE else 1

    def row_sets(self, num_tasks: int) -> int:
        """Return 1: all tasks share rows."""
        del num_tasks
        return 1


@dataclasses.dataclass(frozen=True)
class Full(Adaptation):
    """All weights of one encoder per group are trained; each task has rows of its own.

    Groups train one after another: several encoders with their optimizer states would not fit.
    """

    adapter: LoraConfig = LoraConfig()
    keeps_base = False
    groups_share_steps = False

    def describe(self) -> str:
        """Return a short description for the run's summary."""
        return "trained"

    def freeze(self, params: Tree, dtype: Any) -> Tree:
        """Return an empty tree."""
        del params, dtype
        return {}

    def init(self, key: jax.Array, params: Tree) -> Tree:
        """Return all parameters."""
        del key
        return {"params": jax.tree.map(jnp.asarray, params)}

    def encode_tasks(self, encode: Encode, sizes: Sequence[int]) -> EncodeTasks:
        """Encode each task's rows; a copy of the encoder for each task stands for its gradient."""
        (size,) = sizes  # of the only group, see `groups_share_steps`

        def encode_all(
            frozen: Tree, trainable: Sequence[Tree], inputs: PackedTokens, key: jax.Array
        ) -> tuple[jax.Array, Callable[[jax.Array], list[Tree]]]:
            (tree,), keys = trainable, jax.random.split(key, size)

            def encode_own(copies: Tree, rows: PackedTokens, key: jax.Array) -> jax.Array:
                return encode(frozen, bert.with_copies(tree["params"], copies), rows, key)

            copies = jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), tree["params"])
            vectors, pull = jax.vjp(lambda own: jax.vmap(encode_own)(own, inputs, keys), copies)
            return vectors, lambda grad: [{"params": pull(grad)[0]}]

        return encode_all

    def row_sets(self, num_tasks: int) -> int:
        """Return the number of tasks: each has a set of its own."""
        return num_tasks


def _with_adapter_copies(
    encode_rows: Callable[..., jax.Array], sizes: Sequence[int]
) -> EncodeTasks:
    """Give each task a copy of its group's adapter; a copy's gradient is that of its task."""

    def encode(
        frozen: Tree, trainable: Sequence[Tree], inputs: Any, key: jax.Array
    ) -> tuple[jax.Array, Callable[[jax.Array], list[Tree]]]:
        copies = map(trees.broadcast, trainable, sizes)
        stack = jax.tree.map(lambda *x: jnp.concatenate(x), *copies)
        vectors, pull = jax.vjp(lambda stack: encode_rows(frozen, stack, inputs, key), stack)
        return vectors, lambda grad: trees.split(pull(grad)[0], sizes)

    return encode


def cohorts(groups: Groups, adaptation: Adaptation) -> tuple[Groups, ...]:
    """Return the sets of groups that train in one step: all together, or each by itself.

    >>> cohorts((("sst",), ("sts",)), Full())
    ((('sst',),), (('sts',),))
    """
    return (groups,) if adaptation.groups_share_steps else tuple((group,) for group in groups)


def make_adaptation(adapt: Adapt, adapter: LoraConfig) -> Adaptation:
    """Return the adaptation with this name.

    Args:
      adapt: `frozen`, `lora` or `full`.
      adapter: configuration of the adapters of `lora`.

    >>> make_adaptation("full", LoraConfig()).row_sets(3)
    3
    """
    if adapt == "lora":
        return Lora(adapter)
    return Frozen() if adapt == "frozen" else Full()
