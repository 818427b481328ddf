"""`padded` with sub-batches of similar lengths, frozen weights cast once and oneDNN's kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks.peers import common, kernels
from benchmarks.peers.common import Drawn
from benchmarks.peers.padded import Padded
from benchmarks.work import Work
from jaxlora.formats.huggingface import Pretrained
from jaxlora.training.step import TrainState

OVERHEAD = 40  # cost of one more sub-batch, in tokens


class Sorted(Padded):
    """`Padded`, but a task's forward pass runs in sub-batches of similar lengths."""

    def _make_model(self, work: Work, base: Pretrained, state: TrainState) -> Any:
        model = super()._make_model(work, base, state)
        for module in model.modules():
            # Autocast does not cache the casts of frozen weights.
            if self._autocast and kernels.is_frozen(module):
                module.to(torch.bfloat16)
        if self.device.type == "cpu":
            kernels.use_fastest(model)
        return model

    def vectors(self, encoder: Any, drawn: Drawn) -> torch.Tensor:
        """Encode a task's sentences in sub-batches."""
        parts = common.by_length(drawn.examples.lengths[drawn.numbers], OVERHEAD)
        found = [
            self._encode(encoder, *common.pad(drawn.examples, drawn.numbers[part]))
            for part in parts
        ]
        back = np.argsort(np.concatenate(parts))
        return torch.cat(found)[torch.from_numpy(back).to(self.device)]
