"""The bench compares equal work: all sides see the same sentences and say the same of them."""

import importlib
import itertools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from releases import since

from benchmarks import families, floor, harness, predict, results, step
from benchmarks.work import TASKS, Ours, Work, make_examples, real_tokens
from jaxlora.nn import bert

# Of the real files (MiniLM's tokenizer): tokens of a sentence at 25, 50, 75, 95 and 99 %, and the
# mean of the longest one of a batch of 32 examples.
REAL = {
    "sst": ((16, 24, 33, 46, 55), 51.4),
    "para": ((11, 14, 18, 30, 41), 43.3),
    "sts": ((10, 12, 17, 31, 38), 38.8),
}


def warmed(state):
    """Move an adapter off B = 0, so that it has a part in the loss."""
    if "lora" not in state.trainable:
        return state
    moved = jax.tree.map(
        lambda x: x + 0.02 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), state.trainable
    )
    return state.replace(trainable=moved)


def our_gradients(cohort, states):
    """The losses `[T]`, and each group's gradients `[T, n]`."""
    in_order = [states[name] for name in cohort.train_step.groups]
    losses, grads, _ = jax.jit(cohort.train_step.gradients)(
        in_order, cohort.frozen, cohort.batches[0]
    )
    rows = [
        np.concatenate([np.reshape(x, (len(x), -1)) for x in jax.tree.leaves(tree)], 1)
        for tree in grads
    ]
    return np.asarray(losses), rows


def gram(rows):
    rows = np.asarray(rows, np.float64)
    return rows @ rows.T


# Losses, and Gram matrices relative to their largest entry. Fine-tuned whole in bfloat16 without
# AVX-512, the peers are up to 6.3e-2 from float32, and we 2.4e-4.
TOLERANCES = {"float32": (1e-5, 1e-4), "bfloat16": (3e-3, 1e-1)}


def peers_say_what_we_say(work, base):
    pytest.importorskip("torchjd")
    loss_tolerance, gram_tolerance = TOLERANCES[work.dtype]
    for cohort in Ours(work, base).cohorts:
        states = {name: warmed(state) for name, state in cohort.states.items()}
        losses, ours = our_gradients(cohort, states)
        for name in step.able(("padded-eager", "sorted", "flat"), work):
            module, kind, _ = step.PEERS[name]
            make = getattr(importlib.import_module(f"benchmarks.peers.{module}"), kind)
            found, theirs = make(work, base, cohort, states=states).gradients(0)
            np.testing.assert_allclose([float(x) for x in found], losses, rtol=loss_tolerance)
            for mine, their in zip(ours, theirs, strict=True):
                expected = gram(mine)
                np.testing.assert_allclose(
                    gram(their), expected, atol=gram_tolerance * np.abs(expected).max()
                )


@pytest.mark.parametrize("variant", ["lora3", "lora1", "baseline2"])
def test_peers_start_from_our_losses_and_gradients(variant, tiny):
    """Equal Gram matrices of equal groups: PCGrad of one is PCGrad of the other."""
    peers_say_what_we_say(Work(variant, 4, "float32", examples=8, dropout=0.0), tiny)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("variant", ["lora1", "lora3", "lora4", "baseline2"])
def test_peers_start_from_our_losses_and_gradients_with_minilm(variant, dtype, minilm):
    peers_say_what_we_say(Work(variant, 4, dtype, examples=8, dropout=0.0), minilm)


def test_a_peer_learns(tiny):
    """Steps with dropout lower the losses of a few examples: PCGrad and AdamW are in place."""
    pytest.importorskip("torchjd")
    from benchmarks.peers.flat import Flat

    work = Work("lora3", 8, "float32", examples=8)
    flat = Flat(work, tiny, Ours(work, tiny).cohorts[0])
    first = sum(flat.run(1))
    assert sum(flat.run(30)) < 0.9 * first


@since("transformers", 5, 12, reason="older ones refuse the mask of the packed peer")
@pytest.mark.parametrize("kind", ["mixed", "merged"])
def test_peers_serve_our_vectors(kind, tiny):
    pytest.importorskip("torchjd")
    pytest.importorskip("onnxruntime")
    names = predict.peer_names(kind, "cpu")
    ours = predict.make_ours(kind, tiny.name)(9)
    peers = predict.make_peers(names, kind, tiny.name, "cpu")
    for name in names:
        found = peers(name, 9)
        if name in predict.APPROXIMATE:
            norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(found, axis=1)
            assert ((ours * found).sum(1) / norms).min() > 0.98
        else:
            np.testing.assert_allclose(found, ours, atol=2e-5)


def test_sub_batches_are_the_cheapest_ones():
    """Against all ways to cut seven sorted sentences."""
    pytest.importorskip("torchjd")
    from benchmarks.peers.common import by_length

    lengths, overhead = np.array([5, 40, 7, 39, 12, 13, 6]), 9
    parts = by_length(lengths, overhead)
    assert sorted(np.concatenate(parts).tolist()) == list(range(7))
    longest = np.sort(lengths)[::-1]

    def cost(cuts):
        edges = [0, *(n + 1 for n in range(6) if cuts >> n & 1), 7]
        return sum(
            overhead + (stop - start) * longest[start] for start, stop in itertools.pairwise(edges)
        )

    found = sum(overhead + len(part) * lengths[part].max() for part in parts)
    assert found == min(map(cost, range(64)))


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
def test_sentences_are_as_long_as_the_real_ones(task):
    examples = make_examples(task, 40_000, 30522)
    assert len(examples) == 40_000
    quantiles, longest = REAL[task.name]
    found = np.percentile(examples.lengths, [25, 50, 75, 95, 99])
    np.testing.assert_allclose(found, quantiles, atol=1)
    batches = examples.lengths.reshape(-1, 32 * task.sentences)
    assert batches.max(1).mean() == pytest.approx(longest, abs=0.8)


