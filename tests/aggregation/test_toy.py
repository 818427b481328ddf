"""Two quadratic tasks whose Pareto front is known: where each method ends.

`L_i(x) = ½ s_i ‖x − a_i‖²` with `a = (±1, 0)`: the front is the segment between the two, and the
point `t` of the plain sum is `Σ s_i a_i / Σ s_i`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.aggregation import aggregate, cagrad

CENTRES = jnp.array([[-1.0, 0.0], [1.0, 0.0]])
SCALES = jnp.array([1.0, 20.0])


@functools.cache
def end_of(name, start, steps=3000):
    tx = aggregate(cagrad(c=0.5) if name == "cagrad" else name, 2)

    def step(carry, n):
        x, state = carry
        away = x[None, :] - CENTRES
        losses = SCALES * jnp.sum(away**2, 1) / 2
        update, state = tx.update(SCALES[:, None] * away, state, losses=losses)
        # A sum of 21 needs small steps; those of bargains have a fixed length, so steps shrink.
        return (x - 0.02 / (1 + n / 100) * update, state), None

    begin = jnp.array(start), tx.init(None)
    return np.asarray(jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(steps)))(begin)[0][0])


OPTIMUM = 19 / 21  # of the sum of the losses


@pytest.mark.parametrize("name", ["sum", "mean", "cagrad"])
def test_these_end_at_the_minimum_of_the_sum(name):
    np.testing.assert_allclose(end_of(name, (0.0, 0.5)), [OPTIMUM, 0], atol=0.02)


@pytest.mark.parametrize(
    "name", ["mgda", "upgrad", "dualproj", "nash_mtl", "pcgrad", "aligned_mtl"]
)
def test_these_end_on_the_front(name):
    x, y = end_of(name, (0.0, 0.5))
    assert abs(y) < 0.02 and -1 <= x <= 1


def test_points_of_the_front_are_kept():
    """MGDA and UPGrad stop at the first they meet; the sum goes on to its own."""
    for name in ("mgda", "upgrad", "dualproj"):
        np.testing.assert_allclose(end_of(name, (-0.5, 0.0)), [-0.5, 0], atol=1e-3)
    assert end_of("sum", (-0.5, 0.0))[0] > 0.8
