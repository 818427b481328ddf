"""A predictor in other processes: sent to spawned ones, refused in forked ones."""

import copy
import dataclasses
import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import jax
import numpy as np
import pytest

import jaxlora
from jaxlora import lora
from jaxlora.serving import adapter_slots
from jaxlora.serving.task_models import TaskModel, TaskModels
from jaxlora.tasks.task import PARA, SST, STS_COSINE
from jaxlora.utils.errors import UserError

REQUESTS = [("sst", "ban cen."), ("sts", "dan fen", "gan len"), ("sts", "ba be", "ba bi")]


def model(task, tree, seed=0):
    return TaskModel(task, tree, task.init_head(jax.random.key(seed), 32, "concat"), "concat")


def warm(tree):
    return jax.tree.map(lambda x: x + 0.1, tree)


@pytest.fixture(params=["lora", "full"])
def predictor(request, tiny):
    """Two tasks with an adapter each, or with a whole BERT each."""
    config, names = lora.LoraConfig(2, 4.0), ("a", "b")
    if request.param == "lora":
        keys = jax.random.split(jax.random.key(0))
        made = [{"lora": warm(lora.init(key, tiny.params, config))} for key in keys]
    else:
        made = [{"params": tiny.params}, {"params": warm(tiny.params)}]
    trees = dict(zip(names, made, strict=True))
    configs = {name: config for name, tree in trees.items() if "lora" in tree}
    tasks = {"sst": model(SST, "a"), "sts": model(STS_COSINE, "b")}
    trained = TaskModels(
        tiny.name,
        tiny.fingerprint,
        "mean",
        32,
        "float32",
        models=tasks,
        trees=trees,
        configs=configs,
        origin="a test",
    )
    return jaxlora.Predictor(tiny, trained)


def test_it_can_be_pickled_before_and_after_its_first_call(predictor):
    before = pickle.dumps(predictor)
    expected = predictor(REQUESTS)
    after = pickle.dumps(predictor)
    assert len(after) == len(before)  # nothing that is cached
    for again in (pickle.loads(before), pickle.loads(after), copy.deepcopy(predictor)):
        assert again(REQUESTS) == expected
        assert pickle.loads(pickle.dumps(again))(REQUESTS) == expected
    assert predictor(REQUESTS) == expected


def test_spawned_workers_give_the_same_answers(predictor):
    """To rounding: another process may compile with other settings."""
    expected = predictor(REQUESTS)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as workers:
        found = workers.submit(predictor, REQUESTS).result(120)
    for one, other in zip(found, expected, strict=True):
        assert (one.task, one.label) == (other.task, other.label)
        assert one.value == pytest.approx(other.value, rel=1e-5, abs=1e-6)
        assert (one.probabilities is None) == (other.probabilities is None)
        assert one.probabilities is None or one.probabilities == pytest.approx(
            other.probabilities, abs=1e-6
        )


