"""What a step will cost: FLOPs, bytes and traffic from shapes alone; nothing is allocated.

FLOPs, traffic and what a device keeps are counted, by closed formulas. What the backward pass needs
besides is an estimate, see `activations`. `docs/scaling.md` compares all this with XLA's own
analyses.
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
    """What a step costs; see the parts."""

    work: Work
    flops: Flops
    memory: Memory
    traffic: Traffic

    def seconds(self, flops_per_second: float, bytes_per_second: float = math.inf) -> float:
        """Compute a step's time without overlap, on devices that reach the rates they are given.

        Args:
          flops_per_second: what a device does of this work, half of its peak or less.
          bytes_per_second: of the link between devices.
        """
        work, devices = self.flops.total, self.work.devices
        return work / devices / flops_per_second + self.traffic.wire(devices) / bytes_per_second


def estimate(work: Work) -> Estimate:
    """Return what a step costs.

    >>> from jaxlora.tasks.task import paper_tasks
    >>> work = Work(SIZES["bert-base"], "lora", paper_tasks("mse"), batch_size=8, rows=16)
    >>> found = estimate(work)
    >>> round(found.flops.total / 1e9), round(found.memory.total / 1e6)
    (363, 1212)
    """
    return Estimate(work, count_flops(work), count_memory(work), count_traffic(work))
