"""jaxlora: one frozen BERT for many tasks; LoRA and PCGrad as functions over pytrees.

`aggregate`, `per_task_grads`, `pcgrad`, `sum_tasks` and `lora` need only jax, NumPy and optax. The
names with more dependencies (`load`, `Predictor`, `Answer`, `from_pretrained`, `SentenceEncoder`)
are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jaxlora import aggregation, lora
from jaxlora.aggregation import aggregate, per_task_grads
from jaxlora.pcgrad import PCGradState, pcgrad, sum_tasks
from jaxlora.utils.errors import UserError

if TYPE_CHECKING:
    from jaxlora.serving.answers import Answer
    from jaxlora.serving.predictor import Predictor, load
    from jaxlora.serving.sentence_encoder import SentenceEncoder, from_pretrained

__version__ = "0.1.0"

__all__ = [
    "Answer", "PCGradState", "Predictor", "SentenceEncoder", "UserError", "aggregate",
    "aggregation", "from_pretrained", "load", "lora", "pcgrad", "per_task_grads", "sum_tasks",
]  # fmt: skip

# Public name → its module and its name in that module.
_ON_FIRST_USE = {
    "Answer": ("jaxlora.serving.answers", "Answer"),
    "Predictor": ("jaxlora.serving.predictor", "Predictor"),
    "SentenceEncoder": ("jaxlora.serving.sentence_encoder", "SentenceEncoder"),
    "from_pretrained": ("jaxlora.serving.sentence_encoder", "from_pretrained"),
    "load": ("jaxlora.serving.predictor", "load"),
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, found = _ON_FIRST_USE[name]
    globals()[name] = getattr(import_module(module), found)
    return globals()[name]


def __dir__() -> list[str]:
    """List the public names, including those not imported yet."""
    return sorted({*globals(), *__all__})
