"""PCGrad: exact cases by hand, torchjd as a live oracle, and what must hold for any gradients."""

import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from hypothesis import given, settings
from hypothesis import strategies as st
from releases import since
from tiny import by_orbax

import jaxlora
from jaxlora.pcgrad import PCGradState, combine, cosines, gram, orders, pcgrad, project, sum_tasks

J_BASE = [[-4, 1, 1], [6, 1, 1]]
J3 = [[1, 0, 0], [-1, 1, 0], [-1, -1, 1]]
J3_SUMS = {  # order of visits of rows 0, 1, 2 → sum of the projected gradients
    "12|02|01": [-2 / 3, 1 / 3, 5 / 3],
    "12|02|10": [-1 / 6, -1 / 6, 5 / 3],
    "12|20|01": [-1 / 3, 2 / 3, 4 / 3],
    "12|20|10": [1 / 6, 1 / 6, 4 / 3],
}


def array(rows):
    return jnp.array(rows, jnp.float32)


def parse(text):
    """`12|02|01` → full orders; each row's own number comes last, where it is skipped."""
    rows = text.split("|")
    return jnp.array([[*map(int, row), i] for i, row in enumerate(rows)])


def ascending(count):
    return jnp.tile(jnp.arange(count), (count, 1))


@jax.jit
def compiled(J, visits):
    W = project(gram(J), visits)
    return W, combine(J, W.sum(0))


def weights(J, visits=None):
    return compiled(array(J), ascending(len(J)) if visits is None else visits)[0]


def surgery(J, visits=None):
    return compiled(array(J), ascending(len(J)) if visits is None else visits)[1]


def random_case(seed, tasks, size):
    key, order_key = jax.random.split(jax.random.key(seed))
    return jax.random.normal(key, (tasks, size)), orders(order_key, tasks)


# ---- cases with exact answers


def test_two_tasks_by_hand():
    np.testing.assert_allclose(weights(J_BASE).sum(0), [20 / 9, 30 / 19], rtol=1e-6)
    np.testing.assert_allclose(surgery(J_BASE), [100 / 171, 650 / 171, 650 / 171], rtol=5e-6)


@pytest.mark.parametrize(("text", "expected"), J3_SUMS.items())
def test_three_tasks_by_hand(text, expected):
    np.testing.assert_allclose(surgery(J3, parse(text)), expected, atol=1e-6)


def test_mean_over_all_orders():
    flips = itertools.product(("12", "21"), ("02", "20"), ("01", "10"))
    sums = [surgery(J3, parse("|".join(rows))) for rows in flips]
    assert len(sums) == 8
    np.testing.assert_allclose(np.mean(sums, 0), [-0.25, 0.25, 1.5], atol=1e-6)


def test_a_task_never_projects_on_itself():
    J = array([[-2, -1], [1, 0], [1, 1]])
    visits = jnp.array([[1, 2, 0], [0, 2, 1], [0, 1, 2]])
    # Visiting itself at the end would give (0.3, -0.6).
    np.testing.assert_allclose(weights(J, visits)[0] @ J, [0.5, -0.5], atol=1e-6)


def test_heads_stay_out_of_it():
    """Shared gradients (1, 0), (-1, 1); head gradients 3, 5: no head enters a dot product."""
    directions = array([[1, 0], [-1, 1]])

    def total(stack, heads):
        return jnp.sum(stack["w"] * directions) + 3 * heads["a"] + 5 * heads["b"]

    params, heads = {"w": jnp.zeros(2)}, {"a": jnp.zeros(()), "b": jnp.zeros(())}
    stack = {"w": jnp.zeros((2, 2))}
    grads, head_grads = jax.grad(total, (0, 1))(stack, heads)
    tx, head_tx = optax.chain(pcgrad(2), optax.sgd(1.0)), optax.sgd(1.0)
    updates, _ = tx.update(grads, tx.init(params))
    head_updates, _ = head_tx.update(head_grads, head_tx.init(heads))
    np.testing.assert_allclose(updates["w"], [-0.5, -1.5], atol=1e-7)
    assert {k: float(v) for k, v in head_updates.items()} == {"a": -3.0, "b": -5.0}


