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
from jax.flatten_util import ravel_pytree

from jaxlora.data.batches import Batch
from jaxlora.data.packing import Shape, fill, stack
from jaxlora.lora import LoraConfig
from jaxlora.nn import bert
from jaxlora.pcgrad import cosines, gram, pcgrad
from jaxlora.tasks import losses
from jaxlora.tasks import task as tasks
from jaxlora.tasks.sharing import VARIANTS, group_name, parse_groups
from jaxlora.training import optimizer
from jaxlora.training.adaptation import make_adaptation
from jaxlora.training.step import GroupStep, TrainStep, make_train_step
from jaxlora.utils import trees

SIZE = 4  # examples of a task in a batch
ADAPTER = LoraConfig(4, 8.0)
ALL = ("sst", "para", "sts")


# These tests compile dozens of tiny programs and run each a few times.
pytestmark = pytest.mark.usefixtures("quick_compilation")


def copy(tree):
    """Host copies of a tree's leaves (keys as their data)."""
    return [np.array(jax.random.key_data(x) if is_key(x) else x) for x in jax.tree.leaves(tree)]


def is_key(x):
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def random_batch(chosen, adapt, hidden_size, seed=0):
    """A batch of random sentences, or of random vectors; and each task's own rows."""
    rng = np.random.default_rng(seed)
    slots = SIZE * max(t.sentences for t in chosen)
    labels = np.stack(
        [
            rng.integers(t.low, t.high + 1, SIZE) if t.classes else rng.uniform(0, 5, SIZE)
            for t in chosen
        ]
    ).astype(np.float32)
    weights = np.ones_like(labels)
    if adapt == "frozen":
        vectors = rng.normal(size=(len(chosen), slots, hidden_size)).astype(np.float32)
        return Batch(vectors, labels, weights), None
    sentences = [
        [rng.integers(5, 200, rng.integers(3, 14)) for _ in range(SIZE * task.sentences)]
        for task in chosen
    ]
    rows = [fill(part, range(len(part)), slots, Shape(5, 32)) for part in sentences]
    together = stack(rows)
    if adapt == "lora":
        numbers = [t * slots + n for t, part in enumerate(sentences) for n in range(len(part))]
        shape = Shape(8, 32)
        together = fill(
            [x for part in sentences for x in part], numbers, slots * len(chosen), shape
        )
    return Batch(together, labels, weights), rows


@dataclasses.dataclass(frozen=True)
class Alone:
    """The step of a single group, from state to state."""

    made: TrainStep

    @property
    def tasks(self):
        return self.made.tasks

    def __call__(self, state, frozen, batch):
        return self.only(self.made({"all": state}, frozen, batch))

    def only(self, found):
        states, metrics = found
        return states["all"], metrics["all"]

    def compile(self):
        compiled = self.made.compile()

        def step(state, frozen, batch):
            return self.only(compiled({"all": state}, frozen, batch))

        step.programs = compiled._cache_size
        return step

    def with_tx(self, tx):
        group = dataclasses.replace(self.made.groups["all"], tx=tx)
        return Alone(dataclasses.replace(self.made, groups={"all": group}))


def make(base, adapt="lora", names=ALL, sts_loss="mse", dropout=0.1, **replace):
    """A group ready to step: its step, frozen tree, state and a batch."""
    chosen = tuple(t for t in tasks.paper_tasks(sts_loss) if t.name in names)
    config = base.config.with_dropout(dropout)
    group = GroupStep(chosen, *optimizer.optimizers(len(chosen), 1e-2, 1e-2))
    made = make_train_step(
        {"all": dataclasses.replace(group, **replace)}, config, make_adaptation(adapt, ADAPTER),
        pooling="cls", dropout=dropout,
    )  # fmt: skip
    batch, rows = random_batch(chosen, adapt, config.hidden_size)
    return SimpleNamespace(
        config=config,
        step=Alone(made),
        encode=made.encode,
        frozen=made.freeze(base.params),
        state=made.init({"all": jax.random.key(2)}, base.params)["all"],
        batch=batch,
        rows=rows,
    )


def warm(trainable):
    """Move an adapter off B = 0, so that A has a gradient too."""
    return jax.tree.map(
        lambda x: x + 0.02 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), trainable
    )


