"""Floating-point operations of a step: 2 per kernel element and token in the forward pass.

In the backward pass, each of the two gradients of a matmul costs the same, if it is needed.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxlora.training.cost.work import Work, kernels
from jaxlora.utils import trees

# Element-wise operations per trained parameter in an update: AdamW with decay, norms, clipping, and
# the selection between the new state and the old one.
UPDATE = 30


class Flops(NamedTuple):
    """Floating-point operations of a step on all devices; a multiply-add counts as two."""

    forward: float
    backward: float
    update: float

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return self.forward + self.backward + self.update


def count_flops(work: Work) -> Flops:
    """Count the operations of a step."""
    c, count = work.config, len(work.tasks)
    dense = 2.0 * trees.count(kernels(work.params)) * work.tokens
    attention = 4.0 * c.num_hidden_layers * work.row_length * c.hidden_size * work.tokens
    # All adapters are applied to all tokens, and each task has its own gradient.
    low_rank = 2.0 * trees.count(work.trained) * work.tokens * (work.adapt == "lora")
    per_task = low_rank * count / work.groups
    heads = 2.0 * trees.count(work.heads) * work.batch_size
    backward = 2 * attention + low_rank + per_task + 2 * heads + dense
    if work.adapt == "full":
        backward += dense  # gradients with respect to the kernels
    if work.adapt == "lora":  # no gradient with respect to the first layer's input
        backward -= 2.0 * 3 * c.hidden_size**2 * work.tokens
    if work.adapt == "frozen":  # no gradient with respect to the heads' input
        inner = [head["hidden"] for head in work.heads if head]
        backward -= 2.0 * trees.count(inner) * work.batch_size
    # Dot products of a group's tasks, and a weighted sum; groups are assumed to be of equal size.
    each = count / work.groups
    surgery = (each * (each + 1) + 2 * each) * trees.count(work.trained)
    numbers = trees.count(work.trained) + trees.count(work.heads)
    return Flops(dense + attention + low_rank + heads, backward, UPDATE * numbers + surgery)
