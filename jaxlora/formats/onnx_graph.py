"""Build ONNX graphs of encoders: `nn.bert` and `nn.modernbert`, with one sentence per row.

The graph consists of standard operators of opset 23, where attention, layer normalization, GELU and
rotary embedding are single nodes, so a runtime need not fuse them. Batch and length are dynamic.

Shapes: N sentences, S padded length, H hidden size, L layers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.nn import ops
from jaxlora.nn.bert import BertConfig, EncoderConfig
from jaxlora.nn.modernbert import GLOBAL, LOCAL, ModernBertConfig
from jaxlora.utils.extras import explained
from jaxlora.utils.trees import Tree

with explained():
    import onnx
    from onnx import helper, numpy_helper

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 23  # the first with Attention and RotaryEmbedding
IR_VERSION = 11  # of the same ONNX release; runtimes of that time refuse newer versions
FLOAT, INT = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64

Value = str
"""Name of a tensor of the graph."""


class Inputs(NamedTuple):
    """Padded token ids, one sentence per row, `i64[N, S]` each.

    Attributes:
      tokens: token ids.
      mask: 1 for the tokens of the sentence, 0 for padding.
      types: token types; None: all are 0.
    """

    tokens: Value
    mask: Value
    types: Value | None = None


class Graph:
    """A builder for an ONNX graph; nodes are added in the order of computation.

    >>> graph = Graph()
    >>> x = graph.input("x", FLOAT, ("batch",))
    >>> graph.output("y", graph("Add", graph("Mul", x, np.float32(2)), np.float32(1)), ("batch",))
    >>> [node.op_type for node in graph.model("example").graph.node]
    ['Mul', 'Add', 'Identity']
    """

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._known: dict[Any, Value] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    def __call__(
        self, op: str, *inputs: Value | np.ndarray | np.generic | int, **attributes: Any
    ) -> Value:
        """Add a node with one output.

        Args:
          op: name of an ONNX operator.
          inputs: names of tensors; arrays and numbers become constants, an int one of `i64[]`.
          attributes: attributes of the operator.

        Returns:
          The name of the output.
        """
        found = f"{op}_{len(self._nodes)}"
        names = [self._name(value) for value in inputs]
        self._nodes.append(helper.make_node(op, names, [found], name=found, **attributes))
        return found

    def _name(self, value: Value | np.ndarray | np.generic | int) -> Value:
        if isinstance(value, str):
            return value
        array = np.asarray(value)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._known:
            self._known[key] = self.constant(array, f"constant_{len(self._known)}")
        return self._known[key]

    def split(self, x: Value, parts: int) -> list[Value]:
        """Split the last axis into equal parts."""
        found = [f"Split_{len(self._nodes)}_{part}" for part in range(parts)]
        node = helper.make_node("Split", [x], found, found[0], axis=-1, num_outputs=parts)
        self._nodes.append(node)
        return found

    def constant(self, value: np.ndarray, name: str) -> Value:
        """Add a named constant."""
        self._constants.append(numpy_helper.from_array(value, name))
        return name

    def input(self, name: str, dtype: int, shape: Sequence[int | str]) -> Value:
        """Declare an input; string sizes are dynamic."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, value: Value, shape: Sequence[int | str]) -> None:
        """Declare a float32 output with this name."""
        self._nodes.append(helper.make_node("Identity", [value], [name], name=name))
        self._outputs.append(helper.make_tensor_value_info(name, FLOAT, shape))

    def model(self, name: str) -> ModelProto:
        """Return the graph as an ONNX model."""
        graph = helper.make_graph(
            self._nodes, name, self._inputs, self._outputs, initializer=self._constants
        )
        opset = helper.make_opsetid("", OPSET)
        return helper.make_model(
            graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="jaxlora"
        )


def weights(graph: Graph, params: Tree, prefix: str = "") -> Tree:
    """Add parameters as float32 constants.

    Returns:
      The same tree with names as leaves: the prefix and the leaf's path.
    """

    def add(path: tuple[Any, ...], leaf: Any) -> Value:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return graph.constant(np.asarray(leaf, np.float32), prefix + name)

    return jax.tree_util.tree_map_with_path(add, params)


def unstack(params: Tree) -> Tree:
    """Return an encoder's parameters with the stacked `layers` as a list of trees."""
    count = len(jax.tree.leaves(params["layers"])[0])
    layers = [jax.tree.map(operator.itemgetter(i), params["layers"]) for i in range(count)]
    return dict(params) | {"layers": layers}


def encode(graph: Graph, config: EncoderConfig, params: Tree, inputs: Inputs) -> Value:
    """Add an encoder.

    Args:
      graph: the graph to add nodes to.
      config: configuration of the encoder.
      params: the result of `weights` for unstacked parameters; several calls may share it.
      inputs: the sentences.

    Returns:
      Output of the last layer, `f32[N, S, H]`.
    """
    return _NETWORKS[type(config)](graph, config, params, inputs)


