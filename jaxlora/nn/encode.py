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
    """Packed sentences; a jointly encoded pair counts as one sentence.

    Attributes:
      tokens: `i32[R, S]`.
      positions: `i32[R, S]`, counted from 0 within each sentence.
      segment_ids: `i32[R, S]`, `n + 1` for the tokens of sentence n, 0 for padding.
      cls_index: `i32[N]`, where sentence n starts in the flattened rows.
      types: `i32[R, S]`, token types, for families that have them; None: all are 0.
    """

    tokens: Any
    positions: Any
    segment_ids: Any
    cls_index: Any
    types: Any = None


class Encode(Protocol):
    """A function that encodes rows with one trainable tree; see `encoder`."""

    def __call__(
        self,
        frozen: Tree,
        trainable: Tree,
        rows: PackedTokens,
        key: jax.Array | None,
        route: Route | None = None,
    ) -> jax.Array:
        """Return sentence vectors, `f32[N, H]`; dropout is on if a key is given."""


def encoder(
    config: bert.EncoderConfig, dtype: Any, adapter: lora.LoraConfig, pooling: str
) -> Encode:
    """Return a function that encodes packed rows with one trainable tree.

    Returns:
      `(frozen, trainable, rows, key or None, route=None) -> f32[N, H]`. `{**frozen, **trainable}`
      are the Flax collections, with `params` as `bert.stack_layers` takes them; trainable `params`
      replace the frozen ones. For the route see `bert.Encoder`.
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
                rows.types,
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
    block: int,
    key: jax.Array,
) -> jax.Array:
    """Encode the rows of all tasks in training, each task with its own copy of its adapter.

    Args:
      encode: from `encoder`.
      frozen: the base's collections.
      stack: `{"lora": leaves [T, L, ...]}`, a copy for each task; `[T, ...]` outside the layers.
      rows: packed sentences. Each task has the same number of sentences, numbered consecutively.
      adapter_of_task: see `ops.low_rank_per_task`.
      block: number of consecutive tokens that belong to one task; 1: sentences are in any order.
      key: PRNG key for dropout.

    Returns:
      `f32[N, H]`.
    """
    count = len(adapter_of_task)
    each = rows.cls_index.shape[0] // count
    task = (rows.segment_ids - 1) // each  # -1 for padding, which belongs to no task
    route: Route = ByTask(jax.nn.one_hot(task, count, dtype=bool), adapter_of_task)
    if block > 1:
        of_block = task.reshape(len(task), -1, block).max(-1)
        route = ByBlock(jnp.maximum(of_block, 0))  # any adapter will do for a block of padding
    by_layer = stack | {"lora": _by_layer(stack["lora"])}
    return encode(frozen, by_layer, rows, key, route)


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
      `(frozen, adapters, PackedTokens, owner) → f32[N, H]`, where `adapters` are T trees as
      returned by `bert.unstack_layers`, stacked along a leading axis, and
      `owner: i32[R, S / block]` is the index of the adapter of each block of tokens.
    """

    def encode_mixed(
        frozen: Tree, adapters: Tree, rows: PackedTokens, owner: jax.Array
    ) -> jax.Array:
        return encode(frozen, {"lora": _by_layer(adapters)}, rows, None, ByBlock(owner))

    return jax.jit(encode_mixed)


def _by_layer(adapters: Tree) -> Tree:
    """Return adapters as the module expects them: `[L, T, ...]`; `[T, ...]` outside the layers."""
    if isinstance(adapters.get("layers", []), list):
        return bert.stack_layers(adapters)
    layers = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), adapters["layers"])
    return adapters | {"layers": layers}
