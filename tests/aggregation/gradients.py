"""Matrices of gradients for the tests of aggregators, and their updates by a member's defaults."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.aggregation import MEMBERS, aggregate

LOSSES = (0.7, 2.5, 1.1, 0.4, 3.0, 1.7, 0.9, 0.2)


def losses_of(num_tasks):
    return np.resize(LOSSES, num_tasks)


def normal(num_tasks, size=40, seed=0):
    """Rows of standard normal numbers; about half of all pairs conflict."""
    return np.random.default_rng(seed).normal(size=(num_tasks, size))


def degenerate(num_tasks, seed=0):
    """Name → gradients that a method could stumble over."""
    J = normal(num_tasks, seed=seed)
    cases = {"one zero": J.copy(), "all zero": 0 * J, "equal": J.copy(), "opposite": J.copy()}
    cases["one zero"][0] = 0
    if num_tasks > 1:
        cases["equal"][1], cases["opposite"][1] = J[0], -J[0]
    cases["rank one"] = np.outer(np.linspace(-1, 2, num_tasks), J[0])
    cases["one direction"] = np.outer(np.linspace(1, 2, num_tasks), J[0])
    cases["huge and tiny"] = J * np.logspace(2, -2, num_tasks)[:, None]
    return cases


@functools.cache
def program(method, num_tasks, options=()):
    """A compiled first update `(J, losses) → (update, state)` of a member, or of a method."""
    tx = aggregate(method, num_tasks, **dict(options))

    def first(J, losses):
        return tx.update(J, tx.init(J[0]), losses=losses)

    return jax.jit(first)


def update(method, J, losses=None, **options):
    """The first update of a member, by name or made, as float64 of NumPy."""
    J = jnp.asarray(J) if isinstance(J, jax.Array) else jnp.asarray(np.asarray(J), float)
    given = jnp.asarray(losses_of(len(J)) if losses is None else losses, float)
    run = program(method, len(J), tuple(sorted(options.items())))
    return np.asarray(run(J, given)[0].astype(float), np.float64)


def promising(promise):
    return [name for name, found in MEMBERS.items() if promise in found.promises]