def pool(graph: Graph, hidden: Value, mask: Value, kind: str) -> Value:
    """Add the pooling of `bert.pool`: `f32[N, S, H]`, `i64[N, S]` → `f32[N, H]`."""
    if kind == "cls":
        return graph("Gather", hidden, 0, axis=1)
    own = graph("Unsqueeze", graph("Cast", mask, to=FLOAT), _axes(-1))
    sums = graph("ReduceSum", graph("Mul", hidden, own), _axes(1), keepdims=0)
    sizes = graph("ReduceSum", own, _axes(1), keepdims=0)
    return graph("Div", sums, graph("Max", sizes, np.float32(1)))


def dense(graph: Graph, params: Tree, x: Value) -> Value:
    """Add a Dense layer: `f32[..., in]` → `f32[..., out]`."""
    y = graph("MatMul", x, params["kernel"])
    return graph("Add", y, params["bias"]) if "bias" in params else y


def activate(graph: Graph, kind: str, x: Value) -> Value:
    """Add an activation, named as in `config.json` or in a head."""
    if kind in ("silu", "swish"):
        return graph("Mul", x, graph("Sigmoid", x))
    op, attributes = _ACTIVATIONS[kind]
    return graph(op, x, **attributes)


_ACTIVATIONS: Mapping[str, tuple[str, dict[str, str]]] = {
    "gelu": ("Gelu", {}),
    "gelu_new": ("Gelu", {"approximate": "tanh"}),
    "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
    "relu": ("Relu", {}),
    "tanh": ("Tanh", {}),
}


