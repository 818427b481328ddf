"""The peer: transformers' BertModel (sdpa), peft's LoRA, torchjd's PCGrad, dynamic padding.

It does what a careful user of PyTorch would: both sentences of a pair in one forward pass, each
batch padded to its longest sentence, one backward pass for each task, a fused AdamW.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import peft
import torch
from flax import traverse_util
from torch.nn import functional
from torchjd.aggregation import PCGrad
from transformers import BertModel

from benchmarks.work import Work, make_data
from jaxlora.data import batches as data_batches
from jaxlora.data.order import make_order
from jaxlora.data.tokenized import Examples
from jaxlora.formats import huggingface
from jaxlora.formats.huggingface import Pretrained
from jaxlora.lora import LoraConfig
from jaxlora.tasks.task import Task
from jaxlora.training.step import TrainState
from jaxlora.training.task_group import Cohort

Mode = Literal["eager", "compile", "graphs"]


class Head(torch.nn.Module):
    """A task's head with our parameters, its loss, and the pooling before it."""

    def __init__(self, task: Task, params: Mapping[str, Any], dropout: float) -> None:
        super().__init__()
        self.task = task
        layers = (_linear(params[name]) for name in ("hidden", "out") if name in params)
        self.layers = torch.nn.ModuleList(layers)
        self.dropout = dropout

    def loss(self, vectors: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Compute the mean loss of sentence vectors, first sentences first."""
        u, v = vectors.chunk(2) if self.task.pair else (vectors, vectors)
        if not self.layers:
            return functional.mse_loss(functional.cosine_similarity(u, v), labels / 5)
        x = torch.cat([u, v, (u - v).abs(), u * v], -1) if self.task.pair else u
        hidden, out = self.layers
        y = out(functional.dropout(functional.relu(hidden(x)), self.dropout, self.training))
        if self.task.outputs > 1:
            return functional.cross_entropy(y, labels.long())
        losses = (
            functional.binary_cross_entropy_with_logits
            if self.task.classes
            else functional.mse_loss
        )
        return losses(y[:, 0], labels)


def _linear(params: Mapping[str, Any]) -> torch.nn.Linear:
    kernel, bias = (torch.tensor(np.array(params[name])) for name in ("kernel", "bias"))
    layer = torch.nn.Linear(*kernel.shape)
    with torch.no_grad():
        layer.weight.copy_(kernel.T)
        layer.bias.copy_(bias)
    return layer


class Peer:
    """The peer's side of one group: equal initial parameters and order of sentences."""

    def __init__(
        self,
        work: Work,
        base: Pretrained,
        ours: Cohort,
        name: str,
        *,
        states: Mapping[str, TrainState] | None = None,
        mode: Mode = "eager",
        device: str = "cpu",
    ) -> None:
        torch.set_num_threads(os.cpu_count() or 1)
        self.device, self._pooling = torch.device(device), work.pooling
        chosen = work.settings
        state, group = (states or ours.states)[name], ours.train_step.groups[name]
        model = make_bert(base, chosen.model.encoder_dropout)
        if chosen.adapt == "lora":
            model = with_adapter(model, chosen.lora, "default")
            load_adapter(model, state.trainable["lora"], "default")
        model = model.to(self.device).train()
        self.shared = [p for p in model.parameters() if p.requires_grad]
        self.encoder = _compiled(model, mode)
        dropout = ours.train_step.dropout
        self.heads = torch.nn.ModuleList(
            Head(task, state.heads[task.name], dropout) for task in group.tasks
        ).to(self.device)
        self.optimizers = [
            torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, fused=True)
            for parameters, rate in (
                (self.shared, chosen.optimizer.learning_rate),
                (list(self.heads.parameters()), chosen.optimizer.head_learning_rate),
            )
            if parameters
        ]
        # CUDA graphs replay one shape; so there are few.
        self._multiple = 32 if mode == "graphs" else 1
        self._surgery = PCGrad() if len(self.heads) > 1 else None
        self._weights = group.weights or (1.0,) * len(self.heads)
        self._autocast = work.dtype == "bfloat16"
        data = make_data(work, base)
        self._examples = {t.name: data[t.name]["train"] for t in group.tasks}
        sizes = {name: len(examples) for name, examples in self._examples.items()}
        self._order = make_order(sizes, work.batch_size, chosen.loop.seed)
        self.taken = 0

    def run(self, steps: int) -> list[float]:
        """Take some steps; return the last losses."""
        for _ in range(steps):
            losses = self.step(self.taken % (2 * self._order.steps_per_epoch))
            self.taken += 1
        return losses

    def losses(self, step: int) -> list[torch.Tensor]:
        """Compute every task's loss on the batch of a step."""
        numbers = self._order.at(step)
        return [self._loss(t, chosen) for t, chosen in enumerate(numbers)]

    def step(self, step: int) -> list[float]:
        """Take one step: a backward pass per task, surgery, clipping, AdamW."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        rows, losses = [], []
        for t, chosen in enumerate(self._order.at(step)):
            loss = self._loss(t, chosen)
            (loss * self._weights[t]).backward()
            losses.append(loss.detach())
            if self._surgery is not None:
                rows.append(torch.cat([p.grad.reshape(-1) for p in self.shared]))
                for p in self.shared:
                    p.grad = None
        if self._surgery is not None:
            self._spread(self._surgery(torch.stack(rows)))
        torch.nn.utils.clip_grad_norm_(self.shared, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        return [float(loss) for loss in losses]

    def _loss(self, t: int, numbers: np.ndarray) -> torch.Tensor:
        head: Any = self.heads[t]
        examples = self._examples[head.task.name]
        chosen = data_batches.sentence_numbers(examples, numbers)
        tokens, mask = pad(examples, chosen, self._multiple)
        tokens, mask = tokens.to(self.device), mask.to(self.device)
        cast = torch.autocast(self.device.type, torch.bfloat16) if self._autocast else _nothing()
        with cast:
            hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
            vectors = pool(hidden, mask, self._pooling).float()
        labels = torch.tensor(examples.labels[numbers], device=self.device)
        return head.loss(vectors, labels)

    def _spread(self, flat: torch.Tensor) -> None:
        sizes = [p.numel() for p in self.shared]
        for p, part in zip(self.shared, flat.split(sizes), strict=True):
            p.grad = part.view_as(p)


def _compiled(model: Any, mode: Mode) -> Any:
    if mode == "eager":
        return model
    return torch.compile(
        model,
        dynamic=mode == "compile",
        mode="reduce-overhead" if mode == "graphs" else "default",
    )


def _nothing() -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def pad(
    examples: Examples, numbers: np.ndarray, multiple: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad sentences to the longest, or to a multiple; return ids and mask, `i64[N, S]` each."""
    lengths = examples.lengths[numbers]
    width = -(-lengths.max() // multiple) * multiple
    tokens = np.zeros((len(numbers), width), np.int64)
    for row, number in enumerate(numbers):
        tokens[row, : lengths[row]] = examples.sentence(number)
    mask = (np.arange(width) < lengths[:, None]).astype(np.int64)
    return torch.from_numpy(tokens), torch.from_numpy(mask)


def pool(hidden: torch.Tensor, mask: torch.Tensor, kind: str) -> torch.Tensor:
    """Compute sentence vectors as `bert.pool` does."""
    if kind == "cls":
        return hidden[:, 0]
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def make_bert(base: Pretrained, dropout: float) -> Any:
    """Convert our base to a model of transformers."""
    return BertModel.from_pretrained(
        huggingface.find(base.name),
        attn_implementation="sdpa",
        dtype=torch.float32,
        add_pooling_layer=False,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )


def with_adapter(model: Any, config: LoraConfig, name: str) -> Any:
    """Build a peft model with one adapter of our configuration."""
    same = peft.LoraConfig(
        r=config.rank, lora_alpha=int(config.alpha), target_modules=list(config.target_modules)
    )
    return peft.get_peft_model(model, same, adapter_name=name)


def load_adapter(model: Any, adapter: Mapping[str, Any], name: str) -> None:
    """Copy our values into an adapter of a peft model."""
    named = dict(model.named_parameters())
    with torch.no_grad():
        for path, stacked in traverse_util.flatten_dict(dict(adapter)).items():
            module, factor = ".".join(path[1:-1]), path[-1]
            for i, value in enumerate(np.array(stacked)):
                layer = f"base_model.model.encoder.layer.{i}.{module}"
                named[f"{layer}.lora_{factor}.{name}.weight"].copy_(torch.tensor(value.T))
