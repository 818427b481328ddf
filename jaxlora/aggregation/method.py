"""The interface of a gradient aggregator, and the registry of aggregators.

A member of the registry is a function of the method's parameters that returns a `Method`. `@member`
adds it to `MEMBERS` with its source and its promises. `aggregate`, the tests, the benchmark and the
table in the documentation read that registry, so one file defines a new method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np

State = Any
Promise = Literal["non-conflicting", "permutation", "homogeneous", "linear", "stationary", "unit"]
Parameters = ParamSpec("Parameters")

PROMISES: dict[Promise, str] = {
    "non-conflicting": "the update has a negative dot product with no task's gradient",
    "permutation": "renumbering the tasks renumbers the weights",
    "homogeneous": "gradients times c give the update times c",
    "linear": "the update is linear in factors c ≥ 0 of the tasks' gradients",
    "stationary": "where positive weights sum the gradients to zero, the update is zero",
    "unit": "one task alone gets its own gradient",
}
"""Properties that a member can promise and their meanings; the tests check each promise."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A rule that computes T weights from the Gram matrix or the losses of T tasks.

    Attributes:
      name: name for messages.
      init: `(num_tasks, part) → state`, where the state is any pytree of arrays. `part` numbers the
        parts of a tree that have separate weights, so that random methods differ between them.
      weights: `(K, losses, state) → (weights, state)`, with the Gram matrix `K: f32[T, T]`,
        `losses: f32[T]` (None unless `needs_losses`), and `weights: f32[T]`.
      needs_losses: whether `losses` must be given.
      every_step: whether it must be called in each step, so that its weights cannot be reused.
    """

    name: str
    init: Callable[[int, int], State]
    weights: Callable[[jax.Array, Any, State], tuple[jax.Array, State]]
    needs_losses: bool = False
    every_step: bool = False


def of_gram(name: str, weights: Callable[[jax.Array], jax.Array]) -> Method:
    """Return the method whose weights are a function of the Gram matrix alone."""
    return Method(name, lambda num_tasks, part: (), lambda K, losses, state: (weights(K), state))


class Member(NamedTuple):
    """An entry of the registry.

    Attributes:
      make: function of the method's parameters that returns the `Method`.
      source: the paper that introduced the method.
      promises: keys of `PROMISES`.
    """

    make: Callable[..., Method]
    source: str
    promises: frozenset[Promise]


MEMBERS: dict[str, Member] = {}
"""All aggregators by name."""


def member(
    source: str, *promises: Promise
) -> Callable[[Callable[Parameters, Method]], Callable[Parameters, Method]]:
    """Return a decorator that adds a function returning a `Method` to `MEMBERS` under its name."""

    def register(make: Callable[Parameters, Method]) -> Callable[Parameters, Method]:
        MEMBERS[make.__name__] = Member(make, source, frozenset(promises))
        return make

    return register


def preference_of(
    preference: Sequence[float] | None, num_tasks: int, default: float = 1.0
) -> jax.Array:
    """Return the preference as `f32[T]`; if it is None, `default` for each task.

    Raises:
      ValueError: if it does not have T entries.
    """
    if preference is None:
        return jnp.full(num_tasks, default, dtype=float)
    if len(preference) != num_tasks:
        raise ValueError(f"preference has {len(preference)} entries for {num_tasks} tasks")
    return jnp.asarray(np.asarray(preference, float), dtype=float)


def check_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raise a ValueError that names the parameter if it is not between `low` and `high`."""
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low:g} and {high:g}, got {value!r}")


def raw_key(seed: int, part: int = 0) -> jax.Array:
    """Return the raw data of a PRNG key, `u32[2]`, which can be saved like any other array."""
    key = jax.random.key(seed, impl=RANDOM)
    return jax.random.key_data(jax.random.fold_in(key, part) if part else key)


def split_raw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Split raw key data into raw data for the next step and a typed key for this one."""
    after, now = jax.random.split(jax.random.wrap_key_data(key, impl=RANDOM))
    return jax.random.key_data(after), now


RANDOM = "threefry2x32"  # fixed, so that raw key data does not depend on JAX's settings