def test_another_process_that_was_not_spawned_is_refused(predictor, monkeypatch):
    data, parent = pickle.dumps(predictor), os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    for use in (
        lambda: predictor(REQUESTS), lambda: predictor.predict("sst", ["ban"]),
        lambda: predictor.encode("sts", ["ban"]), lambda: pickle.loads(data),
        lambda: jaxlora.load("anything"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=r"forked.*spawn"):
            use()


FORK = """
import os, sys, numpy, jaxlora
from jaxlora.formats import huggingface as pretrained
from jaxlora.tasks.task import STS_COSINE
from jaxlora.serving.task_models import TaskModel, TaskModels
base = pretrained.load(sys.argv[1])
tasks = {"sts": TaskModel(STS_COSINE, "a", {}, "concat")}
of_base = (base.name, base.fingerprint, "mean", 32, "float32")
found = {"models": tasks, "trees": {"a": {}}, "configs": {}, "origin": "a test"}
predictor = jaxlora.Predictor(base, TaskModels(*of_base, **found))
if os.fork() == 0:
    try:
        predictor.predict("sts", [("ba", "be")])
    except jaxlora.UserError as error:
        print("refused:", error, flush=True)
    os._exit(0)
os.wait()
print("parent:", len(predictor.predict("sts", [("ba", "be")])))
"""


@pytest.mark.slow
def test_a_forked_process_does_not_hang(tiny_base):
    command = [sys.executable, "-W", "ignore", "-c", FORK, str(tiny_base)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "refused: a predictor cannot be used" in done.stdout and "parent: 1" in done.stdout


def test_an_answer_that_is_no_number_is_refused(predictor, monkeypatch):
    head = jax.tree.map(lambda x: x * np.nan, predictor.trained.models["sst"].head)
    monkeypatch.setitem(predictor.trained.models, "sst", TaskModel(SST, "a", head, "concat"))
    with pytest.raises(UserError, match="sst: 1 of 1 answers are not numbers"):
        predictor(REQUESTS)
    assert np.isnan(predictor.predict("sst", ["ban"])).all()


def all_kinds(tiny, max_length, more):
    """A frozen task, two adapters; perhaps also one of another width, and joint pairs."""
    narrow = lora.LoraConfig(2, 4.0, ("query",))
    configs = {"a": narrow, "b": narrow}
    tasks = {
        "frozen": model(dataclasses.replace(SST, name="frozen"), ""),
        "sst": model(SST, "a"), "sts": model(STS_COSINE, "b"),
    }  # fmt: skip
    if more:
        joint = dataclasses.replace(PARA, name="joint", pair_encoding="joint")
        tasks["joint"], configs["c"] = model(joint, "c"), lora.LoraConfig(4, 4.0)
    trees = {
        name: {"lora": warm(lora.init(jax.random.key(1), tiny.params, config))}
        for name, config in configs.items()
    }
    trained = TaskModels(
        tiny.name, tiny.fingerprint, "mean", max_length, "float32", models=tasks,
        trees={"": {}} | trees, configs=configs, origin="a test",
    )  # fmt: skip
    return jaxlora.Predictor(tiny, trained)


def ask(names, longest, rng):
    """Requests of up to so many words."""

    def words():
        return " ".join(rng.choice(["ba", "be", "bi"], rng.integers(1, longest)))

    texts = {"frozen": 1, "joint": 2, "sst": 1, "sts": 2}
    return [(name, *(words() for _ in range(texts[name]))) for name in names]


@pytest.mark.parametrize(
    ("max_length", "more"), [(16, False), pytest.param(40, True, marks=pytest.mark.slow)]
)
def test_a_warm_predictor_compiles_nothing(tiny, caplog, monkeypatch, max_length, more):
    monkeypatch.setattr(adapter_slots, "FIRST_SLOTS", 1)  # fewer than adapters
    predictor, rng = all_kinds(tiny, max_length, more), np.random.default_rng(0)
    predictor.warm()
    names = [*predictor.tasks]
    calls = [ask([name] * count, 9, rng) for name in names for count in (1, 7, 70)]
    calls += [ask(names * n, longest, rng) for n in (1, 3, 30) for longest in (3, 60)]
    calls += [ask(["sst", "sts"] * n, longest, rng) for n in (1, 5, 30) for longest in (3, 60)]
    with jax.log_compiles():
        answers = [predictor(call) for call in calls]
    assert [r.getMessage() for r in caplog.records if "ompil" in r.getMessage()] == []
    assert list(map(len, answers)) == list(map(len, calls))
    with jax.log_compiles():  # what is not warm is seen
        pickle.loads(pickle.dumps(predictor))(calls[0])
    assert [r for r in caplog.records if "ompil" in r.getMessage()]


@pytest.mark.parametrize("memory", [-1, 2e9, "2GB"])
def test_memory_is_a_number_of_bytes(predictor, memory):
    message = "`memory` .*: must be a whole number of bytes, at least 0"
    with pytest.raises(UserError, match=message):
        dataclasses.replace(predictor, memory=memory)
    with pytest.raises(UserError, match=message):
        jaxlora.load("anything", memory=memory)


def test_truncated_texts_are_counted(predictor):
    counts = []
    asked = [("sts", "ba " * 40, "ban"), ("sst", "ban"), ("sst", "ba " * 40)]
    for requests in (asked, asked[1:2]):
        predictor(requests, counts.append)
    assert counts == [2, 0]
    assert predictor.describe_truncated(2) == "2 texts cut to 32 tokens"


def test_one_request_is_not_numbered(predictor):
    with pytest.raises(UserError, match="sst: the request has a blank sentence"):
        predictor([("sst", " ")])
    with pytest.raises(UserError, match="sst: example 1 has a blank sentence"):
        predictor.predict("sst", ["ban", " "])
