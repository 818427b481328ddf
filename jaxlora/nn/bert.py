"""The encoder of BERT and its relatives over packed rows, as a Flax module.

RoBERTa, DistilBERT, ELECTRA and MPNet differ from BERT only in a few fields of `BertConfig`.
The collection `params` holds the pretrained weights (frozen under LoRA). Two more are optional:
`lora` holds an adapter of the same layout, and `copies` receives gradients (see `with_copies`).
Module names are those of Hugging Face's BertModel, for the whole family. The layers are stacked
along a leading axis and run under `nn.scan`, unrolled if there are few. Devlin et al. 2018, "BERT";
post-LayerNorm, exact GELU, absolute positions.

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
from jaxlora.utils import trees
from jaxlora.utils.trees import Tree

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": ops.gelu,
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
NO_ADAPTER = LoraConfig()
# Metadata of configuration fields that only some families have.
OF_SOME = {"of some": True}
# Up to this many layers are unrolled. A loop stacks the residuals of the backward pass (10–20 % of
# a step on CPU); unrolled layers take longer to compile.
MOST_UNROLLED = 12
# Parameters that the modules read through `apply_shared`.
LARGE = ("kernel", "word_embeddings")


@dataclasses.dataclass(frozen=True)
class EncoderConfig(abc.ABC):
    """Configuration shared by all encoders; the defaults are those of bert-base-uncased.

    Attributes mirror Hugging Face's `config.json`. If an architecture names a field differently,
    BERT's name is used here.
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
        """The maximum number of tokens in a sentence."""
        return self.max_position_embeddings

    def with_dropout(self, rate: float) -> Self:
        """Return the configuration with all dropout rates set to `rate`."""
        rates = {f.name: rate for f in dataclasses.fields(self) if "dropout" in f.name}
        return dataclasses.replace(self, **rates)  # type: ignore[arg-type]

    @abc.abstractmethod
    def network(self, dtype: Any = jnp.float32, adapter: LoraConfig = NO_ADAPTER) -> nn.Module:
        """Return the encoder as a Flax module with the call signature of `Encoder`."""


@dataclasses.dataclass(frozen=True)
class BertConfig(EncoderConfig):
    """Configuration of a BERT, or of a relative that differs in these fields.

    Attributes:
      padding_idx: id of the padding token; positions start at `padding_idx + 1` (RoBERTa, MPNet).
      embedding_size: width of the embeddings before projection (ELECTRA); None: the hidden size.
      relative_attention_num_buckets: number of buckets of the attention bias (MPNet); 0: no bias.
    """

    padding_idx: int = dataclasses.field(default=-1, metadata=OF_SOME)
    embedding_size: int | None = dataclasses.field(default=None, metadata=OF_SOME)
    relative_attention_num_buckets: int = dataclasses.field(default=0, metadata=OF_SOME)

    @property
    def max_length(self) -> int:
        """The maximum number of tokens in a sentence."""
        return self.max_position_embeddings - self.padding_idx - 1

    def network(self, dtype: Any = jnp.float32, adapter: LoraConfig = NO_ADAPTER) -> Encoder:
        """Return the encoder as a Flax module."""
        return Encoder(self, dtype, adapter)


class Dense(nn.Module):
    """`x W + b`, plus `scale · x A B` if the `lora` collection has this layer.

    With several adapters (`A: [T, in, r]`, `B: [T, r, out]`), a route selects the adapter of each
    token. In training the adapter's input has a separate dropout. Matmul inputs have `dtype`; sums
    and results are float32.
    """

    features: int
    dtype: Any = jnp.float32
    lora: LoraConfig = LoraConfig()
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, route: Route | None = None, train: bool = False) -> jax.Array:
        """Map `[..., in]`, and a route if there are several adapters, to `f32[..., features]`."""
        kernel = self.param(
            "kernel", nn.initializers.normal(0.02), (x.shape[-1], self.features), jnp.float32
        )
        y = apply_shared(self, "kernel", lambda w, x: ops.matmul(x, w, self.dtype), kernel, x)
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
    """Multi-head attention in which a token attends only to its own sentence."""

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
        """Map `x: [R, S, H]` to the same shape; for the other arguments see `Layer`."""
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
        """Map `x: [..., F]`, `residual: [..., H]` to `f32[..., H]`."""
        c = self.config
        y = Dense(c.hidden_size, self.dtype, self.lora, name="dense")(x, route, train)
        y = dropout(self, y, c.hidden_dropout_prob, train)
        return layer_norm(c)(y + residual)


