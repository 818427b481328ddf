"""The settings of a run: small dataclasses with the meaning, bounds and default of each field.

A new setting is a field and its description here; `jaxlora train` makes the flag from them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import typing
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar

from jaxlora.aggregation import MEMBERS
from jaxlora.data.sources import Location
from jaxlora.data.task_files import TaskSpec, check_name
from jaxlora.formats.huggingface import MINILM
from jaxlora.lora import LoraConfig
from jaxlora.serving.task_models import Dtype, PairFeatures, Pooling
from jaxlora.tasks import sharing
from jaxlora.tasks.sharing import Adapt, Groups
from jaxlora.tasks.task import MADE_UP, PairEncoding, Task
from jaxlora.training.adaptation import Adaptation, cohorts, make_adaptation
from jaxlora.utils import bounds
from jaxlora.utils.bounds import Bound
from jaxlora.utils.errors import ConfigError, UserError
from jaxlora.utils.schema import build

PaperVariant = Literal[
    "baseline1", "baseline2", "baseline3", "baseline4", "lora1", "lora2", "lora3", "lora4"
]
VariantName = Literal[PaperVariant, "own"]
PresetName = Literal["demo", "cs224n", "paper", "own"]
Source = Literal["demo", "cs224n", "official", "files"]
Schedule = Literal["constant", "linear"]
if TYPE_CHECKING:
    Surgery = str
else:
    Surgery = Literal[("none", *MEMBERS)]

S = TypeVar("S", bound="Sections")


# Field of a section → name of the setting, where the two differ.
RENAMED = {"dropout": "lora_dropout"}


class OnlyFor(NamedTuple):
    """Annotation: the adaptations that a setting applies to."""

    adapts: tuple[Adapt, ...]


TRAINED = OnlyFor(("lora", "full"))
ADAPTED = OnlyFor(("lora",))


@dataclasses.dataclass(frozen=True)
class TaskChoice:
    """Which tasks are trained, and which of them together.

    Attributes:
      tasks: your own tasks instead of the paper's: TOML files or tables of data, and values such
        as topic.epochs=3.
      text: the text column of these tables, or the two columns of a pair, separated by a comma.
      label: the label column of these tables, or several columns of 0 and 1, separated by commas.
      only: train only these tasks.
      groups: which tasks share a trainable encoder tree, e.g. "sst|para,sts"; default: the
        variant's.
      pair_encoding: how pairs of the paper's tasks are encoded: separate, with a vector for each
        sentence, or joint, with one for both, as in [CLS] a [SEP] b [SEP]. Your own tasks set
        `pair` instead.
      sts_weight: factor of the STS loss relative to the other tasks; the cosine loss is between 0
        and 1, so 25 brings it to the scale of the labels.
    """

    tasks: tuple[str, ...] | None = None
    text: str | None = None
    label: str | None = None
    only: tuple[str, ...] | None = None
    groups: str | None = None
    pair_encoding: PairEncoding = "separate"
    sts_weight: Annotated[float, Bound(0, open=True)] = 1.0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the examples come from.

    Attributes:
      source: where the data comes from; default: cs224n if data_dir is given, files if tasks are
        given, else the preset's.
      data_dir: folder with the tab-separated files of the CS224N default project.
      synthetic_sts: also train STS on the pairs of the demo grammar.
    """

    source: Source = "demo"
    data_dir: str | None = None
    synthetic_sts: bool = False


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """From sentences to vectors, and to the features of a head.

    Attributes:
      base: minilm, a local Hugging Face folder, or a hub id, best pinned to a revision, as in
        bert-base-uncased@COMMIT.
      pooling: sentence vector: that of the [CLS] token (as in the paper) or the mean over tokens.
      pair_features: input of the head for pairs: u, v (as in the paper) or u, v, |u-v|, u·v.
      encoder_dropout: dropout inside the encoder during training (the heads have 0.1).
      max_length: length in tokens at which sentences are cut, and the largest length of a row.
      start_from: a bank or a finished run with adapters and heads for the same tasks, from which
        training starts; BANK:TASK for one task with another name.
      dtype: dtype of matmul inputs; default: bfloat16 on accelerators, float32 on CPU. float32
        means full precision, not TF32.
    """

    base: str = MINILM
    pooling: Pooling = "mean"
    pair_features: PairFeatures = "interaction"
    encoder_dropout: Annotated[float, Bound(0, 1), TRAINED] = 0.0
    max_length: Annotated[int, Bound(3)] = 128
    start_from: str | None = None
    dtype: Dtype | None = None


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates.

    Attributes:
      learning_rate: peak learning rate of the encoder's adapter or weights.
      head_learning_rate: peak learning rate of the heads.
      lora_plus_ratio: learning rate of the adapters' B divided by that of A (LoRA+).
      warmup_steps: steps over which the learning rates rise from 0; below 1: a share of all steps.
      schedule: learning rates after the warm-up: constant, or falling linearly to 0.
      weight_decay: weight decay of AdamW.
      clip: largest norm of a group's combined gradient; larger ones are scaled down.
      surgery: how gradients of tasks that share parameters are combined: an aggregator of
        jaxlora.aggregation with its defaults, or none: they are summed and conflicts recorded.
    """

    learning_rate: Annotated[float, Bound(0, open=True), TRAINED] = 1e-3
    head_learning_rate: Annotated[float, Bound(0, open=True)] = 1e-3
    lora_plus_ratio: Annotated[float, Bound(0, open=True), ADAPTED] = 1.0
    warmup_steps: Annotated[float, Bound(0)] = 50
    schedule: Schedule = "linear"
    weight_decay: Annotated[float, Bound(0)] = 0.01
    clip: Annotated[float, Bound(0, open=True)] = 1.0
    surgery: Annotated[Surgery, TRAINED] = "pcgrad"


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long a group is trained, on what batches.

    Attributes:
      batch_size: examples of each task in a step.
      epochs: passes over the group's largest training set; default for your own tables: at least
        4, and as many as give 300 steps.
      max_steps: train a group for at most this many steps; the schedule also ends there.
      eval_every: steps between evaluations and checkpoints; default: four times an epoch, for
        your own tables 24 times in all.
      patience: stop a group after this many evaluations without a better score; 0: never.
      seed: seed of all random numbers.
    """

    batch_size: Annotated[int, Bound(1)] = 16
    epochs: Annotated[int, Bound(1)] = 3
    max_steps: Annotated[int | None, Bound(1)] = None
    eval_every: Annotated[int | None, Bound(1)] = None
    patience: Annotated[int, Bound(0)] = 0
    seed: Annotated[int, Bound(0, 2**31)] = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sections:
    """Settings in sections. Their names are unique, so flags need no prefix for the section.

    Attributes:
      data: where the examples come from.
      model: from sentences to vectors.
      lora: the adapters; if only the rank is given, alpha equals it.
      optimizer: how gradients become updates.
      loop: how long, on what batches.
    """

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    lora: Annotated[LoraConfig, ADAPTED] = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loop: LoopConfig = LoopConfig()

    def change(self: S, **fields: Any) -> S:
        """Return a copy in which some settings have other values.

        Raises:
          ConfigError: if a setting does not exist, or a value is out of bounds.

        >>> Sections().change(rank=4, epochs=2).lora.rank
        4
        """
        places, changed = flat_names(type(self)), defaultdict[str, dict[str, Any]](dict)
        for name, value in fields.items():
            if name not in places:
                raise ConfigError(name, f"no such setting; there are {', '.join(places)}")
            section, field = places[name]
            changed[section][field] = value
        sections = {s: dataclasses.replace(getattr(self, s), **v) for s, v in changed.items()}
        return dataclasses.replace(self, **sections)

    def flat(self) -> dict[str, Any]:
        """Return the settings of all sections by name."""
        places = flat_names(type(self))
        return {name: getattr(getattr(self, s), field) for name, (s, field) in places.items()}


