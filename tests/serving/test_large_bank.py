"""A bank of a thousand tasks: opened, served and changed at the cost of the tasks that are used."""

import dataclasses
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import random_adapter

import jaxlora
from jaxlora import lora
from jaxlora.serving import adapter_slots, bank
from jaxlora.serving import manifest as manifests
from jaxlora.serving.task_models import TaskModel, TaskModels
from jaxlora.tasks.task import SST

COUNT, ADAPTERS, HEADS = 1000, 8, 7
CONFIG = lora.LoraConfig(2, 4.0)
WORDS = ["ba", "be", "bi", "ban", "ben", "cen", "dan", "fen", "gan", "len", "man"]


def models(tiny, names, seed=0):
    """Tasks with an adapter and a head each, in memory."""
    found, trees = {}, {}
    for number, name in enumerate(names):
        task = dataclasses.replace(SST, name=name, title=name)
        head = task.init_head(jax.random.key(seed + number), 32, "concat")
        adapter = random_adapter(tiny.params, CONFIG)
        trees[name] = {"lora": jax.tree.map(lambda x, n=number: x * (1 + seed + 0.3 * n), adapter)}
        found[name] = TaskModel(task, name, jax.tree.map(lambda x: 3 * x, head), "concat")
    return TaskModels(
        tiny.name, tiny.fingerprint, "mean", 32, "float32", models=found, trees=trees,
        configs=dict.fromkeys(trees, CONFIG), origin="a test",
    )  # fmt: skip


@pytest.fixture(scope="module")
def few(tiny):
    """Eight tasks, of whose adapters and heads all others are made."""
    return models(tiny, [f"task{n}" for n in range(ADAPTERS)])


@pytest.fixture(scope="module")
def written(few, tmp_path_factory):
    """A bank of a thousand tasks; task n has adapter n mod 8 and head n mod 7.

    Each names trees of its own, which are links to those of the first eight.
    """
    folder = tmp_path_factory.mktemp("large") / "bank"
    bank.add(folder, few, list(few.models))
    manifest = manifests.read(folder)
    sizes, adapters, tasks = dict(manifest.sizes), dict(manifest.adapters), dict(manifest.tasks)

    def link(part, source, name):
        made = f"{name}-{source.split('-')[1]}"
        (folder / part / made).symlink_to(source)
        sizes[f"{part}/{made}"] = sizes[f"{part}/{source}"]
        return made

    for n in range(ADAPTERS, COUNT):
        name, of_tasks = f"task{n}", manifest.tasks
        adapter = link(manifests.ADAPTERS, of_tasks[f"task{n % ADAPTERS}"].adapter, name)
        head = link(manifests.HEADS, of_tasks[f"task{n % HEADS}"].head, name)
        adapters[adapter] = CONFIG
        task = dataclasses.replace(SST, name=name, title=name)
        tasks[name] = dataclasses.replace(of_tasks["task0"], task=task, adapter=adapter, head=head)
    manifests.write(
        folder, dataclasses.replace(manifest, sizes=sizes, adapters=adapters, tasks=tasks)
    )
    return folder


@pytest.fixture
def large(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "bank", symlinks=True))


@pytest.fixture(scope="module")
def alone(tiny, few):
    """Ask for probabilities one request at a time, of all adapters and heads in memory."""
    made = {}
    for n in range(ADAPTERS * HEADS):
        model, head = few.models[f"task{n % ADAPTERS}"], few.models[f"task{n % HEADS}"].head
        task = dataclasses.replace(model.task, name=f"task{n}")
        made[task.name] = dataclasses.replace(model, task=task, stored_head=head)
    predictor = jaxlora.Predictor(tiny, dataclasses.replace(few, models=made))

    def ask(asked):
        numbers = [int(name.removeprefix("task")) % (ADAPTERS * HEADS) for name, _ in asked]
        pairs = zip(numbers, asked, strict=True)
        return probabilities([predictor([(f"task{n}", text)])[0] for n, (_, text) in pairs])

    return ask


def requests(numbers, seed=0):
    rng = np.random.default_rng(seed)
    return [(f"task{n}", " ".join(rng.choice(WORDS, rng.integers(1, 12)))) for n in numbers]


