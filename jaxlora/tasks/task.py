"""The definition of a task: its sentences, labels, head, loss and metric."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.nn import heads
from jaxlora.nn.heads import HeadName
from jaxlora.tasks import thresholds
from jaxlora.tasks.kinds import KINDS, LOSSES, SPAN, Kind, KindName, LabelForm, Loss
from jaxlora.tasks.metrics import METRICS, Metric

TrainedHead = Literal["mlp", "classifier"]
PairEncoding = Literal["separate", "joint"]


class HeadKind(NamedTuple):
    """A head with one hidden layer.

    Attributes:
      first: name of the first layer; the second is `out`.
      activation: activation between the layers, see `bert.ACTIVATIONS`.
      pooling: sentence pooling that the head requires; None: any.
      scaled: whether it outputs scores from 0 to `SPAN`; otherwise they are on the labels' scale.
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
    # A placeholder: before training starts, it is replaced by the head of the base's family.
    "classifier": HeadKind("", "", "cls", False),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """One task: everything that differs between tasks is defined here.

    Attributes:
      name: short name, used in flags, parameter trees and file names.
      kind: see `KINDS`.
      pair: whether an example is a pair of sentences.
      pair_encoding: `separate`: one vector per sentence of a pair; `joint`: one vector for both,
        which the encoder reads together, as in `[CLS] a [SEP] b [SEP]`.
      low, high: the range of the labels; for classes, the first and the last index.
      classes: names of the classes, in the order of their indices.
      loss: see `kinds.LOSSES`; `cosine` needs no head and uses the cosine of the two vectors;
        default: the first loss of the kind that fits `pair_encoding`.
      metric: see `metrics.METRICS`; default: the first metric of the kind. `f1` is the F1 score of
        the second of two classes; with more classes it is `macro_f1`.
      title: name for tables and messages; default: `name`.
      head: see `HEADS`.
      thresholds: for each output, the probability above which it is positive; `()`: 0.5.
      tune_thresholds: whether to choose thresholds on the dev set; default: see `Kind.tuned`.
      class_weights: factor of the loss for each class; `balanced`: derived from the class counts
        of the training set, see `weighted`; `()`: 1.
      label_delimiter: separates the class names of a label set.

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
    thresholds: tuple[float, ...] = dataclasses.field(default=(), kw_only=True)
    tune_thresholds: bool | None = dataclasses.field(default=None, kw_only=True)
    class_weights: Literal["balanced"] | tuple[float, ...] = dataclasses.field(
        default=(), kw_only=True
    )
    label_delimiter: str = dataclasses.field(default="|", kw_only=True)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is not one of {', '.join(KINDS)}")
        kind, fill = KINDS[self.kind], object.__setattr__
        fill(self, "loss", self.loss or next(n for n in kind.losses if self._fits(n)))
        fill(self, "metric", self.metric or kind.metrics[0])
        fill(self, "title", self.title or self.name)
        if self.tune_thresholds is None:
            fill(self, "tune_thresholds", kind.tuned and not self.thresholds)
        if kind.form != "score":
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
        self._check_decisions()
        self._check_pair()

    def _fits(self, loss: str) -> bool:
        return loss != "cosine" or self.pair_encoding == "separate"

    def _check_pair(self) -> None:
        if self._kind.paired and not self.pair:
            raise ValueError(f"a {self.kind} task needs two sentences; name two text columns")
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
        if self.form != "score" and len(self.classes) < 2:
            raise ValueError("classes: name at least two")
        if self._kind.positive and len(self.classes) != 2:
            raise ValueError(f"classes: a {self.kind} task has two, the second is the positive one")
        if self.classes and self.form == "score":
            raise ValueError(f"classes do not go with {self.kind}")
        if self.form == "classes":
            check_names(self.classes, self.label_delimiter)
        if not -float("inf") < self.low < self.high < float("inf"):
            raise ValueError(f"the labels' range {self.low:g} to {self.high:g} is empty")

    def _check_decisions(self) -> None:
        if (self.thresholds or self.tune_thresholds) and not self.thresholded:
            raise ValueError(f"threshold: {self.kind} has none; it is for binary and multilabel")
        if self.thresholds and len(self.thresholds) != self.outputs:
            raise ValueError(f"thresholds: {len(self.thresholds)} are given for {self.outputs}")
        if not all(0 < one < 1 for one in self.thresholds):
            raise ValueError(f"threshold: must be above 0 and below 1, not {self.thresholds}")
        if self.class_weights and self.form != "class":
            raise ValueError(f"class_weights: {self.kind} has no single class per example")
        if isinstance(self.class_weights, tuple) and self.class_weights:
            if len(self.class_weights) != len(self.classes):
                raise ValueError(f"class_weights: give one for each of {', '.join(self.classes)}")
            if not all(0 < one < math.inf for one in self.class_weights):
                raise ValueError("class_weights: must be above 0")

    @property
    def _kind(self) -> Kind:
        return KINDS[self.kind]

    @property
    def _loss(self) -> Loss:
        return LOSSES[self.loss]

    @property
    def form(self) -> LabelForm:
        """The form of a label: a class index, a set of classes, or a score."""
        return self._kind.form

    @property
    def positive(self) -> str | None:
        """Name of the positive class; None unless the task is binary."""
        return self.classes[1] if self._kind.positive else None

    @property
    def label_shape(self) -> tuple[int, ...]:
        """Shape of one label and one prediction: `()`, or `(classes,)` for multilabel tasks."""
        return (len(self.classes),) if self.form == "classes" else ()

    @property
    def outputs(self) -> int:
        """Number of outputs of the head; 0 means no head."""
        return self._loss.outputs(len(self.classes))

    @property
    def problem(self) -> str:
        """The `problem_type` in transformers."""
        return self._loss.problem

    @property
    def thresholded(self) -> bool:
        """Whether each output is a logit compared with a threshold."""
        return self._loss.thresholded

    @property
    def metrics(self) -> dict[str, Metric]:
        """Metrics that fit the kind, by name; synonyms appear once."""
        found = dict.fromkeys(self._resolve(name) for name in self._kind.metrics)
        return {name: METRICS[name] for name in found}

    @property
    def metric_name(self) -> str:
        """Name of the metric for tables and messages."""
        return self._metric.title

    @property
    def greater_is_better(self) -> bool:
        """Whether a higher metric is better."""
        return self._metric.greater

    def score(self, predictions: np.ndarray, labels: np.ndarray) -> float:
        """Compute the metric; NaN if any prediction or label is NaN."""
        return self._metric.compute(predictions, labels)

    def gain(self, score: float) -> float:
        """Return the score with the sign that makes higher better: errors are negated."""
        return score if self.greater_is_better else -score

    @property
    def _metric(self) -> Metric:
        return METRICS[self._resolve(self.metric)]

    def _resolve(self, metric: str) -> str:
        # Depends on the task's classes, not on those that occur in the data.
        return "macro_f1" if metric == "f1" and len(self.classes) > 2 else metric

    def per_example_loss(self, outputs: jax.Array, labels: jax.Array) -> jax.Array:
        """Compute the loss of each example, times the weight of its class.

        Scores are rescaled to 0 … `SPAN` if the head outputs them on that scale.

        Args:
          outputs: outputs of the head, or cosines if there is no head.
          labels: `f32[B]`, or `f32[B, K]` for multilabel tasks.

        Returns:
          `f32[B]`.

        Raises:
          ValueError: if `class_weights` is still `balanced`; call `weighted` first.
        """
        if self.form == "score" and HEADS[self.head].scaled:
            labels = (labels - self.low) * (SPAN / (self.high - self.low))
        loss = self._loss.per_example(outputs, labels)
        if isinstance(self.class_weights, str):
            raise ValueError(f"{self.name}: class_weights {self.class_weights!r} need the labels")
        if not self.class_weights:
            return loss
        return loss * jnp.array(self.class_weights, jnp.float32)[labels.astype(jnp.int32)]

    def weighted(self, labels: np.ndarray) -> Task:
        """Return the task with balanced class weights replaced by numbers.

        Balanced weights follow scikit-learn: `E / (classes · E_k)` for a class with E_k of E
        examples. All classes then have the same share of the loss, and the mean weight is 1.

        Args:
          labels: `f32[E]`, labels of the training set.

        >>> spam = Task("spam", "binary", class_weights="balanced")
        >>> spam.weighted(np.array([0, 0, 0, 1])).class_weights
        (0.6666666666666666, 2.0)
        """
        if self.class_weights != "balanced":
            return self
        counts = np.bincount(labels.astype(int), minlength=len(self.classes))
        weights = len(labels) / (len(self.classes) * np.maximum(counts, 1))
        return dataclasses.replace(self, class_weights=tuple(weights.tolist()))

    def tuned(self, outputs: np.ndarray, labels: np.ndarray) -> Task:
        """Return the task with thresholds chosen on labelled examples if `tune_thresholds` is set.

        The threshold of a binary task maximizes its metric (F1 if not in `thresholds.MEASURES`),
        those of a multilabel task the F1 score of each class. NaN outputs leave the task unchanged.

        Args:
          outputs: outputs of the head.
          labels: `f32[E]`, or `f32[E, K]` for multilabel tasks.
        """
        if not self.tune_thresholds or np.isnan(outputs).any():
            return self
        columns = (np.reshape(x, (len(labels), self.outputs)).T for x in (outputs, labels))
        measure = self.metric if self.metric in thresholds.MEASURES else "f1"
        if self.form == "classes":
            measure = "f1"
        chosen = [
            thresholds.choose(_sigmoid(logits), own, measure)[0]
            for logits, own in zip(*columns, strict=True)
        ]
        return dataclasses.replace(self, thresholds=tuple(chosen))

    @property
    def cuts(self) -> np.ndarray:
        """Thresholds as logits: `f32[outputs]`, or `f32[]` for a single output."""
        found = np.array([math.log(p) - math.log1p(-p) for p in self.thresholds], np.float32)
        return found[0] if self.outputs == 1 else found

    def decode(self, outputs: jax.Array) -> jax.Array:
        """Convert outputs to predictions.

        A NaN output gives a NaN prediction, also for classes.

        Returns:
          `f32[B]`, class indices or scores; for multilabel tasks `f32[B, K]` of 0 and 1.
        """
        if self.thresholds:
            outputs = outputs - self.cuts[None]
        found = self._loss.decode(outputs)
        on_scale = self.form == "score" and HEADS[self.head].scaled
        return self._on_scale(found) if on_scale else found

    def decode_cosine(self, cosines: jax.Array) -> jax.Array:
        """Convert cosines to scores `f32[B]` on the labels' scale."""
        return self._on_scale(SPAN * cosines)

    def _on_scale(self, inner: jax.Array) -> jax.Array:
        scores = self.low + inner * ((self.high - self.low) / SPAN)
        return jnp.clip(scores, self.low, self.high)

    def probabilities(self, outputs: jax.Array) -> jax.Array | None:
        """Convert outputs to probabilities `f32[B, classes]`; None for a task with scores."""
        convert = self._loss.probabilities
        return None if convert is None else convert(outputs)

    @property
    def texts(self) -> int:
        """Number of sentences in an example: 1 or 2."""
        return 2 if self.pair else 1

    @property
    def joint(self) -> bool:
        """Whether the encoder reads both sentences of a pair together."""
        return self.pair_encoding == "joint"

    @property
    def sentences(self) -> int:
        """Number of sentence vectors per example: 2 for separately encoded pairs, else 1."""
        return 1 if self.joint else self.texts

    def encoded(self, texts: tuple[str, ...]) -> list[str | tuple[str, ...]]:
        """Return the tokenizer inputs of an example: each text, or one tuple for a joint pair.

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
        """Build the head; with two vectors its hidden layer is half as wide, as in the paper."""
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
        features = self.features(hidden_size, pair_features)
        return heads.init(self.head_module(hidden_size, 0.0), key, features)

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
        """Apply the head to sentence vectors `u, v: f32[B, H]`; tasks with one vector ignore `v`.

        Args:
          params: the head's parameters, `{}` without a head.
          u, v: vectors of the first and second sentence; for joint pairs, `u` is that of the pair.
          pair_features: see `heads.pair_vector`.
          dropout: dropout rate of the head, applied if `key` is given.
          key: PRNG key for training; None: evaluation without dropout.
        """
        u, v = jnp.asarray(u), jnp.asarray(v)
        if not self.outputs:
            return heads.cosine(u, v)
        x = heads.pair_vector(u, v, pair_features) if self.sentences > 1 else u
        rngs = None if key is None else {"dropout": key}
        module = self.head_module(u.shape[-1], dropout)
        return jnp.asarray(module.apply({"params": params}, x, train=key is not None, rngs=rngs))


def check_names(names: tuple[str, ...], delimiter: str) -> None:
    """Check that class names can be joined by a delimiter in one cell.

    Raises:
      ValueError: if the delimiter is unusable, or a name is blank or contains it.
    """
    if not delimiter or any(c in '"\r\n' for c in delimiter):
        raise ValueError(f"label_delimiter: {delimiter!r} cannot separate names; take one like '|'")
    if not all(map(str.strip, names)):
        raise ValueError("classes: a name is blank")
    if odd := [name for name in names if delimiter in name]:
        raise ValueError(
            f"label_delimiter: {delimiter!r} is in the name {odd[0]!r}; choose another"
        )


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    """Compute `1 / (1 + exp(-x))` in float64 without overflow."""
    return np.asarray(1 / (1 + np.exp(-np.clip(logits.astype(np.float64), -700, 700))))


SENTIMENTS = ("0", "1", "2", "3", "4")  # very negative … very positive
SST = Task("sst", "classification", classes=SENTIMENTS, title="SST-5")
PARA = Task("para", "binary", pair=True, title="Quora")
STS_COSINE = Task("sts", "similarity", pair=True, high=5.0, title="STS-B")
STS_MSE = dataclasses.replace(STS_COSINE, loss="squared_error")

STS_LOSSES = {"mse": STS_MSE, "cosine": STS_COSINE}
NAMES = ("sst", "para", "sts")
# Titles of the built-in data, so that nobody mistakes it for the public datasets.
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