def flat_names(cls: type[Sections]) -> dict[str, tuple[str, str]]:
    """Return the section and the field of each setting, by the name of the setting."""
    kinds = {name: kind for name, kind in typing.get_type_hints(cls).items() if _is_section(kind)}
    return {
        RENAMED.get(field.name, field.name): (section, field.name)
        for section, kind in kinds.items()
        for field in dataclasses.fields(kind)
    }


def check_values(section: Any) -> None:
    """Check the types, choices and bounds of a section's settings.

    Raises:
      ConfigError: if one cannot be used; the error names the first one.
    """
    for name, hint in typing.get_type_hints(type(section), include_extras=True).items():
        value = getattr(section, name)
        try:
            build(hint, os.fspath(value) if isinstance(value, os.PathLike) else value)
        except ValueError as error:
            raise ConfigError(RENAMED.get(name, name), str(error)) from None
    bounds.check(section)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Sections):
    """The complete settings of a run, as stored in `config.json`.

    Attributes:
      variant: one of the paper's, or own.
      preset: the preset that gave all settings that were not chosen explicitly.
      tasks: the tasks to train.
      groups: which tasks share a trainable encoder tree.
    """

    variant: VariantName
    preset: PresetName
    tasks: tuple[TaskSpec, ...]
    groups: Groups

    def __post_init__(self) -> None:
        for field in dataclasses.fields(Sections):
            check_values(getattr(self, field.name))
        for spec in self.tasks:
            check_name(spec.task.name, "tasks")
        grouped = [name for group in self.groups for name in group]
        if sorted(grouped) != sorted(self.named) or () in self.groups:
            raise ConfigError("groups", "not a partition of the tasks")
        if self.adapt == "lora" and not self.lora.target_modules:
            raise ConfigError("target_modules", "name at least one module, such as query")
        self._check_source()

    def _check_source(self) -> None:
        source, folder = self.data.source, self.data.data_dir
        if source == "cs224n" and folder is None:
            raise ConfigError(
                "data_dir",
                "missing; the cs224n data needs the folder with ids-sst-train.csv, "
                "quora-train.csv, sts-train.csv, …; without data try `preset='demo'`",
            )
        if (source == "files") != any(spec.table for spec in self.tasks):
            raise ConfigError("tasks", "needs `source='files'`, which in turn needs `tasks`")
        if self.data.synthetic_sts and not (
            source in ("cs224n", "official") and "sts" in self.named
        ):
            raise ConfigError(
                "synthetic_sts",
                "adds the demo grammar's pairs to real STS pairs; it goes with `source='cs224n'` "
                "or official, and not with `only` that leaves sts out",
            )
        if source != "cs224n" and folder is not None:
            raise ConfigError(
                "data_dir", f"goes with `source='cs224n'`, not with `source='{source}'`"
            )

    @property
    def dtype(self) -> Dtype:
        """Dtype of matmul inputs.

        Raises:
          ConfigError: if none is set; `presets.make_settings` chooses one for the device.
        """
        if self.model.dtype is None:
            raise ConfigError("dtype", "is left open; name float32 or bfloat16")
        return self.model.dtype

    @property
    def adapt(self) -> Adapt:
        """Which part of the encoder is trained."""
        return sharing.variant(self.variant).adapt

    @property
    def adaptation(self) -> Adaptation:
        """How the encoder is adapted."""
        return make_adaptation(self.adapt, self.lora)

    @property
    def cohorts(self) -> tuple[Groups, ...]:
        """Which groups train in one step."""
        return cohorts(self.groups, self.adaptation)

    @property
    def title(self) -> str:
        """Title of plots; it says if the data is made up."""
        return f"{self.variant}, {MADE_UP}" if self.data.source == "demo" else self.variant

    @property
    def named(self) -> dict[str, Task]:
        """The tasks by name."""
        return {spec.task.name: spec.task for spec in self.tasks}

    def place(self, task: str) -> Location:
        """Return where the data source finds the rows of a task."""
        if self.data.source == "files":
            return next(spec.table for spec in self.tasks if spec.task.name == task)
        return None if self.data.data_dir is None else Path(self.data.data_dir)

    def of_group(self, names: tuple[str, ...]) -> Settings:
        """Return the settings of a group, in which its tasks' own settings take precedence.

        Raises:
          ConfigError: if two tasks of the group set different values.
        """
        own: dict[str, Any] = {}
        for spec in self.tasks:
            for key, value in spec.own if spec.task.name in names else ():
                if own.setdefault(key, value) != value:
                    raise ConfigError(
                        "tasks",
                        f"{', '.join(names)} are trained together and must agree on {key} "
                        f"({own[key]} or {value}); change it, or `groups`",
                    )
        return self.change(**own)

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain JSON values, without sections."""
        top = {name: getattr(self, name) for name in _TOP}
        specs = [dataclasses.asdict(spec) for spec in self.tasks]
        values = {**top, "adapt": self.adapt, "tasks": specs, **self.flat()}
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain

    @classmethod
    def from_json(cls, plain: Any) -> Settings:
        """Build settings from JSON values, the inverse of `to_json`.

        Raises:
          UserError: if a field is unknown, or a value is invalid.
        """
        try:
            values = dict(_with_quoting(plain))
            adapt = values.pop("adapt", None)
            nested: dict[str, Any] = {name: values.pop(name) for name in _TOP if name in values}
            for name, (section, field) in flat_names(cls).items():
                nested.setdefault(section, {})
                if name in values:
                    nested[section][field] = values.pop(name)
            settings = build(cls, {**nested, **values})
            if settings.adapt != adapt:
                raise ConfigError("adapt", f"not that of {settings.variant}", adapt)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"the settings were changed, or another version of jaxlora wrote them ({error})"
            ) from error
        return settings


_TOP = ("variant", "preset", "tasks", "groups")


def _with_quoting(plain: Any) -> Any:
    """Add the field `quoting` to tables that were written by versions without it."""
    if not isinstance(plain, Mapping) or not isinstance(plain.get("tasks"), list):
        return plain
    tasks = [
        task | {"table": {"quoting": None} | task["table"]}
        if isinstance(task, dict) and isinstance(task.get("table"), dict)
        else task
        for task in plain["tasks"]
    ]
    return {**plain, "tasks": tasks}
