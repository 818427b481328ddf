"""OpenVINO: a merged model per task, converted from PyTorch and compiled for all cores."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import torch

from benchmarks.peers.requests import Pooled, Served, Side, in_sub_batches, merged, sample
from jaxlora.utils.trees import Tree


def make(served: Served) -> Side:
    """Compile a model for each task."""
    models = [_compile(served, adapter) for adapter in served.adapters]

    def encode_part(task: int, tokens: torch.Tensor, mask: torch.Tensor) -> Any:
        return models[task]([tokens.numpy(), mask.numpy()])[0]

    return in_sub_batches(encode_part)


def _import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which sends usage data from a forked process."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino

    return openvino


def _compile(served: Served, adapter: Tree) -> Any:
    openvino = _import_openvino()
    tokens, mask = sample()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' masks depend on values while traced
        model = openvino.convert_model(
            Pooled(merged(served, adapter), served.pooling),
            example_input={"tokens": tokens, "mask": mask},
            input=[("tokens", [-1, -1]), ("mask", [-1, -1])],
        )
    options = {
        "INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0)),
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    return openvino.Core().compile_model(model, "CPU", options)
