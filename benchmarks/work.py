"""The workload of all sides: the same weights, sentences, adapters and heads."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxlora.data.batches import Batch
from jaxlora.data.tokenized import Examples
from jaxlora.formats import families
from jaxlora.formats.huggingface import Pretrained
from jaxlora.serving.task_models import Dtype
from jaxlora.tasks.task import Task, paper_tasks
from jaxlora.training import sharding
from jaxlora.training.config import Settings, VariantName
from jaxlora.training.inputs import Data
from jaxlora.training.presets import make_settings
from jaxlora.training.step import StepMetrics, TrainState
from jaxlora.training.task_group import Cohort, make_cohort

LENGTHS = json.loads(Path(__file__).with_name("lengths.json").read_text(encoding="utf-8"))
TASKS = paper_tasks("mse")
FIRST_WORD = 1000  # id in BERT's vocabulary; lower ids are mostly special and unused tokens
Metrics = dict[str, StepMetrics]
LOOK_AT = 200  # number of steps to search for the shapes of batches


@dataclasses.dataclass(frozen=True)
class Work:
    """A training workload: a variant at a batch size and dtype, on `examples` of each task.

    Other settings are those of the preset `cs224n`, whose scores are published. `dropout`, if
    given, applies to heads and encoder.
    """

    variant: VariantName
    batch_size: int
    dtype: Dtype
    examples: int = 512
    dropout: float | None = None
    pooling: Literal["cls", "mean"] = "mean"

    @property
    def settings(self) -> Settings:
        """The settings of the run."""
        settings = make_settings(
            self.variant,
            "cs224n",
            data_dir=".",  # required, but not read
            max_length=128,
            pooling=self.pooling,
            dtype=self.dtype,
            batch_size=self.batch_size,
            epochs=20,
        )
        return settings if self.dropout is None else settings.change(encoder_dropout=self.dropout)

    @property
    def tasks(self) -> dict[str, Task]:
        """The tasks of the run."""
        return self.settings.named


def make_examples(task: Task, count: int, vocabulary: int, seed: int = 0) -> Examples:
    """Draw sentences of random words, with random labels.

    Lengths have the distribution of the real data; the two lengths of a pair are independent.
    """
    rng = np.random.default_rng([seed, *task.name.encode()])
    found = np.array([*map(int, LENGTHS[task.name])]), np.array([*LENGTHS[task.name].values()])
    lengths = rng.choice(found[0], count * task.sentences, p=found[1] / found[1].sum())
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    first = min(FIRST_WORD, vocabulary // 2)
    tokens = rng.integers(first, vocabulary, offsets[-1]).astype(np.int32)
    labels = rng.integers(int(task.low), int(task.high) + 1, count).astype(np.float32)
    return Examples(np.arange(count).astype(str), tokens, offsets, labels, task.sentences)


def make_data(work: Work, base: Pretrained) -> Data:
    """Build all splits of all tasks; `dev` and `test` are tiny."""
    sizes = {"train": work.examples, "dev": 8, "test": 8}
    return {
        name: {k: make_examples(task, n, base.config.vocab_size) for k, n in sizes.items()}
        for name, task in work.tasks.items()
    }


def real_tokens(work: Work, base: Pretrained) -> float:
    """Compute the average number of tokens per step over all tasks, without padding."""
    data = make_data(work, base)
    means = {name: splits["train"].lengths.mean() for name, splits in data.items()}
    return sum(work.batch_size * t.sentences * means[name] for name, t in work.tasks.items())


class Steps:
    """The steps of some cohorts, each cycling through its own batches.

    Attributes:
      cohorts: the cohorts (groups that train in one step).
      states: for each cohort, the states of its groups.
      stacks: for each cohort, the batches of `run_together`.
      waited: seconds that steps have waited for batches so far.
    """

    def __init__(self, cohorts: list[Cohort]) -> None:
        self.cohorts = cohorts
        self.waited = 0.0
        self.stacks: list[Batch] = []
        self._scans: list[Any] = []
        self._steps = [cohort.compile() for cohort in cohorts]
        self.states: list[dict[str, TrainState]] = [cohort.states for cohort in cohorts]
        self._batches: list[Iterator[Batch]] = [_over_and_over(cohort) for cohort in cohorts]

    def run(self, steps: int) -> list[Metrics]:
        """Take some steps with every cohort and wait for them; return the last metrics."""
        for _ in range(steps):
            metrics = [self._step(i) for i in range(len(self.cohorts))]
        return jax.block_until_ready(metrics)

    def run_cohort(self, i: int, steps: int) -> Metrics:
        """Take some steps with one cohort, as `run` does with all."""
        for _ in range(steps):
            metrics = self._step(i)
        return jax.block_until_ready(metrics)

    def compile(self) -> None:
        """Run a batch of every shape once, so that no timed step compiles."""
        for cohort, train_step in zip(self.cohorts, self._steps, strict=True):
            for batch in one_of_each_shape(cohort.batches, LOOK_AT):
                # Placed as in a run: a different placement would compile a different program.
                placed = cohort.place(batch)
                jax.block_until_ready(train_step(cohort.states, cohort.frozen, placed))

    def run_together(self, steps: int) -> list[Metrics]:
        """Take some steps in one program per cohort, on batches that are already on the device."""
        if not self.stacks:
            self.stacks = [_next_of_one_shape(batches, steps) for batches in self._batches]
            self._scans = [_make_scan(train_step) for train_step in self._steps]
        metrics = [self._scan(i, stack) for i, stack in enumerate(self.stacks)]
        return jax.block_until_ready(metrics)

    def _scan(self, i: int, stack: Batch) -> Metrics:
        metrics: Metrics
        self.states[i], metrics = self._scans[i](self.states[i], self.cohorts[i].frozen, stack)
        return metrics

    def _step(self, i: int) -> Metrics:
        began = time.perf_counter()
        batch = next(self._batches[i])
        self.waited += time.perf_counter() - began
        self.states[i], metrics = self._steps[i](self.states[i], self.cohorts[i].frozen, batch)
        return metrics


class Ours(Steps):
    """Our side: the cohorts of a variant."""

    def __init__(self, work: Work, base: Pretrained) -> None:
        data, mesh = make_data(work, base), sharding.make_mesh("data=1")
        own = families.localise(work.settings.lora, base.config)
        chosen = dataclasses.replace(work.settings, lora=own)
        made = [make_cohort(chosen, base, data, groups, mesh) for groups in chosen.cohorts]
        super().__init__([_with_head_dropout(cohort, work.dropout) for cohort in made])


def _with_head_dropout(cohort: Cohort, rate: float | None) -> Cohort:
    if rate is None:
        return cohort
    return dataclasses.replace(
        cohort, train_step=dataclasses.replace(cohort.train_step, dropout=rate)
    )


def _over_and_over(cohort: Cohort) -> Iterator[Batch]:
    while True:
        yield from (batch for _, batch in cohort.prefetch(0))


def _make_scan(train_step: Any) -> Any:
    """Compile a scan of the step over stacked batches that returns the last metrics."""

    def several(states: dict[str, TrainState], frozen: Any, batches: Batch) -> Any:
        states, metrics = jax.lax.scan(lambda s, b: train_step(s, frozen, b), states, batches)
        return states, jax.tree.map(lambda x: x[-1], metrics)

    return jax.jit(several, donate_argnums=0)


def _next_of_one_shape(batches: Iterator[Batch], count: int) -> Batch:
    """Stack the next `count` batches that have the first one's shape, on the device."""
    found = [next(batches)]
    shape = jax.tree.map(np.shape, found[0])
    while len(found) < count:
        batch = next(batches)
        if jax.tree.map(np.shape, batch) == shape:
            found.append(batch)
    return jax.device_put(jax.tree.map(lambda *x: np.stack(x), *found))


def one_of_each_shape(batches: Any, look_at: int) -> list[Batch]:
    """Return the first batch of each shape among the first steps."""
    found: dict[Any, Batch] = {}
    for step in range(min(look_at, batches.order.steps)):
        batch = batches[step]
        found.setdefault(tuple(jax.tree.map(np.shape, batch.inputs)), batch)
    return list(found.values())