def _axes(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def _norm(graph: Graph, config: EncoderConfig, params: Tree, x: Value) -> Value:
    given = (params[name] for name in ("scale", "bias") if name in params)
    return graph("LayerNormalization", x, *given, axis=-1, epsilon=config.layer_norm_eps)


def _length(graph: Graph, inputs: Inputs) -> Value:
    """Return S, `i64[1]`."""
    return graph("Shape", inputs.tokens, start=1, end=2)


def _places(graph: Graph, inputs: Inputs) -> Value:
    """Return 0 … S - 1, `i64[S]`."""
    return graph("Range", 0, graph("Squeeze", _length(graph, inputs)), 1)


def _first(graph: Graph, table: Value, length: Value) -> Value:
    """Return the first S rows of a table, `f32[S, ...]`."""
    return graph("Slice", table, _axes(0), length, _axes(0))


def _attend(graph: Graph, config: EncoderConfig, parts: Sequence[Value], mask: Value) -> Value:
    """Add attention over query, key and value, each `f32[N, S, H]`, with a mask or bias."""
    heads = config.num_attention_heads
    return graph("Attention", *parts, mask, q_num_heads=heads, kv_num_heads=heads)


def _seen(graph: Graph, mask: Value) -> Value:
    """Return the attention mask, `bool[N, 1, queries S, keys S]`.

    As in `bert.Encoder`, padding attends to padding, so that no row is fully masked.
    """
    queries, keys = (graph("Unsqueeze", mask, _axes(1, axis)) for axis in (3, 2))
    return graph("Equal", queries, keys)


# ---- BERT and its relatives


def _bert(graph: Graph, config: BertConfig, params: Tree, inputs: Inputs) -> Value:
    x = _norm(
        graph, config, params["embeddings"]["LayerNorm"], _embed(graph, config, params, inputs)
    )
    if "embeddings_project" in params:
        x = dense(graph, params["embeddings_project"], x)
    mask = _seen(graph, inputs.mask)
    if config.relative_attention_num_buckets:
        mask = _biased(graph, config, params, inputs, mask)
    for layer in params["layers"]:
        x = _bert_layer(graph, config, layer, x, mask)
    return x


def _bert_layer(graph: Graph, config: BertConfig, params: Tree, x: Value, mask: Value) -> Value:
    own, output = params["attention"]["self"], params["attention"]["output"]
    parts = [dense(graph, own[name], x) for name in ("query", "key", "value")]
    y = dense(graph, output["dense"], _attend(graph, config, parts, mask))
    x = _norm(graph, config, output["LayerNorm"], graph("Add", y, x))
    y = activate(graph, config.hidden_act, dense(graph, params["intermediate"]["dense"], x))
    y = graph("Add", dense(graph, params["output"]["dense"], y), x)
    return _norm(graph, config, params["output"]["LayerNorm"], y)


def _embed(graph: Graph, config: BertConfig, params: Tree, inputs: Inputs) -> Value:
    """Return the sum of the embeddings, `f32[N, S, embedding_size]`."""
    tables = params["embeddings"]
    x = graph("Gather", tables["word_embeddings"], inputs.tokens)
    x = graph("Add", x, _positions(graph, config, tables["position_embeddings"], inputs))
    if not config.type_vocab_size:
        return x
    types = 0 if inputs.types is None else inputs.types
    return graph("Add", x, graph("Gather", tables["token_type_embeddings"], types))


def _positions(graph: Graph, config: BertConfig, table: Value, inputs: Inputs) -> Value:
    """Return the position embeddings; see `ops.positions_after` for RoBERTa's."""
    if config.padding_idx < 0:
        return _first(graph, table, _length(graph, inputs))
    padding = np.int64(config.padding_idx)
    words = graph("Cast", graph("Not", graph("Equal", inputs.tokens, padding)), to=INT)
    counted = graph("Mul", graph("CumSum", words, 1), words)
    return graph("Gather", table, graph("Add", counted, padding))


def _biased(graph: Graph, config: BertConfig, params: Tree, inputs: Inputs, seen: Value) -> Value:
    """Return MPNet's masked bias of the attention scores, `f32[N, heads, S, S]`.

    The bucket depends only on the distance, so a vector of buckets by distance is enough.
    """
    most, count = config.max_length, config.relative_attention_num_buckets
    of_distance = np.concatenate(
        [ops.relative_buckets(most, count)[-1, :-1], ops.relative_buckets(most, count)[0]]
    )  # distances from -(most - 1) to most - 1
    buckets = graph("Gather", of_distance, _distances(graph, inputs, most - 1))
    bias = graph("Gather", params["relative_attention_bias"], buckets)  # [S, S, heads]
    bias = graph("Unsqueeze", graph("Transpose", bias, perm=[2, 0, 1]), _axes(0))
    return graph("Where", seen, bias, np.finfo(np.float32).min)


def _distances(graph: Graph, inputs: Inputs, offset: int) -> Value:
    """Return key position - query position + offset, `i64[queries S, keys S]`."""
    places = _places(graph, inputs)
    return graph("Sub", graph("Add", places, offset), graph("Unsqueeze", places, _axes(1)))


# ---- ModernBERT


def _modernbert(graph: Graph, config: ModernBertConfig, params: Tree, inputs: Inputs) -> Value:
    x = graph("Gather", params["embeddings"]["word_embeddings"], inputs.tokens)
    x = normed = _norm(graph, config, params["embeddings"]["LayerNorm"], x)
    seen = _seen(graph, inputs.mask)
    near = graph(
        "LessOrEqual", graph("Abs", _distances(graph, inputs, 0)), config.local_attention // 2
    )
    masks = {GLOBAL: seen, LOCAL: graph("And", seen, near)}
    angles = {
        GLOBAL: _rotations(graph, config, inputs, config.global_rope_theta),
        LOCAL: _rotations(graph, config, inputs, config.local_rope_theta),
    }
    for kind, layer in zip(config.layer_types, params["layers"], strict=True):
        y = _rotary_attention(graph, config, layer["attn"], normed, masks[kind], angles[kind])
        x = graph("Add", x, y)
        y = _gated(graph, config, layer["mlp"], _norm(graph, config, layer["mlp_norm"], x))
        x = graph("Add", x, y)
        normed = _norm(graph, config, layer["next_norm"], x)
    return normed


def _rotary_attention(
    graph: Graph, config: ModernBertConfig, params: Tree, x: Value, mask: Value,
    angles: Sequence[Value | np.ndarray],
) -> Value:  # fmt: skip
    query, key, value = graph.split(dense(graph, params["Wqkv"], x), 3)
    query, key = (
        graph("RotaryEmbedding", part, *angles, num_heads=config.num_attention_heads)
        for part in (query, key)
    )
    return dense(graph, params["Wo"], _attend(graph, config, (query, key, value), mask))


def _rotations(
    graph: Graph, config: ModernBertConfig, inputs: Inputs, theta: float
) -> tuple[np.ndarray, np.ndarray, Value]:
    """Return cosines and sines, `f32[max_length, d / 2]`, and positions, `i64[N, S]`."""
    size = config.hidden_size // config.num_attention_heads
    every = jnp.arange(config.max_length)[None]
    cosines, sines = (
        np.asarray(table[0, :, 0, : size // 2]) for table in ops.rotations(every, size, theta)
    )
    places = graph("Expand", _places(graph, inputs), graph("Shape", inputs.tokens))
    return cosines, sines, places


def _gated(graph: Graph, config: ModernBertConfig, params: Tree, x: Value) -> Value:
    wide, gate = graph.split(dense(graph, params["Wi"], x), 2)
    y = graph("Mul", activate(graph, config.hidden_act, wide), gate)
    return dense(graph, params["Wo"], y)


_NETWORKS: Mapping[type[EncoderConfig], Callable[..., Value]] = {
    BertConfig: _bert,
    ModernBertConfig: _modernbert,
}
