"""The transform around every method: arguments, parts, reuse, averages, meshes, what it saw."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gradients import normal

from jaxlora import pcgrad
from jaxlora.aggregation import aggregate, constant, famo, metrics, part_names

J = jnp.asarray(normal(3), jnp.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "pcgard"}, "no aggregator 'pcgard'; there are aligned_mtl, cagrad"),
        ({"num_tasks": 0}, "num_tasks must be at least 1"),
        ({"groups": [[0, 1], [1, 2]]}, r"groups must hold each of \[0, 1, 2\] once"),
        ({"groups": [[0, 1]]}, "groups must hold"),
        ({"groups": []}, "groups must hold"),
        ({"groups": [[0, 1, 2], []]}, "groups must hold"),
        ({"every": 0}, "every must be at least 1"),
        ({"ema": 1.0}, "ema must be from 0 to below 1"),
        ({"method": "famo", "every": 2}, "famo must see every step"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        aggregate(**{"method": "sum", "num_tasks": 3, **arguments})


def test_bad_gradients_and_losses_are_named():
    tx = aggregate("dwa", 3)
    with pytest.raises(ValueError, match=r"aggregate\('dwa', num_tasks=3\) needs .*'w' has shape"):
        tx.update({"w": J[:2]}, tx.init(None))
    for losses in (None, jnp.ones(2)):
        with pytest.raises(ValueError, match="dwa weights by losses"):
            tx.update({"w": J}, tx.init(None), losses=losses)
    with pytest.raises(ValueError, match="preference has 2 entries for 3 tasks"):
        tx = aggregate(constant([1.0, 2.0]), 3)
        tx.update(J, tx.init(None))


def test_weights_are_reused_between_updates():
    tx = aggregate("mgda", 3, every=3)
    update, state, weights = jax.jit(tx.update), tx.init(None), []
    for n in range(6):
        scaled = J * jnp.array([1.0, n + 1.0, 1.0])[:, None]
        found, state = update(scaled, state)
        np.testing.assert_allclose(found, state.weights @ scaled, rtol=1e-5, atol=1e-6)
        weights.append(state.weights.tolist())
    assert weights[0] == weights[1] == weights[2] != weights[3] == weights[4] == weights[5]


def test_an_average_of_weights():
    """As CR-MOGM: the first as they are, then 0.9 of the last."""
    tx, alone = aggregate("mgda", 3, ema=0.9), aggregate("mgda", 3)
    state, average = tx.init(None), None
    for n in range(3):
        scaled = J * jnp.array([1.0, n + 1.0, 1.0])[:, None]
        _, state = tx.update(scaled, state)
        new = np.asarray(alone.update(scaled, alone.init(None))[1].weights)
        average = new if average is None else 0.9 * average + 0.1 * new
        np.testing.assert_allclose(state.weights, average, rtol=1e-5)


def test_each_leaf_by_itself():
    tree = {"a": J, "b": -2 * J[:, :5]}
    tx = aggregate("upgrad", 3, per="leaf")
    params = jax.tree.map(lambda x: x[0], tree)
    found, state = tx.update(tree, tx.init(params), params)
    alone = aggregate("upgrad", 3)
    for n, name in enumerate(part_names(tree, "leaf")):
        np.testing.assert_allclose(found[name], alone.update(tree[name], alone.init(None))[0])
        seen = metrics(state, parts=part_names(tree, "leaf"))
        assert seen[f"{name}/norm/0"] == state.norms[n, 0]


def test_random_parts_differ():
    tree = {"a": J, "b": J}
    tx = aggregate("random", 3, per="leaf")
    _, state = tx.update(tree, tx.init(jax.tree.map(lambda x: x[0], tree)))
    assert (state.weights[0] != state.weights[1]).all()


def test_metrics_of_either_state():
    for tx in (aggregate("pcgrad", 3), pcgrad(3)):
        chain = optax.chain(tx, optax.adam(1.0))
        _, state = chain.update(J, chain.init(J[0]))
        found = metrics(state, ("x", "y", "z"))
        K = np.asarray(J) @ np.asarray(J).T
        assert int(found["conflicts"]) == (K[np.triu_indices(3, 1)] < 0).sum()
        expected = K[0, 2] / np.sqrt(K[0, 0] * K[2, 2])
        np.testing.assert_allclose(found["cosine/x+z"], expected, rtol=1e-4)
    with pytest.raises(ValueError, match="found 0"):
        metrics(optax.EmptyState())


def test_pcgrad_is_a_member_of_the_family():
    mine, one = pcgrad(3, seed=2), aggregate("pcgrad", 3)
    state = one.init(None)._replace(rules=(mine.init(None).key,))
    np.testing.assert_array_equal(mine.update(J, mine.init(None))[0], one.update(J, state)[0])


MESH = """
import sys, json
import jax, jax.numpy as jnp, numpy as np
from jaxlora.aggregation import MEMBERS, aggregate
mesh = jax.make_mesh((8,), ("parts",))
G = jax.random.normal(jax.random.key(0), (3, 64))
there = jax.device_put(G, jax.NamedSharding(mesh, jax.P(None, "parts")))
losses, gaps = jnp.array([1.0, 2.0, 3.0]), {}
for name in sys.argv[1:] or MEMBERS:
    tx = aggregate(name, 3)
    run = jax.jit(lambda g: tx.update(g, tx.init(None), losses=losses)[0])
    found = run(there)
    assert found.sharding.spec == jax.P("parts"), name
    gaps[name] = float(np.abs(np.asarray(found) - np.asarray(run(G))).max())
