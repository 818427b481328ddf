"""A solver of small quadratic programs for use inside a compiled step."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

_BLOCK_STEPS = 10


def ridge(C: jax.Array) -> jax.Array:
    """Return `C` plus a multiple of the identity just above its rounding errors: it is definite."""
    T = len(C)
    return C + 2 * T * jnp.finfo(C.dtype).eps * jnp.eye(T, dtype=C.dtype)


def solve_definite(A: jax.Array, b: jax.Array) -> jax.Array:
    """Solve `A x = b` for positive definite A by Cholesky factorization, `f32[T]`."""
    L, x = jnp.linalg.cholesky(A), b[:, None]
    for transposed in (False, True):
        x = jax.lax.linalg.triangular_solve(
            L, x, left_side=True, lower=True, transpose_a=transposed
        )
    return x[:, 0]


def solve_within(C: jax.Array, inside: jax.Array, b: jax.Array) -> jax.Array:
    """Solve `C[S, S] y[S] = b[S]` with `y = 0` outside `S = inside: bool[T]`; `C` is definite."""
    identity = jnp.eye(len(C), dtype=C.dtype)
    block = jnp.where(inside[:, None] & inside[None, :], C, identity)
    return solve_definite(block, jnp.where(inside, b, 0))


def nonneg_qp(C: jax.Array, q: jax.Array) -> jax.Array:
    """Minimize `½ yᵀ C y + qᵀ y` over `y ≥ 0`; return the minimizer, `f32[T]`.

    Two active-set methods find it exactly. Block principal pivoting (Kim & Park 2011, "Fast
    nonnegative matrix factorization", section 4) moves all infeasible variables together and mostly
    ends after two to five solves. If it has not ended after ten, Lawson & Hanson's method (1974,
    chapter 23) takes over, which moves one variable at a time; after 6 T steps it returns the best
    point so far.

    Args:
      C: `f32[T, T]`, positive semidefinite with ones (or zeros) on the diagonal.
      q: `f32[T]`.

    >>> nonneg_qp(jnp.eye(2), jnp.array([-2.0, 3.0])).round(4).tolist()
    [2.0, 0.0]
    """
    C = ridge(C)
    inside, y, ended = _block_pivoting(C, q)
    return _lawson_hanson(C, q, inside & ended, jnp.where(ended, jnp.maximum(y, 0), 0), ~ended)


def _slopes(C: jax.Array, q: jax.Array, y: jax.Array) -> jax.Array:
    """Return the objective's gradient at `y`; entries within rounding errors are set to zero."""
    slopes = C @ y + q
    noise = len(q) * jnp.finfo(C.dtype).eps * (jnp.abs(C) @ jnp.abs(y) + jnp.abs(q))
    return jnp.where(jnp.abs(slopes) <= noise, 0, slopes)


class _Block(NamedTuple):
    inside: jax.Array
    y: jax.Array
    step: jax.Array
    ended: jax.Array


def _block_pivoting(C: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the set of positive variables, the current point, and whether it is the optimum."""
    eps = len(q) * jnp.finfo(C.dtype).eps

    def pivot(s: _Block) -> _Block:
        y = solve_within(C, s.inside, -q)
        below = y < -eps * jnp.max(jnp.abs(y))
        wrong = jnp.where(s.inside, below, _slopes(C, q, y) < 0)
        return _Block(s.inside ^ wrong, y, s.step + 1, ~jnp.any(wrong))

    start = _Block(q < 0, jnp.zeros_like(q), jnp.int32(0), jnp.bool_(False))
    end = jax.lax.while_loop(lambda s: ~s.ended & (s.step < _BLOCK_STEPS), pivot, start)
    return end.inside, end.y, end.ended


class _Walk(NamedTuple):
    inside: jax.Array
    y: jax.Array
    step: jax.Array
    go: jax.Array


def _lawson_hanson(
    C: jax.Array, q: jax.Array, inside: jax.Array, y: jax.Array, go: jax.Array
) -> jax.Array:
    """Continue from a feasible point if `go` is true; each step lowers the objective."""

    def walk(s: _Walk) -> _Walk:
        goal = solve_within(C, s.inside, -q)
        leaving = s.inside & (goal <= 0)
        reach = jnp.where(leaving, s.y / jnp.where(leaving, s.y - goal, 1), 1)
        leaving &= reach <= jnp.min(reach)
        y = jnp.where(leaving, 0, jnp.maximum(s.y + jnp.min(reach) * (goal - s.y), 0))
        slopes = jnp.where(s.inside, 0, _slopes(C, q, y))
        blocked = jnp.any(leaving)
        entering = (jnp.arange(len(q)) == jnp.argmin(slopes)) & (slopes < 0) & ~blocked
        return _Walk(s.inside & ~leaving | entering, y, s.step + 1, blocked | jnp.any(entering))

    most = 6 * len(q)
    start = _Walk(inside, y, jnp.int32(0), go)
    return jax.lax.while_loop(lambda s: s.go & (s.step < most), walk, start).y
