"""Bytes on each device: counted, but for the estimate of what the backward pass needs."""

from __future__ import annotations

from typing import NamedTuple

from jaxlora.training.cost import activations
from jaxlora.training.cost.work import FLOAT, Work, held, kernels
from jaxlora.utils import trees


class Memory(NamedTuple):
    """Bytes on each device.

    Attributes:
      frozen: parameters that are not trained.
      trained: parameters that are, heads included.
      moments: AdamW's two for each of them.
      best: a copy of what is trained, as it was at the best evaluation. It stays on the devices,
        split as they split it: in host memory, every process would have to hold all of it.
      batch: tokens, positions, segments, labels.
      activations: held when the backward pass begins; an estimate, see `activations`.
      gradients: of each task, `[T, ...]`, and of the heads.
      update: the new parameters and moments, until it is known that they are finite.
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
        """What a step is given."""
        return self.frozen + self.trained + self.moments + self.batch

    @property
    def temporary(self) -> float:
        """What it holds besides at the fullest moment: before the backward pass, or the update."""
        return max(self.activations, self.gradients + self.update)

    @property
    def total(self) -> float:
        """What a device needs."""
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
    """Count the bytes of the parameters that no step changes; kernels have the matmuls' dtype."""
    if not work.adaptation.keeps_base:
        return 0.0
    in_matmuls = held(kernels(work.frozen), work.fsdp)
    return FLOAT * (held(work.frozen, work.fsdp) - in_matmuls) + work.width * in_matmuls