class Attention(nn.Module):
    """Self-attention and its output layer (Hugging Face's `attention.self`, `attention.output`)."""

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
        """Map `x: f32[R, S, H]` to the same shape."""
        rest = (self.config, self.dtype, self.lora)
        y = SelfAttention(*rest, name="self")(x, mask, route, bias, train)
        return Output(*rest, name="output")(y, x, route, train)


class Intermediate(nn.Module):
    """The first half of the feed-forward layer: Dense → activation."""

    config: BertConfig
    dtype: Any
    lora: LoraConfig

    @nn.compact
    def __call__(self, x: jax.Array, route: Route | None, train: bool) -> jax.Array:
        """Map `[..., H]` to `[..., F]`."""
        width = self.config.intermediate_size
        y = Dense(width, self.dtype, self.lora, name="dense")(x, route, train)
        return ACTIVATIONS[self.config.hidden_act](y)


class Layer(nn.Module):
    """One transformer layer, in the form that `nn.scan` needs: carry in, (carry, None) out."""

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
          bias: `f32[1, heads, S, S]`, added to the attention scores; None: no bias.
        """
        rest = (self.config, self.dtype, self.lora)
        x = Attention(*rest, name="attention")(x, mask, route, bias, self.train)
        y = Intermediate(*rest, name="intermediate")(x, route, self.train)
        return Output(*rest, name="output")(y, x, route, self.train), None


class Embeddings(nn.Module):
    """Word + position + token type embeddings (if the family has these), normalized."""

    config: BertConfig

    @nn.compact
    def __call__(
        self, tokens: jax.Array, positions: jax.Array, types: jax.Array | None, train: bool
    ) -> jax.Array:
        """Map `tokens, positions, types: i32[R, S]` to `f32[R, S, embedding_size]`."""
        c = self.config
        if c.padding_idx >= 0:
            positions = ops.positions_after(tokens, positions, c.padding_idx)
        words = self._table("word_embeddings", c.vocab_size)
        x = apply_shared(self, "word_embeddings", operator.getitem, words, tokens)
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
          segment_ids: `i32[R, S]`, the sentence of each token, 0 for padding; a token attends to
            the tokens in its row with the same id.
          train: whether to apply dropout (needs a `dropout` rng).
          route: selects one of T adapters for each token (leaves of `lora` are then
            `[L, T, ...]`); None for a single adapter (`[L, ...]`) or no adapter.
          types: `i32[R, S]`, token types; None: all are 0.

        Returns:
          `f32[R, S, H]`, the output of the last layer.
        """
        c, rest = self.config, (self.dtype, self.lora)
        mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        x = Embeddings(c, name="embeddings")(tokens, positions, types, train)
        if c.embedding_size not in (None, c.hidden_size):
            x = Dense(c.hidden_size, *rest, name="embeddings_project")(x, route, train)
        layers = scan_layers(Layer, c, (nn.broadcast,) * 3)(c, *rest, train, name="layers")
        return layers(x, mask, route, self._bias(tokens.shape[-1]))[0]

    def _bias(self, length: int) -> jax.Array | None:
        """Return the relative attention bias, `f32[1, heads, S, S]`, or None if there is none."""
        c = self.config
        if not c.relative_attention_num_buckets:
            return None
        count = c.relative_attention_num_buckets
        shape = (count, c.num_attention_heads)
        table = self.param(
            "relative_attention_bias", nn.initializers.normal(0.02), shape, jnp.float32
        )
        bias = table.astype(jnp.float32)[ops.relative_buckets(length, count)]
        return jnp.moveaxis(bias, -1, 0)[None]


