"""Export a task as an ONNX folder: merged encoder, pooling and head in a single graph.

Using the folder needs only ONNX Runtime and the tokenizers library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlora.data.tokenized import truncating
from jaxlora.formats import families, onnx_graph
from jaxlora.formats.huggingface import Pretrained
from jaxlora.formats.onnx_graph import INT, Graph, Inputs, Value
from jaxlora.serving.export_merged import (
    README,
    encoder_params,
    special_tokens,
    write_tokenizer,
)
from jaxlora.serving.export_onnx_readme import readme
from jaxlora.serving.task_models import TaskModel, TaskModels
from jaxlora.tasks.kinds import SPAN
from jaxlora.tasks.task import HEADS, Task
from jaxlora.utils.extras import explained
from jaxlora.utils.files import atomic_dir, write_json, write_text
from jaxlora.utils.trees import Tree

with explained():
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

if TYPE_CHECKING:
    from onnx import ModelProto

MODEL, QUANTIZED = "model.onnx", "model_quantized.onnx"
ABOUT = "task.json"
# Protobuf files are limited to 2 GiB; larger models store their weights in a second file.
MOST_IN_ONE_FILE = 2**31 - 2**20
_HEAD = "head."  # prefix of the names of head weights


def save(
    folder: str | Path, base: Pretrained, trained: TaskModels, name: str, int8: bool = False
) -> None:
    """Write a task for ONNX Runtime.

    The folder has `model.onnx`, a `tokenizer.json` that truncates and pads, `task.json` with the
    names of inputs, outputs and classes, and a README with code.

    Args:
      folder: new or empty; written atomically.
      base: the base model, see `TaskModels.load_base`.
      trained: the task models with the task.
      name: the name of the task.
      int8: also write `model_quantized.onnx` with 8-bit weights, see `quantize`.

    Raises:
      UserError: if no task has that name, or the folder is not empty.
    """
    model, special = trained.find(name), special_tokens(base)
    made = build(base, trained, name)
    with atomic_dir(folder) as temporary:
        write(made, temporary / MODEL)
        if int8:
            quantize(temporary / MODEL, temporary / QUANTIZED)
        tokenizer = _padding(base, trained, special["pad_token"])
        write_tokenizer(temporary, base, special, tokenizer, trained.max_length)
        write_json(temporary / ABOUT, _about(made, model.task, trained.max_length))
        write_text(temporary / README, readme(trained, model, token_types(base)))


def token_types(base: Pretrained) -> bool:
    """Return whether the model takes token types."""
    return families.of(base.config).token_types


def _padding(base: Pretrained, trained: TaskModels, padding: str) -> str:
    tokenizer = truncating(base.tokenizer, trained.max_length)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(padding), pad_token=padding)
    return tokenizer.to_str()


def _about(made: ModelProto, task: Task, max_length: int) -> dict[str, Any]:
    gives: dict[str, Any] = {"classes": task.classes}
    if task.thresholded:
        gives["thresholds"] = task.thresholds or (0.5,) * task.outputs
    if not task.classes:
        gives = {"low": task.low, "high": task.high}
    return {
        "task": task.name, "title": task.title, "kind": task.kind, "pair": task.pair,
        "pair_encoding": task.pair_encoding if task.pair else None, **gives,
        "max_length": max_length,
        "inputs": [one.name for one in made.graph.input],
        "outputs": [one.name for one in made.graph.output],
    }  # fmt: skip


def write(model: ModelProto, path: Path) -> None:
    """Write a model; the weights of a large one go to a second file, `model.onnx.data`."""
    beside = model.ByteSize() > MOST_IN_ONE_FILE
    onnx.save_model(
        model, path, save_as_external_data=beside, location=f"{path.name}.data" if beside else None
    )


def quantize(model: Path, quantized: Path) -> None:
    """Quantize a model's weights to 8 bits by ONNX Runtime's dynamic quantization.

    The weights of matmuls (one scale per output channel) and embeddings are quantized; activations
    are quantized at each call by their range. Norms, softmax and the small head stay float32.
    """
    loaded = onnx.load(model)
    names = [n.name for n in loaded.graph.node if any(i.startswith(_HEAD) for i in n.input)]
    # Marks the model as pre-processed, which silences a warning: our operators are fused already.
    onnx.helper.set_model_props(loaded, {"onnx.quant.pre_process": "onnxruntime.quant"})
    quantize_dynamic(
        loaded, quantized, op_types_to_quantize=["MatMul", "Gather"], nodes_to_exclude=names,
        per_channel=True, weight_type=QuantType.QInt8,
        use_external_data_format=loaded.ByteSize() > MOST_IN_ONE_FILE,
    )  # fmt: skip


# ---- the graph


def build(base: Pretrained, trained: TaskModels, name: str) -> ModelProto:
    """Build the model of a task.

    Inputs are `input_ids`, `attention_mask` and, if the family has token types, `token_type_ids`,
    each `i64[batch, length]`. If the task encodes the sentences of a pair separately, the inputs of
    the second end in `_2`, with their own length. Outputs are `vector`, `f32[batch, H]` (and
    `vector_2`), and `probabilities`, `f32[batch, classes]`, or `score`, `f32[batch]`, on the
    labels' scale.
    """
    model, graph = trained.find(name), Graph()
    tree = onnx_graph.unstack(encoder_params(base, trained, name))
    params = onnx_graph.weights(graph, tree)
    vectors = []
    for end in ("", "_2")[: model.task.sentences]:
        inputs = _inputs(graph, end, token_types(base))
        hidden = onnx_graph.encode(graph, base.config, params, inputs)
        vectors.append(onnx_graph.pool(graph, hidden, inputs.mask, trained.pooling))
        graph.output(f"vector{end}", vectors[-1], ("batch", base.config.hidden_size))
    head = trained.head(name, base)
    _answer(graph, model.task, _apply_head(graph, model, head, vectors))
    return graph.model(name)


def _inputs(graph: Graph, end: str, types: bool) -> Inputs:
    names = ("input_ids", "attention_mask", "token_type_ids")[: 2 + types]
    return Inputs(*(graph.input(n + end, INT, ("batch", f"length{end}")) for n in names))


def _apply_head(graph: Graph, model: TaskModel, head: Tree, vectors: list[Value]) -> Value:
    """Add `Task.apply_head`, `f32[batch, outputs]`; without a head the cosine, `f32[batch, 1]`."""
    if not model.task.outputs:
        return _cosine(graph, *vectors)
    params = onnx_graph.weights(graph, head, _HEAD)
    kind = HEADS[model.task.head]
    x = vectors[0] if len(vectors) == 1 else _pair(graph, model.pair_features, *vectors)
    x = onnx_graph.activate(graph, kind.activation, onnx_graph.dense(graph, params[kind.first], x))
    return onnx_graph.dense(graph, params["out"], x)


def _pair(graph: Graph, kind: str, u: Value, v: Value) -> Value:
    """Add `heads.pair_vector`."""
    parts = [u, v]
    if kind == "interaction":
        parts += [graph("Abs", graph("Sub", u, v)), graph("Mul", u, v)]
    return graph("Concat", *parts, axis=-1)


def _cosine(graph: Graph, u: Value, v: Value) -> Value:
    """Add `heads.cosine`, 0 for zero vectors: `f32[batch, 1]`."""
    uv, uu, vv = (
        graph("ReduceSum", graph("Mul", *two), np.array([-1])) for two in ((u, v), (u, u), (v, v))
    )
    squares = graph("Mul", uu, vv)
    zero = graph("Equal", squares, np.float32(0))
    return graph("Where", zero, np.float32(0), graph("Div", uv, graph("Sqrt", squares)))


def _answer(graph: Graph, task: Task, outputs: Value) -> None:
    """Add `Task.probabilities`, or for scores `Task.decode`, as the last output."""
    if task.classes:
        found = _PROBABILITIES[task.loss](graph, outputs)
        return graph.output("probabilities", found, ("batch", len(task.classes)))
    if task.loss == "cosine" or HEADS[task.head].scaled:
        inner = SPAN if task.loss == "cosine" else 1.0
        slope = np.float32(inner * (task.high - task.low) / SPAN)
        scores = graph("Add", graph("Mul", outputs, slope), np.float32(task.low))
        outputs = graph("Clip", scores, np.float32(task.low), np.float32(task.high))
    return graph.output("score", graph("Squeeze", outputs, np.array([1])), ("batch",))


def _yes_or_no(graph: Graph, outputs: Value) -> Value:
    positive = graph("Sigmoid", outputs)
    return graph("Concat", graph("Sub", np.float32(1), positive), positive, axis=-1)


_PROBABILITIES: Mapping[str, Callable[[Graph, Value], Value]] = {
    "cross_entropy": lambda graph, outputs: graph("Softmax", outputs, axis=-1),
    "ordinal_cross_entropy": lambda graph, outputs: graph("Softmax", outputs, axis=-1),
    "binary_cross_entropy": _yes_or_no,
    "multilabel_cross_entropy": lambda graph, outputs: graph("Sigmoid", outputs),
}
