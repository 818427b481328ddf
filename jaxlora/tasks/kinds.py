"""Kinds of tasks: the form of labels, which losses and metrics fit, how outputs are decoded.

A new kind needs an entry in `KINDS`, and one in `LOSSES` if it has its own loss or decoding. The
rest of the library looks everything up in these tables, by kind or by `LabelForm`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxlora.tasks import losses

KindName = Literal["classification", "binary", "multilabel", "ordinal", "regression", "similarity"]
# A label is a class index, a set of classes (0 or 1 for each class), or a score.
LabelForm = Literal["class", "classes", "score"]
SPAN = losses.SPAN

Decode = Callable[[jax.Array], jax.Array]


class Kind(NamedTuple):
    """Properties shared by all tasks of a kind.

    Attributes:
      form: the form of a label.
      losses: names of the allowed losses; the default is the first that fits `pair_encoding`.
      metrics: names of the allowed metrics; the first is the default.
      tuned: whether thresholds are chosen on the dev set by default.
      positive: whether there are exactly two classes, the second being the positive one.
      ordered: whether the classes have an order.
      paired: whether examples must be pairs.
    """

    form: LabelForm
    losses: tuple[str, ...]
    metrics: tuple[str, ...]
    tuned: bool = False
    positive: bool = False
    ordered: bool = False
    paired: bool = False


OF_CLASSES = ("accuracy", "balanced_accuracy", "macro_f1", "f1")
OF_SCORES = ("pearson", "spearman", "mae", "rmse")
KINDS: dict[str, Kind] = {
    "classification": Kind("class", ("cross_entropy",), OF_CLASSES),
    "binary": Kind("class", ("binary_cross_entropy",), OF_CLASSES, positive=True),
    "multilabel": Kind(
        "classes", ("multilabel_cross_entropy",), ("micro_f1", "macro_f1", "accuracy"), tuned=True
    ),
    "ordinal": Kind(
        "class",
        ("ordinal_cross_entropy",),
        ("mae", "spearman", "accuracy", "macro_f1"),
        ordered=True,
    ),
    "regression": Kind("score", ("squared_error",), OF_SCORES),
    "similarity": Kind("score", ("cosine", "squared_error"), OF_SCORES, paired=True),
}


class Loss(NamedTuple):
    """A loss and the decoding of the outputs that it trains.

    Attributes:
      per_example: `(outputs, labels) → f32[B]`.
      outputs: number of classes → number of outputs of the head; 0 means no head.
      decode: outputs → predictions: class indices, 0 or 1 for each class, or scores from 0 to
        `SPAN`. A NaN output gives a NaN prediction.
      probabilities: outputs → `f32[B, classes]`; None for scores.
      problem: the `problem_type` in transformers.
      torch: torch expression that decodes `x: f32[B, outputs]`; 0 stands for a threshold's logit.
      numpy: NumPy expression that decodes `probabilities`; 0.5 is a placeholder for the threshold.
    """

    per_example: Callable[[jax.Array, jax.Array], jax.Array]
    outputs: Callable[[int], int]
    decode: Decode
    probabilities: Decode | None
    problem: str
    torch: str
    numpy: str = ""

    @property
    def thresholded(self) -> bool:
        """Whether each output is a logit compared with a threshold."""
        return self.problem == "multi_label_classification"


def most_probable(logits: jax.Array) -> jax.Array:
    """Return the index of the most probable class, `f32[B, K]` → `f32[B]`."""
    return _unless_nan(logits, jnp.argmax(logits, -1))


def expected_class(logits: jax.Array) -> jax.Array:
    """Return the class nearest to the expected class index, `f32[B, K]` → `f32[B]`.

    `round(Σ_k k · softmax(logits)_k)`; halves round to even.

    >>> expected_class(jnp.array([[0.0, -9.0, 0.0]])).tolist()  # 0 or 2, so 1 is nearest
    [1.0]
    """
    numbers = jnp.arange(logits.shape[-1], dtype=logits.dtype)
    probabilities = jax.nn.softmax(logits)
    # Not a matmul, because accelerators reduce the precision of its inputs.
    expected = jnp.sum(probabilities * numbers.reshape((1,) * (logits.ndim - 1) + (-1,)), -1)
    return _unless_nan(logits, jnp.round(expected))


def _unless_nan(logits: jax.Array, classes: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(logits).any(-1), jnp.nan, classes.astype(jnp.float32))


def positive(logits: jax.Array) -> jax.Array:
    """Return 1 where a logit is above 0, else 0; NaN stays NaN."""
    return jnp.where(jnp.isnan(logits), jnp.nan, (logits > 0).astype(jnp.float32))


def two_probabilities(logits: jax.Array) -> jax.Array:
    """Return the probabilities of both classes from one logit, `f32[B]` → `f32[B, 2]`."""
    found = jax.nn.sigmoid(logits)
    return jnp.stack([1 - found, found], axis=-1)


LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(
        losses.cross_entropy, lambda classes: classes, most_probable, jax.nn.softmax,
        "single_label_classification", "x.argmax(-1)", "probabilities.argmax(-1)",
    ),
    "ordinal_cross_entropy": Loss(
        losses.cross_entropy, lambda classes: classes, expected_class, jax.nn.softmax,
        "single_label_classification",
        "(x.softmax(-1) @ torch.arange(float(x.shape[-1]))).round().long()",
        "(probabilities @ np.arange(probabilities.shape[-1])).round().astype(int)",
    ),
    "binary_cross_entropy": Loss(
        losses.binary_cross_entropy, lambda _: 1, positive, two_probabilities,
        "multi_label_classification", "(x[:, 0] > 0).long()",
        "(probabilities[:, 1] > 0.5).astype(int)",
    ),
    "multilabel_cross_entropy": Loss(
        losses.multilabel_cross_entropy, lambda classes: classes, positive, jax.nn.sigmoid,
        "multi_label_classification", "(x > 0).long()", "(probabilities > 0.5).astype(int)",
    ),
    "squared_error": Loss(
        losses.squared_error, lambda _: 1, lambda x: x, None, "regression", "x[:, 0]",
    ),
    "cosine": Loss(
        losses.cosine_error, lambda _: 0, lambda x: SPAN * x, None, "regression", f"{SPAN} * x",
    ),
}  # fmt: skip
