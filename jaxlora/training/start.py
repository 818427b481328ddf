"""Initial parameters from the adapters and heads of a bank, in place of fresh ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxlora.formats.huggingface import Pretrained
from jaxlora.serving import bank
from jaxlora.serving.task_models import TaskModel, TaskModels
from jaxlora.tasks.sharing import group_name
from jaxlora.tasks.task import Task
from jaxlora.training.config import Settings
from jaxlora.training.step import TrainState
from jaxlora.utils import trees
from jaxlora.utils.errors import ConfigError
from jaxlora.utils.trees import Tree

START = "the start of "  # prefix of the names of initial parameters in the inputs of a run
# Fields that determine the outputs of a head and their meaning.
_OF_HEAD = ("kind", "pair", "classes", "low", "high", "loss", "head", "pair_encoding")
_OF_ADAPTER = ("rank", "alpha", "rslora", "rank_pattern", "alpha_pattern")
Start = Mapping[str, Mapping[str, Tree]]
"""Group → its initial `{"trainable", "heads"}`."""


def load_start(settings: Settings, base: Pretrained) -> Start:
    """Load the initial parameters that `start_from` names; empty if it is not set.

    Args:
      settings: settings of the run, after `inputs.fit_to_base`.
      base: the base.

    Raises:
      UserError: if the bank or the task does not exist.
      ConfigError: if the parameters do not fit the settings or the base.
    """
    asked = settings.model.start_from
    if asked is None:
        return {}
    folder, task = _parse(asked)
    if task and len(settings.named) > 1:
        raise ConfigError("start_from", "names one task, but several are trained", asked)
    source = bank.load(Path(folder))
    if differs := source.fingerprint.differing(base.fingerprint, joint=source.reads_jointly):
        raise ConfigError("start_from", f"has another {' and '.join(differs)} of the base", asked)
    if source.pooling != settings.model.pooling:
        raise ConfigError("pooling", f"{asked} has {source.pooling}", settings.model.pooling)
    return {
        group_name(names): _of_group(settings, source, names, task) for names in settings.groups
    }


def _parse(asked: str) -> tuple[str, str]:
    """Split `FOLDER:TASK` into its parts; the task is empty if none is named.

    >>> _parse("bank:topics"), _parse("bank")
    (('bank', 'topics'), ('bank', ''))
    """
    folder, colon, task = asked.rpartition(":")
    return (asked, "") if not colon or Path(asked).exists() else (folder, task)


def _of_group(
    settings: Settings, source: TaskModels, names: tuple[str, ...], task: str
) -> dict[str, Tree]:
    models = {name: source.find(task or name) for name in names}
    if len({model.tree for model in models.values()}) > 1:
        raise ConfigError(
            "groups",
            f"{', '.join(names)} share parameters here and do not in {source.origin}; train them "
            "in groups of their own",
        )
    tree = next(iter(models.values())).tree
    _check_adapter(settings, source, tree)
    for name, model in models.items():
        _check_head(settings, settings.named[name], model)
    heads = {name: model.head for name, model in models.items()}
    return {"trainable": source.trees[tree], "heads": heads}


def _check_adapter(settings: Settings, source: TaskModels, tree: str) -> None:
    wanted, there = settings.lora, source.configs.get(tree)
    if settings.adapt != "lora" or there is None:
        kinds = {"lora": {"lora"}, "full": {"params"}, "frozen": set()}
        if set(source.trees[tree]) != kinds[settings.adapt]:
            raise ConfigError(
                "variant", f"adapts the encoder in another way than {source.origin} does",
                settings.variant,
            )  # fmt: skip
        return
    for field in _OF_ADAPTER:
        mine, theirs = getattr(wanted, field), getattr(there, field)
        if mine != theirs:
            raise ConfigError(field, f"{source.origin} has {theirs}; take the same", mine)
    if set(wanted.target_modules) != set(there.target_modules):
        raise ConfigError(
            "target_modules",
            f"{source.origin} has {', '.join(there.target_modules)}; take the same",
            ", ".join(wanted.target_modules),
        )


def _check_head(settings: Settings, task: Task, model: TaskModel) -> None:
    for field in _OF_HEAD:
        mine, theirs = getattr(task, field), getattr(model.task, field)
        if mine != theirs:
            raise ConfigError(
                "start_from", f"its {model.task.name} has {field} {theirs}, {task.name} has {mine}"
            )
    compares = task.sentences > 1 and task.outputs
    if compares and model.pair_features != settings.model.pair_features:
        raise ConfigError(
            "pair_features", f"{model.task.name} was trained with {model.pair_features}",
            settings.model.pair_features,
        )  # fmt: skip


def fingerprints(start: Start) -> dict[str, str]:
    """Return checksums of initial parameters, as inputs of a run."""
    return {f"{START}{name}": trees.checksum(dict(found)) for name, found in start.items()}


def begin(states: Mapping[str, TrainState], start: Start) -> dict[str, TrainState]:
    """Replace the fresh parameters in initial states by those of a start.

    Raises:
      ConfigError: if their shapes differ.
    """
    return {name: _replace(name, state, start.get(name)) for name, state in states.items()}


def _replace(name: str, state: TrainState, found: Mapping[str, Tree] | None) -> TrainState:
    if found is None:
        return state
    fresh = {"trainable": state.trainable, "heads": state.heads}
    given = jax.tree.map(jnp.asarray, dict(found))
    if jax.tree.map(jnp.shape, given) != jax.tree.map(jnp.shape, fresh):
        raise ConfigError("start_from", f"its parameters have other shapes than those of {name}")
    return dataclasses.replace(state, **given)
