"""Gradients of T tasks → one: a family of aggregators on the T×T matrix of their dot products.

`aggregate` makes the optax transform of any of them; `MEMBERS` lists them, and each is a function
here that takes the method's own parameters.
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
