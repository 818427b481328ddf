"""Traffic between devices in a step, from the collectives that XLA derives from `sharding`.

Sources: Xu et al. 2021, "GSPMD"; Rajbhandari et al. 2019, "ZeRO".
"""

from __future__ import annotations

from typing import NamedTuple

from jaxlora.training import sharding
from jaxlora.training.cost.work import FLOAT, Work, kernels, split
from jaxlora.utils import trees


class Traffic(NamedTuple):
    """Bytes of the results of each kind of collective that a device gets in a step.

    Attributes:
      all_gather: sharded kernels, gathered in the forward pass and again in the backward pass.
      all_reduce: gradients of replicated leaves, embeddings looked up in a table sharded by rows,
        and sentence vectors.
      reduce_scatter: gradients of sharded leaves. (XLA on CPU reduces all and slices instead.)
      all_to_all: embeddings looked up in a table sharded by columns.
    """

    all_gather: float
    all_reduce: float
    reduce_scatter: float
    all_to_all: float

    def wire(self, devices: int) -> float:
        """Return the bytes that a device sends if every collective is a ring algorithm.

        >>> Traffic(0, 8.0, 0, 0).wire(4)
        12.0
        """
        once = self.all_gather + self.reduce_scatter + self.all_to_all
        return (once + 2 * self.all_reduce) * (1 - 1 / devices)


def count_traffic(work: Work) -> Traffic:
    """Count the traffic of a step, with rows split over both axes and leaves over `fsdp`."""
    if work.devices == 1 or work.adapt == "frozen":  # vectors are replicated
        return Traffic(0, 0, 0, 0)
    count, full = len(work.tasks), work.adapt == "full"
    used = kernels(work.params if full else work.frozen)
    fetched = 2.0 * work.width * split(used, work.fsdp)
    if not full and work.fsdp > 1:  # as in `count_flops`: no gradient of the first layer's input
        fetched -= 3.0 * work.width * work.config.hidden_size**2
    looked_up, exchanged = _lookups(work)
    # Sums of sentence vectors over devices, since the row of a sentence may be on any of them.
    pooled = FLOAT * count * (2 * work.batch_size + 1) * (work.config.hidden_size + 1)
    gradients = FLOAT * count * trees.count(work.trained) / work.groups
    whole = looked_up + pooled
    if not full:
        return Traffic(fetched, gradients + whole, 0, exchanged)
    parts = FLOAT * count * split(work.trained, work.fsdp)
    words = FLOAT * count * split(work.params["embeddings"]["word_embeddings"], work.fsdp)
    # Summed over fsdp (except the table, whose shards get their own gradients), then over data.
    again = parts / work.fsdp if work.data > 1 else 0.0
    return Traffic(
        fetched + looked_up, gradients - parts + whole, parts - words + again, 2 * exchanged
    )


def _lookups(work: Work) -> tuple[float, float]:
    """Count the bytes of embeddings from a sharded table: all-reduced, and exchanged all-to-all.

    The first is for a table sharded by rows, in which a device also looks up tokens of the others
    along `fsdp`. The second is for a table sharded by columns.
    """
    shape = work.params["embeddings"]["word_embeddings"].shape
    axis = sharding.split_axis(shape, work.fsdp) if work.fsdp > 1 else None
    vectors = FLOAT * work.config.hidden_size * work.tokens
    return (vectors / work.data * (axis == 0), vectors / work.devices * (axis == 1))
