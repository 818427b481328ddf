"""CAGrad: the best worst-case gain near the mean gradient."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlora.aggregation.gram import cosines, norms
from jaxlora.aggregation.method import Method, check_range, member, of_gram
from jaxlora.aggregation.qp import nonneg_qp

_MOST_STEPS = 40


class _Level(NamedTuple):
    level: jax.Array
    u: jax.Array
    step: jax.Array
    go: jax.Array


def conflict_averse(K: jax.Array, c: float) -> jax.Array:
    """Return the weights of CAGrad, `f32[T]`.

    The update `d` solves `max_d min_i g_i·d` with `‖d − g₀‖ ≤ c ‖g₀‖`, where `g₀` is the mean. For
    a given worst-case gain ν, the `d` nearest to `g₀` with `g_i·d ≥ ν` is `g₀ + Σ y_i g_i`, where
    `y ≥ 0` solves a small quadratic program. Its distance `h(ν)` is convex and grows with ν, with
    slope `Σ y / h`, so Newton's method from above finds `h(ν) = c ‖g₀‖`.
    """
    T, C, lengths = len(K), cosines(K), norms(K)
    size = jnp.max(lengths)
    d = lengths / jnp.where(size > 0, size, 1)
    inverse = jnp.where(d > 0, 1 / jnp.where(d > 0, d, 1), 0)
    onto = C @ d / T  # the mean's projections onto the unit gradients
    radius = c * jnp.sqrt(jnp.maximum(d @ onto / T, 0))
    highest = jnp.min(jnp.where(d > 0, d * (onto + radius), jnp.inf))

    def lower(s: _Level) -> _Level:
        u = nonneg_qp(C, onto - s.level * inverse)
        h = jnp.sqrt(jnp.maximum(u @ C @ u, 0))
        slope = jnp.sum(u * inverse) / jnp.where(h > 0, h, 1)
        level = s.level - (h - radius) / jnp.where(slope > 0, slope, 1)
        noise = 4 * T * jnp.finfo(K.dtype).eps * radius
        return _Level(level, u, s.step + 1, (h - radius > noise) & (slope > 0))

    start = _Level(highest, jnp.zeros_like(d), jnp.int32(0), radius > 0)
    end = jax.lax.while_loop(lambda s: s.go & (s.step < _MOST_STEPS), lower, start)
    return 1 / T + end.u * inverse


@member("Liu et al. 2021a", "permutation", "homogeneous")
def cagrad(c: float = 0.5) -> Method:
    """Maximize the gain of the worst-off task within a ball around the mean gradient.

    The update is `g₀ + (c ‖g₀‖ / ‖g_w‖) g_w`, where w minimizes `g_w·g₀ + c ‖g₀‖ ‖g_w‖` over the
    simplex: Liu et al. 2021, "Conflict-Averse Gradient Descent for Multi-task Learning", algorithm
    1. Zero gradients are left out of the worst case. Converges to a minimum of the mean loss if
    `c < 1`.

    Args:
      c: radius of the ball, relative to the norm of the mean. 0 gives the mean; with 1 or more, the
        update conflicts with no task.
    """
    check_range("c", c, 0)
    return of_gram("cagrad", lambda K: conflict_averse(K, c))
