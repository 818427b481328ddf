"""Presets, and how explicit settings and a preset become the settings of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxlora.data.tables import count_training_rows
from jaxlora.data.task_files import COSINE_WEIGHT, TaskSpec, made_up, paper_specs, read_tasks
from jaxlora.formats import huggingface
from jaxlora.lora import ALL_TARGETS, LoraConfig
from jaxlora.tasks import sharing
from jaxlora.tasks.sharing import Variant, groups_like, parse_groups
from jaxlora.training.config import (
    DataConfig,
    LoopConfig,
    ModelConfig,
    OnlyFor,
    OptimizerConfig,
    PresetName,
    Sections,
    Settings,
    TaskChoice,
    VariantName,
    check_values,
    flat_names,
)
from jaxlora.utils import bounds, files
from jaxlora.utils.errors import ConfigError

PAPER_GUESSES = (
    "source", "encoder_dropout", "warmup_steps", "schedule", "weight_decay", "sts_weight",
    "epochs", "eval_every", "patience", "clip", "max_length", "dtype",
)  # fmt: skip
"""Settings of the preset `paper` that are guesses, because we found no statement in the paper.

All of GLUE's Quora pairs; dropout 0.1 in the encoder (the heads have 0.1 as well); no warm-up, a
constant learning rate, no weight decay, no weight on the STS loss; 10 epochs with four evaluations
each, without early stopping; the encoder's gradient clipped at norm 1.0; 128 tokens; bfloat16
matmuls on accelerators. Two guesses are not settings: each group keeps the checkpoint that was
best on dev, and the frozen encoder of baseline1 has no dropout. docs/paper.md explains each.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset(Sections):
    """Default settings of a run, which explicit settings override.

    Attributes:
      choice: the tasks.
    """

    choice: TaskChoice = TaskChoice()


def demo(chosen: Variant) -> Preset:
    """Return settings for MiniLM on built-in, made-up data."""
    return Preset(
        data=DataConfig("demo"),
        model=ModelConfig(max_length=64),
        optimizer=_tuned_rates(chosen),
        loop=LoopConfig(epochs=3),
        choice=_tuned_weights(chosen),
    )


def cs224n(chosen: Variant) -> Preset:
    """Return settings that train well on the CS224N data, see docs/tuning.md."""
    return Preset(
        data=DataConfig("cs224n"),
        model=ModelConfig(encoder_dropout=0.05),
        lora=LoraConfig(8, 8.0, ALL_TARGETS),
        optimizer=_tuned_rates(chosen),
        loop=LoopConfig(epochs=2),
        choice=_tuned_weights(chosen),
    )


def paper(chosen: Variant) -> Preset:
    """Return the paper's settings; those that it does not state are in `PAPER_GUESSES`."""
    return Preset(
        data=DataConfig("official"),
        model=ModelConfig("bert-base-uncased", "cls", "concat", encoder_dropout=0.1),
        optimizer=OptimizerConfig(
            learning_rate=chosen.learning_rate,
            head_learning_rate=chosen.learning_rate,
            warmup_steps=0,
            schedule="constant",
            weight_decay=0.0,
        ),
        loop=LoopConfig(batch_size=8, epochs=10),
    )


