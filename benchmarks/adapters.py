"""Measure many tasks with separate adapters: `python -m benchmarks.adapters`.

Training: one step for all adapters, against one shared adapter and against one adapter at a time.
Serving: requests to many tasks against requests to one; banks of different sizes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from benchmarks import harness
from benchmarks.work import (
    LOOK_AT,
    Ours,
    Steps,
    Work,
    make_examples,
    one_of_each_shape,
    real_tokens,
)
from jaxlora import lora
from jaxlora.formats import huggingface
from jaxlora.formats.huggingface import Pretrained
from jaxlora.serving import bank
from jaxlora.serving.predictor import Predictor
from jaxlora.serving.task_models import TaskModel, TaskModels
from jaxlora.tasks.task import SST
from jaxlora.training import sharding
from jaxlora.training.config import Settings
from jaxlora.training.task_group import Cohort, make_cohort

SIZES = (96, 128, 192, 256, 384, 512, 768, 1024)  # examples of eight tasks
WORDS = ("a", "the", "film", "was", "very", "good", "bad", "not", "one", "of", "many", "we", "saw")

PART = 100  # tasks added to a bank per call
CHILD = """
import json, sys, time
from pathlib import Path
import jaxlora
from jaxlora.utils import process
process.reuse_memory()
process.keep_programs(Path(sys.argv[2]))
began, cpu = time.perf_counter(), time.process_time()
jaxlora.load(sys.argv[1])([("task0", "a film")])
took = time.perf_counter() - began
print(json.dumps({
    "open and answer s": took,
    "its CPU s": time.process_time() - cpu,
    "status": Path("/proc/self/status").read_text(),
}))
"""


@dataclasses.dataclass(frozen=True)
class Flags:
    """Measure adapters of many tasks, in training and in serving.

    Attributes:
      base: the base model.
      batch_sizes: examples of each task in a step.
      tasks: numbers of tasks among which 256 requests are divided.
      banks: numbers of tasks in a bank.
      rounds: number of timed runs.
      steps: steps per run.
      out: folder of the JSON files.
    """

    base: str = "minilm"
    batch_sizes: tuple[int, ...] = (8, 32)
    tasks: tuple[int, ...] = (1, 8, 64, 150)
    banks: tuple[int, ...] = (10, 1000)
    rounds: int = 7
    steps: int = 4
    out: Path = harness.OUT


def measure_step(size: int, base: Pretrained, flags: Flags) -> dict[str, Any]:
    """Compare a step of three tasks with separate adapters to one with a shared adapter."""
    sides = {}
    for variant in ("lora3", "lora1"):
        work = Work(variant, size, "float32")
        sides[variant] = Ours(work, base)
        sides[variant].compile()
    spreads = harness.interleave(
        {name: functools.partial(side.run, flags.steps) for name, side in sides.items()},
        flags.rounds,
    )
    rows = [sides["lora1"].cohorts[0].batches[k].inputs.tokens.size for k in range(50)]
    shared, own = (spreads[name].per(flags.steps) for name in ("lora3", "lora1"))
    return {
        "batch": size,
        "shared ms": shared,
        "an adapter each ms": own,
        "each / shared": own.median / shared.median,
        "padding %": 100 * (1 - real_tokens(work, base) / float(np.mean(rows))),
    }


def eight_tasks(base: Pretrained) -> tuple[Settings, dict[str, Any]]:
    """Return the settings and data for an epoch of eight tasks of different sizes."""
    settings = Work("lora1", 16, "float32").settings.change(epochs=1)
    specs = tuple(
        dataclasses.replace(
            next(spec for spec in settings.tasks if spec.task.name == "sst"),
            task=dataclasses.replace(SST, name=f"task{n}"),
        )
        for n in range(len(SIZES))
    )
    groups = tuple((spec.task.name,) for spec in specs)
    data = {}
    for n, (spec, size) in enumerate(zip(specs, SIZES, strict=True)):
        counts = {"train": size, "dev": 8, "test": 8}
        data[spec.task.name] = {
            split: make_examples(SST, count, base.config.vocab_size, n)
            for split, count in counts.items()
        }
    return dataclasses.replace(settings, tasks=specs, groups=groups), data


def measure_epoch(base: Pretrained, flags: Flags) -> dict[str, Any]:
    """Compare an epoch of eight tasks trained together and one by one, without compilation."""
    settings, data = eight_tasks(base)
    mesh = sharding.make_mesh("data=1")
    together = [make_cohort(settings, base, data, settings.groups, mesh)]
    alone = [make_cohort(settings, base, data, (names,), mesh) for names in settings.groups]
    sides = {"together": epoch(together), "one by one": epoch(alone)}
    spreads = harness.interleave(sides, max(2, flags.rounds // 3))
    first, second = spreads["together"], spreads["one by one"]
    return {
        "tasks": len(SIZES),
        "together ms": first,
        "one by one ms": second,
        "together / one by one": first.median / second.median,
        "programs": sum(len(one_of_each_shape(c.batches, LOOK_AT)) for c in together),
    }


def epoch(cohorts: list[Cohort]) -> Callable[[], None]:
    """Return a function that takes all steps of some cohorts."""
    ours = Steps(cohorts)
    ours.compile()

    def run() -> None:
        for number, cohort in enumerate(cohorts):
            ours.run_cohort(number, cohort.batches.order.steps)

    return run


def make_models(base: Pretrained, count: int, first: int = 0) -> TaskModels:
    """Return `count` tasks, numbered from `first`, each with its own adapter and head."""
    config, models, trees = lora.LoraConfig(), {}, {}
    for n in range(first, first + count):
        task = dataclasses.replace(SST, name=f"task{n}")
        adapter = lora.init(jax.random.key(n), base.params, config)
        trees[task.name] = {"lora": jax.tree.map(lambda x: np.asarray(x) + 0.01, adapter)}
        head = jax.tree.map(
            np.asarray, task.init_head(jax.random.key(n), base.config.hidden_size, "interaction")
        )
        models[task.name] = TaskModel(
            task, task.name, jax.tree.map(np.asarray, head), "interaction"
        )
    return TaskModels(
        base=base.name, fingerprint=base.fingerprint, pooling="mean", max_length=128,
        dtype="float32", models=models, trees=trees, configs=dict.fromkeys(trees, config),
        origin="the benchmark",
    )  # fmt: skip


def measure_serving(base: Pretrained, flags: Flags) -> list[dict[str, Any]]:
    """Compare 256 requests to many tasks with 256 requests to one."""
    served = Predictor(base, make_models(base, max(flags.tasks)))
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(4, 30))) for _ in range(256)]
    calls = {
        count: [(f"task{n % count}", text) for n, text in enumerate(texts)] for count in flags.tasks
    }
    calls[0] = [("task0", texts[0])]
    sides = {count: functools.partial(served, call) for count, call in calls.items()}
    spreads = harness.interleave(sides, flags.rounds, warmups=2)
    one = spreads.pop(0)
    alone = spreads[min(spreads)].median
    rows = [
        {"requests": 256, "tasks": count, "ms": spread, "× one task": spread.median / alone}
        for count, spread in spreads.items()
    ]
    return [{"requests": 1, "tasks": 1, "ms": one, "× one task": ""}, *rows]


def measure_bank(count: int, base: Pretrained, folder: Path) -> dict[str, Any]:
    """Time the operations on a bank of `count` tasks, and a process that opens it."""
    place = folder / f"bank{count}"
    for first in range(0, count, PART):
        models = make_models(base, min(PART, count - first), first)
        bank.add(place, models, list(models.models))
    new, other = (make_models(base, 1, first) for first in (count, count + 1))
    again = dataclasses.replace(new, trees={f"task{count}": other.trees[f"task{count + 1}"]})
    acts: dict[str, Callable[[], object]] = {
        "add a task": lambda: bank.add(place, new, [f"task{count}"]),
        "update it": lambda: bank.add(place, again, [f"task{count}"], replace=True),
        "list": lambda: bank.contents(place),
        "remove it": lambda: bank.remove(place, f"task{count}"),
    }
    times = {}
    for name, act in acts.items():
        began = time.perf_counter()
        act()
        times[f"{name} s"] = round(time.perf_counter() - began, 3)
    return {"tasks": count, **times, **open_and_answer(place, folder / "programs")}


def open_and_answer(place: Path, programs: Path) -> dict[str, float]:
    """Measure a new process that opens a bank and answers a request, with cached programs."""
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(place), str(programs)],
            check=True, capture_output=True, text=True,
            env=harness.environment(),
        )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found["peak MB"] = harness.peak_megabytes(found.pop("status"))
    return {name: round(value, 2) for name, value in found.items()}


def main(flags: Flags) -> None:
    """Measure everything."""
    base = huggingface.load(flags.base)
    rows = [measure_step(size, base, flags) for size in flags.batch_sizes]
    harness.show("adapters-step", "A step of three tasks, float32", rows, flags.out)
    rows = [measure_epoch(base, flags)]
    harness.show("adapters-epoch", f"An epoch of tasks of {SIZES} examples", rows, flags.out)
    rows = measure_serving(base, flags)
    harness.show("adapters-serving", "Requests to many tasks in one call", rows, flags.out)
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure_bank(count, base, Path(folder)) for count in flags.banks]
    harness.show("adapters-bank", "A bank of many tasks", rows, flags.out)


if __name__ == "__main__":
    main(tyro.cli(Flags))