def probabilities(answers):
    return np.array([list(answer.probabilities.values()) for answer in answers])


def test_a_tight_budget_answers_as_one_task_at_a_time(tiny, alone, large, monkeypatch):
    """Of four threads whose tasks take each other's places, some of them updated meanwhile."""
    monkeypatch.setattr(adapter_slots, "FIRST_SLOTS", 4)
    predictor = jaxlora.load(large, memory=40_000)
    numbers = [0, 57, 911, 414, 57, 12, 999, 333, 56, 0, 720, 57]
    asked = requests(numbers)
    expected = alone(asked)
    assert len({row.tobytes() for row in expected}) == len(expected)
    slots = predictor._slots(*predictor._widths)
    assert slots.most < len(set(numbers)) / 2
    other = models(tiny, ["task57", "task0"], seed=5)
    for round_, change in enumerate([None, "task57", "task0"]):
        if change:
            bank.add(large, other, [change], replace=True)
        orders = [np.random.default_rng([round_, n]).permutation(len(asked)) for n in range(4)]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda order: predictor([asked[n] for n in order]), orders))
        for answers, order in zip(found, orders, strict=True):
            np.testing.assert_allclose(probabilities(answers), expected[order], rtol=0, atol=1e-5)
    assert slots._count == slots.most
    again = probabilities(jaxlora.load(large)(asked))  # opened now: with the new versions
    changed = np.isin([name for name, _ in asked], ["task57", "task0"])
    assert (np.abs(again - expected).max(1) > 1e-3).tolist() == changed.tolist()


WRITER = """
import sys, time
from pathlib import Path
from jaxlora.serving import bank
folder, source = Path(sys.argv[1]), bank.load(Path(sys.argv[2]))
names = list(source.models)
for turn in range(10**6):
    bank.add(folder, source, [names[turn % len(names)]], replace=True)
    print(turn, flush=True)
"""


@pytest.mark.slow
def test_a_tight_budget_beside_another_process_that_updates(tiny, alone, large, tmp_path):
    """Of tasks beside the updated ones; a predictor that is opened later has those, too."""
    stable = [n for n in range(0, COUNT, 9) if n not in (27, 45)]
    asked = requests(np.random.default_rng(1).choice(stable, 150).tolist())
    expected = alone(asked)
    bank.add(tmp_path / "new", models(tiny, ["task27", "task45"], seed=5), ["task27", "task45"])
    bank.add(tmp_path / "more", models(tiny, ["task27", "task45"], seed=6), ["task27", "task45"])
    predictor = jaxlora.load(large, memory=2**20)
    command = [sys.executable, "-W", "ignore", "-c", WRITER, str(large), str(tmp_path / "new")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        try:
            for _ in range(8):
                assert writer.stdout.readline()  # an update more
                found = probabilities(predictor(asked))
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
                again = jaxlora.load(large, memory=2**20)
                assert len(again(requests([27, 45]))) == 2
        finally:
            writer.kill()
    bank.add(large, bank.load(tmp_path / "more"), ["task27"], replace=True)
    assert len(bank.contents(large)) == COUNT


def test_a_change_reads_its_own_trees_alone(tiny, large, reads):
    """As many at a thousand tasks as at one."""
    source, counts = models(tiny, ["new"], seed=3), []
    (large.parent / "small").mkdir()
    for folder in (large, large.parent / "small"):
        bank.add(folder, source, ["new"])
        bank.add(folder, models(tiny, ["new"], seed=4), ["new"], replace=True)
        bank.rollback(folder, "new")
        bank.remove(folder, "new")
        counts.append(len(reads))
        reads.clear()
    assert counts[0] == counts[1]
    assert len(json.loads((large / manifests.NAME).read_text())["tasks"]) == COUNT
    assert len(list((large / manifests.HEADS).iterdir())) == COUNT


def test_what_a_killed_change_left_is_removed(tiny, large):
    left = [
        large / ".tmp-1",
        large / manifests.ADAPTERS / ".tmp-2",
        large / manifests.HEADS / ".tmp-3",
    ]
    for path in left:
        (path / "content").mkdir(parents=True)
    bank.add(large, models(tiny, ["new"]), ["new"])
    assert not any(path.exists() for path in left)
    assert len(bank.contents(large)) == COUNT + 1
