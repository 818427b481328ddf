"""sentence-transformers: each task's merged model with pooling, at the library's batch size."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch

from benchmarks.peers import common
from benchmarks.peers.requests import Requests, Served, Side, merged
from jaxlora.formats.huggingface import Pretrained
from jaxlora.utils.trees import Tree

BATCH = 32  # the default of `SentenceTransformer.encode`, which sorts by length first


def make(served: Served) -> Side:
    """Build a SentenceTransformer for each task; its batches are sorted by length and padded."""
    models = [_make_model(served, adapter) for adapter in served.adapters]

    @torch.inference_mode()
    def encode(requests: Requests) -> np.ndarray:
        examples, owner = requests
        order = np.argsort(-examples.lengths, kind="stable")
        parts, found = [], []
        for task in np.unique(owner):
            mine = order[owner[order] == task]
            for start in range(0, len(mine), BATCH):
                parts.append(mine[start : start + BATCH])
                tokens, mask = (x.to(served.device) for x in common.pad(examples, parts[-1]))
                features = {"input_ids": tokens, "attention_mask": mask}
                found.append(models[task](features)["sentence_embedding"].cpu().numpy())
        return np.concatenate(found)[np.argsort(np.concatenate(parts))]

    return encode


def _make_model(served: Served, adapter: Tree) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    with tempfile.TemporaryDirectory() as folder:
        merged(served, adapter).save_pretrained(folder)
        _save_tokenizer(served.base, folder)
        transformer = Transformer(folder)
    pooling = Pooling(served.base.config.hidden_size, pooling_mode=served.pooling)
    return SentenceTransformer(modules=[transformer, pooling], device=served.device).eval()


def _save_tokenizer(base: Pretrained, folder: str) -> None:
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    make: Any = PreTrainedTokenizerFast
    make(tokenizer_object=base.tokenizer, **special).save_pretrained(folder)
