"""ModernBERT's encoder over packed rows, with the collections of `bert.Encoder`.

Warner et al. 2024, "Smarter, Better, Faster, Longer": LayerNorm before each half of a layer, rotary
positions, a gated feed-forward layer, no biases by default, and sliding-window attention in most
layers. Module names are Hugging Face's except `next_norm`: the norm that transformers applies
before a layer's attention is here at the end of the previous layer. This makes all layers alike,
and the last layer's `next_norm` is transformers' final norm.

Shapes: R rows, S tokens a row, H hidden size, d a head's size, L layers, T adapters.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlora.lora import LoraConfig
from jaxlora.nn import ops
from jaxlora.nn.bert import (
    ACTIVATIONS,
    NO_ADAPTER,
    Dense,
    EncoderConfig,
    apply_shared,
    dropout,
    keep_weights,
    layer_norm,
    scan_layers,
)
from jaxlora.nn.routes import Route

GLOBAL, LOCAL = "full_attention", "sliding_attention"
# A layer's inputs that depend on its kind (global or local): mask, cosines and sines.
Sight = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class ModernBertConfig(EncoderConfig):
    """Configuration of a ModernBERT; where ModernBERT's field names differ, BERT's are used.

    Attributes:
      layer_types: `full_attention` or `sliding_attention` for each layer; `()`: every third layer,
        starting with the first, has `full_attention`.
      local_attention: width of the window to which a token attends in a `sliding_attention` layer,
        half of it on each side.
      global_rope_theta, local_rope_theta: base of the rotary frequencies in each kind of layer.
      attention_bias, mlp_bias, norm_bias: whether those modules have biases.
      embedding_dropout: dropout rate of the embeddings. `hidden_dropout_prob` is the rate of the
        feed-forward layer, `attention_probs_dropout_prob` of the attention weights and output.
    """

    type_vocab_size: int = 0
    layer_norm_eps: float = 1e-5
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    layer_types: tuple[str, ...] = ()
    local_attention: int = 128
    global_rope_theta: float = 160_000.0
    local_rope_theta: float = 10_000.0
    attention_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    embedding_dropout: float = 0.0

    def __post_init__(self) -> None:
        layers = range(self.num_hidden_layers)
        kinds = self.layer_types or tuple(LOCAL if i % 3 else GLOBAL for i in layers)
        if len(kinds) != len(layers) or not {GLOBAL, LOCAL}.issuperset(kinds):
            raise ValueError(f"layer_types: not {len(layers)} of {GLOBAL} and {LOCAL}")
        object.__setattr__(self, "layer_types", kinds)
        if self.hidden_size % (2 * max(1, self.num_attention_heads)):
            raise ValueError("hidden_size: not an even multiple of num_attention_heads")

    def network(self, dtype: Any = jnp.float32, adapter: LoraConfig = NO_ADAPTER) -> Encoder:
        """Return the encoder as a Flax module."""
        return Encoder(self, dtype, adapter)


class Attention(nn.Module):
    """Multi-head attention with rotary positions; one Dense computes query, key and value."""

    config: ModernBertConfig
    dtype: Any
    lora: LoraConfig

    @nn.compact
    def __call__(self, x: jax.Array, sight: Sight, route: Route | None, train: bool) -> jax.Array:
        """Map `x: f32[R, S, H]` to the same shape."""
        c, rest = self.config, (self.dtype, self.lora, self.config.attention_bias)
        mask, *angles = sight
        shape = (*x.shape[:-1], c.num_attention_heads, c.hidden_size // c.num_attention_heads)
        made = Dense(3 * c.hidden_size, *rest, name="Wqkv")(x, route, train)
        query, key, value = (part.reshape(shape) for part in jnp.split(made, 3, -1))
        query, key = (ops.rotate(part, *angles) for part in (query, key))
        kept = keep_weights(self, shape, c.attention_probs_dropout_prob, train)
        y = ops.attend(*(part.astype(self.dtype) for part in (query, key, value)), mask, *kept)
        y = Dense(c.hidden_size, *rest, name="Wo")(y.reshape(x.shape), route, train)
        return dropout(self, y, c.attention_probs_dropout_prob, train)


class Mlp(nn.Module):
    """A gated feed-forward layer: `(act(x U) · x V) W` (Shazeer 2020, "GLU Variants", GEGLU)."""

    config: ModernBertConfig
    dtype: Any
    lora: LoraConfig

    @nn.compact
    def __call__(self, x: jax.Array, route: Route | None, train: bool) -> jax.Array:
        """Map `f32[R, S, H]` to the same shape."""
        c, rest = self.config, (self.dtype, self.lora, self.config.mlp_bias)
        made = Dense(2 * c.intermediate_size, *rest, name="Wi")(x, route, train)
        wide, gate = jnp.split(made, 2, -1)
        y = dropout(self, ACTIVATIONS[c.hidden_act](wide) * gate, c.hidden_dropout_prob, train)
        return Dense(c.hidden_size, *rest, name="Wo")(y, route, train)


class Layer(nn.Module):
    """One layer, in the form that `nn.scan` needs; the carry is `x` and its LayerNorm."""

    config: ModernBertConfig
    dtype: Any
    lora: LoraConfig
    train: bool

    @nn.compact
    def __call__(
        self,
        carry: tuple[jax.Array, jax.Array],
        local: jax.Array,
        sights: tuple[Sight, Sight],
        route: Route | None,
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        """Return the next carry; `local: bool[]` selects from the two `sights` (global, local)."""
        (x, normed), c = carry, self.config
        rest = (c, self.dtype, self.lora)
        sight = jax.tree.map(lambda far, near: jnp.where(local, near, far), *sights)
        x = x + Attention(*rest, name="attn")(normed, sight, route, self.train)
        normed = layer_norm(c, "mlp_norm", c.norm_bias)(x)
        x = x + Mlp(*rest, name="mlp")(normed, route, self.train)
        return (x, layer_norm(c, "next_norm", c.norm_bias)(x)), None


class Embeddings(nn.Module):
    """Word embeddings, normalized."""

    config: ModernBertConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool) -> jax.Array:
        """Map `i32[R, S]` to `f32[R, S, H]`."""
        c = self.config
        shape = (c.vocab_size, c.hidden_size)
        table = self.param("word_embeddings", nn.initializers.normal(0.02), shape, jnp.float32)
        words = table.astype(jnp.float32)
        x = apply_shared(self, "word_embeddings", operator.getitem, words, tokens)
        x = layer_norm(c, use_bias=c.norm_bias)(x)
        return dropout(self, x, c.embedding_dropout, train)


class Encoder(nn.Module):
    """Packed tokens to contextual vectors, with the interface of `bert.Encoder`."""

    config: ModernBertConfig
    dtype: Any = jnp.float32
    lora: LoraConfig = LoraConfig()

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        train: bool = False,
        route: Route | None = None,
        types: jax.Array | None = None,
    ) -> jax.Array:
        """Encode rows into which several sentences are packed; see `bert.Encoder`."""
        del types  # ModernBERT has none
        c = self.config
        x = Embeddings(c, name="embeddings")(tokens, train)
        local = jnp.array([kind == LOCAL for kind in c.layer_types])
        in_axes = (0, nn.broadcast, nn.broadcast)
        layers = scan_layers(Layer, c, in_axes)(c, self.dtype, self.lora, train, name="layers")
        (_, normed), _ = layers((x, x), local, self._sights(positions, segment_ids), route)
        return normed

    def _sights(self, positions: jax.Array, segment_ids: jax.Array) -> tuple[Sight, Sight]:
        """Return the inputs of layers with global and with local attention."""
        c = self.config
        size = c.hidden_size // c.num_attention_heads
        mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        apart = positions[:, None, :, None] - positions[:, None, None, :]
        near = mask & (jnp.abs(apart) <= c.local_attention // 2)
        far_angles, near_angles = (
            ops.rotations(positions, size, theta)
            for theta in (c.global_rope_theta, c.local_rope_theta)
        )
        return (mask, *far_angles), (near, *near_angles)
