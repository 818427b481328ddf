"""Task heads: from pooled sentence vectors to one prediction per example."""

from __future__ import annotations

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlora.nn import ops
from jaxlora.nn.bert import ACTIVATIONS

HeadName = Literal["mlp", "pooler", "dense_relu", "dense_gelu", "classifier"]
_EXACT = ops.precision_of(jnp.float32)


def pair_vector(u: jax.Array, v: jax.Array, kind: str) -> jax.Array:
    """Return the input of a pair head from two sentence vectors.

    Args:
      u, v: `f32[B, H]`.
      kind: `concat` gives `[u, v]` (`f32[B, 2H]`, as in the paper); `interaction` gives
        `[u, v, |u-v|, u·v]` (`f32[B, 4H]`; Conneau et al. 2017, "Supervised Learning of
        Universal Sentence Representations", section 3.1).

    >>> pair_vector(jnp.array([[1.0]]), jnp.array([[3.0]]), "interaction").tolist()
    [[1.0, 3.0, 2.0, 3.0]]
    """
    parts = {"concat": (u, v), "interaction": (u, v, jnp.abs(u - v), u * v)}[kind]
    return jnp.concatenate(parts, axis=-1)


def cosine(u: jax.Array, v: jax.Array) -> jax.Array:
    """Compute the cosine between vectors, `f32[..., H]` → `f32[...]`; 0 for zero vectors.

    >>> cosine(jnp.array([3.0, 4.0]), jnp.array([6.0, 8.0])).item()
    1.0
    """
    squares = jnp.sum(u * u, -1) * jnp.sum(v * v, -1)
    zero = squares == 0  # False for NaN, so that the cosine is NaN
    return jnp.where(zero, 0.0, jnp.sum(u * v, -1) * jax.lax.rsqrt(jnp.where(zero, 1.0, squares)))


class Head(nn.Module):
    """Linear → activation → Dropout → Linear, in float32.

    With ReLU it is the paper's head. With tanh and the name `pooler` it is BERT's pooler and
    classifier. The classifiers of other families differ only in the activation.

    Attributes:
      hidden: width of the hidden layer.
      outputs: number of outputs; an output axis of size 1 is squeezed.
      dropout: dropout rate of the hidden units.
      first: name of the first layer.
      activation: key of `bert.ACTIVATIONS`.
    """

    hidden: int
    outputs: int
    dropout: float = 0.1
    first: str = "hidden"
    activation: str = "relu"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Map `f32[B, F]` to `f32[B, outputs]`, or `f32[B]` for one output."""
        x = nn.Dense(self.hidden, precision=_EXACT, name=self.first)(x)
        x = ACTIVATIONS[self.activation](x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        y = nn.Dense(self.outputs, precision=_EXACT, name="out")(x)
        return y[..., 0] if self.outputs == 1 else y


@functools.partial(jax.jit, static_argnums=(0, 2))
def init(head: Head, key: jax.Array, features: int) -> dict[str, Any]:
    """Initialize a head's parameters for inputs with `features` features, in one program."""
    params: dict[str, Any] = head.init(key, jnp.zeros((1, features)))["params"]
    return params
