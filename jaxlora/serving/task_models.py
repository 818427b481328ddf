"""Trained tasks with their heads and encoder trees, and the base that they need."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import jax
from pydantic import Field

from jaxlora import lora
from jaxlora.data.tables import Columns
from jaxlora.formats import huggingface
from jaxlora.formats.fingerprint import Fingerprint
from jaxlora.formats.huggingface import Pretrained, absolute
from jaxlora.lora import LoraConfig
from jaxlora.tasks.task import HEADS, Task
from jaxlora.utils.errors import UserError, suggestion
from jaxlora.utils.trees import Tree

Pooling = Literal["cls", "mean"]
PairFeatures = Literal["concat", "interaction"]


@dataclasses.dataclass(frozen=True)
class Facts:
    """Where a trained task comes from.

    Attributes:
      dev: its metric → the score of its dev set.
      data: checksum of its examples.
      dev_data: checksum of those of its dev set; None: not known.
      variant: of the run.
      versions: package → version, of what computed it.
      imported_from: the folder or model that others wrote.
      left_out: what was trained beside it and has no effect here.
      combined_from: task → weight, of the adapters that were added up.
      columns: of the tables that it was trained on; None: they were not the user's.
    """

    dev: dict[str, float] = dataclasses.field(default_factory=dict)
    data: str | None = None
    dev_data: str | None = None
    variant: str | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    imported_from: str | None = None
    left_out: tuple[str, ...] = ()
    combined_from: dict[str, float] = dataclasses.field(default_factory=dict)
    columns: Columns | None = None


@dataclasses.dataclass(frozen=True)
class TaskModel:
    """A task as it is served.

    Attributes:
      task: what it is.
      tree: name of its encoder tree.
      stored_head: `head`, or a function that reads it.
      pair_features: see `heads.pair_vector`.
      facts: where it comes from.
    """

    task: Task
    tree: str
    stored_head: Tree | Callable[[], Tree] = dataclasses.field(repr=False)
    pair_features: PairFeatures
    facts: Facts = Facts()

    @property
    def head(self) -> Tree:
        """Its head's parameters, `{}` for a task without a head.

        Raises:
          UserError: if they are read now, and are missing or damaged.
        """
        return self.stored_head() if callable(self.stored_head) else self.stored_head

    def head_shapes(self, hidden_size: int) -> Tree:
        """Return a tree of the head's shapes, `{}` for none."""
        return jax.eval_shape(
            lambda: self.task.init_head(jax.random.key(0), hidden_size, self.pair_features)
        )


@dataclasses.dataclass(frozen=True)
class BaseSpec:
    """The base model that tasks were trained on, and how its outputs become sentence vectors.

    Attributes:
      base: its name or folder.
      fingerprint: what decides its vectors.
      pooling: of a sentence's tokens.
      max_length: tokens a sentence is cut to.
      dtype: of matmul inputs.
    """

    base: str
    fingerprint: Fingerprint
    pooling: Pooling
    max_length: Annotated[int, Field(ge=3)]
    dtype: Literal["float32", "bfloat16"]

    def base_spec(self) -> dict[str, Any]:
        """Return these fields, also of a subclass, as arguments of another."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(BaseSpec)}


@dataclasses.dataclass(frozen=True, repr=False, kw_only=True)
class TaskModels(BaseSpec):
    """Trained tasks that share a base.

    Attributes:
      models: the tasks by name.
      trees: encoder trees by name: `{}` (frozen), `{"lora": …}` or `{"params": …}` (a whole BERT).
      configs: the configuration of each adapter among the trees, by the tree's name.
      origin: the folder they come from.
    """

    models: Mapping[str, TaskModel]
    trees: Mapping[str, Tree]
    configs: Mapping[str, LoraConfig]
    origin: str

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.origin!r}: {self.summary})"

    @property
    def summary(self) -> str:
        """The base, and how many tasks of each kind there are."""
        kinds = collections.Counter(one.task.kind for one in self.models.values())
        each = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
        tasks = f"{len(self.models):,} task{'' if len(self.models) == 1 else 's'}"
        return f"base {self.base}, {tasks}{f' ({each})' if each else ''}"

    def find(self, name: str) -> TaskModel:
        """Return a task by its name.

        Raises:
          UserError: if there is none of that name.
        """
        if name not in self.models:
            there = ", ".join(self.models) or "none"
            hint = suggestion(name, self.models)
            raise UserError(f"{self.origin}: no task {name!r}; there are {there}{hint}")
        return self.models[name]

    @property
    def reads_jointly(self) -> bool:
        """Whether any task reads the two texts of a pair together."""
        return any(one.task.joint for one in self.models.values())

    def at(self, base: str | None) -> TaskModels:
        """Return the same tasks, with their base in another place; None: where it was."""
        return self if base is None else dataclasses.replace(self, base=absolute(base))

    def load_base(self) -> Pretrained:
        """Return the base model.

        Raises:
          UserError: if it is not available, is another one, or tasks do not fit it.
        """
        try:
            base = huggingface.load(self.base)
        except huggingface.MissingBaseError as error:
            raise UserError(
                f"{error}; {self.origin} needs it: if it has moved, say where with `base`"
            ) from error
        self._check_same(base)
        if self.reads_jointly:
            huggingface.check_pairs(base)
        limit = base.config.max_length
        if self.max_length > limit:
            raise UserError(f"{self.origin}: max_length {self.max_length}, {self.base} has {limit}")
        for name, one in self.models.items():
            if HEADS[one.task.head].pooling not in (None, self.pooling):
                raise UserError(f"{self.origin}: the head of {name} needs pooling cls")
        return base

    def head(self, name: str, base: Pretrained) -> Tree:
        """Return the head of a task, `{}` for none.

        Raises:
          UserError: if it is missing or damaged, or has not the shapes of such a task's head.
        """
        one = self.find(name)
        found = one.head
        if _shapes(found) != _shapes(one.head_shapes(base.config.hidden_size)):
            raise UserError(
                f"{self.origin}: the head of {name} is not one of such a task; put back a copy, or "
                "train it again"
            )
        return found

    def _check_same(self, base: Pretrained) -> None:
        """Refuse a base that would give other vectors than the one that was trained on."""
        if other := self.fingerprint.differing(base.fingerprint, joint=self.reads_jointly):
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


def upgrade(values: Mapping[str, Any]) -> dict[str, Any]:
    """Bring plain values of an earlier jaxlora to the present form.

    Format 1 knew the base by the checksum of its weights alone, and names of facts had spaces.
    """
    known = {name: value for name, value in values.items() if name != "sha256"}
    if "sha256" in values:
        known["fingerprint"] = {"weights": values["sha256"]}
    if isinstance(values.get("facts"), Mapping):
        known["facts"] = {str(k).replace(" ", "_"): v for k, v in values["facts"].items()}
    return known


def combine_tasks(
    trained: TaskModels, parts: Mapping[str, float], name: str, head: str, rank: int | None = None
) -> TaskModels:
    """Return a new task whose adapter is a weighted sum of other tasks'.

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
    # Thresholds that were chosen for the source's own adapter do not suit the sum.
    thresholds = () if source.task.tune_thresholds else source.task.thresholds
    task = dataclasses.replace(
        source.task, name=name, title=" + ".join(parts), thresholds=thresholds
    )
    model = TaskModel(
        task, name, source.head, source.pair_features, Facts(combined_from=dict(parts))
    )
    return dataclasses.replace(
        trained,
        models={name: model},
        trees={name: {"lora": adapter[0]}},
        configs={name: adapter[1]},
    )
