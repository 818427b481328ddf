"""transformers with each task's adapter merged, in sub-batches of similar lengths."""

from __future__ import annotations

import torch

from benchmarks.peers import common, kernels
from benchmarks.peers.requests import Served, Side, in_sub_batches, merged


def make(served: Served) -> Side:
    """Build one model per adapter, with the adapter merged."""
    return _make(served, fastest=False)


def make_onednn(served: Served) -> Side:
    """Build the same as `make`, with oneDNN's kernels where they are faster."""
    return _make(served, fastest=served.device == "cpu")


def _make(served: Served, *, fastest: bool) -> Side:
    models = [merged(served, adapter) for adapter in served.adapters]
    if fastest:
        for model in models:
            kernels.use_fastest(model)

    @torch.inference_mode()
    def encode_part(task: int, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        tokens, mask = tokens.to(served.device), mask.to(served.device)
        hidden = models[task](input_ids=tokens, attention_mask=mask).last_hidden_state
        return common.pool(hidden, mask, served.pooling).cpu()

    return in_sub_batches(encode_part)
