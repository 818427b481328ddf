"""transformers' BertModel (sdpa) + peft's LoRA + torchjd's PCGrad, each task's batch padded.

It is what a careful PyTorch user would write: both sentences of a pair in one forward pass, each
batch padded to its longest sentence, one backward pass per task, a fused AdamW.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, Literal

import torch

from benchmarks.peers import common
from benchmarks.peers.common import Drawn, Group, Peer
from benchmarks.work import Work
from jaxlora.formats.huggingface import Pretrained
from jaxlora.training.step import TrainState
from jaxlora.training.task_group import Cohort

Mode = Literal["eager", "compile", "graphs"]


class Padded(Peer):
    """One model for each group."""

    def __init__(
        self,
        work: Work,
        base: Pretrained,
        cohort: Cohort,
        *,
        states: Mapping[str, TrainState] | None = None,
        mode: Mode = "eager",
        device: str = "cpu",
    ) -> None:
        super().__init__(cohort, device)
        self._pooling, self._autocast = work.pooling, work.dtype == "bfloat16"
        # CUDA graphs replay fixed shapes, so lengths are rounded up to few shapes.
        self._multiple = 32 if mode == "graphs" else 1
        self._encoders = []
        for name, state in common.in_order(cohort, states):
            model = self._make_model(work, base, state)
            shared = [p for p in model.parameters() if p.requires_grad]
            self.groups.append(Group(work, cohort, name, state, shared, device))
            self._encoders.append(_compiled(model, mode))

    def _make_model(self, work: Work, base: Pretrained, state: TrainState) -> Any:
        chosen = work.settings
        model = common.make_bert(base, chosen.model.encoder_dropout)
        if chosen.adapt == "lora":
            model = common.with_adapter(model, chosen.lora, "default")
            common.load_adapter(model, state.trainable["lora"], "default")
        return model.to(self.device).train()

    def gradients(self, step: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Run one backward pass for each task."""
        losses, jacobians = [], []
        drawn = iter(common.draw(self.cohort, step))
        for group, encoder in zip(self.groups, self._encoders, strict=True):
            rows = []
            for head, weight in zip(group.heads, group.weights, strict=True):
                part = next(drawn)
                vectors = self.vectors(encoder, part)
                loss = head.loss(vectors, torch.tensor(part.labels, device=self.device))
                (loss * weight).backward()
                losses.append(loss.detach())
                rows.append(group.take_grads())
            jacobians.append(torch.stack(rows))
        return losses, jacobians

    def vectors(self, encoder: Any, drawn: Drawn) -> torch.Tensor:
        """Encode a task's sentences as one padded batch."""
        return self._encode(encoder, *common.pad(drawn.examples, drawn.numbers, self._multiple))

    def _encode(self, encoder: Any, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        tokens, mask = tokens.to(self.device), mask.to(self.device)
        with self._cast():
            hidden = encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
            return common.pool(hidden, mask, self._pooling).float()

    def _cast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast)


def _compiled(model: Any, mode: Mode) -> Any:
    if mode == "eager":
        return model
    return torch.compile(
        model,
        dynamic=mode == "compile",
        mode="reduce-overhead" if mode == "graphs" else "default",
    )