def task_loss(group, t, trainable, head):
    """One task's mean loss, written out."""
    task = group.step.tasks[t]
    vectors = group.encode(group.frozen, trainable, group.rows[t], None)
    u, v = vectors[:SIZE], vectors[SIZE : 2 * SIZE]
    outputs = task.apply_head(head, u, v, pair_features="concat")
    return jnp.mean(task.per_example_loss(outputs, group.batch.labels[t]))


class Recorded(NamedTuple):
    """In place of PCGrad's state: the gradients and losses as they came in."""

    grads: Any
    losses: Any
    conflicts: Any
    cosines: Any


def recorder(num_tasks):
    """A transform that keeps the per-task gradients and losses and updates nothing."""

    def init(params):
        zeros = jax.tree.map(lambda x: jnp.zeros((num_tasks, *x.shape)), params)
        return (Recorded(zeros, jnp.zeros(num_tasks), jnp.zeros(()), jnp.zeros(())),)

    def update(grads, state, params=None, *, losses):
        del state, params
        none = jax.tree.map(lambda g: jnp.zeros_like(g[0]), grads)
        return none, (Recorded(grads, losses, jnp.zeros(()), jnp.zeros(())),)

    return optax.GradientTransformationExtraArgs(init, update)


# ---- gradients


def losses_and_gradients(group, trainable):
    """Each task's loss and its gradients by (trainable, head), from T separate calls."""

    def all_tasks(trainable, heads):
        return [
            jax.value_and_grad(task_loss, (2, 3))(group, t, trainable, heads[task.name])
            for t, task in enumerate(group.step.tasks)
        ]

    return jax.jit(all_tasks)(trainable, group.state.heads)


@pytest.mark.parametrize("adapt", ["lora", "full"])
def test_each_tasks_gradient_is_its_own(adapt, tiny):
    group = make(tiny, adapt, dropout=0.0, tx=recorder(3))
    start = warm(group.state.trainable) if adapt == "lora" else group.state.trainable
    train_step = jax.jit(group.step)
    after, metrics = train_step(group.state.replace(trainable=start), group.frozen, group.batch)
    expected = losses_and_gradients(group, start)
    grads = after.opt_state[0].grads
    for t, (loss, (by_hand, _)) in enumerate(expected):
        np.testing.assert_allclose(metrics.losses[t], loss, rtol=1e-5)
        total = optax.tree.norm(by_hand)
        assert total > 1e-3
        for g, e in zip(jax.tree.leaves(grads), jax.tree.leaves(by_hand), strict=True):
            assert jnp.linalg.norm((g[t] - e).ravel()) <= 1e-5 * total


def test_a_loss_reaches_the_aggregator_with_the_factor_of_its_gradient(tiny):
    """The loss that is logged has no factor."""
    factors = (1.0, 0.5, 25.0)
    seen = []
    for weights in ((), factors):
        group = make(tiny, dropout=0.0, tx=recorder(3), weights=weights)
        start = group.state.replace(trainable=warm(group.state.trainable))
        after, metrics = jax.jit(group.step)(start, group.frozen, group.batch)
        seen.append((after.opt_state[0], metrics.losses))
    (plain, logged), (scaled, logged_too) = seen
    np.testing.assert_allclose(logged_too, logged, rtol=1e-6)
    np.testing.assert_array_equal(plain.losses, logged)
    np.testing.assert_allclose(scaled.losses, logged * jnp.array(factors), rtol=1e-6)
    grads, expected = (jax.tree.leaves(recorded.grads) for recorded in (scaled, plain))
    for t, factor in enumerate(factors):
        for g, e in zip(grads, expected, strict=True):
            np.testing.assert_allclose(g[t], factor * e[t], rtol=1e-4, atol=1e-6 * factor)


