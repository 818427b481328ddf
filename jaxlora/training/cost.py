"""What a step will cost: FLOPs, bytes and traffic from shapes alone; nothing is allocated.

Counted is what `step.TrainStep` does. Matmuls: 2 a kernel's number and token forward; as much
again for each of the two gradients, less what nobody needs (frozen kernels have no gradient of
their own). Memory: what the compiled step holds at its fullest moment, which is the end of the
forward pass (all that the backward pass reads) or the update (all gradients and the new state);
and the best parameters so far, which a run keeps beside it.
Traffic: what `mesh` makes XLA send (Xu et al. 2021, "GSPMD"; Rajbhandari et al. 2019, "ZeRO").
`docs/scaling.md` compares all this with XLA's own analyses.

Shapes: T tasks, R rows, S tokens a row, B examples a task, H hidden size, F the feed-forward
layer's width, L layers, r rank.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlora import lora
from jaxlora.formats import families
from jaxlora.lora import LoraConfig
from jaxlora.nn import bert
from jaxlora.nn.bert import BertConfig, EncoderConfig
from jaxlora.tasks.sharing import Adapt, group_name, variant
from jaxlora.tasks.task import Task, paper_tasks
from jaxlora.training import sharding
from jaxlora.training.adaptation import Adaptation, make_adaptation
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

FLOAT = 4  # bytes of float32, in which all is kept but the matmuls' inputs
PACKED = 0.9  # of a row's tokens are real where tasks share rows
# Element-wise operations of a trained number in an update: AdamW with decay, norms, clipping, the
# choice between the new state and the old one.
UPDATE = 30
# Of each layer and token, in float32: two LayerNorms' input, the centred input and the output; with
# dropout two more of softmax's weights (those it leaves, and its mask); the feed-forward layer
# before its activation. And in the matmuls' dtype: softmax's weights, query, key and value.
KEPT_HIDDEN, KEPT_DROPPED, KEPT_WIDE = 6, 2, 1
KEPT_HEADS = 3


@dataclasses.dataclass(frozen=True)
class Work:
    """A step of one group.

    Attributes:
      config: the network.
      adapt: what of it is trained.
      tasks: the group's T tasks.
      batch_size: B.
      rows: R; for adapters of all tasks together, for whole encoders of each task.
      row_length: S.
      adapter: used by `lora`.
      dtype: of matmul inputs.
      pair_features: see `heads.pair_vector`.
      data, fsdp: the mesh.
    """

    config: EncoderConfig
    adapt: Adapt
    tasks: tuple[Task, ...]
    batch_size: int
    rows: int
    row_length: int = 64
    adapter: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    dtype: str = "float32"
    pair_features: str = "concat"
    data: int = 1
    fsdp: int = 1

    @property
    def adaptation(self) -> Adaptation:
        """How the encoder is adapted."""
        return make_adaptation(self.adapt, self.adapter)

    @property
    def devices(self) -> int:
        """Of the mesh."""
        return self.data * self.fsdp

    @property
    def tokens(self) -> int:
        """Tokens of a step on all devices, padding included."""
        return self.adaptation.row_sets(len(self.tasks)) * self.rows * self.row_length

    @property
    def width(self) -> int:
        """Bytes of a matmul's input."""
        return int(jnp.dtype(self.dtype).itemsize)


class Flops(NamedTuple):
    """Floating-point operations of a step, on all devices; a multiply-add is two."""

    forward: float
    backward: float
    update: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.forward + self.backward + self.update


class Memory(NamedTuple):
    """Bytes on each device.

    Attributes:
      frozen: parameters that are not trained.
      trained: parameters that are, heads included.
      moments: AdamW's two for each of them.
      best: a copy of what is trained, as it was at the best evaluation. It stays on the devices,
        split as they split it: in host memory, every process would have to hold all of it.
      batch: tokens, positions, segments, labels.
      activations: what the forward pass leaves to the backward pass.
      copies: the layers' kernels, cut out of their stack, for whole encoders once for each task.
      workspace: the layer at hand, and the heads' new state.
      gradients: of each task, `[T, ...]`, and of the heads.
      update: the new parameters and moments, until it is known that they are finite.
    """

    frozen: float
    trained: float
    moments: float
    best: float
    batch: float
    activations: float
    copies: float
    workspace: float
    gradients: float
    update: float

    @property
    def arguments(self) -> float:
        """What a step is given."""
        return self.frozen + self.trained + self.moments + self.batch

    @property
    def temporary(self) -> float:
        """What it holds besides at the fullest moment."""
        backward = self.activations + self.copies + self.workspace
        return max(backward, self.gradients + self.update)

    @property
    def total(self) -> float:
        """What a device needs."""
        return self.arguments + self.best + self.temporary


