"""Task heads: from the pooled sentence vectors to one prediction per example."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp


def pair_vector(u: jax.Array, v: jax.Array, kind: str) -> jax.Array:
    """What a pair head sees of two sentence vectors.

    Args:
      u, v: `f32[B, H]`.
      kind: `concat` gives `[u, v]` (`f32[B, 2H]`, the paper's); `interaction` gives
        `[u, v, |u-v|, u·v]` (`f32[B, 4H]`; Conneau et al. 2017, "Supervised Learning of
        Universal Sentence Representations", section 3.1).

    >>> pair_vector(jnp.array([[1.0]]), jnp.array([[3.0]]), "interaction").tolist()
    [[1.0, 3.0, 2.0, 3.0]]
    """
    parts = {"concat": (u, v), "interaction": (u, v, jnp.abs(u - v), u * v)}[kind]
    return jnp.concatenate(parts, axis=-1)


def cosine(u: jax.Array, v: jax.Array) -> jax.Array:
    """Cosine of the angle between vectors `f32[..., H]` → `f32[...]`, safe (0) for zero vectors.

    >>> cosine(jnp.array([3.0, 4.0]), jnp.array([6.0, 8.0])).item()
    1.0
    """
    squares = jnp.sum(u * u, -1) * jnp.sum(v * v, -1)
    safe = jnp.where(squares > 0, squares, 1.0)
    return jnp.where(squares > 0, jnp.sum(u * v, -1) * jax.lax.rsqrt(safe), 0.0)


class Head(nn.Module):
    """Linear → ReLU → Dropout → Linear, as in the paper.

    Attributes:
      hidden: width of the hidden layer.
      outputs: number of outputs; 1 is squeezed away.
      dropout: probability of zeroing a hidden unit in training.
    """

    hidden: int
    outputs: int
    dropout: float = 0.1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """`f32[B, F]` → `f32[B, outputs]`, or `f32[B]` for one output."""
        x = nn.relu(nn.Dense(self.hidden, name="hidden")(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        y = nn.Dense(self.outputs, name="out")(x)
        return y[..., 0] if self.outputs == 1 else y
