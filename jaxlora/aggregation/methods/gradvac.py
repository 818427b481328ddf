"""GradVac: rotate gradients until their cosines reach running targets."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlora.aggregation.method import Method, check_range, member, raw_key, split_raw
from jaxlora.aggregation.methods.pcgrad import orders


class GradVacState(NamedTuple):
    """State of `gradvac`.

    Attributes:
      key: `u32[2]`, raw key data for the next visiting orders.
      targets: `f32[T, T]`, running means of the observed cosines.
    """

    key: jax.Array
    targets: jax.Array


def _or_zero(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    return jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1), 0)


def turn(
    K: jax.Array, orders: jax.Array, targets: jax.Array, beta: float
) -> tuple[jax.Array, jax.Array]:
    """Return the coefficients of the rotated gradients and the next targets, `f32[T, T]` each.

    Task i visits the others as in PCGrad. If its cosine `φ` with `g_j` is below the target `φ̂`,
    it adds `‖g_i‖ (φ̂ √(1 − φ²) − φ √(1 − φ̂²)) / (‖g_j‖ √(1 − φ̂²))` times `g_j`, which makes the
    cosine `φ̂`. Then `φ̂ ← (1 − β) φ̂ + β φ`. Zero gradients and a target of 1 change nothing.
    """

    def one_task(i: jax.Array, order: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
        def visit(
            carry: tuple[jax.Array, jax.Array], j: jax.Array
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            w, target = carry
            mine = jnp.sqrt(jnp.maximum(w @ K @ w, 0))
            other = jnp.sqrt(K[j, j])
            phi = jnp.clip(_or_zero(K[j] @ w, mine * other), -1, 1)
            sine, goal_sine = (jnp.sqrt(jnp.maximum(1 - c * c, 0)) for c in (phi, target[j]))
            step = mine * _or_zero(target[j] * sine - phi * goal_sine, other * goal_sine)
            w = w.at[j].add(jnp.where((j != i) & (phi < target[j]), step, 0))
            moved = (1 - beta) * target[j] + beta * phi
            return (w, target.at[j].set(jnp.where(j == i, target[j], moved))), None

        start = jax.nn.one_hot(i, len(K), dtype=K.dtype)
        return jax.lax.scan(visit, (start, target), order)[0]

    return jax.vmap(one_task)(jnp.arange(len(K)), orders, targets)


@member("Wang et al. 2021", "homogeneous", "unit")
def gradvac(beta: float = 0.5, seed: int = 0) -> Method:
    """Rotate each gradient until its cosine with each other one reaches a running target, then sum.

    Wang et al. 2021, "Gradient Vaccine: Investigating and Improving Multi-task Optimization in
    Massively Multilingual Models", algorithm 1 and equation 3. Targets start at 0; with targets of
    0 it is PCGrad.

    Args:
      beta: weight of a new cosine in the running mean, 0 to 1.
      seed: seed of the random visiting orders.
    """
    check_range("beta", beta, 0, 1)

    def init(num_tasks: int, part: int) -> GradVacState:
        return GradVacState(raw_key(seed, part), jnp.zeros((num_tasks, num_tasks)))

    def weights(K: jax.Array, losses: Any, state: GradVacState) -> tuple[jax.Array, GradVacState]:
        after, now = split_raw(state.key)
        W, targets = turn(K, orders(now, len(K)), state.targets, beta)
        return W.sum(0), GradVacState(after, targets)

    return Method("gradvac", init, weights, every_step=True)
