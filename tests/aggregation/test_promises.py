"""What the members promise, each property held against all that promise it."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from gradients import degenerate, losses_of, normal, program, promising, update
from tiny import by_orbax

from jaxlora.aggregation import MEMBERS, PROMISES, aggregate

ALL = sorted(MEMBERS)
# For tests that compile programs of their own: one of each kind is quick, all are slow.
KINDS = ("cagrad", "famo", "nash_mtl", "pcgrad", "upgrad")
EACH = [*KINDS, *(pytest.param(n, marks=pytest.mark.slow) for n in ALL if n not in KINDS)]


def test_every_promise_is_known_and_made():
    made = {promise for found in MEMBERS.values() for promise in found.promises}
    assert made == set(PROMISES)


@pytest.mark.parametrize("name", promising("non-conflicting"))
def test_no_task_is_worked_against(name):
    for J in (*(normal(3, seed=seed) for seed in range(8)), *degenerate(3).values()):
        d, state = program(name, 3)(jnp.asarray(J, jnp.float32), jnp.asarray(losses_of(3)))
        lengths = np.linalg.norm(J, axis=1)
        assert (J @ np.asarray(d) >= -1e-5 * lengths * (abs(state.weights) @ lengths)).all()


@pytest.mark.parametrize("name", ["sum", "mean", "aligned_mtl"])
def test_what_promises_nothing_of_the_kind_does_work_against_tasks(name):
    """The test above can fail."""
    J = np.array([[1.0, 0.0, 0.0], [-3.0, 0.5, 0.0], [-4.0, 0.0, 0.3]])
    assert "non-conflicting" not in MEMBERS[name].promises
    assert (J @ update(name, J)).min() < -1e-3


@pytest.mark.parametrize("name", promising("permutation"))
def test_renumbering_the_tasks_changes_nothing(name):
    J, losses, order = normal(5), losses_of(5), np.array([3, 0, 4, 1, 2])
    expected = update(name, J, losses)
    found = update(name, J[order], losses[order])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("scale", [1e-10, 1e-3, 2.0**20, 1e10])
@pytest.mark.parametrize("name", promising("homogeneous"))
def test_the_update_scales_with_the_gradients(name, scale):
    J = normal(3)
    expected = update(name, J)
    found = update(name, np.float32(scale) * J.astype(np.float32)) / scale
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("name", "degree"), [("nash_mtl", 0.0), ("fairgrad", -1 / 3)])
def test_bargains_scale_as_documented(name, degree):
    J = normal(3)
    for scale in (1e-10, 1e-3, 1e10):
        found = update(name, np.float32(scale) * J.astype(np.float32)) / scale**degree
        np.testing.assert_allclose(found, update(name, J), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", promising("linear"))
def test_linear_in_the_tasks_scales(name):
    J, c1, c2 = normal(3), np.array([[1.0], [2.0], [0.0]]), np.array([[0.5], [10.0], [3.0]])
    parts = update(name, c1 * J) + 2 * update(name, c2 * J)
    np.testing.assert_allclose(update(name, (c1 + 2 * c2) * J), parts, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", promising("stationary"))
def test_stationary_points_are_kept(name):
    """Positive weights 1, 2, 3 sum the gradients to zero: any direction works against a task."""
    J = normal(3)
    J[2] = -(J[0] + 2 * J[1]) / 3
    near = 1e-5 if name not in {"nash_mtl", "fairgrad"} else 1e-2  # no solution: see nash_mtl
    assert np.abs(update(name, J)).max() <= near * np.abs(J).max()


@pytest.mark.parametrize("name", promising("unit"))
def test_one_task_keeps_its_gradient(name):
    J = normal(1)
    np.testing.assert_allclose(update(name, J), J[0], rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_finite_gradients_give_a_finite_update_and_state(name):
    huge = normal(3) * np.array([[1e10], [1.0], [1e-10]])
    for J in (*degenerate(1).values(), *degenerate(3).values(), huge):
        losses = losses_of(len(J))
        found, state = program(name, len(J))(jnp.asarray(J, jnp.float32), jnp.asarray(losses))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((found, state)))


@pytest.mark.parametrize("name", EACH)
def test_what_is_not_finite_is_seen_once_and_remembered_nowhere(name):
    J, losses = jnp.asarray(normal(3), jnp.float32), jnp.asarray(losses_of(3))
    tx = aggregate(name, 3, ema=0.5)
    update = jax.jit(tx.update)
    _, state = update(J, tx.init(None), losses=losses)
    found, after = update(J.at[1, 0].set(jnp.nan), state, losses=losses)
    assert np.isnan(found).all()
    same = jax.tree.map(np.array_equal, (after.rules, after.weights), (state.rules, state.weights))
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("name", ["pcgrad", "uw"])
def test_what_is_not_finite_stays_in_its_group(name):
    J, losses = jnp.asarray(normal(4), jnp.float32), jnp.asarray(losses_of(4))
    tx = aggregate(name, 4, groups=((0, 2), (1, 3)), ema=0.5)
    sound, _ = tx.update(J, tx.init(None), losses=losses)
    found, state = tx.update(J.at[1, 0].set(jnp.inf), tx.init(None), losses=losses)
    np.testing.assert_array_equal(found[0], sound[0])
    assert np.isnan(found[1]).all()
    found, _ = tx.update(J, state, losses=losses)  # the average of the other group starts here
    np.testing.assert_allclose(found[1], sound[1], rtol=1e-6)


def test_weights_are_computed_again_after_an_update_that_gave_none():
    J = jnp.asarray(normal(3), jnp.float32)
    tx = aggregate("mgda", 3, every=5)
    expected, _ = tx.update(J, tx.init(None))
    found, state = tx.update(J * jnp.nan, tx.init(None))
    assert np.isnan(found).all()
    found, state = tx.update(J, state)
    np.testing.assert_array_equal(found, expected)
    found, _ = tx.update(J[::-1], state)  # weights of the update before
    assert not np.allclose(found, expected)


@pytest.mark.parametrize("name", EACH)
def test_bfloat16_is_summed_in_float32(name):
    half = jnp.asarray(normal(3, 3000), jnp.bfloat16)
    losses = jnp.asarray(losses_of(3))
    found, state = program(name, 3)(half, losses)
    exact, expected = program(name, 3)(half.astype(jnp.float32), losses)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(state.weights, expected.weights, rtol=1e-4)
    np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("name", EACH)
def test_a_scan_of_steps_is_the_steps_one_by_one(name):
    tx, losses = aggregate(name, 3), jnp.asarray([losses_of(3), losses_of(3)[::-1], losses_of(3)])
    J = jnp.asarray([normal(3, seed=seed) for seed in range(3)], jnp.float32)

    def step(state, given):
        found, state = tx.update(given[0], state, losses=given[1])
        return state, found

    end, together = jax.jit(lambda s: jax.lax.scan(step, s, (J, losses)))(tx.init(None))
    state, one = tx.init(None), jax.jit(step)
    for n in range(3):
        state, alone = one(state, (J[n], losses[n]))
        np.testing.assert_allclose(together[n], alone, rtol=1e-4, atol=1e-5)
    assert jax.tree.map(jnp.shape, end) == jax.tree.map(jnp.shape, state)


@pytest.mark.parametrize("name", EACH)
def test_without_jit_it_is_the_same(name):
    J, losses = jnp.asarray(normal(3), jnp.float32), jnp.asarray(losses_of(3))
    tx = aggregate(name, 3)
    alone, _ = tx.update(J, tx.init(None), losses=losses)
    np.testing.assert_allclose(alone, program(name, 3)(J, losses)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EACH)
def test_groups_are_separate_calls(name):
    """Tasks 0, 3, 4 and 1, 2; random methods have a key of their own for each group."""
    J, losses, groups = normal(5), losses_of(5), ((0, 3, 4), (1, 2))
    tx = aggregate(name, 5, groups=groups)
    found, state = jax.jit(tx.update)(
        jnp.asarray(J, jnp.float32), tx.init(None), losses=jnp.asarray(losses)
    )
    for n, tasks in enumerate(map(list, groups)):
        alone = aggregate(name, len(tasks))
        start = alone.init(None)._replace(rules=(tx.init(None).rules[n],))
        expected, after = jax.jit(alone.update)(
            jnp.asarray(J[tasks], jnp.float32), start, losses=jnp.asarray(losses[tasks])
        )
        np.testing.assert_allclose(found[n], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state.weights[np.array(tasks)], after.weights, rtol=1e-4)


@pytest.mark.parametrize("name", EACH)
def test_parts_are_separate_calls(name):
    """Random methods have a key of their own for each part."""
    tree = {"a": {"x": normal(3, 7, 1), "y": normal(3, 5, 2)}, "b": normal(3, 9, 3)}
    tree = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
    params, losses = jax.tree.map(lambda x: x[0], tree), jnp.asarray(losses_of(3))
    tx = aggregate(name, 3, per=lambda path: path.split(".")[0])
    found, state = jax.jit(tx.update)(tree, tx.init(params), params, losses=losses)
    for n, part in enumerate("ab"):
        one = aggregate(name, 3)
        rules = jax.tree.map(lambda x, n=n: x[n], tx.init(params).rules)
        start = one.init(None)._replace(rules=rules)
        expected, after = jax.jit(one.update)({part: tree[part]}, start, losses=losses)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
            {part: found[part]}, expected,
        )  # fmt: skip
        np.testing.assert_allclose(state.weights[n], after.weights, rtol=1e-4, atol=1e-6)


SAVED = {
    "orbax": by_orbax,
    "msgpack": lambda state, _: serialization.from_bytes(state, serialization.to_bytes(state)),
    "pickle": lambda state, _: pickle.loads(pickle.dumps(state)),
}


@pytest.mark.parametrize("way", SAVED)
def test_a_saved_state_goes_on_as_if_nothing_had_been(way, tmp_path):
    """Of all members at once, so that it is one file each."""
    J, losses = jnp.asarray(normal(3), jnp.float32), jnp.asarray(losses_of(3))
    txs = {name: aggregate(name, 3, ema=0.5) for name in ALL}

    @jax.jit
    def step(states, J):
        found = {n: tx.update(J, states[n], losses=losses) for n, tx in txs.items()}
        return {n: x[0] for n, x in found.items()}, {n: x[1] for n, x in found.items()}

    _, states = step({name: tx.init(None) for name, tx in txs.items()}, J)
    back = SAVED[way](states, tmp_path)
    assert jax.tree.structure(back) == jax.tree.structure(states)
    expected, found = step(states, 2 * J)[0], step(back, 2 * J)[0]
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("name", ALL)
def test_dtypes_stay_what_they_are(name):
    tx, losses = aggregate(name, 2), jnp.asarray(losses_of(2))
    before = tx.init(None)
    _, after = jax.eval_shape(lambda s: tx.update(jnp.zeros((2, 3)), s, losses=losses), before)
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, before)


def test_in_a_chain_and_partition_with_extra_arguments():
    """The losses reach the aggregator through optax's wrappers."""
    shared = optax.chain(aggregate("geometric_mean", 2), optax.sgd(1.0))
    tx = optax.partition({"shared": shared, "own": optax.sgd(1.0)}, {"w": "shared", "h": "own"})
    params = {"w": jnp.zeros(2), "h": jnp.zeros(2)}
    grads = {"w": jnp.eye(2), "h": jnp.ones(2)}
    updates, _ = tx.update(grads, tx.init(params), params, losses=jnp.array([1.0, 4.0]))
    np.testing.assert_allclose(updates["w"], [-1.0, -0.25], rtol=1e-6)