class Traffic(NamedTuple):
    """Bytes of arrays that a device gets from the others in a step.

    Attributes:
      all_gather: split kernels, fetched for the forward pass and again for the backward pass.
      all_reduce: gradients of replicated leaves, words looked up in parts, vectors.
      reduce_scatter: gradients of split leaves; a device keeps only its part of the sum. (XLA on
        CPU sums all and cuts the part out.)
      all_to_all: embeddings whose columns are split.
    """

    all_gather: float
    all_reduce: float
    reduce_scatter: float
    all_to_all: float

    def wire(self, devices: int) -> float:
        """Bytes a device sends when each operation goes round in a ring.

        >>> Traffic(0, 8.0, 0, 0).wire(4)
        12.0
        """
        once = self.all_gather + self.reduce_scatter + self.all_to_all
        return (once + 2 * self.all_reduce) * (1 - 1 / devices)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a step costs; see the parts."""

    work: Work
    flops: Flops
    memory: Memory
    traffic: Traffic

    def seconds(self, flops_per_second: float, bytes_per_second: float = math.inf) -> float:
        """A step's time when nothing overlaps, and the devices reach the rates they are given.

        Args:
          flops_per_second: what a device does of this work, half of its peak or less.
          bytes_per_second: of the link between devices.
        """
        work, devices = self.flops.total, self.work.devices
        return work / devices / flops_per_second + self.traffic.wire(devices) / bytes_per_second


def estimate(work: Work) -> Estimate:
    """What a step costs.

    >>> work = Work(SIZES["bert-base"], "lora", paper_tasks("mse"), batch_size=8, rows=16)
    >>> found = estimate(work)
    >>> round(found.flops.total / 1e9), round(found.memory.total / 1e6)
    (363, 1212)
    """
    found = _trees(work)
    return Estimate(work, _flops(work, found), _memory(work, found), _traffic(work, found))


def for_variant(
    name: str,
    config: EncoderConfig,
    batch_size: int,
    sentence_length: float = 20.0,
    row_length: int = 64,
    **rest: Any,
) -> dict[str, Work]:
    """A step of each of a variant's groups, by name; rows are as many as packing needs.

    Args:
      name: see `variants.VARIANTS`.
      config: the network.
      batch_size: B.
      sentence_length: tokens of a sentence on the average.
      row_length: S.
      rest: other fields of `Work`.

    Raises:
      UserError: for an unknown variant, and for lengths that cannot be, naming them.

    >>> [(n, w.rows) for n, w in for_variant("lora1", SIZES["minilm"], 16).items()]
    [('sst', 6), ('para', 12), ('sts', 12)]
    """
    chosen = variant(name)
    _check_lengths(config, batch_size, sentence_length, row_length)
    named = {task.name: task for task in paper_tasks(chosen.sts_loss)}
    works = {}
    for group in chosen.groups:
        tasks = tuple(named[name] for name in group)
        each = [task.sentences for task in tasks]
        together = max(each) if chosen.adapt == "full" else sum(each)
        work = Work(config, chosen.adapt, tasks, batch_size, 0, row_length, **rest)
        work = dataclasses.replace(work, adapter=families.localise(work.adapter, config))
        needed = together * batch_size * sentence_length / (PACKED * row_length)
        rows = math.ceil(needed / work.devices) * work.devices
        works[group_name(group)] = dataclasses.replace(work, rows=rows)
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


class _Trees(NamedTuple):
    """Shapes of a step's parameters: the encoder's, the adapter's, what is trained, the heads'."""

    params: Tree
    adapter: Tree
    trained: Tree
    heads: Tree


def _trees(work: Work) -> _Trees:
    params = bert.param_shapes(work.config)
    key, hidden = jax.random.key(0), work.config.hidden_size
    trained = jax.eval_shape(work.adaptation.init, key, params)
    heads = [
        jax.eval_shape(lambda t=task: t.init_head(key, hidden, work.pair_features))
        for task in work.tasks
    ]
    return _Trees(params, trained.get("lora", {}), trained, heads)


def _kernels(params: Tree) -> list[Any]:
    """The layers' kernels, `[L, in, out]` or L times `[in, out]`."""
    paths = jax.tree_util.tree_leaves_with_path(params["layers"])
    return [leaf for path, leaf in paths if path[-1].key == "kernel"]


