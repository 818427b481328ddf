"""What a run is asked to do: flags, presets, and the settings they resolve to."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax

from jaxlora.data.sources import Location
from jaxlora.data.task_files import TaskSpec, check_name, made_up, paper_specs, read_tasks
from jaxlora.formats import huggingface
from jaxlora.lora import ALL_TARGETS, PAPER_TARGETS, LoraConfig
from jaxlora.tasks.sharing import Adapt, Groups, Variant, groups_like, parse_groups, variant
from jaxlora.tasks.task import MADE_UP, Task
from jaxlora.utils.errors import UserError
from jaxlora.utils.schema import build

VariantName = Literal[
    "baseline1", "baseline2", "baseline3", "baseline4", "lora1", "lora2", "lora3", "lora4"
]
PresetName = Literal["demo", "cs224n", "paper"]
Source = Literal["demo", "cs224n", "official", "files"]
Pooling = Literal["cls", "mean"]
PairFeatures = Literal["concat", "interaction"]
Schedule = Literal["constant", "linear"]
Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Flags:
    """Train one of the paper's variants and compare it with the paper's figures.

    Flags that are left out take the preset's value (shown by the first lines of a run).

    Attributes:
      variant: baseline1 (frozen BERT), baseline2–4 (full fine-tuning), lora1–4 (adapters); who
        shares what, and the STS loss, stand in the README's table.
      preset: demo: MiniLM and built-in made-up data; cs224n: settings that train well on real data
        (needs --data-dir); paper: bert-base-uncased and the paper's settings, as far as it states
        them (docs/paper.md lists what is guessed).
      data_dir: folder with the tab-separated files of the CS224N default project.
      source: where the data comes from; cs224n if --data-dir is given, files if --tasks is, else
        the preset's.
      tasks: tasks of your own instead of the paper's: TOML files, and values such as
        topic.epochs=3.
      only: train these of the tasks and leave the others out.
      base: minilm, a local Hugging Face folder, or a hub id, best pinned to a revision, as in
        bert-base-uncased@COMMIT.
      base_sha256: refuse the base if its weights have another checksum; the config.json of a run
        says which they have.
      groups: which tasks share a trainable encoder tree, e.g. "sst|para,sts"; default: the
        variant's.
      pooling: sentence vector: the [CLS] token's (the paper's) or the mean over the tokens.
      pair_features: what a pair's head sees: u, v (the paper's) or u, v, |u-v|, u·v.
      rank: rank of the adapters.
      alpha: numerator of the adapters' scale alpha / rank; default: the rank.
      target_modules: Dense layers with an adapter: BERT's names, which mean the same layers in
        its relatives, or the base's own by PEFT's names.
      rank_pattern: other ranks for some modules, e.g. query 4 intermediate.dense 8.
      alpha_pattern: other alphas, likewise.
      rslora: scale the adapters by alpha / √rank instead.
      lora_dropout: dropout of the adapters' input.
      lora_plus_ratio: learning rate of the adapters' B over that of A (LoRA+).
      learning_rate: of the encoder's adapter or weights.
      head_learning_rate: of the heads.
      encoder_dropout: dropout inside the encoder while it is adapted (the heads have 0.1).
      warmup_steps: steps over which the learning rates rise from 0.
      schedule: of the learning rates after the warm-up.
      weight_decay: AdamW's.
      clip: largest norm of a group's combined gradient; larger ones are scaled down.
      surgery: how the gradients of tasks that share are combined: by PCGrad, or only summed.
      sts_weight: factor of the STS loss beside the other tasks'; the cosine loss lives on 0–1, so
        25 brings it to the scale of the labels.
      batch_size: examples of each task in a step.
      epochs: passes over the group's largest training set.
      max_steps: train a group for so many steps at the most; the schedule ends there, too.
      eval_every: steps between evaluations and checkpoints; default: four times an epoch.
      patience: stop a group after so many evaluations without a better score; 0: never.
      max_length: tokens a sentence is cut to, and the longest row.
      synthetic_sts: train STS on the demo grammar's pairs, too.
      seed: of everything random.
      dtype: of matmul inputs; default: bfloat16 on accelerators, float32 on CPU. float32 is
        computed as such, not as TF32.
      out: folder of the run; default: runs/<variant>.
      resume: go on with the run in --out, if there is one.
      predict_test: write predictions for the test sets, too.
      strict: refuse tables with blank texts, instead of leaving those rows out.
      mesh: devices: "data=4,fsdp=2" splits rows over all eight and the encoder's trees in two;
        auto splits rows over all there are.
      skip_nonfinite: leave steps out whose loss is not finite, and count them.
      coordinator: host:port of the first of many processes, where no launcher says it.
      processes: how many there are.
      process: which one this is, from 0; default: a pod's number in an Indexed Job, or 0.
    """

    variant: VariantName
    preset: PresetName = "demo"
    data_dir: Path | None = None
    source: Source | None = None
    tasks: tuple[str, ...] | None = None
    only: tuple[str, ...] | None = None
    base: str | None = None
    base_sha256: str | None = None
    groups: str | None = None
    pooling: Pooling | None = None
    pair_features: PairFeatures | None = None
    rank: int | None = None
    alpha: float | None = None
    target_modules: tuple[str, ...] | None = None
    rank_pattern: tuple[tuple[str, int], ...] | None = None
    alpha_pattern: tuple[tuple[str, float], ...] | None = None
    rslora: bool = False
    lora_dropout: float | None = None
    lora_plus_ratio: float | None = None
    learning_rate: float | None = None
    head_learning_rate: float | None = None
    encoder_dropout: float | None = None
    warmup_steps: int | None = None
    schedule: Schedule | None = None
    weight_decay: float | None = None
    clip: float = 1.0
    surgery: Literal["pcgrad", "none"] | None = None
    sts_weight: float | None = None
    batch_size: int | None = None
    epochs: int | None = None
    max_steps: int | None = None
    eval_every: int | None = None
    patience: int = 0
    max_length: int | None = None
    synthetic_sts: bool = False
    seed: int = 0
    dtype: Dtype | None = None
    out: Path | None = None
    resume: bool = False
    predict_test: bool = True
    strict: bool = False
    mesh: str = "auto"
    skip_nonfinite: bool = False
    coordinator: str | None = None
    processes: int = 1
    process: int | None = None


_TUNED: dict[str, Any] = {
    "base": "minilm",
    "pooling": "mean",
    "pair_features": "interaction",
    "rank": 15,
    "target_modules": PAPER_TARGETS,
    "learning_rate": {"frozen": 1e-3, "lora": 1e-3, "full": 5e-5},
    "head_learning_rate": 1e-3,
    "encoder_dropout": 0.0,
    "warmup_steps": 50,
    "schedule": "linear",
    "weight_decay": 0.01,
    "surgery": "pcgrad",
    "sts_weight": {"mse": 1.0, "cosine": 25.0},
    "batch_size": 16,
    "max_length": 128,
}

PRESETS: dict[str, dict[str, Any]] = {
    "demo": _TUNED | {"source": "demo", "epochs": 3, "max_length": 64},
    # A little dropout, and narrow adapters everywhere: what dev liked best (docs/tuning.md).
    "cs224n": _TUNED
    | {"source": "cs224n", "epochs": 2, "encoder_dropout": 0.05}
    | {"rank": 8, "target_modules": ALL_TARGETS},
    "paper": {
        "source": "official",
        "base": "bert-base-uncased",
        "pooling": "cls",
        "pair_features": "concat",
        "rank": 15,
        "target_modules": PAPER_TARGETS,
        "encoder_dropout": 0.1,
        "warmup_steps": 0,
        "schedule": "constant",
        "weight_decay": 0.0,
        "surgery": "pcgrad",
        "sts_weight": 1.0,
        "batch_size": 8,
        "epochs": 10,
        "max_length": 128,
    },
}

PAPER_GUESSES = (
    "source", "encoder_dropout", "warmup_steps", "schedule", "weight_decay", "sts_weight",
    "epochs", "eval_every", "patience", "clip", "max_length", "dtype",
)  # fmt: skip
"""What the preset `paper` had to guess, since the paper does not state it, as far as we read it.

