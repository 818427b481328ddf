"""Shared parts of the training peers: heads, losses, examples, PCGrad, optimizers.

A peer starts from our initial parameters and uses our examples in our order.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
from flax import traverse_util
from torch.nn import functional
from torchjd.aggregation import PCGradWeighting
from transformers import BertModel

from benchmarks.work import Work
from jaxlora.data.batches import sentence_numbers
from jaxlora.data.tokenized import Examples
from jaxlora.formats import huggingface
from jaxlora.formats.huggingface import Pretrained
from jaxlora.lora import LoraConfig
from jaxlora.tasks.task import Task
from jaxlora.training.step import TrainState
from jaxlora.training.task_group import Cohort


class Drawn(NamedTuple):
    """A task's part of a batch: its sentences' numbers (first sentences first), and labels."""

    examples: Examples
    numbers: np.ndarray
    labels: np.ndarray


def draw(cohort: Cohort, step: int) -> list[Drawn]:
    """Return the examples of each task that our step with this number uses."""
    batches = cohort.batches
    drawn = batches.order.at(step % batches.order.steps)
    return [
        Drawn(examples, sentence_numbers(examples, numbers), examples.labels[numbers])
        for examples, numbers in zip(batches.examples.values(), drawn, strict=True)
    ]


def in_order(
    cohort: Cohort, states: Mapping[str, TrainState] | None
) -> list[tuple[str, TrainState]]:
    """Return the groups' names and states (by default the initial states), in task order."""
    found = states or cohort.states
    return [(name, found[name]) for name in cohort.train_step.groups]


class Head(torch.nn.Module):
    """A task's head with our parameters, and its loss."""

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


class Group:
    """A group of tasks: heads, optimizers, and PCGrad over the shared parameters.

    Attributes:
      heads: the heads of its tasks.
      weights: the weights of their losses.
      shared: the parameters that its tasks share.
    """

    def __init__(
        self,
        work: Work,
        cohort: Cohort,
        name: str,
        state: TrainState,
        shared: Sequence[torch.nn.Parameter],
        device: str,
    ) -> None:
        group, dropout = cohort.train_step.groups[name], cohort.train_step.dropout
        heads = [Head(task, state.heads[task.name], dropout) for task in group.tasks]
        self.heads: Any = torch.nn.ModuleList(heads).to(device)
        self.weights = group.weights or (1.0,) * len(heads)
        self.shared = list(shared)
        self._weighting = PCGradWeighting()
        rates, trained = work.settings.optimizer, list(self.heads.parameters())
        self._optimizers = [
            torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, fused=True)
            for parameters, rate in (
                (self.shared, rates.learning_rate),
                (trained, rates.head_learning_rate),
            )
            if parameters
        ]

    def take_grads(self) -> torch.Tensor:
        """Return the shared parameters' gradients as one vector, and clear them."""
        grads = [p.grad.reshape(-1) for p in self.shared if p.grad is not None]
        for p in self.shared:
            p.grad = None
        return torch.cat(grads)

    def update(self, jacobian: torch.Tensor) -> None:
        """Take an optimizer step from the tasks' gradients `[T, n]`: PCGrad, clipping, AdamW."""
        flat = jacobian[0]
        if len(jacobian) > 1:
            flat = self._weighting(jacobian @ jacobian.T) @ jacobian
        sizes = [p.numel() for p in self.shared]
        for p, part in zip(self.shared, flat.split(sizes), strict=True):
            p.grad = part.view_as(p)
        torch.nn.utils.clip_grad_norm_(self.shared, 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


class Peer(abc.ABC):
    """A peer that trains a cohort.

    Attributes:
      cohort: our cohort.
      groups: the peer's groups.
    """

    def __init__(self, cohort: Cohort, device: str) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.cohort, self.device = cohort, torch.device(device)
        self.groups: list[Group] = []
        self._taken = 0

    @abc.abstractmethod
    def gradients(self, step: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return each task's loss and each group's gradients `[T, n]` on the batch of a step."""

    def step(self, step: int) -> list[float]:
        """Take one step and return the losses."""
        losses, jacobians = self.gradients(step)
        for group, jacobian in zip(self.groups, jacobians, strict=True):
            group.update(jacobian)
        return [float(loss) for loss in losses]

    def run(self, steps: int) -> list[float]:
        """Take some steps; return the last losses."""
        for _ in range(steps):
            losses = self.step(self._taken)
            self._taken += 1
        return losses


def pad(
    examples: Examples, numbers: np.ndarray, multiple: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad sentences to the longest, rounded up; return ids and mask, `i64[N, S]` each."""
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


def by_length(lengths: np.ndarray, overhead: int) -> list[np.ndarray]:
    """Split sentences into sub-batches of similar lengths at the lowest total cost.

    Args:
      lengths: number of tokens of each sentence.
      overhead: cost of one more sub-batch, in tokens.

    Returns:
      Sentence numbers of each sub-batch, the longest first.

    >>> [part.tolist() for part in by_length(np.array([9, 30, 10, 29]), 4)]
    [[1, 3], [2, 0]]
    """
    order = np.argsort(-lengths, kind="stable")
    longest, count = lengths[order], len(lengths)
    cost, start = np.zeros(count + 1), np.zeros(count + 1, np.int64)
    for end in range(1, count + 1):
        costs = cost[:end] + overhead + (end - np.arange(end)) * longest[:end]
        start[end] = costs.argmin()
        cost[end] = costs[start[end]]
    parts, end = [], count
    while end:
        parts.append(order[start[end] : end])
        end = start[end]
    return parts[::-1]


def make_bert(base: Pretrained, dropout: float) -> Any:
    """Load our base as a transformers model."""
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
    """Copy our adapter's values into an adapter of a peft model."""
    named = dict(model.named_parameters())
    with torch.no_grad():
        for path, stacked in traverse_util.flatten_dict(dict(adapter)).items():
            module, factor = ".".join(path[1:-1]), path[-1]
            for i, value in enumerate(np.array(stacked)):
                layer = f"base_model.model.encoder.layer.{i}.{module}"
                named[f"{layer}.lora_{factor}.{name}.weight"].copy_(torch.tensor(value.T))
