"""The system `C z = β z^(−1/p)` behind Nash-MTL and FairGrad."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlora.aggregation.qp import ridge, solve_definite

_HALVINGS = 24
_MOST_STEPS = 200


class _Point(NamedTuple):
    z: jax.Array
    step: jax.Array
    size: jax.Array  # relative size of the last step
    shrinks: jax.Array


def solve_bargain(C: jax.Array, alone: jax.Array, p: float) -> jax.Array:
    """Solve `C z = β z^(−1/p)` for `z > 0`, `f32[T]`, by Newton's method.

    The solution minimizes the convex `½ zᵀ C z − Σ β ∫ z^(−1/p)`. With `z = z₀ (1 + η)` each step
    solves `(Z C Z + diag(r)/p) η = r − z ∘ C z`, `r = β z^(1 − 1/p)`, which is well conditioned
    even if C is not. Of the step lengths 1, ½, ¼, … the line search takes the one with the smallest
    slope, or the longest whose slope is within rounding errors. Near the minimum it takes full
    steps until they no longer shrink.

    Args:
      C: `f32[T, T]`, positive semidefinite with ones on the diagonal.
      alone: `f32[T]`, positive, the solution for orthogonal tasks, `β^(p/(p + 1))`; β itself may
        be beyond the range of float32.
      p: positive.

    >>> solve_bargain(jnp.eye(2), jnp.array([1.0, 2.0]), 1.0).round(4).tolist()
    [1.0, 2.0]
    """
    C = ridge(C)
    eps = jnp.finfo(C.dtype).eps
    near = 0.5 * p / (p + 1)  # smaller where z^(−1/p) curves faster
    shares = jnp.ldexp(jnp.ones(_HALVINGS, C.dtype), -jnp.arange(_HALVINGS))

    def newton(s: _Point) -> _Point:
        z, target = s.z, alone**2 * (s.z / alone) ** (1 - 1 / p)
        missing = target - z * (C @ z)
        H = z[:, None] * C * z[None, :] + jnp.diag(target / p)
        scale = jax.lax.rsqrt(jnp.diag(H))  # scales the diagonal to ones
        scaled = scale[:, None] * H * scale[None, :]
        eta = scale * solve_definite(scaled, scale * missing)
        # A long step ends before the first z that would be negative.
        size = jnp.max(jnp.abs(eta))
        eta *= jnp.minimum(1, 0.99 / jnp.max(-eta, initial=0.99))
        tried = z[None, :] * (1 + shares[:, None] * eta[None, :])
        inside = jnp.where(tried > 0, tried, 1)
        gains, wanted = inside @ C, alone[None, :] * (inside / alone[None, :]) ** (-1 / p)
        slopes = jnp.abs((gains - wanted) @ (z * eta))
        rounding = eps * ((inside @ jnp.abs(C) + wanted) @ jnp.abs(z * eta))
        usable = jnp.all(tried > 0, 1) & jnp.isfinite(slopes) & jnp.isfinite(rounding)
        least = jnp.min(jnp.where(usable, slopes, jnp.inf))
        longest = jnp.argmax(usable & (slopes <= jnp.maximum(least, rounding)))
        longest = jnp.where(jnp.any(usable), longest, _HALVINGS - 1)
        chosen = jnp.maximum(tried[jnp.where(size < near, 0, longest)], jnp.finfo(C.dtype).tiny)
        return _Point(chosen, s.step + 1, size, (size < s.size) | (size > eps**0.5))

    def unfinished(s: _Point) -> jax.Array:
        return (s.step < _MOST_STEPS) & (s.size > 4 * eps) & s.shrinks

    start = _Point(alone, jnp.int32(0), jnp.asarray(jnp.inf, C.dtype), jnp.bool_(True))
    return jax.lax.while_loop(unfinished, newton, start).z