def scan_layers(layer: type[nn.Module], config: EncoderConfig, in_axes: Any) -> Any:
    """Return a module class that applies L copies of a layer, with parameters stacked `[L, ...]`.

    Args:
      layer: module that maps a carry and further inputs to (carry, None).
      config: gives the number of layers.
      in_axes: axes of the further inputs: 0 for one slice per layer, `nn.broadcast` to share an
        input between all layers.
    """
    return nn.scan(
        layer,
        variable_axes={"params": 0, "lora": 0, "copies": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=config.num_hidden_layers,
        unroll=min(config.num_hidden_layers, MOST_UNROLLED),
    )


def pool(hidden: jax.Array, segment_ids: jax.Array, cls_index: jax.Array, kind: str) -> jax.Array:
    """Pool token vectors into one vector per sentence.

    Args:
      hidden: `f32[R, S, H]`.
      segment_ids: `i32[R, S]`; sentence n (of this batch) has id `n + 1`, padding 0.
      cls_index: `i32[N]`, where sentence n starts in the flattened rows.
      kind: `cls` for the vector of the first token (as in the paper), or `mean` for the mean over
        the sentence's tokens (Reimers & Gurevych 2019, "Sentence-BERT", section 3).

    Returns:
      `f32[N, H]`.

    >>> hidden = jnp.arange(4.0).reshape(1, 4, 1)
    >>> pool(hidden, jnp.array([[1, 1, 2, 0]]), jnp.array([0, 2]), "mean").tolist()
    [[0.5], [2.0]]
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    if kind == "cls":
        return flat[cls_index]
    if kind != "mean":
        raise ValueError(f"pooling must be cls or mean, got {kind!r}")
    ids = segment_ids.reshape(-1)
    count = len(cls_index) + 1
    sums = jax.ops.segment_sum(flat, ids, count)[1:]
    sizes = jax.ops.segment_sum(jnp.ones_like(ids, flat.dtype), ids, count)[1:]
    return sums / jnp.maximum(sizes, 1)[:, None]


def apply_shared(
    module: nn.Module, name: str, compute: Callable[..., jax.Array], param: jax.Array, *args: Any
) -> jax.Array:
    """Return `compute(param, *args)`; the gradient goes to the parameter's copy, if it has one.

    Args:
      module: the module of the parameter.
      name: name of the parameter, and of its copy in the `copies` collection.
      compute: see `ops.for_own_copy`.
      param: the parameter.
      args: further arguments of `compute`.
    """
    if not module.has_variable("copies", name):
        return compute(param, *args)
    return ops.for_own_copy(compute)(param, module.get_variable("copies", name), *args)


def with_copies(params: Tree, copies: Tree) -> dict[str, Tree]:
    """Return an encoder's collections, for the gradient with respect to `copies`.

    Under `jax.vmap`, with copies for each task, the large parameters stay shared (see
    `ops.for_own_copy`), and only the small ones are copied.

    Args:
      params: the parameters.
      copies: zeros of the same shapes.
    """
    own, shared = trees.flatten(copies), trees.flatten(params)
    small = {path: x + own[path] for path, x in shared.items() if path[-1] not in LARGE}
    large = {path: x for path, x in own.items() if path[-1] in LARGE}
    return {"params": trees.unflatten(shared | small), "copies": trees.unflatten(large)}


def dropout(module: nn.Module, x: jax.Array, rate: float, train: bool) -> jax.Array:
    """Apply `ops.dropout` with the module's `dropout` rng if `train`; else return `x`."""
    return ops.dropout(x, rate, module.make_rng("dropout")) if train and rate else x


def keep_weights(
    module: nn.Module, shape: tuple[int, ...], rate: float, train: bool
) -> tuple[jax.Array | None, float]:
    """Draw the attention weights that dropout keeps, and their scale, for `ops.attend`.

    Args:
      module: module whose `dropout` rng is used.
      shape: shape of the queries, `[R, S, heads, d]`.
      rate: dropout rate.
      train: if False, or if the rate is 0, all weights are kept.
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
    """Return the parameters as `jax.ShapeDtypeStruct`s. The dict is cached: do not modify it.

    >>> sum(x.size for x in jax.tree.leaves(param_shapes(BertConfig())))
    108891648
    """
    ids = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(lambda: config.network().init(jax.random.key(0), ids, ids, ids))["params"]


def matmul_ready(params: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """Cast and unstack frozen parameters in advance, so that no step has to.

    Dense kernels get `dtype`; embeddings, biases and LayerNorm stay float32. See `unstack_layers`.
    """

    def leaf(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        return jnp.asarray(x, dtype if path[-1].key == "kernel" else jnp.float32)

    return unstack_layers(jax.tree_util.tree_map_with_path(leaf, params))


def unstack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """Split stacked layers into a list of trees, one per layer, up to `MOST_UNROLLED` layers.

    From a stack, compiled programs would copy each layer. `stack_layers` is the inverse.
    """
    count = len(jax.tree.leaves(params["layers"])[0]) if "layers" in params else 0
    if not 0 < count <= MOST_UNROLLED:
        return params
    layers = [jax.tree.map(operator.itemgetter(i), params["layers"]) for i in range(count)]
    return params | {"layers": layers}


def stack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """Stack a list of layers along a leading axis, as the module expects them.

    This costs nothing in a program that unrolls the layers: XLA replaces a slice of the stack by
    the array that was stacked.
    """
    if not isinstance(params.get("layers"), list):
        return params
    return params | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *params["layers"])}
