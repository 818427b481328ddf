"""The trained tasks of a run as `TaskModels`, from which predictions are made."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from jaxlora.data.delimited import Reading
from jaxlora.data.tables import Table
from jaxlora.formats.fingerprint import Fingerprint
from jaxlora.serving.task_models import Facts, TaskModel, TaskModels
from jaxlora.tasks.sharing import group_name
from jaxlora.tasks.task import Task
from jaxlora.training import inputs
from jaxlora.training.config import Settings
from jaxlora.utils.errors import Note, UserError
from jaxlora.utils.trees import Tree


def task_models(
    settings: Settings,
    checksums: Mapping[str, str],
    best: Mapping[str, Mapping[str, Tree]],
    dev: Mapping[str, float],
    tasks: Mapping[str, Task],
) -> TaskModels:
    """Return the tasks of a run with their trees, heads and facts.

    Args:
      settings: settings of the run.
      checksums: checksums of the base and the data, see `inputs.fingerprints`.
      best: group → `{"trainable", "heads"}`, NumPy arrays.
      dev: task → score on its dev set.
      tasks: the tasks by name, with their final thresholds.
    """
    versions, tables = inputs.versions(), {spec.task.name: spec.table for spec in settings.tasks}
    models = {}
    for group in settings.groups:
        for name in group:
            task, tree, table = tasks[name], group_name(group), tables[name]
            facts = Facts(
                dev={task.metric: dev[name]},
                data=checksums[inputs.data_of(name)],
                dev_data=checksums.get(inputs.dev_of(name)),
                variant=settings.variant,
                versions=versions,
                columns=None if table is None else table.columns,
                reading=None if table is None else _reading_of(name, table),
            )
            head = best[tree]["heads"].get(name) or {}
            models[name] = TaskModel(task, tree, head, settings.model.pair_features, facts)
    trees = {name: found["trainable"] for name, found in best.items()}
    return TaskModels(
        base=settings.model.base,
        fingerprint=Fingerprint.from_inputs(checksums),
        pooling=settings.model.pooling,
        max_length=settings.model.max_length,
        dtype=settings.dtype,
        models={name: models[name] for name in settings.named},
        trees=trees,
        configs={name: settings.lora for name, tree in trees.items() if "lora" in tree},
        origin=settings.variant,
    )


def _reading_of(task: str, table: Table) -> Reading | None:
    """Return how a task's tables are read; if they are gone by now, warn and return None."""
    try:
        return table.reading()
    except UserError as error:
        message = (
            f"{error}; so the model does not record how double quotes in the tables of {task} were "
            "read: choose `quoting` when you evaluate or predict"
        )
        warnings.warn(Note(message), stacklevel=2)
        return None
