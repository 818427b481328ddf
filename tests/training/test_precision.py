"""Every product says how exact it is: float32 stays float32 on accelerators that would use TF32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from test_step import random_batch

from jaxlora import lora
from jaxlora.nn import bert, ops
from jaxlora.nn.encode import encoder, make_encode, make_mixed_encode
from jaxlora.pcgrad import pcgrad
from jaxlora.serving import inference
from jaxlora.tasks import task as tasks
from jaxlora.tasks.task import PARA, SST
from jaxlora.training import optimizer
from jaxlora.training.adaptation import make_adaptation
from jaxlora.training.step import GroupStep, make_train_step
from jaxlora.utils import trees

HIGHEST, DEFAULT = jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT
PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")
DTYPES = (jnp.float32, jnp.bfloat16)


def products(jaxpr):
    """All products of a program, also in the programs that it calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in PRODUCTS:
            yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=is_program):
            if is_program(value):
                yield from products(getattr(value, "jaxpr", value))


def is_program(value):
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def wrong(function, *args):
    """How many products there are, and those that are less exact than their inputs."""
    found = list(products(jax.make_jaxpr(function)(*args).jaxpr))
    return len(found), [str(e) for e in found if e.params["precision"] != wanted(e)]


def wanted(equation):
    wide = any(x.aval.dtype == jnp.float32 for x in equation.invars)
    return (HIGHEST, HIGHEST) if wide else (DEFAULT, DEFAULT)


def check(function, *args, at_least=1):
    count, bad = wrong(function, *args)
    assert count >= at_least and not bad, f"{count} products; of them wrong: {bad[:3]}"


def test_a_product_without_a_precision_is_found():
    """Also within a scan, a gradient, a compiled function and a custom derivative."""
    w = jnp.eye(3)
    scanned = jax.jit(lambda x: jax.lax.scan(lambda c, _: (c @ w, None), x, None, 2)[0].sum())
    assert len(wrong(lambda x: x @ w, w)[1]) == 1
    assert len(wrong(jax.grad(scanned), w)[1]) == 2
    custom = jax.custom_vjp(lambda x: x @ w)
    custom.defvjp(lambda x: (x @ w, None), lambda _, grad: (grad @ w,))
    assert len(wrong(custom, w)[1]) == 1
    assert len(wrong(jax.grad(lambda x: custom(x).sum()), w)[1]) == 2
    assert wrong(lambda x: jnp.matmul(x, w, precision=HIGHEST), w) == (1, [])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapt", ["frozen", "lora", "full"])
def test_train_steps(adapt, dtype, tiny):
    adapter, chosen = lora.LoraConfig(4, 8.0, dropout=0.1), tasks.paper_tasks("mse")
    group = GroupStep(chosen, *optimizer.optimizers(3, 1e-2, 1e-2, lora_plus_ratio=4.0))
    made = make_train_step(
        {"all": group}, tiny.config, make_adaptation(adapt, adapter), dtype=dtype,
        pair_features="interaction",
    )  # fmt: skip

    def begin(key):
        return made.freeze(tiny.params), made.init({"all": key}, tiny.params)

    frozen, state = jax.eval_shape(begin, jax.random.key(0))
    batch, _ = random_batch(chosen, adapt, tiny.config.hidden_size)
    check(made, state, frozen, batch, at_least=12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers", [2, bert.MOST_UNROLLED + 1])
def test_evaluation(layers, dtype, tiny):
    config = dataclasses.replace(tiny.config, num_hidden_layers=layers)
    adapter = lora.LoraConfig(4, 8.0, lora.ALL_TARGETS)

    def begin(params):
        one = {"lora": lora.init(jax.random.key(0), params, adapter)}
        two = trees.broadcast(bert.unstack_layers(one["lora"]), 2)
        return {"params": bert.matmul_ready(params, dtype)}, one, two

    frozen, one, two = jax.eval_shape(begin, bert.param_shapes(config))
    rows = random_batch((SST, PARA), "lora", config.hidden_size)[0].inputs
    owner = jnp.zeros((*rows.tokens.shape[:1], 1), jnp.int32)
    encode = encoder(config, dtype, adapter, "mean")
    for tree in ({}, one):
        check(make_encode(encode), frozen, tree, rows, at_least=8)
    check(make_mixed_encode(encode), frozen, two, rows, owner, at_least=8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_derivatives_of_layers(dtype):
    x, w, copies = jnp.ones((2, 3, 8)), jnp.ones((8, 4)), jnp.ones((2, 8, 4))
    task = jnp.ones((2, 3, 2), bool)
    heads = jnp.ones((2, 3, 2, 4), dtype)
    mask = jnp.ones((2, 1, 3, 3), bool)

    def total(x, w, copies, heads):
        products = (
            ops.matmul(x, w, dtype), ops.low_rank(x, w, w.T, dtype),
            ops.low_rank_per_task(x, copies, copies.swapaxes(1, 2), task, (0, 1), dtype),
            ops.attend(heads, heads, heads, mask),
        )  # fmt: skip
        return sum(jnp.sum(y) for y in products)

    check(jax.grad(total, (0, 1, 2, 3)), x, w, copies, heads, at_least=20)


@pytest.mark.parametrize("task", [SST, PARA, tasks.STS_MSE])
def test_heads(task):
    head = jax.eval_shape(lambda: task.init_head(jax.random.key(0), 16, "concat"))
    vectors = jnp.ones((4, 16))
    check(
        lambda head, u: inference._apply_head(task, head, u, u, "concat"), head, vectors, at_least=2
    )


@pytest.mark.parametrize("num_tasks", [2, 3, 6])
def test_pcgrad(num_tasks):
    tx = pcgrad(num_tasks)
    grads = {"a": jnp.ones((num_tasks, 4, 2)), "b": jnp.ones((num_tasks, 3), jnp.bfloat16)}
    state = tx.init(None)
    count, bad = wrong(tx.update, grads, state)
    # A Gram matrix of bfloat16 leaves may be asked for as exactly as that of float32 leaves.
    assert count >= 3 and not [e for e in bad if "HIGHEST" not in e]


def test_adapters(tiny):
    config = lora.LoraConfig(4, 8.0)
    adapter = jax.eval_shape(lambda: lora.init(jax.random.key(0), tiny.params, config))
    for fold in (lora.merge, lora.unmerge):
        check(lambda a, fold=fold: fold(tiny.params, a, config), adapter, at_least=4)
    check(lambda a: lora.truncate(lora.add([(a, config)] * 3, [1.0] * 3), 2)[0], adapter)


def test_the_precision_of_float32_changes_nothing_on_the_cpu():
    x, w = np.random.default_rng(0).normal(size=(2, 16, 16)).astype(np.float32)
    found = ops.matmul(x, w, jnp.float32)
    np.testing.assert_array_equal(found, jnp.matmul(x, w, precision=DEFAULT))
