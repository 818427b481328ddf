"""Trained task models: their heads and encoder trees, and the base they need."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import jax
from pydantic import Field

from jaxlora import lora
from jaxlora.data.delimited import Reading
from jaxlora.data.tables import Columns
from jaxlora.formats import huggingface
from jaxlora.formats.fingerprint import Fingerprint
from jaxlora.formats.huggingface import Pretrained, absolute
from jaxlora.lora import LoraConfig
from jaxlora.tasks.task import HEADS, Task
from jaxlora.utils.errors import ConfigError, UserError, list_some, suggestion
from jaxlora.utils.trees import Tree

Pooling = Literal["cls", "mean"]
PairFeatures = Literal["concat", "interaction"]
Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Facts:
    """The provenance of a trained task.

    Attributes:
      dev: metric → score on its dev set.
      data: checksum of its examples.
      dev_data: checksum of the examples of its dev set; None: unknown.
      variant: variant of the run.
      versions: package → version used for training.
      imported_from: the third-party folder or model it was imported from.
      left_out: modules that were trained with it and ignored by the import.
      combined_from: task → weight, of the adapters that were summed.
      columns: columns of its training tables; None: it was not trained on the user's tables.
      reading: how its delimited training tables were read; None: there were none, or unknown.
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
    reading: Reading | None = None


@dataclasses.dataclass(frozen=True)
class TaskModel:
    """A trained task.

    Attributes:
      task: its definition.
      tree: name of its encoder tree.
      stored_head: the head's parameters, or a function that reads them.
      pair_features: see `heads.pair_vector`.
      facts: its provenance.
    """

    task: Task
    tree: str
    stored_head: Tree | Callable[[], Tree] = dataclasses.field(repr=False)
    pair_features: PairFeatures
    facts: Facts = Facts()

    @property
    def head(self) -> Tree:
        """The parameters of its head, `{}` for a task without a head.

        Raises:
          UserError: if they have to be read and are missing or damaged.
        """
        return self.stored_head() if callable(self.stored_head) else self.stored_head

    def head_shapes(self, hidden_size: int) -> Tree:
        """Return the head's tree of `ShapeDtypeStruct`s, `{}` for a task without a head."""
        return jax.eval_shape(
            lambda: self.task.init_head(jax.random.key(0), hidden_size, self.pair_features)
        )


@dataclasses.dataclass(frozen=True)
class BaseSpec:
    """The base model of tasks, and how it computes sentence vectors.

    Attributes:
      base: its name or folder.
      fingerprint: checksums of all that determines its vectors.
      pooling: how token vectors become a sentence vector.
      max_length: number of tokens that sentences are truncated to.
      dtype: dtype of matmul inputs.
    """

    base: str
    fingerprint: Fingerprint
    pooling: Pooling
    max_length: Annotated[int, Field(ge=3)]
    dtype: Dtype

    def base_spec(self) -> dict[str, Any]:
        """Return only the fields of `BaseSpec`, as keyword arguments for a subclass."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(BaseSpec)}


@dataclasses.dataclass(frozen=True, repr=False, kw_only=True)
class TaskModels(BaseSpec):
    """Trained tasks that share a base.

    Attributes:
      models: the tasks by name.
      trees: encoder trees by name: `{}` (frozen), `{"lora": …}`, or `{"params": …}` (full encoder).
      configs: name of each tree that is an adapter → its LoRA configuration.
      origin: the folder they were read from, for error messages.
    """

    models: Mapping[str, TaskModel]
    trees: Mapping[str, Tree]
    configs: Mapping[str, LoraConfig]
    origin: str

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.origin!r}: {self.summary})"

    @property
    def summary(self) -> str:
        """The base and the number of tasks of each kind, as text."""
        kinds = collections.Counter(one.task.kind for one in self.models.values())
        each = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
        tasks = f"{len(self.models):,} task{'' if len(self.models) == 1 else 's'}"
        return f"base {self.base}, {tasks}{f' ({each})' if each else ''}"

    def find(self, name: str) -> TaskModel:
        """Return a task by its name.

        Raises:
          UserError: if no task has that name.
        """
        if name not in self.models:
            there = list_some(self.models) or "none"
            hint = suggestion(name, self.models)
            raise UserError(f"{self.origin}: no task {name!r}; there are {there}{hint}")
        return self.models[name]

    @property
    def reads_jointly(self) -> bool:
        """Whether any task reads the two texts of a pair together."""
        return any(one.task.joint for one in self.models.values())

    def at(self, base: str | None) -> TaskModels:
        """Return the same tasks with a new location of their base; None leaves it unchanged."""
        return self if base is None else dataclasses.replace(self, base=absolute(base))

    def load_base(self) -> Pretrained:
        """Load the base model and check that it is the one the tasks were trained on.

        Raises:
          UserError: if it is missing, has other checksums, or does not fit the tasks.
        """
        try:
            base = huggingface.load(self.base)
        except huggingface.MissingBaseError as error:
            raise UserError(
                f"{error}; {self.origin} needs it: if it has moved, give its location as `base`"
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

    def check_adapter(self, tree: str, base: Pretrained) -> None:
        """Check that an adapter's configuration fits the base.

        Raises:
          UserError: if it does not.
        """
        try:
            lora.targets(base.params, self.configs[tree])
        except ConfigError as error:
            raise UserError(
                f"{self.origin}: the adapter {tree} does not fit the base ({error}); train or "
                "combine its tasks again, or remove them"
            ) from error

    def head(self, name: str, base: Pretrained) -> Tree:
        """Return the parameters of a task's head, `{}` for a task without a head.

        Raises:
          UserError: if it is missing or damaged, or has wrong shapes.
        """
        one = self.find(name)
        found = one.head
        if _shapes(found) != _shapes(one.head_shapes(base.config.hidden_size)):
            raise UserError(
                f"{self.origin}: the head of {name} does not fit its task; restore a backup, or "
                "train it again"
            )
        return found

    def _check_same(self, base: Pretrained) -> None:
        """Refuse a base whose vectors would differ from those of the original base."""
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
    """Upgrade plain values that an earlier jaxlora wrote.

    Format 1 stored only the checksum of the base's weights, and had spaces in names of facts.
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
    """Return a new task whose adapter is a weighted sum of the adapters of other tasks.

    Args:
      trained: the task models with those tasks.
      parts: task → weight.
      name: the name of the new task.
      head: the task whose head and labels to use.
      rank: rank of the best approximation (`lora.truncate`); None: the exact sum (`lora.add`).

    Raises:
      UserError: if a task has no adapter.
    """
    trees = {part: trained.models[part].tree for part in parts}
    for part, tree in trees.items():
        if "lora" not in trained.trees[tree]:
            raise UserError(f"{trained.origin}: {part} has no adapter to sum")
    adapters = [(trained.trees[tree]["lora"], trained.configs[tree]) for tree in trees.values()]
    adapter = lora.add(adapters, list(parts.values()))
    if rank is not None:
        adapter = lora.truncate(adapter, rank)
    source = trained.models[head]
    # Thresholds that were tuned for the source's own adapter do not fit the sum.
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
