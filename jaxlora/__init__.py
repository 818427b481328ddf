"""jaxlora: one frozen BERT, many tasks; LoRA and PCGrad as functions over pytrees."""

from jaxlora import lora
from jaxlora.errors import UserError
from jaxlora.pcgrad import PCGradState, pcgrad
from jaxlora.predict import Model, load

__all__ = ["Model", "PCGradState", "UserError", "load", "lora", "pcgrad"]