def test_zero_gradient_never_conflicts():
    J = [[0, 0, 0], [1, -1, 0], [-1, 0.5, 0]]
    np.testing.assert_allclose(surgery(J), [-0.45, -0.65, 0], atol=1e-6)
    assert weights(J)[0].tolist() == [1, 0, 0]
    np.testing.assert_array_equal(surgery(np.zeros((3, 2))), [0, 0])


# ---- a live oracle


@pytest.mark.parametrize("tasks", [2, 3, 5])
@pytest.mark.parametrize("seed", range(8))
def test_agrees_with_torchjd(tasks, seed, monkeypatch):
    torch = pytest.importorskip("torch")
    aggregation = pytest.importorskip("torchjd.aggregation")
    J, visits = random_case(seed, tasks, size=6)
    rows = iter(np.asarray(visits))
    monkeypatch.setattr(torch, "randperm", lambda n: torch.tensor(next(rows)))
    expected = aggregation.PCGrad()(torch.tensor(np.asarray(J))).numpy()
    np.testing.assert_allclose(surgery(J, visits), expected, rtol=1e-4, atol=1e-5)
    assert next(rows, None) is None  # it used one order for each task, as we did


# ---- what must hold for any gradients


@pytest.mark.parametrize("power", [-33, -20, -1, 0, 7, 33])
def test_powers_of_two_scale_bit_for_bit(power):
    J, visits = random_case(3, 4, 50)
    scale = 2.0**power  # 2^±33 is about 1e±10
    np.testing.assert_array_equal(surgery(J * scale, visits), surgery(J, visits) * scale)


@pytest.mark.parametrize("scale", [1e-10, 1e-7, 1e-3, 3.0, 1e5, 1e10])
def test_scales_exactly_with_the_gradients(scale):
    for text, expected in J3_SUMS.items():
        found = surgery(array(J3) * scale, parse(text)) / scale
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_no_conflict_gives_the_plain_sum():
    J = jnp.abs(random_case(0, 4, 30)[0])
    np.testing.assert_array_equal(weights(J), np.eye(4))
    np.testing.assert_allclose(surgery(J), np.sum(J, 0), rtol=1e-6)


def test_one_task_is_the_identity():
    grads = {"a": jax.random.normal(jax.random.key(0), (1, 7, 3)), "b": jnp.array([[-1e-30]])}
    tx = pcgrad(1)
    updates, _ = tx.update(grads, tx.init(None))
    for name, g in grads.items():
        np.testing.assert_array_equal(updates[name], g[0])


def test_leaves_count_as_one_long_vector():
    J, visits = random_case(5, 3, 24)
    tree = {"a": J[:, :12].reshape(3, 2, 2, 3), "b": [J[:, 12:23], J[:, 23]]}
    np.testing.assert_allclose(gram(tree), gram(J), rtol=1e-5, atol=1e-5)
    result = combine(tree, project(gram(tree), visits).sum(0))
    assert jax.tree.map(jnp.shape, result) == {"a": (2, 2, 3), "b": [(11,), ()]}
    flat = jnp.concatenate([x.ravel() for x in jax.tree.leaves(result)])
    np.testing.assert_allclose(flat, surgery(J, visits), rtol=1e-4, atol=1e-5)


matrices = st.integers(2, 4).flatmap(
    lambda tasks: st.lists(
        st.lists(st.integers(-8, 8), min_size=3, max_size=3), min_size=tasks, max_size=tasks
    )
)


@settings(max_examples=40, deadline=None)
@given(J=matrices, data=st.data())
def test_renumbering_tasks_renumbers_the_weights(J, data):
    J, tasks = np.array(J, np.float32), len(J)
    visits = np.array([data.draw(st.permutations(range(tasks))) for _ in range(tasks)])
    new = np.array(data.draw(st.permutations(range(tasks))))  # new task i is old task new[i]
    old = np.argsort(new)
    W, renumbered = weights(J, visits), weights(J[new], old[visits[new]])
    np.testing.assert_allclose(renumbered, W[new][:, new], rtol=1e-3, atol=1e-5 * np.abs(W).max())


@settings(max_examples=40, deadline=None)
@given(J=matrices.filter(lambda J: len(J) == 2))
def test_of_two_tasks_neither_harms_the_other(J):
    J = array(J)
    projected = weights(J) @ J
    lengths = jnp.linalg.norm(J, axis=1)
    for i, j in ((0, 1), (1, 0)):
        assert projected[i] @ J[j] >= -1e-5 * lengths[0] * lengths[1]
        assert jnp.linalg.norm(projected[i]) <= lengths[i] * (1 + 1e-5)


