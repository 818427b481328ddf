"""Cosines and lookahead, by hand; and the groups that follow."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from tiny import Silent, short

from jaxlora.cli.main import main
from jaxlora.training import affinity, metrics_log
from jaxlora.training import run as train
from jaxlora.training.presets import make_settings
from jaxlora.utils.errors import UserError


@pytest.fixture(scope="module")
def shared(tiny_base, data_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("affinity") / "run"
    asked = short("lora3", encoder_dropout=0.0, epochs=3)
    train.run(
        make_settings("lora3", base=str(tiny_base), data_dir=data_dir, **asked), out, Silent()
    )
    return out


def test_cosines_are_the_logs_with_an_interval_around_them(shared):
    found = affinity.measure(shared)
    assert found.tasks == ("sst", "para", "sts")
    records = [r for r in metrics_log.read_records(shared) if r["kind"] == "train"]
    for a, b in itertools.combinations(range(3), 2):
        logged = [r["cosine"][f"{found.tasks[a]}+{found.tasks[b]}"] for r in records]
        steps = np.diff([0, *(r["step"] for r in records)])
        assert steps.sum() == 21 and len(set(steps.tolist())) > 1
        expected = np.average(logged, weights=steps)
        assert found.mean[a, b] == found.mean[b, a]
        assert found.mean[a, b] == pytest.approx(expected, abs=1e-6)
        assert found.low[a, b] < found.mean[a, b] < found.high[a, b]
    assert np.diag(found.mean).tolist() == [1, 1, 1]


def test_the_interval_covers_the_mean_of_steps_that_are_alike():
    """95 of 100 intervals; steps that follow each other have a correlation of 0.8."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(300):
        values, last = [], rng.normal() / 0.6
        for noise in rng.normal(size=600):
            last = 0.8 * last + noise
            values.append(last)
        low, _, high = affinity.interval([(value, 1) for value in values])
        held += low < 0 < high
    assert held > 0.9 * 300


@pytest.mark.parametrize("steps", [[10] * 5, [10, 10, 2] * 3, [10] * 30])
def test_the_interval_covers_the_mean_of_few_records(steps):
    """95 of 100 intervals, from a log that holds the mean of each 10 steps."""
    rng = np.random.default_rng(0)
    found = np.array(
        [affinity.interval([(rng.normal() / np.sqrt(n), n) for n in steps]) for _ in range(500)]
    )
    assert 0.92 < np.mean((found[:, 0] < 0) & (found[:, 2] > 0)) < 0.98


def test_one_record_gives_no_interval(shared, tmp_path):
    (tmp_path / "config.json").write_text((shared / "config.json").read_text())
    first = (shared / "metrics.jsonl").read_text().splitlines()[0]
    (tmp_path / "metrics.jsonl").write_text(first + "\n")
    with pytest.raises(UserError, match="only one record of sst and para; train it longer"):
        affinity.measure(tmp_path)


def best_by_brute_force(gain):
    """All ways to give each task one of T labels."""
    count = len(gain)
    return max(
        sum(gain[a, b] for a, b in itertools.combinations(range(count), 2) if of[a] == of[b])
        for of in itertools.product(range(count), repeat=count)
    )


@pytest.mark.parametrize("seed", range(6))
def test_no_partition_has_a_larger_sum(seed):
    gain = np.random.default_rng(seed).normal(size=(5, 5))
    gain = gain + gain.T
    names = tuple("abcde")
    groups = affinity.propose_groups(names, gain)
    assert sorted(itertools.chain.from_iterable(groups)) == list(names)
    inside = sum(
        gain[names.index(a), names.index(b)]
        for group in groups
        for a, b in itertools.combinations(group, 2)
    )
    assert inside == pytest.approx(best_by_brute_force(gain))


def test_of_many_tasks_clear_groups_are_found():
    names = tuple(f"t{n}" for n in range(12))
    kind = np.arange(12) % 3
    mean = np.where(kind[:, None] == kind[None], 0.5, -0.2)
    groups = affinity.propose_groups(names, mean)
    assert {frozenset(group) for group in groups} == {
        frozenset(name for name, own in zip(names, kind, strict=True) if own == k) for k in range(3)
    }


def test_a_step_on_a_task_helps_it(shared):
    ahead = affinity.look_ahead(shared, batches=3)
    assert ahead.shape == (3, 3) and np.isfinite(ahead).all()
    assert (np.diag(ahead) > 0).all()


def test_small_steps_change_losses_as_the_gradients_say():
    """To first order `L_j' = L_j − ε g_i·g_j / |g_i|`: two quadratics, without an encoder."""

    class Step:
        def task_losses(self, states, frozen, batch):
            w = states[0].trainable
            return jax.numpy.stack([jax.numpy.sum((w - c) ** 2) for c in CENTRES])

        def gradients(self, states, frozen, batch):
            w = states[0].trainable
            grads = jax.numpy.stack([2 * (w - c) for c in CENTRES])
            return self.task_losses(states, frozen, batch), [grads], None

    @dataclasses.dataclass
    class State:
        trainable: jax.Array

    CENTRES = jax.numpy.array([[1.0, 0.0], [-1.0, 2.0]])
    w, length = jax.numpy.array([3.0, 1.0]), 1e-3
    found = affinity._effect(Step(), State(w), {}, None, length)
    grads = 2 * (w[None] - CENTRES)
    losses = jax.numpy.sum((w[None] - CENTRES) ** 2, -1)
    norms = jax.numpy.linalg.norm(grads, axis=-1)
    expected = length * (grads @ grads.T) / norms[:, None] / losses[None]
    np.testing.assert_allclose(found, expected, rtol=2e-2)


def test_the_command(shared, capsys):
    assert main(["affinity", str(shared), "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["tasks"] == ["sst", "para", "sts"]
    assert sorted(itertools.chain.from_iterable(plain["groups"])) == ["para", "sst", "sts"]
    assert (shared / "affinity.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["affinity", str(shared)]) == 0
    assert "--groups=" in capsys.readouterr().out


@pytest.mark.slow
def test_groups_in_another_order_than_the_tasks(shared, make, tmp_path):
    run = tmp_path / "run"
    settings = make("lora3", groups="sts,para,sst", encoder_dropout=0.0, epochs=3)
    train.run(settings, run, Silent())
    found, other = affinity.measure(run), affinity.measure(shared)
    assert found.tasks == other.tasks
    ahead = affinity.look_ahead(run, batches=2)
    assert (np.diag(ahead) > 0).all()
    with pytest.raises(UserError, match="must be at least 1"):
        affinity.look_ahead(run, batches=0)


def test_a_run_without_a_record_says_so(shared, tmp_path):
    (tmp_path / "config.json").write_text((shared / "config.json").read_text())
    with pytest.raises(UserError, match="no step of tasks in one group yet"):
        affinity.measure(tmp_path)


def test_a_run_in_which_nothing_is_shared_is_refused(make, tmp_path):
    train.run(make("baseline1"), tmp_path / "run", Silent())
    with pytest.raises(UserError, match="no tasks share parameters"):
        affinity.measure(tmp_path / "run")
    with pytest.raises(UserError, match="do not share one trained tree"):
        affinity.look_ahead(tmp_path / "run")