All of GLUE's Quora pairs; dropout 0.1 in the encoder (the heads have 0.1 as well); no warm-up, a
constant rate, no weight decay, the STS loss not weighted; 10 epochs, evaluated four times in each,
without early stopping; the encoder's gradient clipped at norm 1.0; 128 tokens; bfloat16 matmuls on
accelerators. No flag, but guesses too: of each group the checkpoint that was best on dev is kept,
and baseline1's frozen encoder has no dropout. docs/paper.md explains each.
"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """A run's settings, nothing left open; `config.json` holds them. Fields as in `Flags`."""

    variant: VariantName
    adapt: Adapt
    groups: Groups
    tasks: tuple[TaskSpec, ...]
    preset: PresetName
    source: Source
    data_dir: str | None
    base: str
    pooling: Pooling
    pair_features: PairFeatures
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    rank_pattern: tuple[tuple[str, int], ...]
    alpha_pattern: tuple[tuple[str, float], ...]
    rslora: bool
    lora_dropout: float
    lora_plus_ratio: float
    learning_rate: float
    head_learning_rate: float
    encoder_dropout: float
    warmup_steps: int
    schedule: Schedule
    weight_decay: float
    clip: float
    surgery: str
    batch_size: int
    epochs: int
    max_steps: int | None
    eval_every: int | None
    patience: int
    max_length: int
    synthetic_sts: bool
    seed: int
    dtype: Dtype

    @property
    def lora(self) -> LoraConfig:
        """The adapters' configuration."""
        return LoraConfig(
            self.rank, self.alpha, self.target_modules, self.rslora,
            self.rank_pattern, self.alpha_pattern, self.lora_dropout,
        )  # fmt: skip

    @property
    def title(self) -> str:
        """What to call the run above a plot; made-up data is named."""
        return f"{self.variant}, {MADE_UP}" if self.source == "demo" else self.variant

    @property
    def named(self) -> dict[str, Task]:
        """The tasks by name."""
        return {d.task.name: d.task for d in self.tasks}

    def place(self, task: str) -> Location:
        """Where a task's source finds its rows."""
        if self.source == "files":
            return next(d.table for d in self.tasks if d.task.name == task)
        return None if self.data_dir is None else Path(self.data_dir)

    def of_group(self, names: tuple[str, ...]) -> Settings:
        """The settings of a group: what its tasks bring along comes first.

        Raises:
          UserError: if two tasks of the group want different values.
        """
        own: dict[str, Any] = {}
        for description in self.tasks:
            for key, value in description.own if description.task.name in names else ():
                if own.setdefault(key, value) != value:
                    raise UserError(
                        f"--tasks: {', '.join(names)} are trained together and must agree on "
                        f"{key} ({own[key]} or {value}); change it, or --groups"
                    )
        return dataclasses.replace(self, **own)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    @classmethod
    def from_json(cls, plain: Any) -> Settings:
        """The inverse of `to_json`.

        Raises:
          UserError: if the fields are not ours, or a value cannot be.

        >>> settings = resolve(Flags("lora3"))
        >>> Settings.from_json(settings.to_json()) == settings
        True
        """
        try:
            settings = build(cls, _with_quoting(plain))
            _check(settings)
            _check_groups(settings)
        except ValueError as error:
            raise UserError(
                f"the settings were changed, or another version of jaxlora wrote them ({error})"
            ) from error
        return settings


