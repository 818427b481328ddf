"""BERT's encoder and those of its family over packed rows, as a Flax module with two collections.

RoBERTa, DistilBERT, ELECTRA and MPNet compute what BERT does but for a few fields of `BertConfig`.
`params` holds the pretrained weights (frozen under LoRA) and `lora`, where given, an adapter of
the same layout. Module names are those of Hugging Face's BertModel, for the whole family. The
layers are stacked along a leading axis and run under `nn.scan`, unrolled where they are few.
Devlin et al. 2018, "BERT"; post-LayerNorm, exact GELU, absolute positions.

Shapes: R rows, S tokens a row, H hidden size, L layers, N sentences.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import operator
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlora.lora import LoraConfig
from jaxlora.nn import ops
from jaxlora.nn.routes import Route

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": ops.gelu,
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}
NO_ADAPTER = LoraConfig()
# Metadata of configuration fields that only some families have.
OF_SOME = {"of some": True}
# Layers in a row without a loop: a loop stacks what the backward pass needs (10–20 % of a step on
# CPU), unrolled layers take longer to compile.
MOST_UNROLLED = 12


@dataclasses.dataclass(frozen=True)
class EncoderConfig(abc.ABC):
    """What all encoders have; the defaults are bert-base-uncased.

    Attributes mirror Hugging Face's `config.json`. A field that an architecture calls otherwise has
    BERT's name here.
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
    model_type: str = dataclasses.field(default="bert", metadata=OF_SOME)

    @property
    def max_length(self) -> int:
        """The most tokens that a sentence may have."""
        return self.max_position_embeddings

    def with_dropout(self, rate: float) -> Self:
        """Return the same network with this dropout everywhere."""
        rates = {f.name: rate for f in dataclasses.fields(self) if "dropout" in f.name}
        return dataclasses.replace(self, **rates)  # type: ignore[arg-type]

    @abc.abstractmethod
    def network(self, dtype: Any = jnp.float32, adapter: LoraConfig = NO_ADAPTER) -> nn.Module:
        """Return the encoder as a Flax module, called as `Encoder` is."""


@dataclasses.dataclass(frozen=True)
class BertConfig(EncoderConfig):
    """The shape of a BERT, or of a relative that differs in these fields.

    Attributes:
      padding_idx: positions start behind that of the padding token (RoBERTa, MPNet); -1: at 0.
      embedding_size: width of the embeddings, projected to the hidden size (ELECTRA); None: that.
      relative_attention_num_buckets: of the distances that bias attention (MPNet); 0: no bias.
    """

    padding_idx: int = dataclasses.field(default=-1, metadata=OF_SOME)
    embedding_size: int | None = dataclasses.field(default=None, metadata=OF_SOME)
    relative_attention_num_buckets: int = dataclasses.field(default=0, metadata=OF_SOME)

    @property
    def max_length(self) -> int:
        """The most tokens that a sentence may have."""
        return self.max_position_embeddings - self.padding_idx - 1

    def network(self, dtype: Any = jnp.float32, adapter: LoraConfig = NO_ADAPTER) -> Encoder:
        """Return the encoder as a Flax module."""
        return Encoder(self, dtype, adapter)


