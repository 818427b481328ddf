"""Gradient aggregators: combine the gradients of T tasks into one, by their T×T Gram matrix.

`aggregate` returns the optax transform of any method. `MEMBERS` lists the methods; each is also a
function of this package that takes the method's parameters.
"""

from jaxlora.aggregation.accumulate import accumulate
from jaxlora.aggregation.method import MEMBERS, PROMISES, Member, Method, of_gram
from jaxlora.aggregation.methods import (
    aligned_mtl,
    cagrad,
    config,
    constant,
    dualproj,
    dwa,
    fairgrad,
    famo,
    geometric_mean,
    gradvac,
    imtl_g,
    mean,
    mgda,
    nash_mtl,
    pcgrad,
    random,
    sum,
    upgrad,
    uw,
)  # fmt: skip
from jaxlora.aggregation.observe import metrics
from jaxlora.aggregation.per_task import per_task_grads
from jaxlora.aggregation.transform import AggregateState, aggregate, part_names

__all__ = [
    "MEMBERS", "PROMISES", "AggregateState", "Member", "Method", "accumulate", "aggregate",
    "aligned_mtl", "cagrad", "config", "constant", "dualproj", "dwa", "fairgrad", "famo",
    "geometric_mean", "gradvac", "imtl_g", "mean", "metrics", "mgda", "nash_mtl", "of_gram",
    "part_names", "pcgrad", "per_task_grads", "random", "sum", "upgrad", "uw",
]  # fmt: skip