def _flops(work: Work, found: _Trees) -> Flops:
    c, count, length = work.config, len(work.tasks), work.row_length
    dense = 2.0 * trees.count(_kernels(found.params)) * work.tokens
    attention = 4.0 * c.num_hidden_layers * length * c.hidden_size * work.tokens
    # Copies of one adapter: computed once, but each has a gradient.
    low_rank = 2.0 * trees.count(found.adapter) * work.tokens
    heads = 2.0 * trees.count(found.heads) * work.batch_size
    backward = 2 * attention + (1 + count) * low_rank + 2 * heads + dense
    if work.adapt == "full":
        backward += dense  # the kernels' own gradients
    if work.adapt == "lora":  # below the first layer nothing is trained: no gradient of its input
        backward -= 2.0 * 3 * c.hidden_size**2 * work.tokens
    if work.adapt == "frozen":  # nor is there any of the heads' input
        inner = [head["hidden"] for head in found.heads if head]
        backward -= 2.0 * trees.count(inner) * work.batch_size
    surgery = (count * (count + 1) + 2 * count) * trees.count(found.trained)
    numbers = trees.count(found.trained) + trees.count(found.heads)
    return Flops(dense + attention + low_rank + heads, backward, UPDATE * numbers + surgery)


def _memory(work: Work, found: _Trees) -> Memory:
    c, count = work.config, len(work.tasks)
    heads = FLOAT * trees.count(found.heads)
    trained = FLOAT * _part(found.trained, work.fsdp)
    here = work.tokens / work.devices
    inputs = 3 * here
    if work.adapt == "frozen":
        inputs = 2 * count * work.batch_size * c.hidden_size
    return Memory(
        frozen=_frozen(work, found),
        trained=trained + heads,
        moments=2 * (trained + heads),
        best=trained + heads,
        batch=FLOAT * (inputs + 2 * count * work.batch_size),
        activations=here * _kept_layers(c) * _kept(work, found),
        copies=_copies(work, found),
        # Of the layer at hand, by trial: softmax's weights twice, the wide layer 1.6 times.
        workspace=3 * heads + here * FLOAT * (2 * _weights(work) + 1.6 * c.intermediate_size),
        gradients=count * trained + heads,
        update=3 * (trained + heads),
    )


def _frozen(work: Work, found: _Trees) -> float:
    """Bytes of the parameters that no step changes; kernels are in the matmuls' dtype."""
    if not work.adaptation.keeps_base:
        return 0.0
    params = _laid_out(found.params)
    kernels = _part(_kernels(params), work.fsdp)
    return FLOAT * (_part(params, work.fsdp) - kernels) + work.width * kernels


def _laid_out(params: Tree) -> Tree:
    """Return the shapes of the frozen parameters on a device: few layers are unstacked."""
    return jax.eval_shape(lambda params: bert.matmul_ready(params, jnp.float32), params)


def _copies(work: Work, found: _Trees) -> float:
    """Bytes of kernels cut out of their stack; they are whole wherever they are used.

    A loop cuts out those of its pass alone; few frozen layers are unstacked from the start, and are
    only brought together from `fsdp`. But a loop takes and gives stacks: whole encoders' kernels
    are laid out for it once for each task, and so are their gradients.
    """
    layers, kernels = work.config.num_hidden_layers, _kernels(found.params)
    at_once = min(layers, bert.MOST_UNROLLED) / layers
    cut = at_once * work.width * trees.count(kernels)
    if work.adapt != "full":
        return cut * (work.adapt == "lora" and (work.fsdp > 1 or layers > bert.MOST_UNROLLED))
    stacks = 2 * FLOAT * _part(kernels, work.fsdp) * (layers > bert.MOST_UNROLLED)
    # The gradient of looking words up starts as zeros for the whole table.
    table = FLOAT * _part(found.params["embeddings"]["word_embeddings"], work.fsdp)
    return len(work.tasks) * (cut + stacks + table)


