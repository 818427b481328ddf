"""A task as plain data: its sentences, labels, head, loss and metric."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.nn import heads
from jaxlora.nn.heads import HeadName
from jaxlora.tasks import losses, metrics

KindName = Literal["classification", "binary", "regression", "similarity"]
TrainedHead = Literal["mlp", "classifier"]
PairEncoding = Literal["separate", "joint"]


class Kind(NamedTuple):
    """The losses and metrics of a kind of task; the first of each is the default."""

    integer: bool
    losses: tuple[str, ...]
    metrics: tuple[str, ...]


KINDS: dict[str, Kind] = {
    "classification": Kind(True, ("cross_entropy",), ("accuracy", "f1", "macro_f1")),
    "binary": Kind(True, ("binary_cross_entropy",), ("accuracy", "f1", "macro_f1")),
    "regression": Kind(False, ("squared_error",), ("pearson", "spearman")),
    "similarity": Kind(False, ("cosine", "squared_error"), ("pearson", "spearman")),
}


class HeadKind(NamedTuple):
    """A head with one hidden layer.

    Attributes:
      first: name of its first layer; the second is `out`.
      activation: the activation between them, see `heads.ACTIVATIONS`.
      pooling: the pooling of sentences that it requires; None: any.
      scaled: whether its scores are from 0 to `SPAN`; otherwise they are on the labels' scale.
    """

    first: str
    activation: str
    pooling: str | None
    scaled: bool


HEADS: dict[str, HeadKind] = {
    "mlp": HeadKind("hidden", "relu", None, True),
    "pooler": HeadKind("pooler", "tanh", "cls", False),  # BertForSequenceClassification's
    "dense_relu": HeadKind("dense", "relu", "cls", False),  # DistilBERT's
    "dense_gelu": HeadKind("dense", "gelu", "cls", False),  # ELECTRA's
    # The base's family decides which of these; a run replaces it before it starts.
    "classifier": HeadKind("", "", "cls", False),
}
LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "cross_entropy": losses.cross_entropy,
    "binary_cross_entropy": losses.binary_cross_entropy,
    "squared_error": losses.squared_error,
    "cosine": losses.cosine_error,
}
# Heads give scores from 0 to 5, as in STS-B, so that no head has to learn a large scale.
SPAN = 5.0
METRICS: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray], float]]] = {
    "accuracy": ("accuracy", metrics.accuracy),
    "f1": ("F1", metrics.f1),
    "macro_f1": ("macro F1", metrics.macro_f1),
    "pearson": ("Pearson r", metrics.pearson),
    "spearman": ("Spearman ρ", metrics.spearman),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """One task: everything that differs between tasks is defined here.

    Attributes:
      name: short name, used in flags, trees and file names.
      kind: see `KINDS`.
      pair: whether an example is a pair of sentences.
      pair_encoding: `separate`, a vector for each sentence of a pair, or `joint`, one for both,
        which the encoder reads together, as in `[CLS] a [SEP] b [SEP]`.
      low, high: the range of the labels; for classes, the first and the last number.
      classes: names of the classes, in the order of their numbers.
      loss: `cross_entropy`, `binary_cross_entropy`, `squared_error`, or `cosine`, which needs no
        head and uses the cosine of the two vectors; default: the first of the kind that fits.
      metric: see `METRICS`; default: that of the kind. `f1` is the F1 score of the second of two
        classes; with more classes it is `macro_f1`.
      title: name for tables and messages; default: `name`.
      head: see `HEADS`.

    Raises:
      ValueError: if fields contradict each other.

    >>> task = Task("topic", "classification", classes=("sport", "science"))
    >>> task.high, task.loss, task.metric_name
    (1.0, 'cross_entropy', 'accuracy')
    """

    name: str
    kind: KindName
    pair: bool = False
    low: float = 0.0
    high: float = 1.0
    classes: tuple[str, ...] = ()
    loss: str = ""
    metric: str = ""
    title: str = ""
    head: HeadName = dataclasses.field(default="mlp", kw_only=True)
    pair_encoding: PairEncoding = dataclasses.field(default="separate", kw_only=True)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is not one of {', '.join(KINDS)}")
        kind, fill = KINDS[self.kind], object.__setattr__
        fill(self, "loss", self.loss or next(n for n in kind.losses if self._fits(n)))
        fill(self, "metric", self.metric or kind.metrics[0])
        fill(self, "title", self.title or self.name)
        if kind.integer:
            fill(self, "classes", self.classes or ("0", "1"))
            fill(self, "low", 0.0)
            fill(self, "high", len(self.classes) - 1.0)
        for what, allowed in (("loss", kind.losses), ("metric", kind.metrics)):
            if getattr(self, what) not in allowed:
                raise ValueError(
                    f"{what} {getattr(self, what)!r} does not go with {self.kind}; "
                    f"choose from {', '.join(allowed)}"
                )
        self._check_labels()
        self._check_pair()

    def _fits(self, loss: str) -> bool:
        return loss != "cosine" or self.pair_encoding == "separate"

    def _check_pair(self) -> None:
        if self.kind == "similarity" and not self.pair:
            raise ValueError("a similarity task needs two sentences; name two text columns")
        if self.pair_encoding == "joint" and not self.pair:
            raise ValueError("pair: 'joint' reads two sentences; name two text columns")
        if not self._fits(self.loss):
            raise ValueError(
                "loss: 'cosine' compares the vectors of two sentences, and a joint pair has one "
                "vector; choose squared_error, or separate pairs"
            )
        if self.head != "mlp" and (self.sentences > 1 or not self.outputs):
            raise ValueError(
                f"head: {self.head!r} reads one vector; it fits neither separate pairs nor the "
                "cosine loss"
            )

    def _check_labels(self) -> None:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes: a name occurs twice ({', '.join(self.classes)})")
        if self.kind == "classification" and len(self.classes) < 2:
            raise ValueError("classes: name at least two")
        if self.kind == "binary" and len(self.classes) != 2:
            raise ValueError("classes: a binary task has two, the second is the positive one")
        if self.classes and not self.integer:
            raise ValueError(f"classes do not go with {self.kind}")
        if not -float("inf") < self.low < self.high < float("inf"):
            raise ValueError(f"the labels' range {self.low:g} to {self.high:g} is empty")

    @property
    def integer(self) -> bool:
        """Whether labels are integers, that is, classes."""
        return KINDS[self.kind].integer

    @property
    def outputs(self) -> int:
        """Number of outputs of the head; 0 means no head."""
        return {"cross_entropy": len(self.classes), "cosine": 0}.get(self.loss, 1)

    @property
    def metric_name(self) -> str:
        """Name of the metric for tables and messages."""
        return METRICS[self._metric][0]

    def score(self, predictions: np.ndarray, labels: np.ndarray) -> float:
        """Compute the metric of predictions: higher is better, NaN if any prediction is NaN."""
        return METRICS[self._metric][1](predictions, labels)

    @property
    def _metric(self) -> str:
        # Decided by the task's classes, not by those that occur in the data.
        return "macro_f1" if self.metric == "f1" and len(self.classes) > 2 else self.metric

    def per_example_loss(self, outputs: jax.Array, labels: jax.Array) -> jax.Array:
        """Compute the loss of each example: `(outputs, labels f32[B]) → f32[B]`.

        Labels that are scores are rescaled to 0 … `SPAN` if the head's outputs are.
        """
        if not self.integer and HEADS[self.head].scaled:
            labels = (labels - self.low) * (SPAN / (self.high - self.low))
        return LOSSES[self.loss](outputs, labels)

    def decode(self, outputs: jax.Array) -> jax.Array:
        """Convert outputs to predictions `f32[B]`: the number of a class, or a score.

        A NaN output gives a NaN prediction, for classes too.
        """
        if self.loss == "cross_entropy":
            classes = jnp.argmax(outputs, -1).astype(jnp.float32)
            return jnp.where(jnp.isnan(outputs).any(-1), jnp.nan, classes)
        if self.loss == "binary_cross_entropy":
            return jnp.where(jnp.isnan(outputs), jnp.nan, (outputs > 0).astype(jnp.float32))
        if self.loss == "cosine":
            return self.decode_cosine(outputs)
        return self._on_scale(outputs) if HEADS[self.head].scaled else outputs

    def decode_cosine(self, cosines: jax.Array) -> jax.Array:
        """Convert cosines to scores `f32[B]` on the labels' scale."""
        return self._on_scale(SPAN * cosines)

    def _on_scale(self, inner: jax.Array) -> jax.Array:
        scores = self.low + inner * ((self.high - self.low) / SPAN)
        return jnp.clip(scores, self.low, self.high)

    def probabilities(self, outputs: jax.Array) -> jax.Array | None:
        """Convert outputs to probabilities `f32[B, classes]`; None for a task with scores."""
        if self.loss == "cross_entropy":
            return jax.nn.softmax(outputs)
        if self.loss == "binary_cross_entropy":
            positive = jax.nn.sigmoid(outputs)
            return jnp.stack([1 - positive, positive], axis=-1)
        return None

    @property
    def texts(self) -> int:
        """Number of texts in an example: 1 or 2."""
        return 2 if self.pair else 1

    @property
    def joint(self) -> bool:
        """Whether the encoder reads both sentences of a pair together."""
        return self.pair_encoding == "joint"

    @property
    def sentences(self) -> int:
        """Number of vectors of an example: 2 for a pair of separate sentences, else 1."""
        return 1 if self.joint else self.texts

    def encoded(self, texts: tuple[str, ...]) -> list[str | tuple[str, ...]]:
        """Return what the tokenizer takes of an example: each text, or a joint pair as one.

        >>> PARA.encoded(("a", "b"))
        ['a', 'b']
        >>> dataclasses.replace(PARA, pair_encoding="joint").encoded(("a", "b"))
        [('a', 'b')]
        """
        return [texts] if self.joint else list(texts)

    def features(self, hidden_size: int, pair_features: str) -> int:
        """Return the width of the head's input."""
        if self.sentences == 1:
            return hidden_size
        return hidden_size * (4 if pair_features == "interaction" else 2)

    def head_module(self, hidden_size: int, dropout: float) -> heads.Head:
        """Build the head; for two vectors its hidden layer is half as wide, as in the paper."""
        kind, width = HEADS[self.head], hidden_size // self.sentences
        return heads.Head(width, self.outputs, dropout, kind.first, kind.activation)

    def init_head(self, key: jax.Array, hidden_size: int, pair_features: str) -> dict[str, Any]:
        """Initialize the head's parameters, `{}` for a task without a head.

        Kernels are drawn by Flax's `lecun_normal` (variance 1/inputs), biases are 0. PyTorch's
        `nn.Linear` draws both uniformly from ±1/√inputs (variance 1/(3 · inputs)).

        >>> sum(x.size for x in jax.tree.leaves(SST.init_head(jax.random.key(0), 768, "concat")))
        594437
        >>> STS_COSINE.init_head(jax.random.key(0), 768, "concat")
        {}
        """
        if not self.outputs:
            return {}
        x = jnp.zeros((1, self.features(hidden_size, pair_features)))
        return self.head_module(hidden_size, 0.0).init(key, x)["params"]

    def apply_head(
        self,
        params: dict[str, Any],
        u: jax.typing.ArrayLike,
        v: jax.typing.ArrayLike,
        *,
        pair_features: str,
        dropout: float = 0.0,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Apply the head to sentence vectors `u, v: f32[B, H]`; tasks of one vector ignore `v`.

        Args:
          params: the head's parameters, `{}` without a head.
          u, v: vectors of the first and the second sentence of each example; u of a joint pair.
          pair_features: see `heads.pair_vector`.
          dropout: dropout rate of the head, applied if `key` is given.
          key: PRNG key for training; None: evaluation, without dropout.
        """
        u, v = jnp.asarray(u), jnp.asarray(v)
        if not self.outputs:
            return heads.cosine(u, v)
        x = heads.pair_vector(u, v, pair_features) if self.sentences > 1 else u
        rngs = None if key is None else {"dropout": key}
        module = self.head_module(u.shape[-1], dropout)
        return jnp.asarray(module.apply({"params": params}, x, train=key is not None, rngs=rngs))


SENTIMENTS = ("0", "1", "2", "3", "4")  # very negative … very positive
SST = Task("sst", "classification", classes=SENTIMENTS, title="SST-5")
PARA = Task("para", "binary", pair=True, title="Quora")
STS_COSINE = Task("sts", "similarity", pair=True, high=5.0, title="STS-B")
STS_MSE = dataclasses.replace(STS_COSINE, loss="squared_error")

STS_LOSSES = {"mse": STS_MSE, "cosine": STS_COSINE}
NAMES = ("sst", "para", "sts")
# Titles of the built-in data, so that nobody takes it for the public data sets.
MADE_UP = "built-in made-up data"
MADE_UP_TITLES = {
    "sst": "made-up sentiment", "para": "made-up paraphrases", "sts": "made-up similarity",
}  # fmt: skip


def paper_tasks(sts_loss: str = "cosine") -> tuple[Task, ...]:
    """Return the paper's three tasks, STS with the given loss (`mse` or `cosine`).

    >>> [task.name for task in paper_tasks("mse")]
    ['sst', 'para', 'sts']
    """
    return SST, PARA, STS_LOSSES[sts_loss]
