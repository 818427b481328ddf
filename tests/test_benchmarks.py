"""The bench compares equal work: both sides see the same sentences and say the same of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import harness
from benchmarks.work import LENGTHS, TASKS, Ours, Work, make_examples, real_tokens


def warmed(state):
    """Move an adapter off B = 0, so that it has a part in the loss."""
    if "lora" not in state.trainable:
        return state
    moved = jax.tree.map(
        lambda x: x + 0.02 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), state.trainable
    )
    return state.replace(trainable=moved)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lora1", "lora3", "lora4", "baseline2"])
def test_both_sides_start_from_the_same_losses(variant, minilm):
    pytest.importorskip("torchjd")
    from benchmarks.peer import Peer

    work = Work(variant, 4, "float32", examples=8, dropout=0.0)
    for cohort in Ours(work, minilm).cohorts:
        states = {name: warmed(state) for name, state in cohort.states.items()}
        _, metrics = jax.jit(cohort.train_step)(states, cohort.frozen, cohort.batches[0])
        for name, ours in metrics.items():
            theirs = Peer(work, minilm, cohort, name, states=states).losses(0)
            np.testing.assert_allclose(ours.losses, [float(x.detach()) for x in theirs], rtol=1e-4)


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
def test_sentences_are_as_long_as_the_real_ones(task):
    examples = make_examples(task, 4000, 30522)
    assert len(examples) == 4000
    found = np.percentile(examples.lengths, [25, 50, 75])
    np.testing.assert_allclose(found, np.array(LENGTHS[task.name])[[5, 10, 15]], atol=1.1)


def test_real_tokens_counts_each_sentence_of_a_step(minilm):
    work = Work("lora3", 4, "float32", examples=8)
    batches = Ours(work, minilm).cohorts[0].batches
    steps = batches.order.orders[0].steps_per_epoch
    counted = sum(int((batches[k].inputs.segment_ids > 0).sum()) for k in range(steps)) / steps
    assert counted == pytest.approx(real_tokens(work, minilm))


def test_sides_run_in_turn_and_warm_ups_are_not_counted():
    calls = []
    spreads = harness.interleave({n: lambda n=n: calls.append(n) for n in "ab"}, 3, warmups=2)
    assert "".join(calls) == "ab" * 5
    assert all(0 <= s.low <= s.median <= s.high < 1 for s in spreads.values())


def test_show_writes_what_it_prints(tmp_path, capsys):
    rows = [{"what": "x", "ms": harness.Spread(0.001, 0.002, 0.003), "ratio": 2.0}]
    harness.show("name", "A title", rows, tmp_path)
    assert "2.0 (1.0–3.0)" in capsys.readouterr().out
    assert '"median": 2.0' in (tmp_path / "name.json").read_text()


def test_several_steps_in_one_program_are_several_steps(tiny):
    """The scanned steps end where single steps on the same batches do."""
    work = Work("lora3", 4, "float32", examples=8, dropout=0.0)
    together, alone = Ours(work, tiny), Ours(work, tiny)
    together.run_together(3)
    (stack,), (cohort,) = together.stacks, alone.cohorts
    train_step, states = cohort.train_step.compile(), cohort.states
    for n in range(3):
        states, _ = train_step(states, cohort.frozen, jax.tree.map(lambda x, n=n: x[n], stack))
    ((found,),) = (cohort.values() for cohort in together.states)
    (state,) = states.values()
    assert int(found.step) == 3
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found.trainable, state.trainable
    )
