"""The `adapter_config.json` of a Hugging Face PEFT folder: its type and its supported values."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from jaxlora.utils import schema
from jaxlora.utils.errors import UserError
from jaxlora.utils.files import read_object

CONFIG = "adapter_config.json"
SEQUENCE_CLASSIFIER = "SEQ_CLS"
_CLASSIFIER_CLASS = "ForSequenceClassification"  # suffix of such class names
MERGE = (
    "merge it with PEFT (merge_and_unload, then save_pretrained, with the base's tokenizer "
    "saved beside it) and use that folder as `base`"
)
Rank = Annotated[int, Field(ge=1)]
Alpha = Annotated[float, Field(gt=0)]
# Fields with their supported values, and (below) fields that can be ignored. Any other field that
# is set is refused, so that an unknown kind of adapter is never read incompletely. (PiSSA and
# similar initializations change the weights of the base.)
_ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
_DEFAULTS = {"bias": "none", "init_lora_weights": True}
_NO_MATTER = {
    "peft_version", "inference_mode", "exclude_modules", "layers_pattern", "megatron_core",
    "qalora_group_size", "eva_config", "runtime_config",
    "fan_in_fan_out",  # PEFT sets it to false for torch.nn.Linear, the only kind here
}  # fmt: skip
# Kinds of adapters that do not change weights, so that they cannot be merged.
_PROMPTS = (
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT",
    "CPT", "XLORA",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """The relevant fields of an `adapter_config.json`, with PEFT's names and defaults.

    Raises:
      ValueError: for a pattern that is not a regular expression.
    """

    r: Rank = 8
    lora_alpha: Alpha = 8.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False
    target_modules: str | tuple[str, ...] | None = None
    rank_pattern: dict[str, Rank] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, Alpha] = dataclasses.field(default_factory=dict)
    layers_to_transform: int | tuple[int, ...] = ()
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None
    auto_mapping: dict[str, Any] = dataclasses.field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_patterns("rank_pattern", self.rank_pattern)
        _check_patterns("alpha_pattern", self.alpha_pattern)

    @property
    def layers(self) -> frozenset[int]:
        """The layers that the adapter is limited to; empty: all."""
        named = self.layers_to_transform
        return frozenset([named] if isinstance(named, int) else named)

    @property
    def classifies(self) -> bool:
        """Whether the adapter was trained in a sequence classifier."""
        model = self.task_type or self.auto_mapping.get("base_model_class")
        return model == SEQUENCE_CLASSIFIER or str(model).endswith(_CLASSIFIER_CLASS)

    def values_of(self, module: str) -> tuple[int, float]:
        """Return rank and alpha of a Linear by its full name; as in PEFT, the first match wins."""
        rank, alpha = (
            next((p[key] for key in p if re.match(rf"(.*\.)?({key})$", module)), default)
            for p, default in ((self.rank_pattern, self.r), (self.alpha_pattern, self.lora_alpha))
        )
        return int(rank), float(alpha)

    def scale(self, rank: int, alpha: float) -> float:
        """Return the factor of `A B`, as in `LoraConfig.scale_of`."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _check_patterns(field: str, patterns: Iterable[str]) -> None:
    for key in patterns:
        try:
            with warnings.catch_warnings(action="ignore"):  # such as FutureWarning
                re.compile(rf"(.*\.)?({key})$")
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{field}: {schema.shown(key)} is no regular expression ({error})"
            ) from error


def read_config(folder: Path) -> PeftConfig:
    """Read the `adapter_config.json` of a folder.

    Raises:
      UserError: naming the unsupported field.
    """
    path = folder / CONFIG
    raw = _DEFAULTS | read_object(path)
    known = {field.name for field in dataclasses.fields(PeftConfig)}
    for name, allowed in _ONLY.items():
        if not any(raw.get(name) is one or raw.get(name) == one for one in allowed):
            raise UserError(_unsupported(path, raw, name))
    for name in raw.keys() - _ONLY.keys() - _NO_MATTER - known:
        if raw[name]:
            raise UserError(_unsupported(path, raw, name))
    # PEFT writes null for fields that are not set.
    optional = known - {"r", "lora_alpha"}
    fields = {name: raw[name] for name in raw.keys() & known}
    given = {k: v for k, v in fields.items() if k not in optional or v not in (None, "")}
    return schema.parse(PeftConfig, given, path)


def _unsupported(path: Path, raw: Mapping[str, Any], name: str) -> str:
    kind = raw.get("peft_type")
    remedy = "" if kind in _PROMPTS or not kind else f"; {MERGE}"
    shown = name if name.isidentifier() else schema.shown(name)
    return (
        f"{path}: {shown} {schema.shown(raw.get(name))} is not supported; only plain LoRA and "
        f"rsLoRA adapters are, with no other change of the encoder{remedy}"
    )