# ---- as an optax transform


def test_both_ways_to_it():
    assert jaxlora.pcgrad is pcgrad
    assert isinstance(jaxlora.pcgrad(num_tasks=3), optax.GradientTransformation)


def test_in_an_optax_chain():
    params = {"w": jnp.ones((4, 2)), "b": jnp.ones(2)}
    grads = {"w": jnp.ones((3, 4, 2)), "b": jnp.ones((3, 2))}  # no conflict: 3 of each
    rest = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    tx = optax.chain(jaxlora.pcgrad(3), optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    expected, _ = rest.update(jax.tree.map(lambda g: g.sum(0), grads), rest.init(params), params)
    state = tx.init(params)
    for update in (tx.update, jax.jit(tx.update)):
        updates, _ = update(grads, state, params)
        for name, by_hand in expected.items():
            assert updates[name].shape == params[name].shape
            np.testing.assert_allclose(updates[name], by_hand, rtol=1e-6)


def test_under_vmap_each_set_is_its_own():
    batch = jax.random.normal(jax.random.key(0), (5, 3, 8))
    tx = pcgrad(3)
    state = tx.init(None)
    updates, states = jax.vmap(tx.update, (0, None))(batch, state)
    one_update = jax.jit(tx.update)
    for k in range(5):
        alone, after = one_update(batch[k], state)
        np.testing.assert_allclose(updates[k], alone, rtol=1e-5, atol=1e-6)
        assert states.conflicts[k] == after.conflicts
    K = jax.vmap(gram)(batch)
    many = jax.vmap(project, (0, None))(K, ascending(3))
    np.testing.assert_allclose(many[2], project(K[2], ascending(3)), rtol=1e-6)


def test_bfloat16_gradients():
    J, visits = random_case(1, 3, 2000)
    half = J.astype(jnp.bfloat16)
    assert gram(half).dtype == jnp.float32
    result = combine(half, project(gram(half), visits).sum(0))
    exact = surgery(half.astype(jnp.float32), visits)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_allclose(result.astype(jnp.float32), exact, rtol=2**-8, atol=1e-2)
    tx = pcgrad(3)
    assert tx.update(half, tx.init(None))[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("surgery", [True, False])
def test_the_state_keeps_its_dtypes_in_x64(surgery):
    with jax.enable_x64(True):
        tx = pcgrad(3, surgery=surgery)
        state = tx.init(None)
        _, after = tx.update(array(J3), state)
    assert [x.dtype for x in after] == [x.dtype for x in state]


def test_state_tells_conflicts_and_cosines():
    tx = pcgrad(3)
    state = tx.init(None)
    assert isinstance(state, PCGradState) and int(state.conflicts) == 0
    _, state = tx.update(array([[1, 0], [-1, 1], [0, 0]]), state)
    assert int(state.conflicts) == 1  # of three pairs; the zero gradient conflicts with nobody
    half = np.sqrt(0.5)
    np.testing.assert_allclose(state.cosines, [[1, -half, 0], [-half, 1, 0], [0, 0, 0]], rtol=1e-6)


def test_without_surgery_the_sum_and_what_pcgrad_would_have_met():
    tx = pcgrad(3, surgery=False)
    update, state = tx.update(array(J3), tx.init(None))
    np.testing.assert_array_equal(update, [-1, 0, 1])
    _, met = pcgrad(3).update(array(J3), pcgrad(3).init(None))
    assert int(state.conflicts) == int(met.conflicts) == 2  # of J3's rows 0 and 1, 0 and 2
    np.testing.assert_array_equal(state.cosines, met.cosines)


def test_cosines_stay_within_one():
    J = jnp.full((2, 1000), 0.1)
    assert float(jnp.abs(cosines(gram(J))).max()) <= 1


def test_every_update_and_every_task_has_its_own_random_order():
    """J3 has four results, by the orders of rows 1 and 2; independent orders make each 1/4."""
    tx = pcgrad(3, seed=1)
    updates = 1024

    def one(state, _):
        update, state = tx.update(array(J3), state)
        return state, update

    _, sums = jax.lax.scan(one, tx.init(None), None, updates)
    for expected in J3_SUMS.values():
        share = np.mean(np.all(np.abs(sums - array(expected)[None]) < 1e-5, axis=1))
        assert abs(share - 0.25) < 0.05  # 1/3 or 1/6 were all tasks to share one order


def test_seed_decides_the_orders():
    def run(seed):
        tx = pcgrad(3, seed)
        state, found, next_update = tx.init(None), [], jax.jit(tx.update)
        for _ in range(6):
            update, state = next_update(array(J3), state)
            found.append(update.tolist())
        return found

    assert run(0) == run(0)
    assert run(0) != run(1)


def test_wrong_leading_axis_names_the_leaf():
    tx = pcgrad(3)
    good = jnp.zeros((3, 2))
    for bad in (jnp.zeros((2, 2)), jnp.zeros(())):
        with pytest.raises(ValueError, match=r"'layer\.kernel'"):
            tx.update({"bias": good, "layer": {"kernel": bad}}, tx.init(None))
    with pytest.raises(ValueError, match="num_tasks"):
        pcgrad(0)


# ---- beside heads, inside optax's wrappers, and saved


TRUNK_AND_HEADS = {"trunk": "shared", "heads": "own"}


def two_tasks():
    """Gradients `[T, ...]` and parameters: shared (1, 0) and (-1, 1), of the heads 3 and 5."""

    def losses(params):
        w, heads = params["trunk"]["w"], params["heads"]
        return jnp.stack(
            [w[0] + 3 * heads["a"]["b"].sum(), w[1] - w[0] + 5 * heads["b"]["b"].sum()]
        )

    heads = {name: {"b": jnp.zeros(1)} for name in "ab"}
    params = {"trunk": {"w": jnp.zeros(2)}, "heads": heads}
    return jax.jacrev(losses)(params), params


def test_heads_in_one_tree_with_what_is_shared():
    grads, params = two_tasks()
    rest = optax.sgd(1.0)
    tx = optax.partition(
        {"shared": optax.chain(pcgrad(2), rest), "own": optax.chain(sum_tasks(2), rest)},
        TRUNK_AND_HEADS,
    )
    for update in (tx.update, jax.jit(tx.update)):
        updates, state = update(grads, tx.init(params), params)
        params_after = optax.apply_updates(params, updates)
        assert jax.tree.map(jnp.shape, params_after) == jax.tree.map(jnp.shape, params)
        np.testing.assert_allclose(params_after["trunk"]["w"], [-0.5, -1.5], atol=1e-7)
        assert {k: x["b"].tolist() for k, x in updates["heads"].items()} == {"a": [-3], "b": [-5]}
        assert optax.tree.get(state, "conflicts") == 1


@pytest.mark.parametrize("make", [pcgrad, sum_tasks])
def test_a_leaf_that_is_not_its_parameters_stack_is_refused(make):
    """Three numbers that three tasks would broadcast to, and a gradient summed already."""
    tx = make(3)
    params = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
    good = {"w": jnp.zeros((3, 3, 2)), "b": jnp.zeros((3, 2))}
    tx.update(good, tx.init(params), params)
    for name, bad in (("w", jnp.zeros((3, 2))), ("b", jnp.zeros(3)), ("b", jnp.zeros((3, 1)))):
        with pytest.raises(
            ValueError, match=rf"{make.__name__}\(num_tasks=3\) .*'{name}' has shape"
        ):
            tx.update(good | {name: bad}, tx.init(params), params)


@pytest.mark.parametrize("make", [pcgrad, sum_tasks])
def test_a_number_and_what_is_no_real_float_are_refused(make):
    tx = make(2)
    for bad, why in ((3.0, r"shape \(\)"), (jnp.ones((2, 3), jnp.int32), "is int32"),
                     (jnp.ones((2, 3), jnp.complex64), "is complex64.*split_real")):  # fmt: skip
        with pytest.raises(ValueError, match=f"leaf 'a' .*{why}|'a' {why}"):
            tx.update({"a": bad}, tx.init(None))


def test_complex_parameters_by_their_parts():
    grads = {"a": jnp.array([[1 + 2j, -1j], [-1 - 1j, 2 + 0j]])}
    parts = jnp.concatenate([grads["a"].real, grads["a"].imag], axis=1)
    tx, params = optax.contrib.split_real_and_imaginary(pcgrad(2)), {"a": jnp.zeros(2, complex)}
    found, _ = tx.update(grads, tx.init(params), params)
    expected = surgery(parts)
    np.testing.assert_allclose(found["a"], expected[:2] + 1j * expected[2:], rtol=1e-6)


@pytest.mark.parametrize("num_tasks", [3, 6])
@pytest.mark.parametrize("make", [pcgrad, sum_tasks])
def test_shardings_that_are_part_of_types(make, num_tasks):
    """As `jax.make_mesh` makes them by default: products over a split axis need to say theirs."""
    mesh = jax.make_mesh((1,), ("parts",))
    J = random_case(0, num_tasks, 8)[0]
    grads, split = {"w": J, "b": J[:, 0]}, jax.NamedSharding(mesh, jax.P(None, "parts"))
    tx = make(num_tasks)
    expected, _ = jax.jit(tx.update)(grads, tx.init(None))
    found, _ = jax.jit(tx.update)(grads | {"w": jax.device_put(J, split)}, tx.init(None))
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-5, atol=1e-6)
    assert found["w"].sharding.spec == jax.P("parts")


def test_sum_tasks_sums_in_float32_and_keeps_the_dtype():
    half = jnp.full((300, 2), 1.0, jnp.bfloat16)  # 257 is no bfloat16: sums would stay at 256
    total, _ = sum_tasks(300).update(half, optax.EmptyState())
    assert total.dtype == jnp.bfloat16 and total.tolist() == [300.0, 300.0]
    with pytest.raises(ValueError, match="num_tasks"):
        sum_tasks(0)


def params_of(tx, grads, params, steps):
    state = tx.init(params)
    if isinstance(state, optax.MultiStepsState):
        stacked = jax.tree.map(lambda x: jnp.stack([x] * 3), state.acc_grads)
        state = state._replace(acc_grads=stacked)
    update = jax.jit(tx.update)
    for number in range(steps):
        scaled = jax.tree.map(lambda g, number=number: g * (number + 1), grads)
        updates, state = update(scaled, state, params)
        params = optax.apply_updates(params, updates)
    return params


WRAPPERS = {
    "named_chain": lambda: optax.named_chain(("pcgrad", pcgrad(3)), ("rest", optax.sgd(0.1))),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        lambda learning_rate: optax.chain(pcgrad(3), optax.sgd(learning_rate))
    )(learning_rate=0.1),
    "masked": lambda: optax.chain(
        optax.masked(pcgrad(3), {"w": True}), optax.masked(sum_tasks(3), {"w": False}),
        optax.sgd(0.1),
    ),
    "apply_if_finite": lambda: optax.chain(pcgrad(3), optax.apply_if_finite(optax.sgd(0.1), 2)),
    "conditionally_mask": lambda: optax.chain(
        pcgrad(3), optax.conditionally_mask(optax.sgd(0.1), lambda step: step >= 0)
    ),
    "conditionally_transform": lambda: optax.chain(
        pcgrad(3), optax.conditionally_transform(optax.sgd(0.1), lambda step: step >= 0)
    ),
    "flatten": lambda: optax.chain(pcgrad(3), optax.flatten(optax.sgd(0.1))),
    "split_real_and_imaginary": lambda: optax.contrib.split_real_and_imaginary(
        optax.chain(pcgrad(3), optax.sgd(0.1))
    ),
    "with_extra_args_support": lambda: optax.with_extra_args_support(
        optax.chain(pcgrad(3), optax.sgd(0.1))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPERS)
def test_optax_wrappers(name):
    """Each as its docstring says, with the result of the plain chain."""
    grads, params = {"w": array(J3)}, {"w": jnp.zeros(3)}
    expected = params_of(optax.chain(pcgrad(3), optax.sgd(0.1)), grads, params, 3)
    found = params_of(WRAPPERS[name](), grads, params, 3)
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-6)