class Dense(nn.Module):
    """`x W + b`, plus `scale · x A B` where the `lora` collection has this layer.

    Of several adapters (`A: [T, in, r]`, `B: [T, r, out]`) a route says which each token uses. In
    training the adapter's input has its own dropout. Matmul inputs are `dtype`; products are
    summed, and returned, in float32.
    """

    features: int
    dtype: Any = jnp.float32
    lora: LoraConfig = LoraConfig()
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, route: Route | None = None, train: bool = False) -> jax.Array:
        """`[..., in]`, and for several adapters a route → `f32[..., features]`."""
        kernel = self.param(
            "kernel", nn.initializers.normal(0.02), (x.shape[-1], self.features), jnp.float32
        )
        y = ops.matmul(x, kernel, self.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y = y + bias.reshape((1,) * (x.ndim - 1) + (-1,))
        if self.has_variable("lora", "A"):
            a, b = (jnp.asarray(self.get_variable("lora", name)) for name in "AB")
            x = dropout(self, x, self.lora.dropout, train)
            low_rank = ops.low_rank if route is None else route.low_rank
            y = y + self.lora.scale_of(self.path) * low_rank(x, a, b, self.dtype)
        return y


class SelfAttention(nn.Module):
    """Multi-head attention in which a token sees only its own sentence."""

    config: BertConfig
    dtype: Any
    lora: LoraConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        route: Route | None,
        bias: jax.Array | None,
        train: bool,
    ) -> jax.Array:
        """`x: [R, S, H]`, `mask: bool[R, 1, S, S]`, `bias: f32[1, heads, S, S]` → `[R, S, H]`."""
        c = self.config
        shape = (*x.shape[:-1], c.num_attention_heads, c.hidden_size // c.num_attention_heads)
        query, key, value = (
            Dense(c.hidden_size, self.dtype, self.lora, name=name)(x, route, train)
            .reshape(shape)
            .astype(self.dtype)
            for name in ("query", "key", "value")
        )
        kept = keep_weights(self, shape, c.attention_probs_dropout_prob, train)
        return ops.attend(query, key, value, mask, *kept, bias).reshape(x.shape)


class Output(nn.Module):
    """Dense → Dropout → add the residual → LayerNorm (float32)."""

    config: BertConfig
    dtype: Any
    lora: LoraConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, residual: jax.Array, route: Route | None, train: bool
    ) -> jax.Array:
        """`x: [..., F]`, `residual: [..., H]` → `f32[..., H]`."""
        c = self.config
        y = Dense(c.hidden_size, self.dtype, self.lora, name="dense")(x, route, train)
        y = dropout(self, y, c.hidden_dropout_prob, train)
        return layer_norm(c)(y + residual)


class Attention(nn.Module):
    """Self-attention and its output layer (HF's `attention.self`, `attention.output`)."""

    config: BertConfig
    dtype: Any
    lora: LoraConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        route: Route | None,
        bias: jax.Array | None,
        train: bool,
    ) -> jax.Array:
        """`x: f32[R, S, H]` → the same shape."""
        rest = (self.config, self.dtype, self.lora)
        y = SelfAttention(*rest, name="self")(x, mask, route, bias, train)
        return Output(*rest, name="output")(y, x, route, train)


class Intermediate(nn.Module):
    """The feed-forward layer's first half: Dense → activation."""

    config: BertConfig
    dtype: Any
    lora: LoraConfig

    @nn.compact
    def __call__(self, x: jax.Array, route: Route | None, train: bool) -> jax.Array:
        """`[..., H]` → `[..., F]`."""
        width = self.config.intermediate_size
        y = Dense(width, self.dtype, self.lora, name="dense")(x, route, train)
        return ACTIVATIONS[self.config.hidden_act](y)


class Layer(nn.Module):
    """One transformer layer, in the form `nn.scan` wants: carry in, (carry, None) out."""

    config: BertConfig
    dtype: Any
    lora: LoraConfig
    train: bool

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array, route: Route | None, bias: jax.Array | None
    ) -> tuple[jax.Array, None]:
        """Return the next layer's input.

        Args:
          x: `f32[R, S, H]`.
          mask: `bool[R, 1, S, S]`.
          route: see `Encoder`.
          bias: `f32[1, heads, S, S]`, added to the scores of attention; None: nothing.
        """
        rest = (self.config, self.dtype, self.lora)
        x = Attention(*rest, name="attention")(x, mask, route, bias, self.train)
        y = Intermediate(*rest, name="intermediate")(x, route, self.train)
        return Output(*rest, name="output")(y, x, route, self.train), None