def test_encoder_is_projected_and_clipped_and_heads_are_not(tiny):
    clip = 1e-3
    tx = optax.chain(pcgrad(3), optax.clip_by_global_norm(clip), optax.sgd(1.0))
    group = make(tiny, dropout=0.0, tx=tx, head_tx=optax.sgd(0.5))
    train_step = jax.jit(group.step)
    after, metrics = train_step(group.state, group.frozen, group.batch)
    expected = losses_and_gradients(group, group.state.trainable)
    for task, (_, (_, grads)) in zip(group.step.tasks, expected, strict=True):
        head = group.state.heads[task.name]
        by_hand = jax.tree.map(lambda h, g: h - 0.5 * g, head, grads)
        assert optax.tree.norm(grads) > 1e-2
        for x, y in zip(
            jax.tree.leaves(after.heads[task.name]), jax.tree.leaves(by_hand), strict=True
        ):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics.update_norm, clip, rtol=1e-4)
    flat = jnp.stack([ravel_pytree(shared)[0] for _, (shared, _) in expected])
    np.testing.assert_allclose(metrics.cosines, cosines(gram(flat)), atol=1e-4)
    assert metrics.conflicts == jnp.sum(jnp.triu(metrics.cosines, 1) < 0)


@pytest.mark.parametrize("clip", [1e-3, 1e9])
def test_the_norms_are_those_of_the_gradients_before_they_are_clipped(tiny, clip):
    tx, head_tx = optimizer.optimizers(3, 1e-3, 1e-3, clip=clip, surgery="none")
    group = make(tiny, dropout=0.0, tx=tx, head_tx=head_tx)
    _, metrics = jax.jit(group.step)(group.state, group.frozen, group.batch)
    expected = losses_and_gradients(group, group.state.trainable)
    shared = sum(ravel_pytree(grads)[0] for _, (grads, _) in expected)
    heads = jnp.concatenate([ravel_pytree(grads)[0] for _, (_, grads) in expected])
    np.testing.assert_allclose(metrics.grad_norm, jnp.linalg.norm(shared), rtol=1e-4)
    np.testing.assert_allclose(metrics.head_grad_norm, jnp.linalg.norm(heads), rtol=1e-4)