def _with_quoting(plain: Any) -> Any:
    """Settings as they are now: the tables of earlier runs do not say what their quotes mean."""
    if not isinstance(plain, dict) or not isinstance(plain.get("tasks"), list):
        return plain
    tasks = [
        task | {"table": {"quoting": None} | task["table"]}
        if isinstance(task, dict) and isinstance(task.get("table"), dict)
        else task
        for task in plain["tasks"]
    ]
    return plain | {"tasks": tasks}


def resolve(flags: Flags) -> Settings:
    """Fill what the flags leave open from the preset and the variant, and check it all.

    Raises:
      UserError: for values out of range or flags that do not fit each other, naming the flag.

    >>> resolve(Flags("lora3")).named["sts"].loss
    'squared_error'
    """
    chosen = variant(flags.variant)
    given = {k: v for k, v in dataclasses.asdict(flags).items() if v is not None}
    values = _paper_rates(chosen) | PRESETS[flags.preset] | given
    for name, key in (("learning_rate", chosen.adapt), ("sts_weight", chosen.sts_loss)):
        if isinstance(values[name], dict):
            values[name] = values[name][key]
    if flags.source is None:
        if flags.data_dir is not None:
            values["source"] = "cs224n"
        if flags.tasks is not None:
            values["source"] = "files"
    values["tasks"] = _tasks(flags, chosen, values["sts_weight"])
    if values["source"] == "demo":
        values["tasks"] = tuple(map(made_up, values["tasks"]))
    names = tuple(d.task.name for d in values["tasks"])
    values["groups"] = (
        groups_like(chosen.groups, names)
        if flags.groups is None
        else parse_groups(flags.groups, names)
    )
    fields = {f.name for f in dataclasses.fields(Settings)}
    defaults: dict[str, Any] = {
        "max_steps": None, "eval_every": None, "alpha": float(values["rank"]),
        "lora_dropout": 0.0, "lora_plus_ratio": 1.0, "rank_pattern": (), "alpha_pattern": (),
    }  # fmt: skip
    settings = Settings(
        **defaults
        | {"dtype": "float32" if jax.default_backend() == "cpu" else "bfloat16"}
        | {k: v for k, v in values.items() if k in fields}
        | {"adapt": chosen.adapt}
        | {"data_dir": None if flags.data_dir is None else str(flags.data_dir.absolute())}
        | {"base": huggingface.absolute(values["base"])}
    )
    _reject_unused(given, settings)
    _check(settings)
    for group in settings.groups:
        _check(settings.of_group(group))
    return settings