class Embeddings(nn.Module):
    """Word + position + token type (if the family has any), normalised."""

    config: BertConfig

    @nn.compact
    def __call__(
        self, tokens: jax.Array, positions: jax.Array, types: jax.Array | None, train: bool
    ) -> jax.Array:
        """`tokens, positions, types: i32[R, S]` → `f32[R, S, embedding_size]`."""
        c = self.config
        if c.padding_idx >= 0:
            positions = ops.positions_after(tokens, positions, c.padding_idx)
        x = self._table("word_embeddings", c.vocab_size)[tokens]
        x = x + self._table("position_embeddings", c.max_position_embeddings)[positions]
        if c.type_vocab_size:
            table = self._table("token_type_embeddings", c.type_vocab_size)
            x = x + (table[0][None, None] if types is None else table[types])
        x = layer_norm(c)(x)
        return dropout(self, x, c.hidden_dropout_prob, train)

    def _table(self, name: str, rows: int) -> jax.Array:
        shape = (rows, self.config.embedding_size or self.config.hidden_size)
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
        route: Route | None = None,
        types: jax.Array | None = None,
    ) -> jax.Array:
        """Encode rows into which several sentences are packed.

        Args:
          tokens: `i32[R, S]`.
          positions: `i32[R, S]`, counted from 0 within each sentence.
          segment_ids: `i32[R, S]`, which sentence a token belongs to, 0 for padding; a token
            attends to the tokens of its row that have its id.
          train: apply dropout (needs a `dropout` rng).
          route: which of T adapters each token uses (leaves of `lora` are `[L, T, ...]` then);
            None for one adapter (`[L, ...]`), or none.
          types: `i32[R, S]`, token types; None: all are 0.

        Returns:
          `f32[R, S, H]`, the last layer.
        """
        c, rest = self.config, (self.dtype, self.lora)
        mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        x = Embeddings(c, name="embeddings")(tokens, positions, types, train)
        if c.embedding_size not in (None, c.hidden_size):
            x = Dense(c.hidden_size, *rest, name="embeddings_project")(x, route, train)
        layers = scan_layers(Layer, c, (nn.broadcast,) * 3)(c, *rest, train, name="layers")
        return layers(x, mask, route, self._bias(tokens.shape[-1]))[0]

    def _bias(self, length: int) -> jax.Array | None:
        """Return `f32[1, heads, S, S]`, a number for each head and distance; None: no bias."""
        c = self.config
        if not c.relative_attention_num_buckets:
            return None
        shape = (c.relative_attention_num_buckets, c.num_attention_heads)
        table = self.param(
            "relative_attention_bias", nn.initializers.normal(0.02), shape, jnp.float32
        )
        return jnp.moveaxis(table.astype(jnp.float32)[ops.relative_buckets(length)], -1, 0)[None]


def scan_layers(layer: type[nn.Module], config: EncoderConfig, in_axes: Any) -> Any:
    """Return a module that applies a layer again and again, its parameters stacked `[L, ...]`.

    Args:
      layer: from a carry and more inputs to (carry, None).
      config: says how many layers there are.
      in_axes: of the other inputs: 0 for one slice a layer, `nn.broadcast` for the same in all.
    """
    return nn.scan(
        layer,
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=config.num_hidden_layers,
        unroll=min(config.num_hidden_layers, MOST_UNROLLED),
    )


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


def dropout(module: nn.Module, x: jax.Array, rate: float, train: bool) -> jax.Array:
    """Apply `ops.dropout` with a module's key, in training."""
    return ops.dropout(x, rate, module.make_rng("dropout")) if train and rate else x


def keep_weights(
    module: nn.Module, shape: tuple[int, ...], rate: float, train: bool
) -> tuple[jax.Array | None, float]:
    """Choose the attention weights that dropout keeps, for `ops.attend`.

    Args:
      module: has the key.
      shape: of queries, `[R, S, heads, d]`.
      rate: of dropout.
      train: without it, and at a rate of 0, all are kept.
    """
    if not (train and rate):
        return None, 1.0
    rows, tokens, heads, _ = shape
    return ops.keep((rows, heads, tokens, tokens), rate, module.make_rng("dropout"))


def layer_norm(
    config: EncoderConfig, name: str = "LayerNorm", use_bias: bool = True
) -> nn.LayerNorm:
    """Return a LayerNorm in float32."""
    return nn.LayerNorm(
        epsilon=config.layer_norm_eps,
        dtype=jnp.float32,
        use_bias=use_bias,
        name=name,
        use_fast_variance=False,
    )


@functools.lru_cache(maxsize=8)
def param_shapes(config: EncoderConfig) -> dict[str, Any]:
    """Return the parameters as `jax.ShapeDtypeStruct`s, unallocated; not to be changed.

    >>> sum(x.size for x in jax.tree.leaves(param_shapes(BertConfig())))
    108891648
    """
    ids = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(lambda: config.network().init(jax.random.key(0), ids, ids, ids))["params"]


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
    count = len(jax.tree.leaves(params["layers"])[0]) if "layers" in params else 0
    if not 0 < count <= MOST_UNROLLED:
        return params
    layers = [jax.tree.map(operator.itemgetter(i), params["layers"]) for i in range(count)]
    return params | {"layers": layers}


def stack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """Return the layers along one axis again, as the module has them.

    In a program that unrolls them this costs nothing: XLA takes a slice of a stack for what was put
    there.
    """
    if not isinstance(params.get("layers"), list):
        return params
    return params | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *params["layers"])}
