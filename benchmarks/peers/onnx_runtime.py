"""ONNX Runtime: a merged model per task, with fused attention and element-wise work; also int8."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.requests import Pooled, Served, Side, in_sub_batches, merged, sample
from jaxlora.utils.trees import Tree


def make(served: Served) -> Side:
    """Create a session for each task."""
    return _make(served, int8=False)


def make_int8(served: Served) -> Side:
    """Build the same as `make`, with int8 weights and dynamically quantized inputs."""
    return _make(served, int8=True)


def _make(served: Served, *, int8: bool) -> Side:
    with tempfile.TemporaryDirectory() as folder:
        sessions = [
            _session(_fused(served, adapter, Path(folder) / str(n), int8=int8))
            for n, adapter in enumerate(served.adapters)
        ]

    def encode_part(task: int, tokens: torch.Tensor, mask: torch.Tensor) -> Any:
        return sessions[task].run(None, {"tokens": tokens.numpy(), "mask": mask.numpy()})[0]

    return in_sub_batches(encode_part)


def _fused(served: Served, adapter: Tree, folder: Path, *, int8: bool) -> Path:
    """Write a task's model as ONNX; return the file's path."""
    import onnx
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.transformers import optimizer

    folder.mkdir()
    exported, fused, small = (folder / f"{name}.onnx" for name in ("exported", "fused", "int8"))
    _export(merged(served, adapter), served.pooling, exported)
    config = served.base.config
    optimizer.optimize_model(
        str(exported), "bert", config.num_attention_heads, config.hidden_size, opt_level=1
    ).save_model_to_file(str(fused))
    if not int8:
        return fused
    # The fused operators' outputs have no declared type.
    quantize_dynamic(fused, small, extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT})
    return small


def _export(model: Any, pooling: str, path: Path) -> None:
    """Export with eager attention, which ONNX Runtime's optimizer recognizes and fuses."""
    model.set_attn_implementation("eager")
    dynamic = {"tokens": {0: "N", 1: "S"}, "mask": {0: "N", 1: "S"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracing exporter is deprecated, but its graphs fuse
        torch.onnx.export(
            Pooled(model, pooling), sample(), path, dynamo=False, opset_version=18,
            input_names=["tokens", "mask"], output_names=["vectors"], dynamic_axes=dynamic,
        )  # fmt: skip


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