def _kept(work: Work, found: _Trees) -> float:
    """Bytes that a layer leaves to the backward pass, of each token."""
    c = work.config
    plain = KEPT_HIDDEN * c.hidden_size + KEPT_WIDE * c.intermediate_size
    if c.attention_probs_dropout_prob:
        plain += KEPT_DROPPED * _weights(work)
    inputs = KEPT_HEADS * c.hidden_size + _weights(work) + _inputs(work, found)
    return FLOAT * plain + work.width * inputs


def _weights(work: Work) -> int:
    """A token's attention weights in a layer."""
    return work.config.num_attention_heads * work.row_length


def _inputs(work: Work, found: _Trees) -> int:
    """Numbers a token's inputs of trained matmuls take in a layer (query, key and value share)."""
    if work.adapt == "frozen":
        return 0
    if work.adapt == "full":
        return 3 * work.config.hidden_size + work.config.intermediate_size
    paths = lora.targets(found.params, work.adapter)
    shared = {path[:-1] if path[-2] == "self" else path: kernel for path, kernel in paths.items()}
    ranks = sum(map(work.adapter.rank_of, paths))
    return sum(kernel.shape[-2] for kernel in shared.values()) + ranks


def _kept_layers(config: EncoderConfig) -> int:
    """Layers whose leavings are held: a loop holds those of its last pass twice."""
    layers = config.num_hidden_layers
    return layers if layers <= bert.MOST_UNROLLED else layers + bert.MOST_UNROLLED


def _part(tree: Tree, parts: int) -> float:
    """Numbers of a tree that one device holds."""
    sizes = (
        (math.prod(x.shape), sharding.split_axis(x.shape, parts) is not None)
        for x in jax.tree.leaves(tree)
    )
    return sum(size / parts if split else size for size, split in sizes)


def _traffic(work: Work, found: _Trees) -> Traffic:
    """Rows over both axes, split leaves over `fsdp`; see `Traffic`."""
    if work.devices == 1 or work.adapt == "frozen":  # vectors are replicated
        return Traffic(0, 0, 0, 0)
    count, full = len(work.tasks), work.adapt == "full"
    kernels = _kernels(found.params if full else _laid_out(found.params))
    fetched = 2.0 * (count if full else 1) * work.width * _split(kernels, work.fsdp)
    if not full and work.fsdp > 1:  # see `_flops`: the first layer's are read once
        fetched -= 3.0 * work.width * work.config.hidden_size**2
    looked_up, exchanged = _lookups(work, found)
    # Sums of vectors over sentences whose rows lie on any device.
    pooled = FLOAT * count * (2 * work.batch_size + 1) * (work.config.hidden_size + 1)
    gradients, whole = FLOAT * count * trees.count(found.trained), looked_up + pooled
    if not full:
        return Traffic(fetched, gradients + whole, 0, exchanged)
    split = FLOAT * count * _split(found.trained, work.fsdp)
    words = FLOAT * count * _split(found.params["embeddings"]["word_embeddings"], work.fsdp)
    # Summed over fsdp first (a table gets its own part's gradients), then the parts over data.
    again = split / work.fsdp if work.data > 1 else 0.0
    return Traffic(
        fetched + looked_up, gradients - split + whole, split - words + again, 2 * exchanged
    )


def _lookups(work: Work, found: _Trees) -> tuple[float, float]:
    """Bytes of words looked up in parts of the table: by rows and added up, by columns exchanged.

    A device that has some rows looks up its neighbours' tokens too.
    """
    shape = found.params["embeddings"]["word_embeddings"].shape
    axis = sharding.split_axis(shape, work.fsdp) if work.fsdp > 1 else None
    vectors = FLOAT * work.config.hidden_size * work.tokens
    return (vectors / work.data * (axis == 0), vectors / work.devices * (axis == 1))


def _split(tree: Tree, parts: int) -> int:
    """Numbers of the leaves that are split."""
    leaves = jax.tree.leaves(tree)
    return sum(
        x.size for x in leaves if parts > 1 and sharding.split_axis(x.shape, parts) is not None
    )
