"""Many devices and many processes give what one gives. Eight devices need a process: eight.py."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import family_bases
import jax
import numpy as np
import pytest
from compiled import wide
from tiny import leaves_equal, short, trained_trees

from jaxlora.data import batches
from jaxlora.serving import finished_run
from jaxlora.tasks import sharing
from jaxlora.training import inputs, run_folder, sharding, task_group
from jaxlora.utils import distributed, trees
from jaxlora.utils.errors import UserError

ROOT = Path(__file__).parents[2]


def eight(*args):
    """A command of eight.py, where there are eight devices."""
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "eight.py"), *map(str, args)]
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("text", "count", "shape"),
    [
        ("auto", 8, {"data": 8, "fsdp": 1}),
        ("auto", 1, {"data": 1, "fsdp": 1}),
        ("data=4,fsdp=2", 8, {"data": 4, "fsdp": 2}),
        ("fsdp=2, data=1", 8, {"data": 1, "fsdp": 2}),
        ("fsdp=8", 8, {"data": 1, "fsdp": 8}),
    ],
)
def test_the_flag(text, count, shape):
    assert sharding.sizes(text, count) == shape


@pytest.mark.parametrize(
    "text",
    ["", "data", "data=", "data=0", "data=-1", "data=2,data=2", "rows=2", "data=2;fsdp=2", "4"],
)
def test_a_flag_that_is_none(text):
    with pytest.raises(UserError, match="write data=4,fsdp=2"):
        sharding.sizes(text, 8)


def test_too_few_devices():
    with pytest.raises(UserError, match="needs 8 devices, there are 4"):
        sharding.sizes("data=4,fsdp=2", 4)


@pytest.mark.parametrize(
    ("shape", "parts", "axis"),
    [
        ((6, 384, 1536), 8, 2),
        ((6, 1536, 384), 8, 1),
        ((30522, 384), 8, 1),  # 30522 = 8 · 3815 + 2
        ((30522, 384), 2, 0),
        ((8, 383, 1537), 8, None),  # not by layers
        ((384,), 8, None),  # too small
        ((), 8, None),
    ],
)
def test_the_axis_that_is_split(shape, parts, axis):
    assert sharding.split_axis(shape, parts) == axis


def test_a_dozen_rows_on_eight_devices_become_sixteen(make, tiny):
    settings = make("lora3")
    data = inputs.load_data(settings, tiny)
    one = task_group.make_cohort(
        settings, tiny, data, settings.groups, sharding.make_mesh("data=1")
    )
    order, train = one.batches.order, {n: data[n]["train"] for n in settings.groups[0]}
    for count in (1, 8):
        made = batches.choose_batch_shapes(train, order, 16, 3, True, count)
        assert all(shape.rows % count == 0 for shape in made.shapes)


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=() if v == "lora3" else pytest.mark.slow) for v in sharing.VARIANTS],
)
def test_the_losses_of_one_device(tiny_base, data_dir, variant):
    many = ["data=4,fsdp=2"] if variant in ("lora3", "baseline2") else ["data=8", "data=2,fsdp=4"]
    found = eight("curves", variant, tiny_base, data_dir, "data=1", *many)
    one = found["data=1"]["losses"]
    shape = sharing.VARIANTS[variant]
    turns = len(shape.groups) if shape.adapt == "full" else 1
    assert len(one) == 5 * turns and all(
        np.ptp(curve) > 0 for curve in np.split(np.array(one), turns)
    )
    for text in many:
        np.testing.assert_allclose(found[text]["losses"], one, rtol=0, atol=1e-5)
        assert found[text]["split"] == ("fsdp" in text and variant != "baseline1")


@pytest.mark.slow
@pytest.mark.parametrize("family", family_bases.FAMILIES)
def test_each_family_has_the_losses_of_one_device(family, data_dir, tmp_path):
    family_bases.save(tmp_path, family)
    found = eight("curves", "lora3", tmp_path, data_dir, "data=1", "data=4,fsdp=2")
    one, many = found["data=1"], found["data=4,fsdp=2"]
    assert len(one["losses"]) == 5 and np.ptp(one["losses"]) > 0 and many["split"]
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def memory():
    return eight("memory")


@pytest.mark.slow
def test_memory_falls_with_the_number_of_parts(memory):
    """Of full fine-tuning: parameters and two moments; the heads are whole everywhere."""
    heads = memory["full data=1"]["state"] - 8 / 7 * (
        memory["full data=1"]["state"] - memory["full fsdp=8"]["state"]
    )
    for parts in (2, 4, 8):
        found = memory[f"full fsdp={parts}"]
        rest = memory["full data=1"]["state"] - heads
        assert found["state"] - heads == pytest.approx(rest / parts, rel=0.05)
        assert found["temporary"] < 1.25 * memory["full data=1"]["temporary"] * (1 / parts + 0.1)
    whole = 3 * 4 * trees.count(wide("full", "data=1").heads)  # float32, with two moments
    assert heads == pytest.approx(whole, rel=0.05)  # and small leaves, and the batch


@pytest.mark.slow
def test_the_collectives_are_those_expected(memory):
    assert memory["full data=1"]["collectives"] == memory["lora data=1"]["collectives"] == {}
    for adapt in ("full", "lora"):  # rows alone: gradients are added up, nothing is fetched
        assert memory[f"{adapt} data=8"]["collectives"].keys() == {"all-reduce"}
    parameters = 4 * 2_700_000  # of the network in eight.py, roughly
    fetched = memory["full fsdp=8"]["collectives"]["all-gather"]
    # Each kernel before its use in either pass, once for all tasks.
    assert max(fetched) < parameters and sum(fetched) < 2 * parameters
    small = memory["lora data=8"]["collectives"]["all-reduce"]
    assert sum(small) < 0.1 * sum(memory["full data=8"]["collectives"]["all-reduce"])


@pytest.mark.slow
def test_the_optimizer_fetches_nothing():
    found = eight("update")
    assert found["moments"] > 20e6
    assert found["collectives"].keys() == {"all-reduce"}  # dot products and norms
    assert sum(found["collectives"]["all-reduce"]) < 1000


@pytest.mark.slow
def test_a_checkpoint_of_eight_devices_goes_on_upon_one_and_four(tiny_base, data_dir, tmp_path):
    folders = eight("resumed", tiny_base, data_dir, tmp_path / "runs")
    whole, *others = sorted(folders, key=lambda path: not path.endswith("whole"))
    expected = trained_trees(Path(whole))
    assert len(others) == 3
    for path in others:
        found = trained_trees(Path(path))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), found, expected)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((None, 2, 0), "`processes`: goes with `coordinator`"),
        ((None, 1, 1), "`process` 1: goes with `coordinator`"),
        (("localhost", 2, 0), "write host:port"),
        (("localhost:1", 2, 2), "number of this process from 0"),
        (("localhost:1", 2, -1), "number of this process from 0"),
    ],
)
def test_flags_of_many_processes(args, message):
    with pytest.raises(UserError, match=message):
        distributed.join(*args)


@pytest.mark.parametrize("launcher", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
@pytest.mark.parametrize(("count", "called"), [("2", [()]), ("1", []), ("", []), ("x", [])])
def test_launchers_are_noticed(monkeypatch, launcher, count, called):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: calls.append(args))
    monkeypatch.setenv(launcher, count)
    distributed.join()
    assert calls == called


@pytest.mark.parametrize(
    ("index", "process", "joined"),
    [("1", None, 1), ("0", None, 0), ("1", 0, 0), (None, None, 0), ("", None, 0)],
)
def test_a_pod_knows_its_number(monkeypatch, index, process, joined):
    """The flag comes first; without a coordinator a pod is alone, as in a sweep."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: calls.append(args))
    if index is None:
        monkeypatch.delenv("JOB_COMPLETION_INDEX", raising=False)
    else:
        monkeypatch.setenv("JOB_COMPLETION_INDEX", index)
    distributed.join()
    assert calls == []
    distributed.join("train-0.train:8476", 2, process)
    assert calls == [("train-0.train:8476", 2, joined)]


def test_a_pod_too_many(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: pytest.fail("joined"))
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "2")
    with pytest.raises(UserError, match="`processes=2` and `process=2`"):
        distributed.join("train-0.train:8476", 2)


@pytest.mark.slow
def test_two_processes_end_as_one(tiny_base, data_dir, tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    flags = {"variant": "lora3", "base": tiny_base, "data_dir": data_dir, **short("lora3")}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    command = [sys.executable, str(ROOT / "experiments" / "run.py"), *flags]
    joined = [f"--coordinator=localhost:{port}", "--processes=2", f"--out={tmp_path / 'two'}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([*command, *joined, f"--process={n}"], **pipes) for n in (0, 1)]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "best on dev" in said[0][0] and "best on dev" not in said[1][0]
    subprocess.run([*command, f"--out={tmp_path / 'one'}"], check=True, capture_output=True)
    one, two = (trained_trees(tmp_path / name) for name in ("one", "two"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), one, two)
    leaves_equal(jax.tree.map(np.shape, one), jax.tree.map(np.shape, two))
    scores = [
        run_folder.read_json(tmp_path / name / finished_run.RESULT)["dev"]
        for name in ("one", "two")
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
