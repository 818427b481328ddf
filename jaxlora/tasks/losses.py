"""Per-example losses, so that the caller can mask and average.

Every function takes a batch and returns `f32[B]`. Only `masked_mean` reduces over the batch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

# Heads output scores from 0 to 5, as in STS-B, so that no head has to learn a large scale.
SPAN = 5.0


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Compute the softmax cross-entropy with class indices.

    Args:
      logits: `f32[B, K]`.
      labels: `f32[B]`, classes `0 … K-1` (the labels of all tasks are floats; they are cast here).

    Returns:
      `f32[B]`: `-log softmax(logits)[label]`, in nats.

    >>> round(cross_entropy(jnp.zeros((1, 5)), jnp.array([3.0])).item(), 4)
    1.6094
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels.astype(jnp.int32))


def binary_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Compute the sigmoid cross-entropy of one logit.

    Args:
      logits: `f32[B]`.
      labels: `f32[B]`, 0 or 1.

    Returns:
      `f32[B]`: `-y log σ(z) - (1-y) log(1-σ(z))`, in nats.
    """
    return optax.sigmoid_binary_cross_entropy(logits, labels)


def multilabel_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Compute the sigmoid cross-entropy averaged over K classes.

    Args:
      logits: `f32[B, K]`.
      labels: `f32[B, K]`, 1 for each class of an example, else 0.

    Returns:
      `f32[B]`, in nats.

    >>> round(multilabel_cross_entropy(jnp.zeros((1, 3)), jnp.array([[1.0, 0, 1]])).item(), 4)
    0.6931
    """
    return jnp.mean(binary_cross_entropy(logits, labels), axis=-1)


def squared_error(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """Compute the squared error `(score - y)²` on the scale of the labels.

    >>> squared_error(jnp.array([4.0]), jnp.array([2.5])).tolist()
    [2.25]
    """
    return jnp.square(scores - labels)


def cosine_error(cosines: jax.Array, labels: jax.Array) -> jax.Array:
    """Compute the squared error `(cos - y/5)²` of cosines, for similarities y from 0 to 5.

    Fuest & Tacke, "Low Rank Adaptation for Multitask BERT", section 4 (the cosine loss of STS).

    >>> cosine_error(jnp.array([1.0, 0.5]), jnp.array([5.0, 0.0])).tolist()
    [0.0, 0.25]
    """
    return jnp.square(cosines - labels / SPAN)


def masked_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Compute the weighted mean over the last axis: `Σ w·v / Σ w`, or 0 if all weights are 0.

    Args:
      values: `f32[..., B]`.
      weights: `f32[..., B]`, 1 for a real example and 0 for padding.

    >>> masked_mean(jnp.array([1.0, 3.0, 100.0]), jnp.array([1.0, 1.0, 0.0])).item()
    2.0
    """
    total = jnp.sum(weights, axis=-1)
    return jnp.sum(values * weights, axis=-1) / jnp.where(total > 0, total, 1.0)
