"""The settings of a run: small dataclasses, each field with its meaning, its bounds, its default.

A new setting is one line and one sentence here: `jaxlora train` makes its flag from them.
"""

from __future__ import annotations

import dataclasses
import json
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
Pooling = Literal["cls", "mean"]
PairFeatures = Literal["concat", "interaction"]
Schedule = Literal["constant", "linear"]
if TYPE_CHECKING:
    Surgery = str
else:
    Surgery = Literal[("none", *MEMBERS)]
Dtype = Literal["float32", "bfloat16"]

S = TypeVar("S", bound="Sections")


# Settings that have another name than the field of their section.
RENAMED = {"dropout": "lora_dropout"}


class OnlyFor(NamedTuple):
    """The adaptations to which a setting means something."""

    adapts: tuple[Adapt, ...]


TRAINED = OnlyFor(("lora", "full"))
ADAPTED = OnlyFor(("lora",))


@dataclasses.dataclass(frozen=True)
class TaskChoice:
    """Which tasks are trained, and which of them together.

    Attributes:
      tasks: tasks of your own instead of the paper's: TOML files or tables of data, and values
        such as topic.epochs=3.
      text: the column of text in those tables, or two of a pair, separated by a comma.
      label: the column of labels in those tables, or several of 0 and 1, separated by commas.
      only: train these of the tasks and leave the others out.
      groups: which tasks share a trainable encoder tree, e.g. "sst|para,sts"; default: the
        variant's.
      pair_encoding: how pairs of the paper's tasks are encoded: separate, a vector for each
        sentence, or joint, one for both, read together as in [CLS] a [SEP] b [SEP]. A task of your
        own has `pair` for it.
      sts_weight: factor of the STS loss beside the other tasks'; the cosine loss is between 0 and
        1, so 25 brings it to the scale of the labels.
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
      source: where the data comes from; default: cs224n if data_dir is given, files if tasks is,
        else the preset's.
      data_dir: folder with the tab-separated files of the CS224N default project.
      synthetic_sts: train STS on the demo grammar's pairs, too.
    """

    source: Source = "demo"
    data_dir: str | None = None
    synthetic_sts: bool = False


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """From sentences to vectors and to a head's features.

    Attributes:
      base: minilm, a local Hugging Face folder, or a hub id, best pinned to a revision, as in
        bert-base-uncased@COMMIT.
      pooling: sentence vector: the [CLS] token's (the paper's) or the mean over the tokens.
      pair_features: what a pair's head sees: u, v (the paper's) or u, v, |u-v|, u·v.
      encoder_dropout: dropout inside the encoder while it is adapted (the heads have 0.1).
      max_length: tokens a sentence is cut to, and the longest row.
      start_from: a bank or a finished run whose adapters and heads of the same tasks training goes
        on from; for one task of another name BANK:TASK.
      dtype: of matmul inputs; default: bfloat16 on accelerators, float32 on CPU. float32 is
        computed as such, not as TF32.
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
      learning_rate: of the encoder's adapter or weights.
      head_learning_rate: of the heads.
      lora_plus_ratio: learning rate of the adapters' B over that of A (LoRA+).
      warmup_steps: steps over which the learning rates rise from 0; below 1: that share of all.
      schedule: of the learning rates after the warm-up.
      weight_decay: AdamW's.
      clip: largest norm of a group's combined gradient; larger ones are scaled down.
      surgery: how the gradients of tasks that share are combined: by a gradient aggregator of
        jaxlora.aggregation with its defaults; none: summed, and their conflicts recorded.
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
      epochs: passes over the group's largest training set.
      max_steps: train a group for at most this many steps; the schedule ends there, too.
      eval_every: steps between evaluations and checkpoints; default: four times an epoch.
      patience: stop a group after this many evaluations without a better score; 0: never.
      seed: of everything random.
    """

    batch_size: Annotated[int, Bound(1)] = 16
    epochs: Annotated[int, Bound(1)] = 3
    max_steps: Annotated[int | None, Bound(1)] = None
    eval_every: Annotated[int | None, Bound(1)] = None
    patience: Annotated[int, Bound(0)] = 0
    seed: Annotated[int, Bound(0, 2**31)] = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sections:
    """Settings in sections; each name is unique, so that a flag needs no section's name.

    Attributes:
      data: where the examples come from.
      model: from sentences to vectors.
      lora: the adapters; where only their rank is asked for, alpha is the rank.
      optimizer: how gradients become updates.
      loop: how long, on what batches.
    """

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    lora: Annotated[LoraConfig, ADAPTED] = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loop: LoopConfig = LoopConfig()

    def change(self: S, **fields: Any) -> S:
        """Return the same with other values of some settings.

        Raises:
          ConfigError: if there is no such setting, or a value is out of bounds.

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
        """Return all settings in the sections by name."""
        places = flat_names(type(self))
        return {name: getattr(getattr(self, s), field) for name, (s, field) in places.items()}


def flat_names(cls: type[Sections]) -> dict[str, tuple[str, str]]:
    """Return where each setting is: its name → its section, and the field there."""
    kinds = {name: kind for name, kind in typing.get_type_hints(cls).items() if _is_section(kind)}
    return {
        RENAMED.get(field.name, field.name): (section, field.name)
        for section, kind in kinds.items()
        for field in dataclasses.fields(kind)
    }


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Sections):
    """The settings of a run, with nothing left open; `config.json` holds them.

    Attributes:
      variant: one of the paper's, or own.
      preset: where settings come from that nobody asked for.
      tasks: what is trained.
      groups: which tasks share a trainable encoder tree.
    """

    variant: VariantName
    preset: PresetName
    tasks: tuple[TaskSpec, ...]
    groups: Groups

    def __post_init__(self) -> None:
        for field in dataclasses.fields(Sections):
            bounds.check(getattr(self, field.name))
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
            raise ConfigError("tasks", "goes with `source='files'`, and that with `tasks`")
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
          ConfigError: if it was left open; `presets.make_settings` chooses one for the device.
        """
        if self.model.dtype is None:
            raise ConfigError("dtype", "is left open; name float32 or bfloat16")
        return self.model.dtype

    @property
    def adapt(self) -> Adapt:
        """What is trained of the encoder."""
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
        """What to call the run above a plot; made-up data is named."""
        return f"{self.variant}, {MADE_UP}" if self.data.source == "demo" else self.variant

    @property
    def named(self) -> dict[str, Task]:
        """The tasks by name."""
        return {spec.task.name: spec.task for spec in self.tasks}

    def place(self, task: str) -> Location:
        """Return where a task's source finds its rows."""
        if self.data.source == "files":
            return next(spec.table for spec in self.tasks if spec.task.name == task)
        return None if self.data.data_dir is None else Path(self.data.data_dir)

    def of_group(self, names: tuple[str, ...]) -> Settings:
        """Return the settings of a group: what its tasks bring along comes first.

        Raises:
          ConfigError: if two tasks of the group want different values.
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
        """Return plain JSON values, without sections."""
        top = {name: getattr(self, name) for name in _TOP}
        specs = [dataclasses.asdict(spec) for spec in self.tasks]
        values = {**top, "adapt": self.adapt, "tasks": specs, **self.flat()}
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain

    @classmethod
    def from_json(cls, plain: Any) -> Settings:
        """Read what `to_json` gives.

        Raises:
          UserError: if the fields are not ours, or a value cannot be.
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
    """Return settings as they are now: tables of earlier runs do not say what their quotes mean."""
    if not isinstance(plain, Mapping) or not isinstance(plain.get("tasks"), list):
        return plain
    tasks = [
        task | {"table": {"quoting": None} | task["table"]}
        if isinstance(task, dict) and isinstance(task.get("table"), dict)
        else task
        for task in plain["tasks"]
    ]
    return {**plain, "tasks": tasks}
