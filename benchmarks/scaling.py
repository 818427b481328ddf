"""Measure how a step scales with its work: `python -m benchmarks.scaling`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import harness
from benchmarks.memory import megabytes
from benchmarks.work import make_examples
from jaxlora import lora
from jaxlora.data import batches as data_batches
from jaxlora.data import packing
from jaxlora.data.batches import Batch
from jaxlora.data.order import JointOrder, Order, make_order
from jaxlora.data.tokenized import Examples
from jaxlora.formats import huggingface
from jaxlora.tasks import task as tasks
from jaxlora.training import optimizer
from jaxlora.training.adaptation import Lora
from jaxlora.training.step import GroupStep, make_train_step

AXES: Mapping[str, tuple[int, ...]] = {
    "batch": (8, 16, 32, 64),
    "row_length": (96, 192, 384),
    "layers": (2, 4, 6),
    "tasks": (1, 4, 16),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A LoRA step with PCGrad: `tasks` copies of STS-B share an adapter."""

    batch: int = 16
    row_length: int = 96
    layers: int = 6
    tasks: int = 3


@dataclasses.dataclass(frozen=True)
class Flags:
    """Measure a step as batch, row length, layers or tasks grow.

    Attributes:
      base: the base model.
      dtype: dtype of the matmuls.
      axes: the quantities to vary.
      rounds: number of timed steps.
      out: folder of the JSON file.
    """

    base: str = "minilm"
    dtype: str = "float32"
    axes: tuple[str, ...] = tuple(AXES)
    rounds: int = 7
    out: Path = harness.OUT


def make_ours(case: Case, flags: Flags) -> Callable[[], float]:
    """Build a step on one batch that returns the peak memory of its process in MB."""
    base, adapter = huggingface.load(flags.base), lora.LoraConfig()
    layers = jax.tree.map(lambda x: x[: case.layers], base.params["layers"])
    config = dataclasses.replace(base.config, num_hidden_layers=case.layers)
    chosen = [dataclasses.replace(tasks.STS_MSE, name=f"task{n}") for n in range(case.tasks)]
    group = GroupStep(tuple(chosen), *optimizer.optimizers(case.tasks, 1e-3, 1e-3))
    made = make_train_step({"all": group}, config, Lora(adapter), dtype=jnp.dtype(flags.dtype))
    params = base.params | {"layers": layers}
    train = {
        t.name: make_examples(tasks.STS_MSE, 256, config.vocab_size, n)
        for n, t in enumerate(chosen)
    }
    order = make_order(dict.fromkeys(train, 256), case.batch, 0)
    batch = jax.device_put(first_batch(train, order, case.row_length))
    states = made.init({"all": jax.random.key(0)}, params)
    frozen, train_step = jax.device_put(made.freeze(params)), made.compile()

    def run() -> float:
        nonlocal states
        states, metrics = train_step(states, frozen, batch)
        jax.block_until_ready(metrics)
        return megabytes("ours", jax.default_backend())

    return run


def first_batch(train: Mapping[str, Examples], order: Order, length: int) -> Batch:
    """Pack the first step's batch into as few rows of the given length as possible."""
    sentences = [
        e.lengths[data_batches.sentence_numbers(e, numbers)]
        for e, numbers in zip(train.values(), order.at(0), strict=True)
    ]
    shape = packing.Shape(packing.place(np.concatenate(sentences), length).rows, length)
    joint = JointOrder((order,), (1,))
    return data_batches.PackedBatches(train, joint, (shape,), mixed=True)[0]


def measure(axis: str, flags: Flags) -> list[dict[str, Any]]:
    """Measure the rows of one axis, and the slope on logarithmic axes (1: proportional)."""
    values = AXES[axis]
    spreads, peaks = [], []
    for value in values:
        worker = harness.Worker(make_ours, dataclasses.replace(Case(), **{axis: value}), flags)
        spreads.append(harness.interleave({"": worker}, flags.rounds, warmups=2)[""])
        peaks.append(round(worker()))
        worker.close()
    logs = np.log([s.median for s in spreads])
    slopes = [None, *np.diff(logs) / np.diff(np.log(values))]
    return [
        {
            "grows": axis,
            "to": value,
            "ms": spread,
            "steps a second": 1 / spread.median,
            "slope": "" if slope is None else round(float(slope), 2),
            "peak MB": peak,
        }
        for value, spread, slope, peak in zip(values, spreads, slopes, peaks, strict=True)
    ]


def main(flags: Flags) -> None:
    """Measure all axes."""
    rows = [row for axis in flags.axes for row in measure(axis, flags)]
    harness.show(
        "scaling", f"A LoRA step with PCGrad, {flags.dtype}, from {Case()}", rows, flags.out
    )


if __name__ == "__main__":
    main(tyro.cli(Flags))
