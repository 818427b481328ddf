"""Floating-point operations of a step: 2 for each number of a kernel and token forward.

Backward as many for each of a matmul's two gradients, less those that nobody needs.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxlora.training.cost.work import Work, kernels
from jaxlora.utils import trees

# Element-wise operations of a trained number in an update: AdamW with decay, norms, clipping, the
# choice between the new state and the old one.
UPDATE = 30


class Flops(NamedTuple):
    """Floating-point operations of a step, on all devices; a multiply-add is two."""

    forward: float
    backward: float
    update: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.forward + self.backward + self.update


def count_flops(work: Work) -> Flops:
    """Count the operations of a step."""
    c, count = work.config, len(work.tasks)
    dense = 2.0 * trees.count(kernels(work.params)) * work.tokens
    attention = 4.0 * c.num_hidden_layers * work.row_length * c.hidden_size * work.tokens
    # All adapters side by side, for all tokens; each task has a gradient of its own.
    low_rank = 2.0 * trees.count(work.trained) * work.tokens * (work.adapt == "lora")
    per_task = low_rank * count / work.groups
    heads = 2.0 * trees.count(work.heads) * work.batch_size
    backward = 2 * attention + low_rank + per_task + 2 * heads + dense
    if work.adapt == "full":
        backward += dense  # the kernels' own gradients
    if work.adapt == "lora":  # below the first layer nothing is trained: no gradient of its input
        backward -= 2.0 * 3 * c.hidden_size**2 * work.tokens
    if work.adapt == "frozen":  # nor is there any of the heads' input
        inner = [head["hidden"] for head in work.heads if head]
        backward -= 2.0 * trees.count(inner) * work.batch_size
    # Dot products of the tasks of a group, and a weighted sum; groups are of one size, on average.
    each = count / work.groups
    surgery = (each * (each + 1) + 2 * each) * trees.count(work.trained)
    numbers = trees.count(work.trained) + trees.count(work.heads)
    return Flops(dense + attention + low_rank + heads, backward, UPDATE * numbers + surgery)
