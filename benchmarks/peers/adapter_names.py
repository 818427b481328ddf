"""peft's `adapter_names`: one padded batch of all tasks, with the name of each row's adapter."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks.peers import common
from benchmarks.peers.requests import Requests, Served, Side


def make(served: Served) -> Side:
    """Load all adapters into one model."""
    names = [f"task{t}" for t in range(len(served.adapters))]
    model: Any = common.with_adapter(common.make_bert(served.base, 0.0), served.config, names[0])
    for name in names[1:]:
        model.add_adapter(name, model.peft_config[names[0]])
    for name, adapter in zip(names, served.adapters, strict=True):
        common.load_adapter(model, adapter, name)
    model = model.to(served.device).eval()

    @torch.inference_mode()
    def encode(requests: Requests) -> np.ndarray:
        examples, owner = requests
        tokens, mask = (x.to(served.device) for x in common.pad(examples, np.arange(len(owner))))
        hidden = model(
            input_ids=tokens, attention_mask=mask, adapter_names=[names[t] for t in owner]
        ).last_hidden_state
        return common.pool(hidden, mask, served.pooling).cpu().numpy()

    return encode
