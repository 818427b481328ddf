"""Packed sentences → vectors: one encoder for training and for serving.

Shapes: R rows, S tokens a row, N sentences, T adapters, L layers, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxlora import lora
from jaxlora.nn import bert
from jaxlora.nn.routes import ByBlock, ByTask, Route
from jaxlora.utils.trees import Tree


class PackedTokens(NamedTuple):
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


class Encode(Protocol):
    """A function that encodes rows with one trainable tree, see `encoder`."""

    def __call__(
        self,
        frozen: Tree,
        trainable: Tree,
        rows: PackedTokens,
        key: jax.Array | None,
        route: Route | None = None,
    ) -> jax.Array:
        """Sentence vectors `f32[N, H]`; dropout is on when a key is given."""


def encoder(
    config: bert.EncoderConfig, dtype: Any, adapter: lora.LoraConfig, pooling: str
) -> Encode:
    """Encode packed rows with one trainable tree.

    Returns:
      `(frozen, trainable, tokens, key or None, route=None) -> f32[N, H]`; `{**frozen, **trainable}`
      are the Flax collections (with `params` as `bert.stack_layers` takes them), so a trainable
      `params` takes the place of the frozen one; for the route see `bert.Encoder`.
    """
    module = config.network(dtype, adapter)

    def encode(
        frozen: Tree,
        trainable: Tree,
        rows: PackedTokens,
        key: jax.Array | None,
        route: Route | None = None,
    ) -> jax.Array:
        collections = {**frozen, **trainable}
        hidden = jnp.asarray(
            module.apply(
                collections | {"params": bert.stack_layers(collections["params"])},
                rows.tokens,
                rows.positions,
                rows.segment_ids,
                key is not None,
                route,
                rngs=None if key is None else {"dropout": key},
            )
        )
        return bert.pool(hidden, rows.segment_ids, rows.cls_index, pooling)

    return encode


def encode_tasks(
    encode: Encode,
    frozen: Tree,
    stack: Tree,
    rows: PackedTokens,
    adapter_of_task: tuple[int, ...],
    key: jax.Array,
) -> jax.Array:
    """Encode rows of all tasks in training, each task with its own copy of its adapter.

    Args:
      encode: from `encoder`.
      frozen: the base's collections.
      stack: `{"lora": leaves [T, L, ...]}`, a copy for each task; `[T, ...]` outside the layers.
      rows: packed sentences; those of a task have consecutive numbers, as many for each.
      adapter_of_task: see `ops.low_rank_per_task`.
      key: PRNG key of dropout.

    Returns:
      `f32[N, H]`.
    """
    count = len(adapter_of_task)
    each = rows.cls_index.shape[0] // count
    # Padding, whose number is -1, belongs to no task.
    task = jax.nn.one_hot((rows.segment_ids - 1) // each, count, dtype=bool)
    by_layer = stack | {"lora": _by_layer(stack["lora"])}
    return encode(frozen, by_layer, rows, key, ByTask(task, adapter_of_task))


def make_encode(
    encode: Encode, sharding: Any = None
) -> Callable[[Tree, Tree, PackedTokens], jax.Array]:
    """Compile evaluation: `(frozen, trainable, PackedTokens) → f32[N, H]`, without dropout."""
    return jax.jit(
        lambda frozen, trainable, rows: encode(frozen, trainable, rows, None),
        out_shardings=sharding,
    )


def make_mixed_encode(encode: Encode) -> Callable[[Tree, Tree, PackedTokens, jax.Array], jax.Array]:
    """Compile evaluation with one of T adapters for each block of tokens.

    Returns:
      `(frozen, adapters, PackedTokens, owner) → f32[N, H]`: T adapters are trees as
      `bert.unstack_layers` makes them, stacked along a first axis, and `owner: i32[R, S / block]`
      says which each block of tokens uses.
    """

    def encode_mixed(
        frozen: Tree, adapters: Tree, rows: PackedTokens, owner: jax.Array
    ) -> jax.Array:
        return encode(frozen, {"lora": _by_layer(adapters)}, rows, None, ByBlock(owner))

    return jax.jit(encode_mixed)


def _by_layer(adapters: Tree) -> Tree:
    """Adapters as the module has them: leaves `[L, T, ...]`, outside the layers `[T, ...]`."""
    if isinstance(adapters.get("layers", []), list):
        return bert.stack_layers(adapters)
    layers = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), adapters["layers"])
    return adapters | {"layers": layers}