def _tasks(flags: Flags, chosen: Variant, sts_weight: float) -> tuple[TaskSpec, ...]:
    known = _described(flags, chosen, sts_weight)
    names = [d.task.name for d in known]
    if flags.only == ():
        raise UserError(f"--only: name at least one of {', '.join(names)}")
    for name in flags.only or ():
        if name not in names:
            raise UserError(f"--only {name}: unknown task; there are {', '.join(names)}")
    return tuple(d for d in known if flags.only is None or d.task.name in flags.only)


def _described(flags: Flags, chosen: Variant, sts_weight: float) -> tuple[TaskSpec, ...]:
    if flags.tasks is None:
        if not 0 < sts_weight < float("inf"):
            raise UserError(f"--sts-weight {sts_weight}: must be above 0")
        return paper_specs(chosen.sts_loss, sts_weight)
    if flags.tasks == ():
        raise UserError("--tasks: name at least one TOML file, or values such as topic.epochs=3")
    if flags.sts_weight is not None:
        raise UserError("--sts-weight is for the paper's tasks; set its weight in --tasks")
    return read_tasks(flags.tasks)


def _paper_rates(chosen: Variant) -> dict[str, Any]:
    return {"learning_rate": chosen.learning_rate, "head_learning_rate": chosen.learning_rate}


