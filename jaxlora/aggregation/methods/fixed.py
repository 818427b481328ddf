"""Weights that do not depend on the gradients: sum, mean, constant."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from jaxlora.aggregation.method import Method, member, of_gram, preference_of


@member("plain multitask training", "permutation", "homogeneous", "linear", "unit")
def sum() -> Method:
    """Sum the gradients, `w = 1`: the gradient of the sum of the losses."""
    return of_gram("sum", lambda K: jnp.ones_like(K[0]))


@member("plain multitask training", "permutation", "homogeneous", "linear", "unit")
def mean() -> Method:
    """Average the gradients, `w = 1/T`: the gradient of the mean of the losses."""
    return of_gram("mean", lambda K: jnp.full_like(K[0], 1 / len(K)))


@member("plain multitask training", "homogeneous", "linear", "unit")
def constant(weights: Sequence[float] | None = None) -> Method:
    """Weight the gradients by fixed numbers.

    Args:
      weights: one for each task; all 1 if not given.
    """
    return of_gram("constant", lambda K: preference_of(weights, len(K)))