print(json.dumps(gaps))
"""


def on_eight_devices(*names):
    done = subprocess.run(
        [sys.executable, "-c", MESH, *names], capture_output=True, text=True, check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_sharded_gradients_give_the_same_update():
    """Split over eight devices, whose shardings are part of types; the result stays split."""
    gaps = on_eight_devices("upgrad", "cagrad", "nash_mtl", "aligned_mtl", "famo")
    assert len(gaps) == 5 and max(gaps.values()) < 1e-5


@pytest.mark.slow
def test_all_members_on_eight_devices():
    assert max(on_eight_devices().values()) < 1e-5


@pytest.mark.parametrize(
    ("method", "bad", "good"),
    [
        ("geometric_mean", [0.0, 1.0], [0.5, 1.0]),  # 0 has no logarithm
        (famo(min_losses=(0.5, 0.5)), [0.4, 1.0], [0.7, 1.0]),
    ],
)
def test_losses_that_give_no_weights_leave_the_state_as_it_was(method, bad, good):
    tx = aggregate(method, 2, ema=0.0 if method != "geometric_mean" else 0.9)
    step = jax.jit(lambda state, losses: tx.update({"w": J[:2]}, state, losses=losses))
    start = step(tx.init(None), jnp.array(good))[1]
    update, state = step(start, jnp.array(bad))
    assert np.isnan(update["w"]).all()
    np.testing.assert_array_equal(state.weights, start.weights)
    jax.tree.map(np.testing.assert_array_equal, state.rules, start.rules)
    assert np.isfinite(step(state, jnp.array(good))[0]["w"]).all()


def test_weights_that_were_never_found_are_not_used_again():
    tx = aggregate("geometric_mean", 2, every=10)
    state = tx.init(None)
    for losses, found in (([0.0, 1.0], False), ([0.5, 1.0], True), ([0.0, 1.0], True)):
        update, state = tx.update({"w": J[:2]}, state, losses=jnp.array(losses))
        assert np.isfinite(update["w"]).all() == found
        assert not found or np.any(update["w"])


def test_names_are_as_many_as_tasks_and_parts():
    tx = aggregate("sum", 2, per="leaf")
    grads = {"a": J[:2], "b": J[:2]}
    state = tx.update(grads, tx.init({"a": J[0], "b": J[0]}))[1]
    assert "b/weight/y" in metrics(state, ("x", "y"), ("a", "b"))
    for tasks, parts, message in (
        (("x", "y", "z"), None, "tasks has 3 names for 2 tasks"),
        (("x",), None, "tasks has 1 names for 2 tasks"),
        (None, ("a",), "parts has 1 names for 2 parts"),
    ):
        with pytest.raises(ValueError, match=message):
            metrics(state, tasks, parts)
