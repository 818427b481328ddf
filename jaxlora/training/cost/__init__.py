"""The cost of a train step: FLOPs, memory and traffic, from shapes alone.

FLOPs, traffic and the arrays that a device keeps between steps are counted by closed formulas. The
memory of the backward pass is estimated, see `activations`. `docs/scaling.md` compares both with
XLA's own analyses.
"""

from __future__ import annotations

import dataclasses
import math

from jaxlora.training.cost.flops import Flops, count_flops
from jaxlora.training.cost.memory import Memory, count_memory
from jaxlora.training.cost.traffic import Traffic, count_traffic
from jaxlora.training.cost.work import SIZES, Work, for_variant

__all__ = ["SIZES", "Estimate", "Flops", "Memory", "Traffic", "Work", "estimate", "for_variant"]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The cost of a step."""

    work: Work
    flops: Flops
    memory: Memory
    traffic: Traffic

    def seconds(self, flops_per_second: float, bytes_per_second: float = math.inf) -> float:
        """Compute the time of a step, without overlap of computation and communication.

        Args:
          flops_per_second: rate that a device reaches, typically at most half of its peak.
          bytes_per_second: bandwidth of the link between devices.
        """
        work, devices = self.flops.total, self.work.devices
        return work / devices / flops_per_second + self.traffic.wire(devices) / bytes_per_second


def estimate(work: Work) -> Estimate:
    """Compute the cost of a step.

    >>> from jaxlora.tasks.task import paper_tasks
    >>> work = Work(SIZES["bert-base"], "lora", paper_tasks("mse"), batch_size=8, rows=16)
    >>> found = estimate(work)
    >>> round(found.flops.total / 1e9), round(found.memory.total / 1e6)
    (363, 1245)
    """
    return Estimate(work, count_flops(work), count_memory(work), count_traffic(work))