def test_one_task_that_is_not_finite_is_left_out_by_apply_if_finite():
    tx = WRAPPERS["apply_if_finite"]()
    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    updates, state = tx.update({"w": array(J3).at[1, 0].set(jnp.nan)}, state, params)
    assert updates["w"].tolist() == [0, 0, 0]
    updates, _ = tx.update({"w": array(J3)}, state, params)
    assert jnp.isfinite(updates["w"]).all() and jnp.abs(updates["w"]).max() > 0.01


def test_accumulation_projects_each_tasks_mean_once():
    """Means of 1, 2 and 3 times J3: twice J3; the same orders as one update of that."""
    grads, params = {"w": array(J3)}, {"w": jnp.zeros(3)}
    inner = optax.chain(pcgrad(3), optax.sgd(0.1))
    found = params_of(optax.MultiSteps(inner, 3), grads, params, 3)
    expected = params_of(inner, {"w": 2 * array(J3)}, params, 1)
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-6)
    assert params_of(optax.MultiSteps(inner, 3), grads, params, 2)["w"].tolist() == [0, 0, 0]


@since("optax", 0, 2, 8, reason="older MultiSteps adds before it calls the transform")
def test_accumulation_without_the_task_axis_is_told_how():
    steps, params = optax.MultiSteps(pcgrad(3), 2), {"w": jnp.zeros((3, 2))}
    with pytest.raises(
        ValueError, match=r"'w' has shape \(3, 2\) instead of \(3, 3, 2\).*acc_grads"
    ):
        steps.update({"w": jnp.zeros((3, 3, 2))}, steps.init(params), params)


