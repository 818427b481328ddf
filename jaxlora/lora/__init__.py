"""LoRA: low-rank adapters as plain pytrees, separate from the frozen parameters.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1:
`W' = W + (alpha / rank) · A B` with `W: [in, out]` (Flax kernels), `A: [in, r]`, `B: [r, out]`.
An adapter mirrors the parameter tree: where the base has `{"query": {"kernel": W, "bias": b}}`,
the adapter has `{"query": {"A": A, "B": B}}`. Leading axes (stacked layers) are kept.
The adapters of several tasks are a dict from task or group to adapter.
"""

from jaxlora.lora.adapter import (
    ALL_TARGETS,
    PAPER_TARGETS,
    Adapter,
    LoraConfig,
    Path,
    check_fit,
    count_params,
    delta,
    describe,
    init,
    matches,
    merge,
    targets,
    unmerge,
)
from jaxlora.lora.combine import add, truncate
from jaxlora.lora.widen import widen

__all__ = [
    "ALL_TARGETS",
    "PAPER_TARGETS",
    "Adapter",
    "LoraConfig",
    "Path",
    "add",
    "check_fit",
    "count_params",
    "delta",
    "describe",
    "init",
    "matches",
    "merge",
    "targets",
    "truncate",
    "unmerge",
    "widen",
]
