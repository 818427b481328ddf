"""The one train step: per-task gradients, what it may touch, and all variants through it."""

import dataclasses
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from jaxlora import bert, lora, losses, step, tasks, trees
from jaxlora.data.packing import Shape, fill
from jaxlora.lora import LoraConfig
from jaxlora.variants import VARIANTS, group_name, parse_groups

SIZE = 4  # examples of a task in a batch
ADAPTER = LoraConfig(4, 8.0)
ALL = ("sst", "para", "sts")
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def copy(tree):
    """Host copies of a tree's leaves (keys as their data)."""
    return [np.array(jax.random.key_data(x) if is_key(x) else x) for x in jax.tree.leaves(tree)]


def is_key(x):
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def random_batch(chosen, seed=0, hidden_size=None):
    """A batch of random sentences, packed; or of random vectors."""
    rng = np.random.default_rng(seed)
    slots = SIZE * max(t.sentences for t in chosen)
    labels = np.stack(
        [
            rng.integers(t.low, t.high + 1, SIZE) if t.integer else rng.uniform(0, 5, SIZE)
            for t in chosen
        ]
    ).astype(np.float32)
    weights = np.ones_like(labels)
    if hidden_size:
        vectors = rng.normal(size=(len(chosen), slots, hidden_size)).astype(np.float32)
        return step.Batch(vectors, labels, weights)
    rows = []
    for task in chosen:
        count = SIZE * task.sentences
        sentences = [rng.integers(5, 200, rng.integers(3, 14)) for _ in range(count)]
        rows.append(fill(sentences, range(count), slots, Shape(5, 32)))
    return step.Batch(step.Rows(*map(np.stack, zip(*rows, strict=True))), labels, weights)


def make(base, adapt="lora", names=ALL, sts_loss="mse", dropout=0.1, **replace):
    """A group ready to step: its setup, frozen tree, state and a batch."""
    chosen = tuple(tasks.tasks(sts_loss)[n] for n in names)
    config = base.config if dropout else dataclasses.replace(base.config, **NO_DROPOUT)
    frozen, trainable = step.split_params(
        adapt, base.params, ADAPTER, jax.random.key(1), jnp.float32
    )
    encode = step.encoder(config, jnp.float32, ADAPTER.scale, "cls")
    setup = step.Setup(
        chosen,
        step.cached if adapt == "frozen" else encode,
        *step.optimizers(len(chosen), 1e-2, 1e-2),
        config.hidden_size,
        dropout=dropout,
    )
    setup = dataclasses.replace(setup, **replace)
    state = step.init_state(setup, trainable, jax.random.key(2))
    batch = random_batch(chosen, hidden_size=config.hidden_size if adapt == "frozen" else None)
    return SimpleNamespace(setup=setup, encode=encode, frozen=frozen, state=state, batch=batch)


def warm(trainable):
    """Move an adapter off B = 0, so that A has a gradient too."""
    return jax.tree.map(
        lambda x: x + 0.02 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), trainable
    )


def task_loss(group, t, trainable, head):
    """One task's mean loss, written out."""
    task = group.setup.tasks[t]
    rows = step.Rows(*(x[t] for x in group.batch.inputs))
    vectors = group.encode(group.frozen, trainable, rows, None)
    u, v = vectors[:SIZE], vectors[SIZE : 2 * SIZE]
    outputs = task.apply_head(head, u, v, pair_features="concat")
    return jnp.mean(task.loss(outputs, group.batch.labels[t]))


class Recorded(NamedTuple):
    """In place of PCGrad's state: the gradients as they came in."""

    grads: Any
    conflicts: Any
    cosines: Any


def recorder():
    """A transform that keeps the per-task gradients and updates nothing."""

    def update(grads, state, params=None):
        del state, params
        none = jax.tree.map(lambda g: jnp.zeros_like(g[0]), grads)
        return none, (Recorded(grads, jnp.zeros(()), jnp.zeros(())),)

    return optax.GradientTransformation(lambda params: (Recorded((), 0, 0),), update)


# ---- gradients