def by_numpy(state, folder):
    np.savez(folder / "state.npz", *jax.tree.leaves(state))
    with np.load(folder / "state.npz") as arrays:
        return jax.tree.unflatten(jax.tree.structure(state), arrays.values())


SAVED = {
    "orbax": by_orbax,
    "numpy": by_numpy,
    "flax bytes": lambda state, _: serialization.from_bytes(state, serialization.to_bytes(state)),
    "msgpack": lambda state, _: serialization.from_state_dict(
        state,
        serialization.msgpack_restore(
            serialization.msgpack_serialize(serialization.to_state_dict(state))
        ),
    ),
    "pickle": lambda state, _: pickle.loads(pickle.dumps(state)),
    "tree arithmetic": lambda state, _: optax.tree.add(optax.tree.zeros_like(state), state),
    "device_get": lambda state, _: jax.device_get(state),
}


@pytest.mark.parametrize("way", SAVED)
def test_a_saved_state_goes_on_as_if_nothing_had_been(way, tmp_path):
    tx = optax.chain(pcgrad(3, seed=4), optax.adam(0.1))
    grads, update = {"w": array(J3)}, jax.jit(tx.update)
    _, state = update(grads, tx.init({"w": jnp.zeros(3)}))
    back = SAVED[way](state, tmp_path)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for _ in range(4):
        expected, state = update(grads, state)
        found, back = update(grads, back)
        np.testing.assert_array_equal(found["w"], expected["w"])
    np.testing.assert_array_equal(back[0].key, state[0].key)


