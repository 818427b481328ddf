"""jaxlora: one frozen BERT, many tasks; LoRA and PCGrad as functions over pytrees."""

from jaxlora import lora
from jaxlora.pcgrad import PCGradState, pcgrad, sum_tasks
from jaxlora.serving.predictor import Answer, Predictor, load
from jaxlora.utils.errors import UserError

__all__ = [
    "Answer", "PCGradState", "Predictor", "UserError", "load", "lora", "pcgrad", "sum_tasks",
]  # fmt: skip

__version__ = "0.1.0"
