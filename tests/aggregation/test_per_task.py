"""Per-task gradients: the two ways agree with `jax.jacrev`, and models of others fit in."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxlora
from jaxlora.aggregation import accumulate, aggregate, metrics, per_task_grads

KEYS = jax.random.split(jax.random.key(0), 8)
TRUNK = {"w": jax.random.normal(KEYS[0], (4, 3)), "b": jnp.zeros(3)}
HEADS = {"b": jax.random.normal(KEYS[1], (3,)), "a": jax.random.normal(KEYS[2], (3,))}
BATCHES = {"a": jax.random.normal(KEYS[3], (5, 4)), "b": jax.random.normal(KEYS[4], (2, 4))}


def loss(trunk, head, x):
    return jnp.mean((jnp.tanh(x @ trunk["w"] + trunk["b"][None]) @ head - 1) ** 2)


def expected(batches):
    """By `jax.jacrev` of the stacked losses, which is right and slow."""

    def stacked(trunk, heads):
        return jnp.stack([loss(trunk, heads[name], batches[name]) for name in ("b", "a")])

    grads, heads = jax.jacrev(stacked, (0, 1))(TRUNK, HEADS)
    return stacked(TRUNK, HEADS), grads, jax.tree.map(lambda x: x.sum(0), heads)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, expected
    )


def test_a_batch_each_in_the_order_of_the_functions():
    fns = {"b": loss, "a": loss}
    assert_same(
        jax.jit(lambda *x: per_task_grads(fns, *x))(TRUNK, HEADS, BATCHES), expected(BATCHES)
    )


def test_sequences_of_tasks():
    split = [[x["b"], x["a"]] for x in (HEADS, BATCHES)]
    losses, grads, heads = per_task_grads((loss, loss), TRUNK, *split)
    by_name = expected(BATCHES)
    assert_same((losses, grads, heads), (*by_name[:2], [by_name[2]["b"], by_name[2]["a"]]))


def test_one_forward_pass_of_a_shared_batch():
    passes = []

    def losses(trunk, heads, x):
        passes.append(1)
        hidden = jnp.tanh(x @ trunk["w"] + trunk["b"][None])
        return jnp.stack([jnp.mean((hidden @ heads[name] - 1) ** 2) for name in ("b", "a")])

    found = per_task_grads(losses, TRUNK, HEADS, BATCHES["a"])
    assert_same(found, expected(dict.fromkeys("ab", BATCHES["a"])))
    assert len(passes) == 1


def test_what_comes_with_the_losses():
    def with_aux(trunk, head, x):
        return loss(trunk, head, x), len(x)

    (losses, aux), *grads = per_task_grads(
        dict.fromkeys("ba", with_aux), TRUNK, HEADS, BATCHES, has_aux=True
    )
    assert aux == {"b": 2, "a": 5}
    assert_same((losses, *grads), expected(BATCHES))
    (again, aux), *_ = per_task_grads(
        lambda trunk, heads, x: (jnp.stack([loss(trunk, h, x) for h in heads]), "aux"),
        TRUNK, list(HEADS.values()), BATCHES["a"], has_aux=True,
    )  # fmt: skip
    assert aux == "aux" and again.shape == (2,)


@pytest.mark.parametrize("none", [None, {}, []])
def test_without_heads(none):
    fns = [lambda trunk, head, x: jnp.sum(trunk * x)] * 2
    losses, grads, heads = per_task_grads(fns, jnp.ones(2), none, jnp.eye(2))
    assert losses.tolist() == [1, 1] and grads.tolist() == [[1, 0], [0, 1]] and heads == none


def test_tasks_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match=r"heads are for the tasks \['a'\], loss_fns for"):
        per_task_grads({"a": loss, "b": loss}, TRUNK, {"a": HEADS["a"]}, BATCHES)
    with pytest.raises(ValueError, match="batches are for the tasks"):
        per_task_grads([loss, loss], TRUNK, [HEADS["a"]] * 2, [BATCHES["a"]])
    with pytest.raises(ValueError, match=r"must return losses \[T\]"):
        per_task_grads(loss, TRUNK, HEADS["a"], BATCHES["a"])


# ---- loops of others


def train(loss, trunk, apply_updates=optax.apply_updates):
    """Take 20 steps on the two tasks: the trunk, and the losses of each step."""
    run = jax.jit(lambda trunk: per_task_grads(dict.fromkeys("ab", loss), trunk, HEADS, BATCHES))
    state, losses = TX.init(trunk), []
    for _ in range(20):
        found, grads, _ = run(trunk)
        updates, state = TX.update(grads, state, trunk)
        trunk, losses = apply_updates(trunk, updates), [*losses, found]
    return trunk, losses


def falls(losses):
    return all(np.asarray(losses)[-1] < np.asarray(losses)[0])


TX = optax.chain(aggregate("upgrad", 2), optax.adam(0.05))


def test_a_scan_over_steps_with_metrics():
    """Plain pytrees; heads have an optimizer of their own; each step logs what it saw."""
    head_tx = optax.adam(0.05)

    def step(carry, _):
        trunk, heads, state, head_state = carry
        losses, grads, head_grads = per_task_grads(dict.fromkeys("ab", loss), trunk, heads, BATCHES)
        updates, state = TX.update(grads, state, trunk)
        head_updates, head_state = head_tx.update(head_grads, head_state)
        trunk = optax.apply_updates(trunk, updates)
        heads = optax.apply_updates(heads, head_updates)
        return (trunk, heads, state, head_state), metrics(state, "ab") | {"losses": losses}

    start = TRUNK, HEADS, TX.init(TRUNK), head_tx.init(HEADS)
    _, log = jax.jit(lambda x: jax.lax.scan(step, x, None, 30))(start)
    assert falls(log["losses"])
    assert log["weight/a"].shape == (30,) and (abs(log["cosine/a+b"]) <= 1).all()


def test_flax_linen():
    model = nn.Sequential([nn.Dense(3), nn.tanh])

    def linen_loss(trunk, head, x):
        return jnp.mean((model.apply(trunk, x) @ head - 1) ** 2)

    assert falls(train(linen_loss, model.init(KEYS[5], BATCHES["a"]))[1])


def test_flax_nnx():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    graph, trunk = nnx.split(model, nnx.Param)

    def nnx_loss(trunk, head, x):
        return jnp.mean((jnp.tanh(nnx.merge(graph, trunk)(x)) @ head - 1) ** 2)

    trunk, losses = train(nnx_loss, trunk)
    nnx.update(model, trunk)
    assert falls(losses)
    assert nnx_loss(nnx.state(model), HEADS["a"], BATCHES["a"]) < losses[0][0]


def test_equinox():
    eqx = pytest.importorskip("equinox")
    trunk, static = eqx.partition(eqx.nn.Linear(4, 3, key=KEYS[6]), eqx.is_inexact_array)

    def eqx_loss(trunk, head, x):
        return jnp.mean((jnp.tanh(jax.vmap(eqx.combine(trunk, static))(x)) @ head - 1) ** 2)

    assert falls(train(eqx_loss, trunk, eqx.apply_updates)[1])


def test_a_window_that_is_not_finite_leaves_the_next_one_alone():
    tx = accumulate(optax.chain(aggregate("sum", 2), optax.sgd(1.0)), num_tasks=2, steps=2)
    params = {"w": jnp.zeros(2)}
    state, found = tx.init(params), []
    for scale in (1.0, np.nan, 1.0, 1.0):
        grads = {"w": scale * jnp.ones((2, 2))}
        updates, state = jax.jit(tx.update)(grads, state, params)
        found.append(np.asarray(updates["w"]))
    assert not found[0].any() and np.isnan(found[1]).all() and not found[2].any()
    np.testing.assert_array_equal(found[3], [-2.0, -2.0])


def test_accumulated_gradients_are_aggregated_once():
    """Two batches a task: the update is that of their means."""
    tx = accumulate(optax.chain(aggregate("upgrad", 2), optax.sgd(1.0)), num_tasks=2, steps=2)
    G = jax.random.normal(KEYS[7], (2, 2, 4))
    params = jnp.zeros(4)
    update = jax.jit(tx.update)
    first, state = update(G[0], tx.init(params), params)
    second, state = update(G[1], state, params)
    alone = aggregate("upgrad", 2)
    wanted, _ = alone.update(G.mean(0), alone.init(params))
    assert not first.any()
    np.testing.assert_allclose(second, -wanted, rtol=1e-5, atol=1e-6)


def test_multi_steps_behind_averages_the_aggregated():
    tx = optax.chain(aggregate("upgrad", 2), optax.MultiSteps(optax.sgd(1.0), 2))
    G, params = jax.random.normal(KEYS[7], (2, 2, 4)), jnp.zeros(4)
    first, state = tx.update(G[0], tx.init(params), params)
    second, _ = tx.update(G[1], state, params)
    alone = aggregate("upgrad", 2)
    parts = [alone.update(g, alone.init(params))[0] for g in G]
    assert not first.any()
    np.testing.assert_allclose(second, -(parts[0] + parts[1]) / 2, rtol=1e-5, atol=1e-6)


def test_they_are_public():
    assert jaxlora.per_task_grads is per_task_grads and jaxlora.aggregate is aggregate
