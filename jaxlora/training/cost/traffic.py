"""What devices send one another in a step, counted from what `sharding` makes XLA send.

Sources: Xu et al. 2021, "GSPMD"; Rajbhandari et al. 2019, "ZeRO".
"""

from __future__ import annotations

from typing import NamedTuple

from jaxlora.training import sharding
from jaxlora.training.cost.work import FLOAT, Work, kernels, split
from jaxlora.utils import trees


class Traffic(NamedTuple):
    """Bytes of arrays that a device gets from the others in a step.

    Attributes:
      all_gather: split kernels, fetched for the forward pass and again for the backward pass.
      all_reduce: gradients of replicated leaves, words looked up in parts, vectors.
      reduce_scatter: gradients of split leaves; a device keeps only its part of the sum. (XLA on
        CPU sums all and cuts the part out.)
      all_to_all: embeddings whose columns are split.
    """

    all_gather: float
    all_reduce: float
    reduce_scatter: float
    all_to_all: float

    def wire(self, devices: int) -> float:
        """Bytes a device sends when each operation goes round in a ring.

        >>> Traffic(0, 8.0, 0, 0).wire(4)
        12.0
        """
        once = self.all_gather + self.reduce_scatter + self.all_to_all
        return (once + 2 * self.all_reduce) * (1 - 1 / devices)


def count_traffic(work: Work) -> Traffic:
    """Count the bytes that a device gets: rows are over both axes, split leaves over `fsdp`."""
    if work.devices == 1 or work.adapt == "frozen":  # vectors are replicated
        return Traffic(0, 0, 0, 0)
    count, full = len(work.tasks), work.adapt == "full"
    used = kernels(work.params if full else work.frozen)
    fetched = 2.0 * (count if full else 1) * work.width * split(used, work.fsdp)
    if not full and work.fsdp > 1:  # as in `count_flops`: the first layer's are read once
        fetched -= 3.0 * work.width * work.config.hidden_size**2
    looked_up, exchanged = _lookups(work)
    # Sums of vectors over sentences whose rows lie on any device.
    pooled = FLOAT * count * (2 * work.batch_size + 1) * (work.config.hidden_size + 1)
    gradients = FLOAT * count * trees.count(work.trained) / work.groups
    whole = looked_up + pooled
    if not full:
        return Traffic(fetched, gradients + whole, 0, exchanged)
    parts = FLOAT * count * split(work.trained, work.fsdp)
    words = FLOAT * count * split(work.params["embeddings"]["word_embeddings"], work.fsdp)
    # Summed over fsdp first (a table gets its own part's gradients), then the parts over data.
    again = parts / work.fsdp if work.data > 1 else 0.0
    return Traffic(
        fetched + looked_up, gradients - parts + whole, parts - words + again, 2 * exchanged
    )


def _lookups(work: Work) -> tuple[float, float]:
    """Count bytes of words looked up in a split table: by rows and summed, by columns exchanged.

    A device that has some rows looks up its neighbours' tokens too.
    """
    shape = work.params["embeddings"]["word_embeddings"].shape
    axis = sharding.split_axis(shape, work.fsdp) if work.fsdp > 1 else None
    vectors = FLOAT * work.config.hidden_size * work.tokens
    return (vectors / work.data * (axis == 0), vectors / work.devices * (axis == 1))
