"""As `padded`, in sub-batches of similar lengths; frozen weights cast once; oneDNN's kernels."""

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

OVERHEAD = 40  # tokens that cost as much as one more sub-batch


class Sorted(Padded):
    """The same model for each group; a task's gradient is the sum over its sub-batches."""

    def _make_model(self, work: Work, base: Pretrained, state: TrainState) -> Any:
        model = super()._make_model(work, base, state)
        for module in model.modules():
            # Autocast does not remember the casts of frozen weights.
            if self._autocast and kernels.is_frozen(module):
                module.to(torch.bfloat16)
        if self.device.type == "cpu":
            kernels.use_fastest(model)
        return model

    def vectors(self, encoder: Any, drawn: Drawn) -> torch.Tensor:
        """Encode a task's sentences, sub-batch by sub-batch."""
        parts = common.by_length(drawn.examples.lengths[drawn.numbers], OVERHEAD)
        found = [
            self._encode(encoder, *common.pad(drawn.examples, drawn.numbers[part]))
            for part in parts
        ]
        back = np.argsort(np.concatenate(parts))
        return torch.cat(found)[torch.from_numpy(back).to(self.device)]
