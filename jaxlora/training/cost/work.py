"""The description of a step whose cost is computed, and the shapes of its parameters.

Shapes: T tasks, R rows, S tokens per row, B examples per task, H hidden size, F width of the
feed-forward layer, L layers, r rank.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.formats import families
from jaxlora.lora import LoraConfig
from jaxlora.nn import bert
from jaxlora.nn.bert import BertConfig, EncoderConfig
from jaxlora.tasks.sharing import Adapt, group_name, variant
from jaxlora.tasks.task import Task, paper_tasks
from jaxlora.training import sharding
from jaxlora.training.adaptation import Adaptation, cohorts, make_adaptation
from jaxlora.training.config import ModelConfig
from jaxlora.utils import trees
from jaxlora.utils.errors import ConfigError
from jaxlora.utils.trees import Tree

SIZES = {
    "minilm": BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536),
    "bert-base": BertConfig(),
    "bert-large": BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
    "1b": BertConfig(
        hidden_size=1536, num_hidden_layers=36, num_attention_heads=24, intermediate_size=6144
    ),
    "3b": BertConfig(
        hidden_size=2560, num_hidden_layers=36, num_attention_heads=40, intermediate_size=10240
    ),
    "10b": BertConfig(
        hidden_size=4096, num_hidden_layers=48, num_attention_heads=64, intermediate_size=16384
    ),
}

FLOAT = 4  # bytes of float32, the dtype of everything but the inputs of matmuls
PACKED = 0.9  # share of tokens in packed rows that are not padding


@dataclasses.dataclass(frozen=True)
class Work:
    """A step of one group, or of several groups that train in one step.

    Attributes:
      config: configuration of the encoder.
      adapt: which part of it is trained.
      tasks: the T tasks of all groups.
      batch_size: B.
      rows: R; of each task in full fine-tuning, else of all tasks together.
      row_length: S.
      adapter: configuration of the adapters; only `lora` uses it.
      dtype: dtype of matmul inputs.
      pair_features: see `heads.pair_vector`.
      groups: K, the number of groups, each with its own trainable tree.
      data, fsdp: sizes of the mesh's axes.
    """

    config: EncoderConfig
    adapt: Adapt
    tasks: tuple[Task, ...]
    batch_size: int
    rows: int
    row_length: int = 64
    adapter: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    dtype: str = "float32"
    pair_features: str = ModelConfig.pair_features
    groups: int = 1
    data: int = 1
    fsdp: int = 1

    @property
    def adaptation(self) -> Adaptation:
        """How the encoder is adapted."""
        return make_adaptation(self.adapt, self.adapter)

    @property
    def devices(self) -> int:
        """Number of devices in the mesh."""
        return self.data * self.fsdp

    @property
    def tokens(self) -> int:
        """Tokens of a step on all devices, including padding."""
        return self.adaptation.row_sets(len(self.tasks)) * self.rows * self.row_length

    @property
    def width(self) -> int:
        """Bytes per element of matmul inputs."""
        return int(jnp.dtype(self.dtype).itemsize)

    @functools.cached_property
    def params(self) -> Tree:
        """Shapes of the encoder's parameters, layers stacked."""
        return bert.param_shapes(self.config)

    @functools.cached_property
    def frozen(self) -> Tree:
        """Shapes of the frozen parameters as a step takes them, see `bert.matmul_ready`."""
        return jax.eval_shape(lambda p: bert.matmul_ready(p, jnp.float32), self.params)

    @functools.cached_property
    def trained(self) -> list[Tree]:
        """Shapes of the trainable tree of each group."""
        one = jax.eval_shape(self.adaptation.init, jax.random.key(0), self.params)
        return [one] * self.groups

    @functools.cached_property
    def heads(self) -> Tree:
        """Shapes of the tasks' heads."""
        key, hidden, features = jax.random.key(0), self.config.hidden_size, self.pair_features
        return [jax.eval_shape(lambda t=t: t.init_head(key, hidden, features)) for t in self.tasks]


def kernels(params: Tree) -> list[Any]:
    """Return the kernels of the layers, either stacked, `[L, in, out]`, or L times `[in, out]`."""
    paths = jax.tree_util.tree_leaves_with_path(params["layers"])
    return [leaf for path, leaf in paths if path[-1].key == "kernel"]


def split(tree: Tree, parts: int) -> int:
    """Count the elements of the leaves that are split into `parts`."""
    leaves = jax.tree.leaves(tree)
    return sum(
        x.size for x in leaves if parts > 1 and sharding.split_axis(x.shape, parts) is not None
    )


def held(tree: Tree, parts: int) -> float:
    """Count the elements of a tree that each device holds if leaves are split into `parts`."""
    return trees.count(tree) - split(tree, parts) * (1 - 1 / parts)


def for_variant(
    name: str,
    config: EncoderConfig,
    batch_size: int,
    sentence_length: float = 20.0,
    row_length: int = 64,
    **rest: Any,
) -> dict[str, Work]:
    """Return the steps of a variant by the names of their groups, with the rows that packing needs.

    All groups train in one step, except in full fine-tuning, where each has a step of its own.

    Args:
      name: see `sharing.VARIANTS`.
      config: configuration of the encoder.
      batch_size: B.
      sentence_length: mean number of tokens per sentence.
      row_length: S.
      rest: other fields of `Work`.

    Raises:
      UserError: if the variant is unknown, or a length is invalid; the error names it.

    >>> [(n, w.groups, w.rows) for n, w in for_variant("lora1", SIZES["minilm"], 16).items()]
    [('sst+para+sts', 3, 28)]
    """
    chosen = variant(name)
    _check_lengths(config, batch_size, sentence_length, row_length)
    named = {task.name: task for task in paper_tasks(chosen.sts_loss)}
    works = {}
    for groups in cohorts(chosen.groups, make_adaptation(chosen.adapt, LoraConfig())):
        names = [name for group in groups for name in group]
        tasks = tuple(named[name] for name in names)
        each = [task.sentences for task in tasks]
        together = max(each) if chosen.adapt == "full" else sum(each)
        work = Work(config, chosen.adapt, tasks, batch_size, 0, row_length, **rest)
        adapter = families.localise(work.adapter, config)
        needed = together * batch_size * sentence_length / (PACKED * row_length)
        rows = math.ceil(needed / work.devices) * work.devices
        works[group_name(names)] = dataclasses.replace(
            work, adapter=adapter, groups=len(groups), rows=rows
        )
    return works


def _check_lengths(
    config: EncoderConfig, batch_size: int, sentence_length: float, row_length: int
) -> None:
    numbers = {"batch_size": batch_size, "sentence_length": sentence_length}
    for name, number in {**numbers, "row_length": row_length}.items():
        if not 0 < number < math.inf:
            raise ConfigError(name, "must be above 0", number)
    limit = config.max_length
    if row_length > limit:
        raise ConfigError("row_length", f"the base has {limit} positions", row_length)
    if sentence_length > row_length:
        raise ConfigError(
            "sentence_length",
            f"a sentence must fit into a row, which has `row_length={row_length}`",
            f"{sentence_length:g}",
        )
