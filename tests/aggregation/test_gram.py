"""The Gram matrix of many tasks on one CPU, which is summed over chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.aggregation.gram import _CHUNK, gram


@pytest.mark.parametrize("rest", [0, 5])
def test_chunks_add_up(rest):
    J = np.random.default_rng(0).normal(size=(6, 2 * _CHUNK + rest)).astype(np.float32)
    expected = J.astype(np.float64) @ J.T.astype(np.float64)
    found = jax.jit(gram)({"w": J.reshape(6, 1, -1)})
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * expected.max())


def test_chunks_of_bfloat16_are_summed_in_float32():
    J = jnp.ones((5, 2 * _CHUNK), jnp.bfloat16)
    assert gram(J).dtype == jnp.float32
    np.testing.assert_array_equal(gram(J), 2 * _CHUNK)
