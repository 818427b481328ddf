"""RLW: random loss weighting."""

from __future__ import annotations

from typing import Any

import jax

from jaxlora.aggregation.method import Method, member, raw_key, split_raw


@member("Lin et al. 2022, RLW", "homogeneous", "unit")
def random(seed: int = 0) -> Method:
    """Draw new weights in each step: the softmax of standard normal numbers.

    The expected update is the mean gradient. Lin et al. 2022, "Reasonable Effectiveness of Random
    Weighting: A Litmus Test for Multi-Task Learning", section 3, propose it as a baseline that a
    useful method should beat.

    Args:
      seed: seed of the random weights.
    """

    def weights(K: jax.Array, losses: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        after, now = split_raw(key)
        return jax.nn.softmax(jax.random.normal(now, (len(K),), K.dtype)), after

    return Method("random", lambda num_tasks, part: raw_key(seed, part), weights)
