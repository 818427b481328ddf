"""What a task is: its sentences, its labels, its head, its loss and its metric, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import heads, losses, metrics


@dataclasses.dataclass(frozen=True)
class Task:
    """One task of the run; everything that differs between tasks stands here and nowhere else.

    Attributes:
      name: short name, used in flags, trees and file names.
      title: the name people know it by.
      pair: whether an example is two sentences.
      low, high: the range of the labels.
      integer: whether labels are whole numbers.
      outputs: outputs of the head; 0 means no head (the loss reads the cosine of the two vectors).
      loss: `(outputs, labels f32[B]) -> f32[B]`.
      decode: `outputs -> predictions f32[B]` on the label's scale.
      metric: `(predictions, labels) -> float`, higher is better.
      metric_name: what to call that number.
    """

    name: str
    title: str
    pair: bool
    low: float
    high: float
    integer: bool
    outputs: int
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    decode: Callable[[jax.Array], jax.Array]
    metric: Callable[[np.ndarray, np.ndarray], float]
    metric_name: str

    @property
    def sentences(self) -> int:
        """Sentences in an example: 1 or 2."""
        return 2 if self.pair else 1

    def features(self, hidden_size: int, pair_features: str) -> int:
        """Width of what the head reads."""
        return hidden_size * ((4 if pair_features == "interaction" else 2) if self.pair else 1)

    def head(self, hidden_size: int, dropout: float) -> heads.Head:
        """The head module; a pair task's hidden layer is half as wide (the paper's sizes)."""
        return heads.Head(hidden_size // self.sentences, self.outputs, dropout)

    def init_head(self, key: jax.Array, hidden_size: int, pair_features: str) -> dict[str, Any]:
        """Fresh head parameters (`{}` for a task without a head), as in `torch.nn.Linear`'s scale.

        >>> sum(x.size for x in jax.tree.leaves(SST.init_head(jax.random.key(0), 768, "concat")))
        594437
        >>> STS_COSINE.init_head(jax.random.key(0), 768, "concat")
        {}
        """
        if not self.outputs:
            return {}
        x = jnp.zeros((1, self.features(hidden_size, pair_features)))
        return self.head(hidden_size, 0.0).init(key, x)["params"]

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
        module = self.head(u.shape[-1], dropout)
        return jnp.asarray(module.apply({"params": params}, x, train=key is not None, rngs=rngs))


def _clip_score(scores: jax.Array) -> jax.Array:
    return jnp.clip(scores, 0.0, 5.0)


SST = Task(
    "sst", "SST-5", False, 0, 4, True, 5,
    losses.cross_entropy, lambda z: jnp.argmax(z, -1).astype(jnp.float32),
    metrics.accuracy, "accuracy",
)  # fmt: skip
PARA = Task(
    "para", "Quora", True, 0, 1, True, 1,
    losses.binary_cross_entropy, lambda z: (z > 0).astype(jnp.float32),
    metrics.accuracy, "accuracy",
)  # fmt: skip
STS_MSE = Task(
    "sts", "STS-B", True, 0, 5, False, 1,
    losses.squared_error, _clip_score,
    metrics.pearson, "Pearson r",
)  # fmt: skip
STS_COSINE = dataclasses.replace(
    STS_MSE, outputs=0, loss=losses.cosine_error, decode=lambda c: _clip_score(5.0 * c)
)

STS_LOSSES = {"mse": STS_MSE, "cosine": STS_COSINE}
NAMES = ("sst", "para", "sts")


def tasks(sts_loss: str = "cosine") -> dict[str, Task]:
    """The three tasks by name, STS with the loss asked for (`mse` or `cosine`).

    >>> list(tasks("mse"))
    ['sst', 'para', 'sts']
    """
    return {t.name: t for t in (SST, PARA, STS_LOSSES[sts_loss])}
