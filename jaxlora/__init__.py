"""jaxlora: one frozen BERT, many tasks; LoRA and PCGrad as functions over pytrees."""

from jaxlora import lora
from jaxlora.errors import UserError
from jaxlora.pcgrad import PCGradState, pcgrad
from jaxlora.predict import Answer, Predictor, load

__all__ = ["Answer", "PCGradState", "Predictor", "UserError", "load", "lora", "pcgrad"]

__version__ = "0.1.0"
