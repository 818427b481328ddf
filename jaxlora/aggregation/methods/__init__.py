"""One gradient aggregator per file; importing this package registers them all."""

from jaxlora.aggregation.methods.aligned_mtl import aligned_mtl
from jaxlora.aggregation.methods.cagrad import cagrad
from jaxlora.aggregation.methods.config import config
from jaxlora.aggregation.methods.dualproj import dualproj
from jaxlora.aggregation.methods.dwa import dwa
from jaxlora.aggregation.methods.fairgrad import fairgrad
from jaxlora.aggregation.methods.famo import famo
from jaxlora.aggregation.methods.fixed import constant, mean, sum
from jaxlora.aggregation.methods.geometric_mean import geometric_mean
from jaxlora.aggregation.methods.gradvac import gradvac
from jaxlora.aggregation.methods.imtl_g import imtl_g
from jaxlora.aggregation.methods.mgda import mgda
from jaxlora.aggregation.methods.nash_mtl import nash_mtl
from jaxlora.aggregation.methods.pcgrad import pcgrad
from jaxlora.aggregation.methods.random import random
from jaxlora.aggregation.methods.upgrad import upgrad
from jaxlora.aggregation.methods.uw import uw

__all__ = [
    "aligned_mtl", "cagrad", "config", "constant", "dualproj", "dwa", "fairgrad", "famo",
    "geometric_mean", "gradvac", "imtl_g", "mean", "mgda", "nash_mtl", "pcgrad", "random", "sum",
    "upgrad", "uw",
]  # fmt: skip
