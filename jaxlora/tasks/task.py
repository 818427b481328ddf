"""What a task is: its sentences, its labels, its head, its loss and its metric, as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.nn import heads
from jaxlora.tasks import losses, metrics

KindName = Literal["classification", "binary", "regression", "similarity"]
HeadName = Literal["mlp", "pooler"]


class Kind(NamedTuple):
    """What a kind of task allows; the first loss and the first metric are its defaults."""

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
      activation: between them, by its name in both flax.linen and torch.
      pooling: how it needs sentences to be pooled; None: any way.
      scaled: whether scores come out from 0 to `SPAN`; else they are the labels' own, of any range.
    """

    first: str
    activation: str
    pooling: str | None
    scaled: bool


HEADS: dict[str, HeadKind] = {
    "mlp": HeadKind("hidden", "relu", None, True),
    "pooler": HeadKind("pooler", "tanh", "cls", False),  # BertForSequenceClassification's
}
LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "cross_entropy": losses.cross_entropy,
    "binary_cross_entropy": losses.binary_cross_entropy,
    "squared_error": losses.squared_error,
    "cosine": losses.cosine_error,
}
# Inside, scores go from 0 to 5 as STS-B's do, so that no head must reach for large numbers.
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
    """One task; everything that differs between tasks stands here and nowhere else.

    Attributes:
      name: short name, used in flags, trees and file names.
      kind: see `KINDS`.
      pair: whether an example is two sentences.
      low, high: the range of the labels; of classes, the first and the last number.
      classes: names of the classes, in the order of their numbers.
      loss: `cross_entropy`, `binary_cross_entropy`, `squared_error`, or `cosine`, which has no head
        and reads the cosine of the two vectors; default: the kind's.
      metric: see `METRICS`; default: the kind's. `f1` is that of the second class where there are
        two, and with more classes another name of `macro_f1`.
      title: the name people know it by; default: the name.
      head: see `HEADS`.

    Raises:
      ValueError: for what does not go together.

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

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is not one of {', '.join(KINDS)}")
        kind, fill = KINDS[self.kind], object.__setattr__
        fill(self, "loss", self.loss or kind.losses[0])
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

    def _check_labels(self) -> None:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes: a name stands there twice ({', '.join(self.classes)})")
        if self.kind == "classification" and len(self.classes) < 2:
            raise ValueError("classes: name at least two")
        if self.kind == "binary" and len(self.classes) != 2:
            raise ValueError("classes: a binary task has two, the second is the positive one")
        if self.classes and not self.integer:
            raise ValueError(f"classes do not go with {self.kind}")
        if not -float("inf") < self.low < self.high < float("inf"):
            raise ValueError(f"the labels' range {self.low:g} to {self.high:g} is empty")
        if self.kind == "similarity" and not self.pair:
            raise ValueError("a similarity is between two texts; name two columns")
        if self.head == "pooler" and (self.pair or not self.outputs):
            raise ValueError("a pooler's head reads one sentence")

    @property
    def integer(self) -> bool:
        """Whether labels are whole numbers, that is classes."""
        return KINDS[self.kind].integer

    @property
    def outputs(self) -> int:
        """Outputs of the head; 0 means no head."""
        return {"cross_entropy": len(self.classes), "cosine": 0}.get(self.loss, 1)

    @property
    def metric_name(self) -> str:
        """What to call the metric."""
        return METRICS[self._metric][0]

    def score(self, predictions: np.ndarray, labels: np.ndarray) -> float:
        """The metric of predictions; higher is better, and NaN where a prediction is NaN."""
        return METRICS[self._metric][1](predictions, labels)

    @property
    def _metric(self) -> str:
        # By the task's classes, not by those that happen to occur.
        return "macro_f1" if self.metric == "f1" and len(self.classes) > 2 else self.metric

    def per_example_loss(self, outputs: jax.Array, labels: jax.Array) -> jax.Array:
        """`(outputs, labels f32[B]) → f32[B]`; scores are on a scale of 0 to `SPAN` here."""
        if not self.integer and HEADS[self.head].scaled:
            labels = (labels - self.low) * (SPAN / (self.high - self.low))
        return LOSSES[self.loss](outputs, labels)

    def decode(self, outputs: jax.Array) -> jax.Array:
        """Outputs → predictions `f32[B]` on the label's scale: a class's number, or a score.

        An output that is NaN gives NaN, for classes too.
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
        """Cosines → scores `f32[B]` on the label's scale, as `decode` does with the cosine loss."""
        return self._on_scale(SPAN * cosines)

    def _on_scale(self, inner: jax.Array) -> jax.Array:
        scores = self.low + inner * ((self.high - self.low) / SPAN)
        return jnp.clip(scores, self.low, self.high)

    def probabilities(self, outputs: jax.Array) -> jax.Array | None:
        """Outputs → `f32[B, classes]`; None for a task with scores."""
        if self.loss == "cross_entropy":
            return jax.nn.softmax(outputs)
        if self.loss == "binary_cross_entropy":
            positive = jax.nn.sigmoid(outputs)
            return jnp.stack([1 - positive, positive], axis=-1)
        return None

    @property
    def sentences(self) -> int:
        """Sentences in an example: 1 or 2."""
        return 2 if self.pair else 1

    def features(self, hidden_size: int, pair_features: str) -> int:
        """Width of what the head reads."""
        return hidden_size * ((4 if pair_features == "interaction" else 2) if self.pair else 1)

    def head_module(self, hidden_size: int, dropout: float) -> heads.Head:
        """The head module; a pair task's hidden layer is half as wide (the paper's sizes)."""
        kind, width = HEADS[self.head], hidden_size // self.sentences
        return heads.Head(width, self.outputs, dropout, kind.first, kind.activation)

    def init_head(self, key: jax.Array, hidden_size: int, pair_features: str) -> dict[str, Any]:
        """Draw fresh head parameters, `{}` for a task without a head.

        Kernels are flax's `lecun_normal` (variance 1/inputs), biases 0. `torch.nn.Linear` would
        draw both uniformly from ±1/√inputs (variance 1/(3 · inputs)).

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
        """Head outputs for sentence vectors `u, v: f32[B, H]` (`v` is ignored by single tasks).

        Args:
          params: this task's head tree, `{}` where it has none.
          u, v: first and second sentence of each example.
          pair_features: see `heads.pair_vector`.
          dropout: head dropout, used when a `key` is given.
          key: PRNG key; None means evaluation.
        """
        u, v = jnp.asarray(u), jnp.asarray(v)
        if not self.outputs:
            return heads.cosine(u, v)
        x = heads.pair_vector(u, v, pair_features) if self.pair else u
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
# What the built-in data is called, and each task's: it is not the data set of the same kind.
MADE_UP = "built-in made-up data"
MADE_UP_TITLES = {
    "sst": "made-up sentiment", "para": "made-up paraphrases", "sts": "made-up similarity",
}  # fmt: skip


def paper_tasks(sts_loss: str = "cosine") -> tuple[Task, ...]:
    """The paper's three tasks, STS with the loss asked for (`mse` or `cosine`).

    >>> [task.name for task in paper_tasks("mse")]
    ['sst', 'para', 'sts']
    """
    return SST, PARA, STS_LOSSES[sts_loss]
