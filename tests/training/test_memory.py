"""How many copies of an encoder a run and a predictor keep, and where.

What other tests leave in a process would be counted, so these have one of their own.
"""

import gc
import os
import subprocess
import sys

import jax
import pytest
from test_sharding import eight
from tiny import Silent, trained_trees

import jaxlora
from jaxlora.serving import predictor as predict
from jaxlora.tasks.task import NAMES
from jaxlora.training import checkpoint
from jaxlora.training import run as train
from jaxlora.training.run import RunOptions
from jaxlora.utils import trees

SHARED = "sst+para+sts"
ALONE = "JAXLORA_TESTS_ALONE"
alone = pytest.mark.skipif(ALONE not in os.environ, reason="runs in a process of its own")


@pytest.mark.slow
@pytest.mark.skipif(ALONE in os.environ, reason="is the process itself")
def test_these_pass_in_a_process_of_their_own():
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-m", "not slow"], env=os.environ | {ALONE: "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def held():
    """Bytes of all buffers on devices; an array and the views of its shards have one of them."""
    gc.collect()
    shards = [shard.data for x in jax.live_arrays() for shard in x.addressable_shards]
    return sum({x.unsafe_buffer_pointer(): x.nbytes for x in shards}.values())


class Weighing(Silent):
    """Notes at each record how many bytes the run holds, by group."""

    def __init__(self, stop_at=None):
        super().__init__(stop_at)
        self.before, self.most = held(), {}

    def record(self, record):
        group = record["group"]
        self.most[group] = max(self.most.get(group, 0), held() - self.before)
        super().record(record)


def needed(out, names, frozen):
    """Bytes that tasks of one step need: what is trained, its two moments, its best; the frozen."""
    found = trained_trees(out)
    heads = [found[task]["head"] for task in names]
    return 4 * 4 * trees.count([found[names[0]]["tree"], heads]) + frozen


@alone
@pytest.mark.parametrize(
    ("variant", "stop_at"),
    [
        ("baseline2", (SHARED, 6)),
        ("lora3", (SHARED, 6)),
        ("baseline1", ("para", 6)),
    ],
)
def test_a_run_holds_what_it_needs_fresh_or_resumed(make, tiny, tmp_path, variant, stop_at):
    encoder = 4 * trees.count(tiny.params)
    fresh = Weighing()
    train.run(make(variant), tmp_path / "whole", fresh)
    with pytest.raises(KeyboardInterrupt):
        train.run(make(variant), tmp_path / "parts", Silent(stop_at))
    resumed = Weighing()
    train.run(make(variant), tmp_path / "parts", resumed, RunOptions(resume=True))
    assert stop_at[0] in resumed.most
    frozen = encoder * (variant in ("lora3", "baseline1"))
    for most in (*fresh.most.values(), *resumed.most.values()):
        # Batches, metrics, and the base's tables are the rest.
        assert most < needed(tmp_path / "whole", NAMES, frozen) + 0.8 * encoder


@alone
def test_while_a_state_is_restored_there_is_no_other(make, tiny, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        train.run(make("baseline2"), tmp_path / "run", Silent((SHARED, 6)))
    restore, copies, encoder = checkpoint.StateCheckpoints.restore, [], trees.count(tiny.params)

    def weighed(self, like):
        copies.append((held() - before) / 4 / encoder)
        return restore(self, like)

    monkeypatch.setattr(checkpoint.StateCheckpoints, "restore", weighed)
    before = held()
    train.run(make("baseline2"), tmp_path / "run", Silent(), RunOptions(resume=True))
    assert len(copies) == 1 and copies[0] < 0.5


@alone
def test_a_predictor_sends_whole_encoders_to_the_device_once(make, tmp_path, monkeypatch):
    train.run(make("baseline4", learning_rate=0.05), tmp_path / "run", Silent())
    model = jaxlora.load(tmp_path / "run")
    used = []

    def noting(*args, encode=predict.inference.encode, **kwargs):
        used.append(args[2])
        return encode(*args, **kwargs)

    monkeypatch.setattr(predict.inference, "encode", noting)
    requests = [("sst", "a film"), ("sts", "a dog", "the cat runs"), ("para", "good", "bad")]
    first = model(requests)
    assert model(requests) == first
    leaves = [jax.tree.leaves(tree) for tree in used]
    assert all(isinstance(x, jax.Array) for tree in leaves for x in tree)
    half = len(leaves) // 2
    assert half == len(model.trained.trees)
    for one, again in zip(leaves[:half], leaves[half:], strict=True):
        assert all(x is y for x, y in zip(one, again, strict=True))


@alone
def test_a_predictor_keeps_only_so_many_whole_encoders_on_the_device(
    make, tiny, tmp_path, monkeypatch
):
    train.run(make("baseline4", groups="sst|para|sts"), tmp_path / "run", Silent())
    monkeypatch.setattr(predict, "MOST_ON_DEVICE", 2)
    model = jaxlora.load(tmp_path / "run")
    before, encoder = held(), 4 * trees.count(tiny.params)
    requests = [("sst", "a film"), ("sts", "a dog", "the cat runs"), ("para", "good", "bad")]
    answers = [model([request]) for request in requests]
    assert 1.9 < (held() - before) / encoder < 2.9
    assert [model([request]) for request in requests] == answers


@alone
def test_with_fsdp_predictions_come_from_the_parts(tiny_base, data_dir, tmp_path):
    """No device holds the whole tree while the best model's predictions are written."""
    found = eight("predicted", tiny_base, data_dir, tmp_path / "run")
    assert found["splits"] == [["sst", "dev"], ["sst", "test"], ["para", "dev"], ["para", "test"],
                               ["sts", "dev"], ["sts", "test"]]  # fmt: skip
    assert max(found["parts"]) < 0.2
