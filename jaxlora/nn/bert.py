"""BERT's encoder over packed rows, as a Flax module with two collections.

`params` holds the pretrained weights (frozen under LoRA) and `lora`, where given, an adapter of
the same layout. Module names are Hugging Face's, so a weight's path can be read off its key. The
layers are stacked along a leading axis and run under `nn.scan`, unrolled where they are few.
Devlin et al. 2018, "BERT"; post-LayerNorm, exact GELU, absolute positions.

Shapes: R rows, S tokens a row, H hidden size, L layers, N sentences.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlora.lora import LoraConfig
from jaxlora.nn import ops

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": ops.gelu,
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}
# Layers in a row without a loop: a loop stacks what the backward pass needs (10–20 % of a step on
# CPU), unrolled layers take longer to compile.
MOST_UNROLLED = 12


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The shape of the network; the defaults are bert-base-uncased.

    Attributes mirror Hugging Face's `config.json`.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1

    def with_dropout(self, rate: float) -> BertConfig:
        """The same network with this dropout everywhere."""
        return dataclasses.replace(
            self, hidden_dropout_prob=rate, attention_probs_dropout_prob=rate
        )


class Dense(nn.Module):
    """`x W + b`, plus `scale · x A B` where the `lora` collection has this layer.

    Of several adapters (`A: [T, in, r]`, `B: [T, r, out]`) each block of tokens uses one; in
    training they are taken for copies of one, each with its own tokens' gradient. In training the
    adapter's input has its own dropout. Matmul inputs are `dtype`; products are summed, and
    returned, in float32.
    """

    features: int
    dtype: Any = jnp.float32
    lora: LoraConfig = LoraConfig()

    @nn.compact
    def __call__(
        self, x: jax.Array, share: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        """`[..., in]`, and for several adapters `share`, see `Encoder` → `f32[..., features]`."""
        kernel = self.param(
            "kernel", nn.initializers.normal(0.02), (x.shape[-1], self.features), jnp.float32
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        y = ops.matmul(x, kernel, self.dtype) + bias.reshape((1,) * (x.ndim - 1) + (-1,))
        if self.has_variable("lora", "A"):
            a, b = (jnp.asarray(self.get_variable("lora", name)) for name in "AB")
            x = _dropout(self, x, self.lora.dropout, train)
            if share is None:
                low = ops.low_rank(x, a, b, self.dtype)
            elif train:
                low = ops.low_rank_of_copies(x, a, b, share, self.dtype)
            else:
                low = ops.low_rank_by_block(x, a, b, share, self.dtype)
            y = y + self.lora.scale_of(self.path) * low
        return y


class SelfAttention(nn.Module):
    """Multi-head attention in which a token sees only its own sentence."""

    config: BertConfig
    dtype: Any
    lora: LoraConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array, share: jax.Array | None, train: bool
    ) -> jax.Array:
        """`x: [R, S, H]`, `mask: bool[R, 1, S, S]` → `[R, S, H]`."""
        c = self.config
        shape = (*x.shape[:-1], c.num_attention_heads, c.hidden_size // c.num_attention_heads)
        query, key, value = (
            Dense(c.hidden_size, self.dtype, self.lora, name=name)(x, share, train)
            .reshape(shape)
            .astype(self.dtype)
            for name in ("query", "key", "value")
        )
        kept, scale = None, 1.0
        if train and c.attention_probs_dropout_prob:
            rows, tokens, heads, _ = shape
            weights = (rows, heads, tokens, tokens)
            kept, scale = ops.keep(
                weights, c.attention_probs_dropout_prob, self.make_rng("dropout")
            )
        y = ops.attend(query, key, value, mask, kept, scale)
        return y.reshape(x.shape)


class Output(nn.Module):
    """Dense → Dropout → add the residual → LayerNorm (float32)."""

    config: BertConfig
    dtype: Any
    lora: LoraConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, residual: jax.Array, share: jax.Array | None, train: bool
    ) -> jax.Array:
        """`x: [..., F]`, `residual: [..., H]` → `f32[..., H]`."""
        c = self.config
        y = Dense(c.hidden_size, self.dtype, self.lora, name="dense")(x, share, train)
        y = _dropout(self, y, c.hidden_dropout_prob, train)
        return _layer_norm(c)(y + residual)


class Attention(nn.Module):
    """Self-attention and its output layer (HF's `attention.self`, `attention.output`)."""

    config: BertConfig
    dtype: Any
    lora: LoraConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array, share: jax.Array | None, train: bool
    ) -> jax.Array:
        """`x: f32[R, S, H]` → the same shape."""
        rest = (self.config, self.dtype, self.lora)
        y = SelfAttention(*rest, name="self")(x, mask, share, train)
        return Output(*rest, name="output")(y, x, share, train)


class Intermediate(nn.Module):
    """The feed-forward layer's first half: Dense → activation."""

    config: BertConfig
    dtype: Any
    lora: LoraConfig

    @nn.compact
    def __call__(self, x: jax.Array, share: jax.Array | None, train: bool) -> jax.Array:
        """`[..., H]` → `[..., F]`."""
        width = self.config.intermediate_size
        y = Dense(width, self.dtype, self.lora, name="dense")(x, share, train)
        return ACTIVATIONS[self.config.hidden_act](y)


class Layer(nn.Module):
    """One transformer layer, in the form `nn.scan` wants: carry in, (carry, None) out."""

    config: BertConfig
    dtype: Any
    lora: LoraConfig
    train: bool

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array, share: jax.Array | None
    ) -> tuple[jax.Array, None]:
        """`x: f32[R, S, H]`, `mask: bool[R, 1, S, S]`, and `share`, see `Encoder`."""
        rest = (self.config, self.dtype, self.lora)
        x = Attention(*rest, name="attention")(x, mask, share, self.train)
        y = Intermediate(*rest, name="intermediate")(x, share, self.train)
        return Output(*rest, name="output")(y, x, share, self.train), None


