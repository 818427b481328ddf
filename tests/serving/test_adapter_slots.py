"""Many adapters in one pass: each request has the answer that its task alone would give."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora import lora
from jaxlora.lora import LoraConfig
from jaxlora.serving import adapter_slots, bank
from jaxlora.serving.adapter_slots import AdapterSlots
from jaxlora.serving.task_models import TaskModel, TaskModels
from jaxlora.tasks.task import SST, STS_COSINE
from jaxlora.utils import trees

TARGETS = (("query", "value"), ("query", "key", "value", "output.dense"), ("intermediate.dense",))
WORDS = ["ba", "be", "bi", "ban", "ben", "cen", "dan", "fen", "gan", "len", "man"]


def many(tiny, count, ranks=(1, 4, 7, 64)):
    """A predictor of tasks with adapters of several ranks and targets, and a frozen one."""
    models, trees, configs = {}, {"": {}}, {}
    for n in range(count):
        name, kind = f"task{n}", STS_COSINE if n % 3 else SST
        config = LoraConfig(min(ranks[n % len(ranks)], 32), 8.0, TARGETS[n % 3])
        adapter = lora.init(jax.random.key(n), tiny.params, config)
        noise = np.random.default_rng(n)
        trees[name] = {
            "lora": jax.tree.map(lambda x, r=noise: x + r.normal(0, 0.2, x.shape), adapter)
        }
        configs[name] = config
        task = dataclasses.replace(kind, name=name)
        head = task.init_head(jax.random.key(n), tiny.config.hidden_size, "concat")
        models[name] = TaskModel(task, name, head, "concat")
    models["frozen"] = TaskModel(dataclasses.replace(STS_COSINE, name="frozen"), "", {}, "concat")
    trained = TaskModels(
        tiny.name,
        tiny.fingerprint,
        "mean",
        30,
        "float32",
        models=models,
        trees=trees,
        configs=configs,
        origin="many",
    )
    return jaxlora.Predictor(tiny, trained)


def sentences(names, each=2):
    rng = np.random.default_rng(0)
    return [(name, " ".join(rng.choice(WORDS, rng.integers(1, 12)))) for name in names * each]


@pytest.mark.parametrize("count", [1, 3, 17, pytest.param(150, marks=pytest.mark.slow)])
def test_a_mixed_call_equals_each_task_alone(tiny, count):
    predictor = many(tiny, count)
    names = [*predictor.tasks]
    asked = sentences(names)
    np.random.default_rng(1).shuffle(asked)
    parts = [(predictor.task(name), (text,)) for name, text in asked]
    mixed = predictor._vectors(parts)
    for name in names[:: max(1, count // 8)]:
        mine = [n for n, (task, _) in enumerate(asked) if task == name]
        merged = merged_alone(tiny, predictor, name, [asked[n][1] for n in mine])
        np.testing.assert_allclose(mixed[mine], merged, rtol=0, atol=1e-5)
    assert len({v.tobytes() for v in mixed}) == len(set(asked))


def merged_alone(tiny, predictor, name, texts):
    """The vectors of a base whose kernels have the task's adapter in them."""
    trained = predictor.trained
    params = tiny.params
    if name in trained.configs:
        params = lora.merge(params, trained.trees[name]["lora"], trained.configs[name])
    models = {"alone": dataclasses.replace(trained.models[name], tree="")}
    models["alone"] = dataclasses.replace(
        models["alone"], task=dataclasses.replace(models["alone"].task, name="alone")
    )
    alone = dataclasses.replace(trained, models=models, trees={"": {}}, configs={})
    base = dataclasses.replace(tiny, params=params)
    return jaxlora.Predictor(base, alone).encode("alone", texts)


def test_the_cost_of_a_pass_does_not_depend_on_the_number_of_tasks(tiny):
    """The same rows and programs for fourteen tasks and for fifteen."""
    predictor = many(tiny, 15, ranks=(4,))
    seen = []
    encode = predictor._mixed(4)
    predictor.__dict__["_mixed"] = lambda width: lambda *args: seen.append(args) or encode(*args)
    for tasks in (14, 15):
        names = [f"task{n % tasks}" for n in range(60)]
        predictor._vectors([(predictor.task(name), ("ba be bi ban",)) for name in names])
    shapes = [jax.tree.map(jnp.shape, args) for args in seen]
    half = len(shapes) // 2
    assert shapes[:half] == shapes[half:]


def test_slots_are_allocated_for_the_adapters_of_a_width_that_is_asked_for(tiny):
    predictor = many(tiny, 9, ranks=(1, 4, 4))
    assert predictor._slots.cache_info().currsize == 0
    predictor([("task0", "ba")])
    assert predictor._slots.cache_info().currsize == 1
    assert [predictor._slots(width)._count for width in (1, 4)] == [4, 8]  # for 3 and for 6


