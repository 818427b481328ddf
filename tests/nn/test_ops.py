"""The layers' functions beside JAX's own derivatives of the same formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_bert import dot_inputs

from jaxlora.nn import ops

KEYS = jax.random.split(jax.random.key(0), 8)
HIDDEN = jax.random.normal(KEYS[0], (3, 5, 16)) * 2 + 1


def compare(found, expected, *inputs, rtol=1e-5):
    """Values, and gradients by all inputs under random cotangents."""
    y, pull = jax.vjp(found, *inputs)
    with jax.default_matmul_precision("highest"):  # of the reference
        z, pull_expected = jax.vjp(expected, *inputs)
    cotangent = jax.random.normal(KEYS[1], y.shape)
    pairs = [(y, z), *zip(pull(cotangent), pull_expected(cotangent), strict=True)]
    for a, b in pairs:
        assert jnp.abs(b).max() > 1e-3
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.abs(b).max()))


def test_gelu():
    x = jnp.linspace(-6, 6, 101)
    compare(ops.gelu, lambda x: jax.nn.gelu(x, approximate=False), x)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_attention(rate):
    """Two sentences and padding in a row; dropout by the same draws."""
    sentences = jnp.array([[1, 1, 1, 2, 2, 0]])
    mask = sentences[:, None, :, None] == sentences[:, None, None, :]
    inputs = jax.random.normal(KEYS[3], (3, 1, 6, 2, 4))
    kept, scale = ops.keep((1, 2, 6, 6), rate, KEYS[4]) if rate else (None, 1.0)

    def by_formula(query, key, value):
        scores = jnp.einsum("rqhd,rkhd->rhqk", query, key) / 2
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
        weights = weights if kept is None else weights * kept * scale
        return jnp.einsum("rhqk,rkhd->rqhd", weights, value)

    compare(lambda *x: ops.attend(*x, mask, kept, scale), by_formula, *inputs)


def test_attention_with_a_bias():
    """Of two rows: its gradient is the sum of theirs, and masked scores have none."""
    mask = jnp.array([[[[1, 1, 0], [1, 1, 0], [0, 0, 1]]], [[[1, 1, 1]] * 3]], bool)
    inputs = jax.random.normal(KEYS[3], (3, 2, 3, 2, 4))
    bias = jax.random.normal(KEYS[2], (1, 2, 3, 3))

    def by_formula(query, key, value, bias):
        scores = jnp.einsum("rqhd,rkhd->rhqk", query, key) / 2 + bias
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
        return jnp.einsum("rhqk,rkhd->rqhd", weights, value)

    def ours(query, key, value, bias):
        return ops.attend(query, key, value, mask, None, 1.0, bias)

    compare(ours, by_formula, *inputs, bias)


def test_rotary_scores_depend_on_the_distance_alone():
    query, key = jax.random.normal(KEYS[3], (2, 1, 1, 1, 8))

    def score(at, other):
        places = (jnp.array([[at]]), jnp.array([[other]]))
        x, y = (
            ops.rotate(v, *ops.rotations(p, 8, 100.0))
            for v, p in zip((query, key), places, strict=True)
        )
        return jnp.sum(x * y).item()

    assert abs(score(3, 7) - score(13, 17)) < 1e-5
    assert abs(score(3, 7) - score(3, 8)) > 1e-3
    assert abs(score(0, 0) - jnp.sum(query * key).item()) < 1e-5


def test_attention_in_bfloat16_multiplies_in_bfloat16_both_ways():
    inputs = jax.random.normal(KEYS[3], (3, 1, 6, 2, 4), jnp.bfloat16)
    mask = jnp.ones((1, 1, 6, 6), bool)
    kept, scale = ops.keep((1, 2, 6, 6), 0.5, KEYS[4])

    def loss(*x):
        return jnp.sum(ops.attend(*x, mask, kept, scale) ** 2)

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*inputs)
    assert list(dot_inputs(jaxpr.jaxpr)) == [(jnp.bfloat16, jnp.bfloat16)] * 6
    gradients = jax.grad(loss, (0, 1, 2))(*inputs)
    assert {g.dtype for g in gradients} == {jnp.dtype(jnp.bfloat16)}
    exact = jax.grad(loss, (0, 1, 2))(*inputs.astype(jnp.float32))
    for a, b in zip(gradients, exact, strict=True):
        assert 0 < jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b) < 2**-5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("adapters", [(0, 0, 0), (0, 1, 1), (0, 0, 1), (0, 1, 2)])
def test_each_tokens_adapter_is_its_tasks_and_gradients_are_split_by_task(adapters, dtype):
    """Beside all T adapters applied to all tokens, of whose results one is chosen."""
    a, b = (
        jax.random.normal(k, s) for k, s in zip(KEYS[5:7], ((3, 16, 4), (3, 4, 8)), strict=True)
    )
    a, b = (w[np.array(adapters)] for w in (a, b))  # tasks of one adapter have copies of it
    owner = jnp.array([[0, 1, 2, 1, -1]] * 3)  # the last token is padding
    task = jax.nn.one_hot(owner, 3, dtype=bool)
    real = (owner >= 0)[..., None]

    def split(x, a, b):
        return real * ops.low_rank_per_task(x, a, b, task, adapters, dtype)

    def chosen(x, a, b):
        each = jax.vmap(lambda a, b: ops.low_rank(x, a, b, dtype), out_axes=-1)(a, b)
        return jnp.sum(each * task[..., None, :], -1)

    rtol = 1e-5 if dtype == jnp.float32 else 2**-6
    compare(split, chosen, HIDDEN, a, b, rtol=rtol)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("block", [1, 2, 6])
def test_each_block_of_tokens_uses_its_own_adapter(block, dtype):
    keys = jax.random.split(jax.random.key(0), 4)
    x, a, b = (
        jax.random.normal(k, s)
        for k, s in zip(keys, ((2, 6, 8), (5, 8, 3), (5, 3, 4)), strict=False)
    )
    owner = jax.random.randint(keys[3], (2, 6 // block), 0, 5)
    found = ops.low_rank_by_block(x, a, b, owner, dtype)
    for row in range(2):
        for token in range(6):
            t = owner[row, token // block]
            alone = ops.low_rank(x[row, token], a[t], b[t], dtype)
            np.testing.assert_allclose(found[row, token], alone, rtol=1e-5, atol=1e-5)


X, W = jnp.ones((3, 4)), jnp.ones((4, 2))
OF_TWO = jnp.array([[True, False], [False, True], [False, True]])
QUERY, SEEN = jnp.ones((1, 3, 2, 4)), jnp.ones((1, 1, 3, 3), bool)
OWN_DERIVATIVES = {
    "gelu": (ops.gelu, X),
    "matmul": (lambda x: ops.matmul(x, W, jnp.float32), X),
    "low_rank": (lambda x: ops.low_rank(x, W, W.T, jnp.float32), X),
    "low_rank_per_task": (
        lambda x: ops.low_rank_per_task(
            x, jnp.stack([W, 2 * W]), jnp.stack([W.T, W.T]), OF_TWO, (0, 1), jnp.float32
        ), X,
    ),
    "attend": (lambda x: ops.attend(x, x, x, SEEN), QUERY),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN_DERIVATIVES)
def test_forward_mode_is_refused_as_the_readme_says(name):
    function, x = OWN_DERIVATIVES[name]
    for derive in (jax.jacfwd(function), lambda x: jax.jvp(function, (x,), (x,))):
        with pytest.raises(TypeError, match=r"forward-mode.*custom_vjp"):
            derive(x)


@pytest.mark.parametrize("name", OWN_DERIVATIVES)
def test_second_derivatives_take_reverse_mode_twice(name):
    """Against differences of first ones, along a direction."""
    function, x = OWN_DERIVATIVES[name]
    x = 0.5 * x + 0.1 * jnp.arange(x.size).reshape(x.shape) / x.size
    direction = jnp.cos(jnp.arange(x.size)).reshape(x.shape)

    def first(x):
        return jax.grad(lambda x: jnp.sum(function(x) ** 2))(x)

    with jax.default_matmul_precision("highest"):
        found = jax.grad(lambda x: jnp.sum(first(x) * direction))(x)
        ahead, behind = (first(x + h * direction) for h in (1e-2, -1e-2))
    expected = (ahead - behind) / 2e-2
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2 * max(scale, 0.1))