@pytest.mark.parametrize("adapt", ["lora", "full"])
def test_each_tasks_gradient_is_its_own(adapt, tiny):
    group = make(tiny, adapt, dropout=0.0, tx=recorder())
    start = warm(group.state.trainable) if adapt == "lora" else group.state.trainable
    with jax.default_matmul_precision("highest"):
        train_step = jax.jit(lambda *args: step.train_step(group.setup, *args))
        after, metrics = train_step(group.state.replace(trainable=start), group.frozen, group.batch)
        grads = after.opt_state[0].grads
        for t, task in enumerate(group.setup.tasks):
            head = group.state.heads[task.name]
            one = jax.jit(jax.value_and_grad(lambda p, t=t, h=head: task_loss(group, t, p, h)))
            loss, expected = one(start)
            np.testing.assert_allclose(metrics.losses[t], loss, rtol=1e-5)
            total = optax.tree.norm(expected)
            assert total > 1e-3
            for g, e in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
                assert jnp.linalg.norm((g[t] - e).ravel()) <= 1e-5 * total


def test_heads_see_neither_projection_nor_clipping(tiny):
    tx, _ = step.optimizers(3, 1e-2, 1e-2, clip=1e-6)
    group = make(tiny, dropout=0.0, tx=tx, head_tx=optax.sgd(0.5))
    start, heads = group.state.trainable, group.state.heads
    after, _ = jax.jit(lambda *args: step.train_step(group.setup, *args))(
        group.state, group.frozen, group.batch
    )
    for t, task in enumerate(group.setup.tasks):
        grads = jax.grad(lambda h, t=t: task_loss(group, t, start, h))(heads[task.name])
        expected = jax.tree.map(lambda h, g: h - 0.5 * g, heads[task.name], grads)
        assert optax.tree.norm(grads) > 1e-2
        for found, by_hand in zip(
            jax.tree.leaves(after.heads[task.name]), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_allclose(found, by_hand, rtol=1e-4, atol=1e-6)


def test_the_encoders_update_is_projected_then_clipped(tiny):
    clip = 1e-3
    tx = optax.chain(*[step.pcgrad(3), optax.clip_by_global_norm(clip), optax.sgd(1.0)])
    group = make(tiny, dropout=0.0, tx=tx)
    _, metrics = jax.jit(lambda *args: step.train_step(group.setup, *args))(
        group.state, group.frozen, group.batch
    )
    np.testing.assert_allclose(metrics.update_norm, clip, rtol=1e-4)
    np.testing.assert_allclose(jnp.diag(metrics.cosines), np.ones(3), rtol=1e-5)
    below = jnp.sum(jnp.triu(metrics.cosines, 1) < 0)
    assert metrics.conflicts == below


# ---- what a step may depend on


def test_padding_examples_change_nothing(tiny):
    group = make(tiny)
    train_step = jax.jit(lambda *args: step.train_step(group.setup, *args))

    def run_once(labels, weights):
        batch = step.Batch(group.batch.inputs, labels, weights)
        return train_step(group.state, group.frozen, batch)

    weights = group.batch.weights.copy()
    weights[:, -1] = 0
    results = []
    for label in (0.0, 1.0):
        labels = group.batch.labels.copy()
        labels[:, -1] = label
        results.append(copy(run_once(labels, weights)))
    assert_same(*results)
    whole = run_once(group.batch.labels, group.batch.weights)[1].losses
    part = run_once(group.batch.labels, weights)[1].losses
    assert (whole != part).all()


def test_mean_is_over_real_examples():
    values, weights = jnp.array([[1.0, 3.0, 9.0]] * 3), jnp.array([[1, 1, 0], [1, 1, 1], [0] * 3])
    np.testing.assert_allclose(losses.masked_mean(values, weights), [2, 13 / 3, 0], rtol=1e-6)


def test_step_and_key_decide_the_dropout(tiny):
    group = make(tiny, tx=recorder(), head_tx=optax.sgd(0.0))
    train_step = jax.jit(lambda *args: step.train_step(group.setup, *args))

    def run(at, key=2):
        state = group.state.replace(step=jnp.array(at, jnp.int32), key=jax.random.key(key))
        after, metrics = train_step(state, group.frozen, group.batch)
        assert int(after.step) == at + 1
        return metrics.losses

    np.testing.assert_array_equal(run(0), run(0))
    assert (run(0) != run(1)).all()
    assert (run(0) != run(0, key=3)).all()


def test_a_head_starts_the_same_whatever_its_group(tiny):
    alone, together = make(tiny, names=("sts",)), make(tiny)
    assert_same(copy(alone.state.heads["sts"]), copy(together.state.heads["sts"]))
    flat = traverse_util.flatten_dict(together.state.heads)
    assert flat["sts", "out", "kernel"].shape == flat["para", "out", "kernel"].shape
    assert (flat["sts", "out", "kernel"] != flat["para", "out", "kernel"]).any()


# ---- what it may touch


@pytest.mark.parametrize("adapt", ["lora", "full", "frozen"])
def test_nothing_frozen_is_trained_or_remembered(adapt, tiny):
    group = make(tiny, adapt)
    before, base_before = copy(group.frozen), copy(tiny.params)
    size = trees.count(group.state.trainable)
    assert (
        size
        == {
            "frozen": 0,
            "lora": 2 * 4 * (32 + 32) * 4,  # layers × modules × (in + out) × rank
            "full": trees.count(bert.param_shapes(tiny.config)),
        }[adapt]
    )
    kept = [x for x in jax.tree.leaves(group.state.opt_state) if not is_key(x)]
    # Adam's two moments; conflicts, cosines and two counters besides.
    assert 2 * size < sum(x.size for x in kept) <= 2 * size + 1 + 9 + 2
    train_step, state = step.make_train_step(group.setup), group.state
    for seed in range(3):
        kind = {"hidden_size": 32} if adapt == "frozen" else {}
        batch = random_batch(group.setup.tasks, seed, **kind)
        state, metrics = train_step(state, group.frozen, batch)
        assert np.isfinite(metrics.losses).all()
    assert train_step._cache_size() == 1
    assert_same(copy(group.frozen), before)
    assert_same(copy(tiny.params), base_before)


def variant_case(name, adapt, groups, sts_loss):
    """Each packed group is a program to compile."""
    slow = [pytest.mark.slow] if adapt != "frozen" and len(groups) > 2 else []
    return pytest.param(adapt, groups, sts_loss, id=name, marks=slow)


VARIANT_CASES = [
    *(variant_case(name, v.adapt, v.groups, v.sts_loss) for name, v in VARIANTS.items()),
    variant_case("mixed", "lora", parse_groups("sst|para,sts"), "cosine"),
]


def changed(before, after):
    """Names of the leaves that differ."""
    flat = zip(trees.names(after), before, copy(after), strict=True)
    return {name for name, x, y in flat if (x != y).any()}


@pytest.mark.parametrize(("adapt", "groups", "sts_loss"), VARIANT_CASES)
def test_every_variant_takes_two_steps(adapt, groups, sts_loss, tiny):
    made = {group_name(g): make(tiny, adapt, g, sts_loss, dropout=0.0) for g in groups}
    states = {g: m.state for g, m in made.items()}
    for group, m in made.items():
        others = {g: copy(s) for g, s in states.items() if g != group}
        train_step = step.make_train_step(m.setup)
        for number in (1, 2):
            before = copy(states[group].trainable)
            heads_before = copy(states[group].heads)
            states[group], metrics = train_step(states[group], m.frozen, m.batch)
            assert np.isfinite(metrics.losses).all() and metrics.losses.shape == (
                len(m.setup.tasks),
            )
            moved = changed(before, states[group].trainable)
            assert moved == expected_to_move(adapt, states[group].trainable, number, moved)
            assert changed(heads_before, states[group].heads) == set(
                trees.names(states[group].heads)
            )
        assert train_step._cache_size() == 1
        for other, leaves in others.items():
            assert_same(copy(states[other]), leaves)
        assert set(states[group].heads) == {t.name for t in m.setup.tasks}


def expected_to_move(adapt, trainable, number, moved):
    names = set(trees.names(trainable))
    if adapt == "frozen":
        assert not names
    if adapt == "lora" and number == 1:
        return {n for n in names if n.endswith(".B")}  # B = 0, so A has no gradient yet
    if adapt == "full":  # a key's bias cancels in the softmax: rounding decides about it
        return names - ({n for n in names if n.endswith("key.bias")} - moved)
    return names


def test_the_adapter_learns(tiny):
    group = make(tiny, dropout=0.0)
    train_step, state, seen = step.make_train_step(group.setup), group.state, []
    for _ in range(25):
        state, metrics = train_step(state, group.frozen, group.batch)
        seen.append(metrics.losses)
    assert (seen[-1] < 0.7 * seen[0]).all()
    assert lora.count_params(state.trainable) == trees.count(group.state.trainable)