def misfit(trained, config):
    """The same tasks, the first with factors twice as wide and another configuration."""
    factors = trees.flatten(trained.trees["task0"]["lora"])
    axes = {"A": -1, "B": -2}
    wide = {path: np.concatenate([x, x], axes[path[-1]]) for path, x in factors.items()}
    return dataclasses.replace(
        trained, configs={**trained.configs, "task0": config},
        trees={**trained.trees, "task0": {"lora": trees.unflatten(wide)}},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(40, 8.0, TARGETS[0]), r"`rank` 40: must be from 1 to 32"),
        (LoraConfig(20, 8.0, ("nothing",)), r"unknown module 'nothing'"),  # the width of task1
    ],
)
def test_an_adapter_that_does_not_fit_the_base_refuses_only_its_own_task(
    tiny, tmp_path, config, message
):
    sound = many(tiny, 2, ranks=(20,))
    bad = jaxlora.Predictor(tiny, misfit(sound.trained, config))
    asked = [("task1", "ba", "be"), ("frozen", "ba", "bi")]
    assert bad(asked) == sound(asked)
    with pytest.raises(jaxlora.UserError, match=f"the adapter task0 does not fit.*{message}"):
        bad([*asked, ("task0", "ba")])
    bank.write(tmp_path / "bank", bad.trained)
    assert "adapter task0" in bank.verify(tmp_path / "bank")[-1]
    with pytest.raises(
        jaxlora.UserError, match=f"adapter of task0 cannot.*{message}.*; not stored"
    ):
        bank.add(tmp_path / "other", bad.trained, ["task0"])


def test_a_task_that_overflows_spoils_no_other_in_its_rows(tiny):
    sound = many(tiny, 7, ranks=(4,))
    huge = jax.tree.map(lambda x: x * np.float32(1e22), sound.trained.trees["task0"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(huge))
    trained = dataclasses.replace(sound.trained, trees={**sound.trained.trees, "task0": huge})
    predictor = jaxlora.Predictor(tiny, trained)
    asked = sentences(["task0", "task3", "task6"], 3)
    parts = [(predictor.task(name), (text,)) for name, text in asked]
    guilty = np.array([name == "task0" for name, _ in asked])
    found = predictor._vectors(parts)
    assert np.isfinite(found).all(-1).tolist() == (~guilty).tolist()
    np.testing.assert_allclose(found[~guilty], sound._vectors(parts)[~guilty], atol=1e-5)
    with pytest.raises(jaxlora.UserError, match="task0: 3 of 3 answers are not numbers"):
        predictor(asked[::-1])


def test_threads_take_turns(tiny, monkeypatch):
    """Calls that need each other's slots: each has the answers that it has alone."""
    monkeypatch.setattr(adapter_slots, "FIRST_SLOTS", 2)
    predictor = dataclasses.replace(many(tiny, 24, ranks=(4,)), memory=0)
    calls = [sentences([f"task{n}", f"task{(n + 9) % 24}"], 1) for n in range(0, 24, 3)]
    alone = [predictor(call) for call in calls]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(predictor, calls * 3)) == alone * 3


def adapter(value):
    return {"layers": {"q": {"A": np.full((2, 3, 1), value), "B": np.full((2, 1, 3), value)}}}


def value_in(slots, place):
    found = {float(x[place].max()) for x in jax.tree.leaves(slots)}
    assert len(found) == 1
    return found.pop()


@pytest.fixture
def slots(monkeypatch):
    """Four slots, then eight; named adapters hold their number."""
    monkeypatch.setattr(adapter_slots, "FIRST_SLOTS", 4)
    monkeypatch.setattr(adapter_slots, "GROWTH", 2)
    loaded = []

    def load(name):
        loaded.append(name)
        return adapter(float(name)), LoraConfig(1, 1.0, ("q",))

    shapes = {("layers", "q", "A"): (2, 3, 2), ("layers", "q", "B"): (2, 2, 3)}
    made = AdapterSlots(load, shapes, budget=8 * 4 * 2 * 12, adapters=30)
    made.loaded = loaded
    return made


def test_an_adapter_is_loaded_once_while_it_stays(slots):
    for _ in range(3):
        tree, places = slots(["1", "2"])
        assert [value_in(tree, p) for p in places] == [1, 2]
    assert slots.loaded == ["1", "2"]


def test_slots_grow_to_the_budget_and_no_further(slots):
    assert slots.most == 8
    for n in range(1, 30):
        tree, places = slots([str(n)])
        assert value_in(tree, places[0]) == n
    assert {len(x) for x in jax.tree.leaves(tree)} == {8}


def test_the_adapter_used_first_makes_room(slots):
    for n in range(8):
        slots([str(n)])
    slots(["0"])
    slots(["8"])  # takes the place of 1
    slots.loaded.clear()
    tree, places = slots(["0", "8", "1"])
    assert slots.loaded == ["1"]
    assert [value_in(tree, p) for p in places] == [0, 8, 1]


def test_none_of_a_call_makes_room_for_another_of_it(slots):
    for start in (0, 8, 4):
        names = [str(n) for n in range(start, start + 8)]
        tree, places = slots(names)
        assert [value_in(tree, p) for p in places] == list(map(float, names))


def test_an_adapter_that_cannot_be_loaded_takes_nothing_away(slots):
    slots(["1", "2"])
    with pytest.raises(ValueError, match="could not convert"):
        slots(["1", "no number"])
    slots.loaded.clear()
    tree, places = slots(["1", "2"])
    assert not slots.loaded and [value_in(tree, p) for p in places] == [1, 2]


def test_an_interrupted_load_leaves_every_adapter_in_its_own_slot(slots, monkeypatch):
    """Ctrl-C, or too little memory, after an adapter was evicted and before the new one came."""
    for n in range(8):
        slots([str(n)])
    slots(["2"])  # the last used: not the one to evict
    with monkeypatch.context() as patched:
        patched.setattr(adapter_slots, "_put", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            slots(["8"])
    for names in (["9"], ["10", "2"], ["8", "9", "7"]):
        found, places = slots(names)
        assert [value_in(found, place) for place in places] == list(map(float, names))
