"""Bytes on each device: counted, except for the estimate of the backward pass."""

from __future__ import annotations

from typing import NamedTuple

from jaxlora.training.cost import activations
from jaxlora.training.cost.work import FLOAT, Work, held, kernels
from jaxlora.utils import trees


class Memory(NamedTuple):
    """Bytes on each device.

    Attributes:
      frozen: parameters that are not trained.
      trained: trained parameters, including heads.
      moments: AdamW's two moments of each trained parameter.
      best: copy of the trained parameters at the best evaluation. It stays sharded on the devices:
        in host memory, every process would have to hold all of it.
      batch: tokens, positions, segments, labels.
      activations: held when the backward pass begins; an estimate, see `activations`.
      gradients: gradients of each task, `[T, ...]`, and of the heads.
      update: the new parameters and moments, held until they are known to be finite.
    """

    frozen: float
    trained: float
    moments: float
    best: float
    batch: float
    activations: float
    gradients: float
    update: float

    @property
    def arguments(self) -> float:
        """Arguments of a step."""
        return self.frozen + self.trained + self.moments + self.batch

    @property
    def temporary(self) -> float:
        """Peak of the other memory of a step: before the backward pass, or during the update."""
        return max(self.activations, self.gradients + self.update)

    @property
    def total(self) -> float:
        """Memory that a device needs."""
        return self.arguments + self.best + self.temporary


def count_memory(work: Work) -> Memory:
    """Count the bytes of a step on each device."""
    count, heads = len(work.tasks), FLOAT * trees.count(work.heads)
    trained = FLOAT * held(work.trained, work.fsdp)
    inputs = 3 * work.tokens / work.devices
    if work.adapt == "frozen":
        inputs = 2 * count * work.batch_size * work.config.hidden_size
    return Memory(
        frozen=_frozen(work),
        trained=trained + heads,
        moments=2 * (trained + heads),
        best=trained + heads,
        batch=FLOAT * (inputs + 2 * count * work.batch_size),
        activations=activations.bytes_held(work),
        gradients=count / work.groups * trained + heads,
        update=3 * (trained + heads),
    )


def _frozen(work: Work) -> float:
    """Count the bytes of the frozen parameters, whose kernels have the dtype of matmuls."""
    if not work.adaptation.keeps_base:
        return 0.0
    in_matmuls = held(kernels(work.frozen), work.fsdp)
    return FLOAT * (held(work.frozen, work.fsdp) - in_matmuls) + work.width * in_matmuls