def test_real_tokens_counts_each_sentence_of_a_step(minilm):
    work = Work("lora3", 4, "float32", examples=8)
    batches = Ours(work, minilm).cohorts[0].batches
    steps = batches.order.orders[0].steps_per_epoch
    counted = sum(int((batches[k].inputs.segment_ids > 0).sum()) for k in range(steps)) / steps
    assert counted == pytest.approx(real_tokens(work, minilm))


def test_the_floor_counts_the_flops_of_a_step(tiny):
    """A forward pass takes 2 FLOPs a kernel weight and token, a backward pass as many or twice."""
    kernels = [
        x.size
        for path, x in jax.tree_util.tree_leaves_with_path(tiny.params["layers"])
        if path[-1].key == "kernel"
    ]
    for full, passes in ((False, 2), (True, 3)):
        shapes = floor.matmuls(tiny.config, 10, full)
        flops = sum(2 * np.prod(shape) * count for shape, count in shapes.items())
        assert flops == 2 * 10 * passes * sum(kernels)


def test_sides_run_in_turn_and_warm_ups_are_not_counted():
    calls = []
    spreads = harness.interleave({n: lambda n=n: calls.append(n) for n in "ab"}, 3, warmups=2)
    assert "".join(calls) == "ab" * 5
    assert all(0 <= s.low <= s.median <= s.high < 1 for s in spreads.values())


def test_no_round_begins_when_the_time_is_over():
    calls = []
    harness.interleave({n: lambda n=n: calls.append(n) for n in "ab"}, 9, 2, most_seconds=0)
    assert "".join(calls) == "ab" * (2 + harness.FEWEST_ROUNDS)


def doubles():
    return lambda x: 2 * x


def fails():
    raise ValueError("a side that cannot be built")


def never_ends():
    return lambda x: time.sleep(600)


def test_sides_that_fail_or_are_late_are_known():
    workers = {side: harness.Worker(side) for side in (doubles, fails, never_ends)}
    for worker in workers.values():
        worker.send(1)
    assert workers[doubles].finished(120) and not workers[fails].finished(120)
    assert not workers[never_ends].finished(0.1)
    assert workers[doubles](4) == 8
    for worker in workers.values():
        worker.kill()


def test_the_best_peer_is_the_fastest_one_of_a_row():
    seconds = {"ours": 1.5, "slow": 9.0, "fast": 3.0}
    found = harness.against_best({n: harness.Spread(s, s, s) for n, s in seconds.items()})
    assert (found["best peer"], found["× best peer"]) == ("fast", 2.0)


def test_show_writes_what_it_prints_and_it_is_done(tmp_path, capsys):
    assert not harness.is_done("name", tmp_path)
    rows = [{"what": "x", "ms": harness.Spread(0.001, 0.002, 0.003), "ratio": 2.0}]
    harness.show("name", "A title", rows, tmp_path)
    assert "2.0 (1.0–3.0)" in capsys.readouterr().out
    path = tmp_path / "name.json"
    assert '"median": 2.0' in path.read_text()
    assert harness.is_done("name", tmp_path)
    content = json.loads(path.read_text())
    content["machine"]["processor"] = "another one"
    path.write_text(json.dumps(content))
    assert not harness.is_done("name", tmp_path)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 avx512_fp16", True),
        ("flags\t\t: fpu avx512f amx_bf16", True),
        ("Features\t: fp asimd i8mm bf16", True),
        ("flags\t\t: fpu f16c avx2 avx512f", False),
        ("Features\t: fp asimd ebf16", False),
    ],
)
def test_bfloat16_is_measured_where_the_processor_multiplies_it(tmp_path, line, expected):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: A\n{line}\nbogomips\t: 1\n")
    assert harness.multiplies_bfloat16(tmp_path / "cpuinfo") == expected


def test_results_join_the_rows_of_a_title_in_the_order_of_the_readme(tmp_path):
    for variant, batch, extra in (("baseline2", 8, {}), ("lora3", 32, {"flat ms": 1.0})):
        row = {"variant": variant, "batch": batch, "dtype": "float32", "ours ms": 3.0, **extra}
        harness.show(f"{variant}-{batch}", "Steps", [row], tmp_path)
    results.main(tmp_path, tmp_path / "R.md")
    table = [x for x in (tmp_path / "R.md").read_text().splitlines() if x.startswith("|")]
    assert table[0] == "| variant | batch | dtype | ours ms | flat ms |"
    assert [line.split(" | ")[0] for line in table[2:]] == ["| lora3", "| baseline2"]


@pytest.mark.parametrize("family", families.Flags().families)
def test_families_are_as_large_as_the_base(family, tiny):
    made = families.make_base(tiny, family)
    assert made.config.model_type == family
    for name in families.SIZES:
        assert getattr(made.config, name) == getattr(tiny.config, name)
    shapes = jax.tree.map(np.shape, made.params)
    assert shapes == jax.tree.map(np.shape, bert.param_shapes(made.config))


def test_no_family_is_refused():
    with pytest.raises(SystemExit, match="--families: name at least one"):
        families.main(families.Flags(families=()))


@pytest.mark.slow
def test_every_family_takes_steps(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(families.huggingface, "load", lambda _: tiny)
    families.main(families.Flags(rounds=1, out=tmp_path))
    (rows,) = [json.loads(path.read_text())["rows"] for path in tmp_path.glob("*.json")]
    assert [row["family"] for row in rows] == list(families.Flags().families)
    assert rows[0]["× bert"] == 1 and all(row["ms"]["median"] > 0 for row in rows)


@pytest.mark.slow
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
