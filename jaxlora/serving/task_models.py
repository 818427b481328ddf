"""What training leaves behind: tasks with their heads and encoder trees, and the base they need."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import jax

from jaxlora import lora
from jaxlora.formats import huggingface
from jaxlora.formats.fingerprint import Fingerprint
from jaxlora.formats.huggingface import Pretrained, absolute
from jaxlora.lora import LoraConfig
from jaxlora.tasks.task import HEADS, Task
from jaxlora.utils import schema
from jaxlora.utils.errors import UserError
from jaxlora.utils.trees import Tree


@dataclasses.dataclass(frozen=True)
class TaskModel:
    """A task as it is served.

    Attributes:
      task: what it is.
      tree: name of its encoder tree.
      head: its head's parameters, `{}` for a task without a head.
      pair_features: see `heads.pair_vector`.
      facts: plain values that say where it comes from: dev score, data, versions.
    """

    task: Task
    tree: str
    head: Tree
    pair_features: str
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def head_shapes(self, hidden_size: int) -> Tree:
        """A tree of the head's shapes, `{}` for none."""
        return jax.eval_shape(
            lambda: self.task.init_head(jax.random.key(0), hidden_size, self.pair_features)
        )


@dataclasses.dataclass(frozen=True, repr=False)
class TaskModels:
    """Trained tasks that share a base.

    Attributes:
      base: its name or folder.
      fingerprint: what decides the base's vectors.
      models: the tasks by name.
      trees: encoder trees by name: `{}` (frozen), `{"lora": …}` or `{"params": …}` (a whole BERT).
      configs: the configuration of each adapter among the trees, by the tree's name.
      pooling, max_length, dtype: as in `config.Settings`.
      origin: the folder they come from.
    """

    base: str
    fingerprint: Fingerprint
    models: Mapping[str, TaskModel]
    trees: Mapping[str, Tree]
    configs: Mapping[str, LoraConfig]
    pooling: str
    max_length: int
    dtype: str
    origin: str

    def find(self, name: str) -> TaskModel:
        """A task by its name.

        Raises:
          UserError: if there is none of that name.
        """
        if name not in self.models:
            close = difflib.get_close_matches(name, self.models, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            there = ", ".join(self.models) or "none"
            raise UserError(f"{self.origin}: no task {name!r}; there are {there}{hint}")
        return self.models[name]

    def at(self, base: str | None) -> TaskModels:
        """The same tasks, with their base in another place; None: where it was."""
        return self if base is None else dataclasses.replace(self, base=absolute(base))

    def load_base(self) -> Pretrained:
        """The base model.

        Raises:
          UserError: if it cannot be had, is another one, or what was trained does not fit it.
        """
        try:
            base = huggingface.load(self.base)
        except huggingface.MissingBaseError as error:
            raise UserError(
                f"{error}; {self.origin} needs it: if it has moved, say where with `base`"
            ) from error
        self._check_same(base)
        limit = base.config.max_length
        if self.max_length > limit:
            raise UserError(f"{self.origin}: max_length {self.max_length}, {self.base} has {limit}")
        for name, one in self.models.items():
            if _shapes(one.head) != _shapes(one.head_shapes(base.config.hidden_size)):
                raise UserError(f"{self.origin}: the head of {name} is not one of such a task")
            if HEADS[one.task.head].pooling not in (None, self.pooling):
                raise UserError(f"{self.origin}: the head of {name} needs pooling cls")
        return base

    def _check_same(self, base: Pretrained) -> None:
        """Refuse a base that would give other vectors than the one that was trained on."""
        if other := self.fingerprint.differing(base.fingerprint):
            part = other[0]
            found, wanted = (getattr(f, part)[:12] for f in (base.fingerprint, self.fingerprint))
            raise UserError(
                f"{self.base}: not the {' and '.join(other)} that {self.origin} was trained on "
                f"(sha256 of the {part}: {found}… instead of {wanted}…); point to the right one "
                "with `base`"
            )
        self.fingerprint.note_if_partial(self.origin)


def _shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    return {jax.tree_util.keystr(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(tree)}


# Fields of `TaskModels` that are plain values, and of `TaskModel`, with what they may be.
OF_BASE = ("base", "fingerprint", "pooling", "max_length", "dtype")
_CHOICES = {
    "pooling": ("cls", "mean"),
    "dtype": ("float32", "bfloat16"),
    "pair_features": ("concat", "interaction"),
}


def of_base(trained: TaskModels) -> dict[str, Any]:
    """What is kept of the base, as plain values."""
    values = {field: getattr(trained, field) for field in OF_BASE}
    return values | {"fingerprint": dataclasses.asdict(trained.fingerprint)}


def from_of_base(values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `of_base`, as arguments of `TaskModels`; other values are left out."""
    fingerprint = schema.build(Fingerprint, values["fingerprint"])
    return {field: values[field] for field in OF_BASE} | {"fingerprint": fingerprint}


def upgrade_base(values: Mapping[str, Any]) -> dict[str, Any]:
    """Bring plain values to the present format: format 1 had the weights' checksum alone."""
    known = {name: value for name, value in values.items() if name != "sha256"}
    if "sha256" in values:
        known["fingerprint"] = dataclasses.asdict(Fingerprint(values["sha256"]))
    return known


def check_plain(values: Mapping[str, Any]) -> None:
    """Check those of the plain fields that are there.

    Raises:
      AttributeError, TypeError, ValueError: naming the first that is wrong.
    """
    for field, value in values.items():
        if field in _CHOICES and value not in _CHOICES[field]:
            raise ValueError(f"{field} is {value!r}, not one of {', '.join(_CHOICES[field])}")
        if field == "base":
            schema.text(value)
        if field == "fingerprint":
            schema.build(Fingerprint, value)
        if field == "max_length" and (type(value) is not int or value < 3):
            raise ValueError(f"max_length is {value!r}, not a whole number from 3")
        if field == "facts":
            scores = value.get("dev", {})  # AttributeError if it is no object
            if not all(isinstance(score, int | float) for score in scores.values()):
                raise TypeError(f"facts: dev is {scores!r}")


def combine_tasks(
    trained: TaskModels, parts: Mapping[str, float], name: str, head: str, rank: int | None = None
) -> TaskModels:
    """A new task whose adapter is a weighted sum of other tasks'.

    Args:
      trained: has those tasks.
      parts: task → weight.
      name: of the new task.
      head: the task whose head and labels it takes over.
      rank: None: exact, of the summed rank (`lora.add`); else the nearest (`lora.truncate`).

    Raises:
      UserError: if a task has no adapter to add up.
    """
    trees = {part: trained.models[part].tree for part in parts}
    for part, tree in trees.items():
        if "lora" not in trained.trees[tree]:
            raise UserError(f"{trained.origin}: {part} has no adapter that could be added up")
    adapters = [(trained.trees[tree]["lora"], trained.configs[tree]) for tree in trees.values()]
    adapter = lora.add(adapters, list(parts.values()))
    if rank is not None:
        adapter = lora.truncate(adapter, rank)
    source = trained.models[head]
    task = dataclasses.replace(source.task, name=name, title=" + ".join(parts))
    model = TaskModel(task, name, source.head, source.pair_features, {"combined from": dict(parts)})
    return dataclasses.replace(
        trained,
        models={name: model},
        trees={name: {"lora": adapter[0]}},
        configs={name: adapter[1]},
    )
