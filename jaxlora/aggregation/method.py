"""What a gradient aggregator is, and the registry of them.

A member of the family is a function of its parameters that returns a `Method`. `@member` puts it
into `MEMBERS` with its source and what it promises; `aggregate`, the tests, the benchmark and the
table in the documentation read that registry, so a new member is written in one file.
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
"""What a member may promise; a common suite of tests holds each member to it."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A rule that turns what is known of T gradients into T weights.

    Attributes:
      name: for messages.
      init: `(num_tasks, part) → state`, any pytree of arrays; parts of a tree that have weights of
        their own are numbered, so that random methods differ between them.
      weights: `(K, losses, state) → (weights, state)`, with `K: f32[T, T]` the Gram matrix,
        `losses: f32[T]`, or None if they were not given, and `weights: f32[T]`.
      needs_losses: whether `losses` must be given.
      every_step: whether it must see each step, so that its weights cannot be reused.
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
      make: function of the method's parameters.
      source: paper.
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
    """Register a function that makes a method under its own name."""

    def register(make: Callable[Parameters, Method]) -> Callable[Parameters, Method]:
        MEMBERS[make.__name__] = Member(make, source, frozenset(promises))
        return make

    return register


def preference_of(
    preference: Sequence[float] | None, num_tasks: int, default: float = 1.0
) -> jax.Array:
    """Return a preference for each task, `f32[T]`; without one, `default` for each.

    Raises:
      ValueError: if it has not T entries.
    """
    if preference is None:
        return jnp.full(num_tasks, default, dtype=float)
    if len(preference) != num_tasks:
        raise ValueError(f"preference has {len(preference)} entries for {num_tasks} tasks")
    return jnp.asarray(np.asarray(preference, float), dtype=float)


def check_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Refuse a parameter that is not between two numbers.

    Raises:
      ValueError: names the parameter.
    """
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low:g} and {high:g}, got {value!r}")


def raw_key(seed: int, part: int = 0) -> jax.Array:
    """Return raw data of a PRNG key, `u32[2]`, so that anything that saves arrays can save it."""
    key = jax.random.key(seed, impl=RANDOM)
    return jax.random.key_data(jax.random.fold_in(key, part) if part else key)


def split_raw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Split raw key data: the raw data for the next step, and a typed key for this one."""
    after, now = jax.random.split(jax.random.wrap_key_data(key, impl=RANDOM))
    return jax.random.key_data(after), now


RANDOM = "threefry2x32"  # fixed, so that raw key data means the same under any JAX setting