def own(chosen: Variant) -> Preset:
    """Return general settings for your own tables, including small ones, see docs/own-tasks.md.

    The numbers of epochs and of evaluations depend on the number of rows, see `pace`.
    """
    return Preset(
        data=DataConfig("files"),
        model=ModelConfig(encoder_dropout=0.05),
        lora=LoraConfig(8, 8.0, ALL_TARGETS),
        optimizer=dataclasses.replace(_tuned_rates(chosen), warmup_steps=0.1),
        loop=LoopConfig(patience=EVALUATIONS // 3),
        choice=_tuned_weights(chosen),
    )


PRESETS: Mapping[PresetName, Callable[[Variant], Preset]] = {
    "demo": demo,
    "cs224n": cs224n,
    "paper": paper,
    "own": own,
}
FEWEST_STEPS, FEWEST_EPOCHS, EVALUATIONS = 300, 4, 24


def pace(
    rows: int, batch_size: int, epochs: int | None = None, max_steps: int | None = None
) -> dict[str, int]:
    """Return `epochs` and `eval_every` for a number of training rows.

    The result gives at least `FEWEST_EPOCHS` epochs, at least `FEWEST_STEPS` steps, and
    `EVALUATIONS` evaluations.

    Args:
      rows: number of training rows.
      batch_size: rows per step.
      epochs, max_steps: values that are given already, if any.

    >>> pace(80, 16), pace(4_000, 16)
    ({'epochs': 60, 'eval_every': 13}, {'epochs': 4, 'eval_every': 42})
    """
    per_epoch = -(-rows // batch_size)
    epochs = epochs or max(FEWEST_EPOCHS, -(-FEWEST_STEPS // per_epoch))
    steps = min(epochs * per_epoch, max_steps or epochs * per_epoch)
    return {"epochs": epochs, "eval_every": -(-steps // EVALUATIONS)}


def _pace_group(
    specs: tuple[TaskSpec, ...], group: tuple[str, ...], loop: LoopConfig, asked: Mapping[str, Any]
) -> tuple[TaskSpec, ...]:
    """Set the `pace` for the largest table of a group, except where settings are explicit."""
    mine = [spec for spec in specs if spec.task.name in group]
    tables = [(spec.table, spec.task) for spec in mine if spec.table is not None]
    if len(tables) < len(mine):
        return specs
    settled = {**asked, **{key: value for spec in mine for key, value in spec.own}}
    rows = max(count_training_rows(table, task) for table, task in tables)
    found = pace(rows, loop.batch_size, settled.get("epochs"), loop.max_steps)
    new = tuple((key, value) for key, value in found.items() if key not in settled)
    return tuple(
        dataclasses.replace(spec, own=spec.own + new) if spec in mine else spec for spec in specs
    )


def _tuned_rates(chosen: Variant) -> OptimizerConfig:
    return OptimizerConfig(learning_rate=5e-5 if chosen.adapt == "full" else 1e-3)


def _tuned_weights(chosen: Variant) -> TaskChoice:
    return TaskChoice(sts_weight=COSINE_WEIGHT if chosen.sts_loss == "cosine" else 1.0)


def make_settings(
    variant: VariantName = "own", preset: PresetName | None = None, **asked: Any
) -> Settings:
    """Return the checked settings of a run.

    Args:
      variant: one of the paper's, or own: an adapter for each task.
      preset: gives all settings that are not in `asked`; None: see `usual_preset`.
      asked: explicit settings, by the names of the fields in `config`; None means not given.

    Raises:
      ConfigError: if a value is out of bounds, or settings contradict each other.

    >>> make_settings("lora3", rank=4, epochs=1).lora.alpha
    4.0
    """
    chosen = sharing.variant(variant)
    asked = {field: value for field, value in asked.items() if value is not None}
    preset = preset or usual_preset(variant, "tasks" in asked)
    if preset not in PRESETS:
        raise ConfigError("preset", f"is none of {', '.join(PRESETS)}", preset)
    start = PRESETS[preset](chosen).change(**_implied(asked) | asked)
    check_values(start.choice)
    specs = _choose_tasks(start.choice, chosen, asked)
    if start.data.source == "demo":
        specs = tuple(map(made_up, specs))
    names = tuple(spec.task.name for spec in specs)
    wanted = start.choice.groups
    groups = groups_like(chosen.groups, names) if wanted is None else parse_groups(wanted, names)
    if preset == "own":
        for group in groups:
            specs = _pace_group(specs, group, start.loop, asked)
    settings = Settings(
        variant=variant,
        preset=preset,
        tasks=specs,
        groups=groups,
        **{f.name: getattr(start, f.name) for f in dataclasses.fields(Sections)},
    ).change(**_located(start))
    _reject_unused(asked, settings)
    for group in settings.groups:
        settings.of_group(group)
    return settings


def usual_preset(variant: str, own_tasks: bool) -> PresetName:
    """Return the default preset: own for your own tasks, else demo."""
    return "own" if own_tasks or variant == "own" else "demo"


def _implied(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that follow from explicit ones, unless they are explicit themselves."""
    implied: dict[str, Any] = {}
    if "data_dir" in asked:
        implied["source"] = "cs224n"
    if "tasks" in asked:
        implied["source"] = "files"
    if isinstance(asked.get("rank"), int):
        implied["alpha"] = float(asked["rank"])
    return implied


def _located(start: Sections) -> dict[str, Any]:
    """Resolve the settings that depend on this process: relative paths and the default dtype."""
    folder, origin = start.data.data_dir, start.model.start_from
    default = jax.default_backend() == "cpu"
    return {
        "data_dir": None if folder is None else str(files.local(folder).absolute()),
        "base": huggingface.absolute(start.model.base),
        "start_from": origin and str(files.local(origin).absolute()),
        "dtype": start.model.dtype or ("float32" if default else "bfloat16"),
    }


def _choose_tasks(
    choice: TaskChoice, chosen: Variant, asked: Mapping[str, Any]
) -> tuple[TaskSpec, ...]:
    known = _known_tasks(choice, chosen, asked)
    names = [spec.task.name for spec in known]
    if choice.only == ():
        raise ConfigError("only", f"name at least one of {', '.join(names)}")
    for name in choice.only or ():
        if name not in names:
            raise ConfigError("only", f"unknown task; there are {', '.join(names)}", name)
    kept = tuple(spec for spec in known if choice.only is None or spec.task.name in choice.only)
    return kept if choice.pair_encoding == "separate" else tuple(map(_read_jointly, kept))


def _read_jointly(spec: TaskSpec) -> TaskSpec:
    """Make one of the paper's tasks read its pairs jointly, if it is a task of pairs."""
    if not spec.task.pair:
        return spec
    try:
        task = dataclasses.replace(spec.task, pair_encoding="joint")
    except ValueError as error:
        raise ConfigError(
            "pair_encoding",
            f"[{spec.task.name}] {error}, or a variant with that loss, such as lora1 or lora3",
            "joint",
        ) from error
    return dataclasses.replace(spec, task=task)


def _known_tasks(
    choice: TaskChoice, chosen: Variant, asked: Mapping[str, Any]
) -> tuple[TaskSpec, ...]:
    if choice.tasks is None and chosen is sharing.OWN:
        raise ConfigError("tasks", "name the files of your tasks, or a `variant` of the paper")
    if choice.tasks is None:
        return paper_specs(chosen.sts_loss, choice.sts_weight)
    if choice.tasks == ():
        raise ConfigError("tasks", "name at least one TOML file, or values such as topic.epochs=3")
    for name, own in (("sts_weight", "weight"), ("pair_encoding", "pair")):
        if name in asked:
            raise ConfigError(name, f"is for the paper's tasks; set `{own}` in `tasks`")
    return read_tasks(choice.tasks, choice.text, choice.label)


def _reject_unused(asked: Mapping[str, Any], settings: Settings) -> None:
    """Refuse explicit settings that have no effect on the variant."""
    whole = bounds.metadata(Settings, OnlyFor)
    for name, (section, field) in flat_names(Settings).items():
        parts = bounds.metadata(type(getattr(settings, section)), OnlyFor)
        only = parts.get(field) or whole.get(section)
        if only and asked.get(name, False) is not False and settings.adapt not in only.adapts:
            raise ConfigError(
                name,
                f"has no effect on {settings.variant}: its encoder is not adapted that way; "
                "leave it out",
            )
    if "surgery" in asked and all(len(group) == 1 for group in settings.groups):
        raise ConfigError("surgery", "has no effect if each task is trained alone; leave it out")