_AT_LEAST = {
    "rank": 1, "batch_size": 1, "epochs": 1, "max_steps": 1, "eval_every": 1, "patience": 0,
    "warmup_steps": 0, "max_length": 3, "seed": 0,
}  # fmt: skip
_POSITIVE = ("alpha", "learning_rate", "head_learning_rate", "clip", "lora_plus_ratio")
_MAX_SEED = 2**31 - 1
# Flags that mean nothing to some variants.
_ONLY_FOR = {
    "rank": ("lora",),
    "alpha": ("lora",),
    "target_modules": ("lora",),
    "rank_pattern": ("lora",),
    "alpha_pattern": ("lora",),
    "rslora": ("lora",),
    "lora_dropout": ("lora",),
    "lora_plus_ratio": ("lora",),
    "learning_rate": ("lora", "full"),
    "encoder_dropout": ("lora", "full"),
    "surgery": ("lora", "full"),
}


def _reject_unused(given: dict[str, Any], settings: Settings) -> None:
    for name, adapts in _ONLY_FOR.items():
        if given.get(name, False) is not False and settings.adapt not in adapts:
            raise UserError(
                f"{flag(name)} means nothing to {settings.variant}: its encoder is not "
                f"adapted that way; leave it out"
            )
    if "surgery" in given and all(len(group) == 1 for group in settings.groups):
        raise UserError("--surgery means nothing where each task is trained alone; leave it out")


def _check(settings: Settings) -> None:
    _check_numbers(settings)
    if settings.seed > _MAX_SEED:
        raise UserError(f"--seed {settings.seed}: must be at most {_MAX_SEED}")
    if not 0 <= settings.weight_decay < float("inf"):
        raise UserError(f"--weight-decay {settings.weight_decay}: must be a number from 0")
    if settings.adapt == "lora" and not settings.target_modules:
        raise UserError("--target-modules: name at least one module, such as query")
    if settings.source == "cs224n" and settings.data_dir is None:
        raise UserError(
            "--data-dir is missing: the cs224n data needs the folder with ids-sst-train.csv, "
            "quora-train.csv, sts-train.csv, …; without data try --preset=demo"
        )
    if (settings.source == "files") != any(d.table for d in settings.tasks):
        raise UserError("--tasks goes with --source=files, and that with --tasks")
    if settings.synthetic_sts and (
        settings.source not in ("cs224n", "official") or "sts" not in settings.named
    ):
        raise UserError(
            "--synthetic-sts adds the demo grammar's pairs to real STS pairs; it goes with "
            "--source=cs224n or official, and not with --only that leaves sts out"
        )
    if settings.source != "cs224n" and settings.data_dir is not None:
        raise UserError(
            f"--data-dir goes with --source=cs224n, not with --source={settings.source}"
        )


def _check_groups(settings: Settings) -> None:
    for description in settings.tasks:
        check_name(description.task.name, "tasks")
    grouped = [name for group in settings.groups for name in group]
    if sorted(grouped) != sorted(d.task.name for d in settings.tasks) or () in settings.groups:
        raise UserError("the groups are not a partition of the tasks")


def _check_numbers(settings: Settings) -> None:
    for name, low in _AT_LEAST.items():
        value = getattr(settings, name)
        if value is not None and value < low:
            raise UserError(f"{flag(name)} {value}: must be at least {low}")
    for name in _POSITIVE:
        if not 0 < getattr(settings, name) < float("inf"):
            raise UserError(f"{flag(name)} {getattr(settings, name)}: must be above 0")
    for name in ("encoder_dropout", "lora_dropout"):
        if not 0 <= getattr(settings, name) < 1:
            raise UserError(f"{flag(name)} {getattr(settings, name)}: must be from 0 to below 1")
    for pattern in ("rank_pattern", "alpha_pattern"):
        for module, value in getattr(settings, pattern):
            if not 0 < value < float("inf"):
                raise UserError(f"{flag(pattern)} {module} {value}: must be above 0")


def flag(name: str) -> str:
    """The flag of a field: `max_steps` → `--max-steps`."""
    return "--" + name.replace("_", "-")