def test_the_orders_are_those_of_a_typed_key_of_the_seed():
    """As before states kept raw data, so that runs stopped then go on with the same orders."""
    key, order_key = jax.random.split(jax.random.key(7))
    W = project(gram(array(J3)), orders(order_key, 3))
    update, state = pcgrad(3, seed=7).update(array(J3), pcgrad(3, seed=7).init(None))
    np.testing.assert_allclose(update, W.sum(0) @ array(J3), rtol=1e-6)
    np.testing.assert_array_equal(state.key, jax.random.key_data(key))


def test_jaxs_default_generator_changes_nothing():
    def run():
        return pcgrad(3, seed=7).update(array(J3), pcgrad(3, seed=7).init(None))

    expected, state = run()
    jax.config.update("jax_default_prng_impl", "rbg")
    try:
        found, again = run()
    finally:
        jax.config.update("jax_default_prng_impl", "threefry2x32")
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(again.key, state.key)


def test_empty_tree():
    tx = pcgrad(3)
    updates, state = tx.update({}, tx.init({}))
    assert updates == {} and int(state.conflicts) == 0
    np.testing.assert_array_equal(state.cosines, np.zeros((3, 3)))


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 5, 9])
def test_gram_is_the_matrix_of_dot_products(num_tasks):
    """Few tasks and many take different ways."""
    rng = np.random.default_rng(num_tasks)
    leaves = [rng.normal(size=(num_tasks, *shape)) for shape in ((7,), (3, 5), (1,))]
    flat = np.concatenate([x.reshape(num_tasks, -1) for x in leaves], axis=1)
    found = gram([jnp.asarray(x, jnp.float32) for x in leaves])
    np.testing.assert_allclose(found, flat @ flat.T, rtol=1e-5, atol=1e-5)
