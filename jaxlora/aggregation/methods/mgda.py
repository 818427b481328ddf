"""MGDA: the shortest convex combination of the gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlora.aggregation.gram import cosines, norms
from jaxlora.aggregation.method import Method, member, of_gram
from jaxlora.aggregation.qp import nonneg_qp


def shortest(K: jax.Array) -> jax.Array:
    """Return the `α` in the simplex with the smallest `αᵀ K α`, `f32[T]`.

    It is `y / Σ y` for the `y ≥ 0` that minimizes `½ yᵀ K y − Σ y`. That is solved with cosines,
    for `u = y · norms`, so that very different norms are no problem.

    >>> shortest(jnp.array([[1.0, 0.0], [0.0, 3.0]])).round(4).tolist()
    [0.75, 0.25]
    """
    lengths = norms(K)
    least = jnp.min(lengths)
    relative = least / jnp.where(lengths > 0, lengths, 1)
    y = relative * nonneg_qp(cosines(K), -relative)
    one = jax.nn.one_hot(jnp.argmin(lengths), len(K), dtype=K.dtype)
    return jnp.where(least > 0, y / jnp.sum(jnp.where(least > 0, y, one)), one)


@member(
    "Désidéri 2012; Sener & Koltun 2018",
    "non-conflicting", "permutation", "homogeneous", "stationary", "unit",
)  # fmt: skip
def mgda() -> Method:
    """Take the shortest vector in the convex hull of the gradients.

    It is the direction of steepest common descent, `w = argmin αᵀ K α` over the simplex: Désidéri
    2012, "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization", theorem 2.1;
    Sener & Koltun 2018, "Multi-Task Learning as Multi-Objective Optimization", equation 3. Small
    gradients dominate; a zero gradient makes the update zero.
    """
    return of_gram("mgda", shortest)
