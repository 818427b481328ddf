"""Shared parts of the inference peers: merged models, and sub-batches by task and length.

A peer is a function from requests (sentences, each with its task's number) to vectors
`f32[sentences, H]`. It starts from token ids; the cost of heads is negligible.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.peers import common
from jaxlora.data.tokenized import Examples
from jaxlora.formats.huggingface import Pretrained
from jaxlora.lora import LoraConfig
from jaxlora.utils.trees import Tree

OVERHEAD = 20  # cost of one more sub-batch, in tokens


class Requests(NamedTuple):
    """Sentences, and the task number of each."""

    examples: Examples
    owner: np.ndarray


class Served(NamedTuple):
    """The models that a peer serves: a base with an adapter for each task.

    Attributes:
      base: the base.
      config: configuration of the adapters.
      adapters: trees as returned by `lora.init`.
      pooling: see `bert.pool`.
      device: the peer's device.
    """

    base: Pretrained
    config: LoraConfig
    adapters: Sequence[Tree]
    pooling: str
    device: str = "cpu"


Side = Callable[[Requests], np.ndarray]
EncodePart = Callable[[int, torch.Tensor, torch.Tensor], Any]
"""`(task, tokens, mask) → [sentences, H]`, for one sub-batch."""


def merged(served: Served, adapter: Tree) -> Any:
    """Return a transformers model with an adapter merged into it."""
    model = common.with_adapter(common.make_bert(served.base, 0.0), served.config, "default")
    common.load_adapter(model, adapter, "default")
    return model.merge_and_unload().to(served.device).eval().requires_grad_(False)


class Pooled(torch.nn.Module):
    """A transformers model with pooling, from token ids to sentence vectors."""

    def __init__(self, model: Any, pooling: str) -> None:
        super().__init__()
        self.model, self.pooling = model, pooling

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Map tokens and mask, `i64[N, S]` each, to `f32[N, H]`."""
        hidden = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state
        return common.pool(hidden, mask, self.pooling)


def sample() -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and mask of two sentences, from which exporters trace a model."""
    tokens, mask = torch.randint(5, 50, (2, 16)), torch.ones(2, 16, dtype=torch.int64)
    mask[1, 9:] = 0
    return tokens, mask


def in_sub_batches(encode_part: EncodePart) -> Side:
    """Return a side that encodes each task's sentences in sub-batches of similar lengths."""

    def encode(requests: Requests) -> np.ndarray:
        examples, owner = requests
        parts, found = [], []
        for task in np.unique(owner):
            mine = np.flatnonzero(owner == task)
            for part in common.by_length(examples.lengths[mine], OVERHEAD):
                parts.append(mine[part])
                vectors = encode_part(int(task), *common.pad(examples, mine[part]))
                found.append(np.asarray(vectors))
        return np.concatenate(found)[np.argsort(np.concatenate(parts))]

    return encode