def test_without_surgery_the_tasks_gradients_are_summed(tiny):
    """Plain gradient descent on the summed loss, which knows of no task axis."""
    tx = optax.chain(pcgrad(3, surgery=False), optax.sgd(1.0))
    group = make(tiny, dropout=0.0, tx=tx)
    state = group.state.replace(trainable=warm(group.state.trainable))

    def total(tree):
        heads = state.heads
        tasks = enumerate(group.step.tasks)
        return sum(task_loss(group, t, tree, heads[task.name]) for t, task in tasks)

    after, metrics = jax.jit(group.step)(state, group.frozen, group.batch)
    grads = jax.jit(jax.grad(total))(state.trainable)
    by_hand = jax.tree.map(lambda p, g: p - g, state.trainable, grads)
    for x, y in zip(jax.tree.leaves(after.trainable), jax.tree.leaves(by_hand), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
    surgical_tx = optax.chain(pcgrad(3), optax.sgd(1.0))
    surgical = group.step.with_tx(surgical_tx)
    surgical_state = state.replace(opt_state=surgical_tx.init(state.trainable))
    other, met = jax.jit(surgical)(surgical_state, group.frozen, group.batch)
    assert metrics.conflicts == met.conflicts > 0
    assert optax.tree.norm(jax.tree.map(jnp.subtract, after.trainable, other.trainable)) > 1e-3


# ---- what a step may depend on


def test_lora_plus_is_a_higher_learning_rate_for_b():
    """Two steps of AdamW by hand (Loshchilov & Hutter 2019, algorithm 2); the decay is B's too."""
    rate, decay, ratio = 0.1, 0.5, 16.0
    tx, _ = optimizer.optimizers(1, rate, 1.0, clip=1e9, weight_decay=decay, lora_plus_ratio=ratio)
    params = {"query": {"A": jnp.array([[1.0, 2.0]]), "B": jnp.array([[3.0], [4.0]])}}
    gradients = [
        {"query": {"A": jnp.array([[[0.5, -1.0]]]), "B": jnp.array([[[2.0], [0.3]]])}},
        {"query": {"A": jnp.array([[[0.1, 3.0]]]), "B": jnp.array([[[-1.0], [1.0]]])}},
    ]
    expected = {}
    for name, own_rate in (("A", rate), ("B", rate * ratio)):
        w, m, v = np.asarray(params["query"][name], np.float64), 0.0, 0.0
        for t, gradient in enumerate(gradients, 1):
            g = np.asarray(gradient["query"][name][0], np.float64)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            direction = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
            w = w - own_rate * (direction + decay * w)
        expected[name] = w
    state = tx.init(params)
    for gradient in gradients:
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    for name, w in expected.items():
        np.testing.assert_allclose(params["query"][name], w, rtol=1e-4)


def test_padding_examples_change_nothing(tiny):
    group = make(tiny)
    train_step = jax.jit(group.step)

    def run_once(labels, weights):
        batch = Batch(group.batch.inputs, labels, weights)
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
    group = make(tiny, tx=recorder(3), head_tx=optax.sgd(0.0))
    train_step = jax.jit(group.step)

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


def assert_only_trainable_is_remembered(adapt, group):
    """Adam's two moments of the trainable tree; besides conflicts, cosines, a key, two counters."""
    size = trees.count(group.state.trainable)
    assert size == {
        "frozen": 0,
        "lora": 2 * 4 * (32 + 32) * 4,  # layers × modules × (in + out) × rank
        "full": trees.count(bert.param_shapes(group.config)),
    }[adapt]  # fmt: skip
    kept = [x for x in jax.tree.leaves(group.state.opt_state) if not is_key(x)]
    besides = sum(x.size for x in kept) - 2 * size
    assert 0 < besides <= 1 + len(group.step.tasks) ** 2 + 2 + 2


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
    base_before = copy(tiny.params)
    for group, m in made.items():
        assert_only_trainable_is_remembered(adapt, m)
        others = {g: copy(s) for g, s in states.items() if g != group}
        frozen_before, train_step = copy(m.frozen), m.step.compile()
        for number in (1, 2):
            before, heads_before = copy(states[group].trainable), copy(states[group].heads)
            states[group], metrics = train_step(states[group], m.frozen, m.batch)
            assert metrics.losses.shape == (len(m.step.tasks),)
            assert np.isfinite(metrics.losses).all()
            moved = changed(before, states[group].trainable)
            assert moved == expected_to_move(adapt, states[group].trainable, number, moved)
            heads = states[group].heads
            assert set(heads) == {t.name for t in m.step.tasks}
            assert changed(heads_before, heads) == set(trees.names(heads))
        assert train_step.programs() == 1
        assert_same(copy(m.frozen), frozen_before)
        for other, leaves in others.items():
            assert_same(copy(states[other]), leaves)
    assert_same(copy(tiny.params), base_before)


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
    train_step, state, seen = group.step.compile(), group.state, []
    for _ in range(25):
        state, metrics = train_step(state, group.frozen, group.batch)
        seen.append(metrics.losses)
    assert (seen[-1] < 0.7 * seen[0]).all()


# ---- groups that share a step


def make_joint(base, groups):
    """Groups that train in one step, each with its own rates; their states, a batch, frozen."""
    named = {task.name: task for task in tasks.paper_tasks("mse")}
    config = base.config.with_dropout(0.0)
    steps = {
        group_name(names): GroupStep(
            tuple(named[name] for name in names),
            *optimizer.optimizers(len(names), 1e-2 / (n + 1), 1e-2, lora_plus_ratio=2.0 + n),
        )
        for n, names in enumerate(groups)
    }
    made = make_train_step(steps, config, make_adaptation("lora", ADAPTER), pooling="cls")
    keys = {name: jax.random.key(n) for n, name in enumerate(steps)}
    states = {
        name: state.replace(trainable=warm(state.trainable))
        for name, state in made.init(keys, base.params).items()
    }
    batch, _ = random_batch(made.tasks, "lora", config.hidden_size)
    return SimpleNamespace(
        made=made,
        step=jax.jit(made),
        states=states,
        batch=batch,
        frozen=made.freeze(base.params),
    )


APART = parse_groups("sst|para,sts")


def test_each_task_of_each_group_has_its_own_factor(tiny):
    joint = make_joint(tiny, APART)
    factors = {"sst": 2.0, "para": 0.5, "sts": 25.0}
    groups = {
        name: dataclasses.replace(group, weights=tuple(factors[t.name] for t in group.tasks))
        for name, group in joint.made.groups.items()
    }
    plain, scaled = (
        jax.jit(made.gradients)([*joint.states.values()], joint.frozen, joint.batch)[2]
        for made in (joint.made, dataclasses.replace(joint.made, groups=groups))
    )
    for own, theirs in zip(scaled, plain, strict=True):
        for task, grads in own.items():
            for g, e in zip(jax.tree.leaves(grads), jax.tree.leaves(theirs[task]), strict=True):
                np.testing.assert_allclose(g, factors[task] * e, rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_not_finite_reaches_no_other_group(tiny):
    joint = make_joint(tiny, APART)
    expected, _ = joint.step(joint.states, joint.frozen, joint.batch)
    labels = joint.batch.labels.copy()
    labels[2] = np.inf  # of sts, a score
    states, metrics = joint.step(joint.states, joint.frozen, joint.batch._replace(labels=labels))
    assert metrics["sst"].finite and not metrics["para+sts"].finite
    assert_same(copy(states["sst"]), copy(expected["sst"]))
    assert changed(copy(joint.states["para+sts"]), states["para+sts"]) == {"step"}


def test_a_group_that_has_ended_stays_as_it_is_and_changes_no_other(tiny):
    """Its trees are multiplied by a hundred, which no bit of the others shows."""
    joint = make_joint(tiny, APART)
    weights = joint.batch.weights.copy()
    weights[0] = 0
    batch = joint.batch._replace(weights=weights)
    ended = joint.states["sst"]
    other = ended.replace(
        trainable=jax.tree.map(lambda x: 100 * x, ended.trainable),
        heads=jax.tree.map(lambda x: 100 * x, ended.heads),
    )
    found = [
        joint.step(joint.states | {"sst": state}, joint.frozen, batch)[0]
        for state in (ended, other)
    ]
    assert_same(copy(found[0]["sst"]), copy(ended))
    # Its sentences are still in this batch's rows; nobody's labels weigh them.
    assert_same(copy(found[0]["para+sts"]), copy(found[1]["para+sts"]))
    assert int(found[0]["para+sts"].step) == 1


def test_a_tasks_labels_reach_no_other_groups_adapter(tiny):
    joint = make_joint(tiny, APART)
    labels = joint.batch.labels.copy()
    labels[0] = (labels[0] + 1) % 5
    found = [
        joint.step(joint.states, joint.frozen, joint.batch._replace(labels=chosen))[0]
        for chosen in (joint.batch.labels, labels)
    ]
    assert_same(*(copy(states["para+sts"]) for states in found))
    before, after = (copy(states["sst"].trainable) for states in found)
    assert any((x != y).any() for x, y in zip(before, after, strict=True))


def test_rows_of_labels_reach_the_task_that_they_are_of(tiny):
    """A task whose labels are sets has a row for each class; the others after it have their own."""
    tags = tasks.Task("tags", "multilabel", classes=("a", "b", "c"))
    chosen = (tasks.SST, tags, dataclasses.replace(tasks.PARA, class_weights=(1.0, 3.0)))
    group = GroupStep(chosen, optax.identity(), optax.identity())
    made = make_train_step({"all": group}, tiny.config, make_adaptation("frozen", ADAPTER))
    heads = {
        t.name: t.init_head(jax.random.key(3), tiny.config.hidden_size, "concat") for t in chosen
    }
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(3, 2 * SIZE, tiny.config.hidden_size)).astype(np.float32)
    own = [rng.integers(0, 5, SIZE), rng.integers(0, 2, (SIZE, 3)), rng.integers(0, 2, SIZE)]
    own = [np.asarray(x, np.float32) for x in own]
    weights = np.ones((3, SIZE), np.float32)
    weights[1, -1] = 0  # padding
    batch = Batch(None, np.concatenate([x.reshape(SIZE, -1).T for x in own]), weights)
    made = dataclasses.replace(made, dropout=0.0)
    found = made.losses([heads], jnp.array(vectors), batch, jax.random.split(jax.random.key(1), 3))
    for t, task in enumerate(chosen):
        u, v = vectors[t, :SIZE], vectors[t, SIZE:]
        outputs = task.apply_head(heads[task.name], u, v, pair_features="concat")
        real = weights[t] > 0
        expected = jnp.mean(task.per_example_loss(outputs, jnp.array(own[t]))[real])
        np.testing.assert_allclose(found[t], expected, rtol=1e-5)