class Embeddings(nn.Module):
    """Word + position + token type (always 0: sentences are encoded one by one), normalised."""

    config: BertConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array, train: bool) -> jax.Array:
        """`tokens, positions: i32[R, S]` → `f32[R, S, H]`."""
        c = self.config
        x = self._table("word_embeddings", c.vocab_size)[tokens]
        x = x + self._table("position_embeddings", c.max_position_embeddings)[positions]
        x = x + self._table("token_type_embeddings", c.type_vocab_size)[0][None, None]
        x = _layer_norm(c)(x)
        return _dropout(self, x, c.hidden_dropout_prob, train)

    def _table(self, name: str, rows: int) -> jax.Array:
        shape = (rows, self.config.hidden_size)
        table = self.param(name, nn.initializers.normal(0.02), shape, jnp.float32)
        return table.astype(jnp.float32)


class Encoder(nn.Module):
    """Packed tokens to contextual vectors.

    Attributes:
      config: shape of the network.
      dtype: dtype of matmul inputs; everything else is float32.
      lora: configuration of the adapter in the `lora` collection, if there is one.
    """

    config: BertConfig
    dtype: Any = jnp.float32
    lora: LoraConfig = LoraConfig()

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        train: bool = False,
        share: jax.Array | None = None,
    ) -> jax.Array:
        """Encode rows into which several sentences are packed.

        Args:
          tokens: `i32[R, S]`.
          positions: `i32[R, S]`, counted from 0 within each sentence.
          segment_ids: `i32[R, S]`, which sentence a token belongs to, 0 for padding; a token
            attends to the tokens of its row that have its id.
          train: apply dropout (needs a `dropout` rng).
          share: which of T adapters tokens use (leaves of `lora` are `[L, T, ...]` then): with
            `train` `f32[R, S, T]`, which of T copies of one adapter gets a token's gradient; else
            `i32[R, S / block]`, the adapter of each block of tokens. None for one adapter
            (`[L, ...]`), or none.

        Returns:
          `f32[R, S, H]`, the last layer.
        """
        mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        x = Embeddings(self.config, name="embeddings")(tokens, positions, train)
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=self.config.num_hidden_layers,
            unroll=min(self.config.num_hidden_layers, MOST_UNROLLED),
        )
        rest = (self.config, self.dtype, self.lora, train)
        return layers(*rest, name="layers")(x, mask, share)[0]


def pool(hidden: jax.Array, segment_ids: jax.Array, cls_index: jax.Array, kind: str) -> jax.Array:
    """One vector per sentence.

    Args:
      hidden: `f32[R, S, H]`.
      segment_ids: `i32[R, S]`; sentence n (of this batch) has id `n + 1`, padding 0.
      cls_index: `i32[N]`, where sentence n starts in the flattened rows.
      kind: `cls`, the vector of the first token (the paper's), or `mean`, the mean over the
        sentence's tokens (Reimers & Gurevych 2019, "Sentence-BERT", section 3).

    Returns:
      `f32[N, H]`.

    >>> hidden = jnp.arange(4.0).reshape(1, 4, 1)
    >>> pool(hidden, jnp.array([[1, 1, 2, 0]]), jnp.array([0, 2]), "mean").tolist()
    [[0.5], [2.0]]
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    if kind == "cls":
        return flat[cls_index]
    ids = segment_ids.reshape(-1)
    count = len(cls_index) + 1
    sums = jax.ops.segment_sum(flat, ids, count)[1:]
    sizes = jax.ops.segment_sum(jnp.ones_like(ids, flat.dtype), ids, count)[1:]
    return sums / jnp.maximum(sizes, 1)[:, None]


def _dropout(module: nn.Module, x: jax.Array, rate: float, train: bool) -> jax.Array:
    return ops.dropout(x, rate, module.make_rng("dropout")) if train and rate else x


def _layer_norm(config: BertConfig) -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon=config.layer_norm_eps,
        dtype=jnp.float32,
        name="LayerNorm",
        use_fast_variance=False,
    )


@functools.lru_cache(maxsize=8)
def param_shapes(config: BertConfig) -> dict[str, Any]:
    """The parameter tree as `jax.ShapeDtypeStruct`s, without allocating it; not to be changed.

    >>> sum(x.size for x in jax.tree.leaves(param_shapes(BertConfig())))
    108891648
    """
    ids = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(lambda: Encoder(config).init(jax.random.key(0), ids, ids, ids))["params"]


def matmul_ready(params: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """Frozen parameters as the programs want them, so that no step does this again.

    Dense kernels are in `dtype`; embeddings, biases and LayerNorm stay float32; see
    `unstack_layers`.
    """

    def leaf(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        return jnp.asarray(x, dtype if path[-1].key == "kernel" else jnp.float32)

    return unstack_layers(jax.tree_util.tree_map_with_path(leaf, params))


def unstack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """Give each layer arrays of its own, up to `MOST_UNROLLED` layers, in a list.

    The programs would copy each layer out of a stack. `stack_layers` is the way back.
    """
    count = len(jax.tree.leaves(params["layers"])[0])
    if count > MOST_UNROLLED:
        return params
    layers = [jax.tree.map(operator.itemgetter(i), params["layers"]) for i in range(count)]
    return params | {"layers": layers}


def stack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """The layers along one axis again, as the module has them.

    In a program that unrolls them this costs nothing: XLA takes a slice of a stack for what was put
    there.
    """
    if isinstance(params["layers"], dict):
        return params
    return params | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *params["layers"])}
