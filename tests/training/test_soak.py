"""Long runs: both dtypes stay close, memory stays as it is, and nothing is compiled again."""

import logging
import resource
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import Silent, short, write_data

from jaxlora.training import run
from jaxlora.training.presets import make_settings

STEPS = 5000
SIZES = {"sst": 260, "para": 400, "sts": 190}  # 67 steps an epoch
WARM = 600  # steps: some epochs and the first evaluation are over
# How far the losses of the two dtypes may be apart, as a share of the loss: docs/reliability.md.
DISTANCE = 0.1

pytestmark = pytest.mark.slow


class Watching(Silent):
    """Notes the process's memory, and what is compiled once it is warm."""

    def __init__(self):
        super().__init__()
        self.memory, self.compiled = {}, []

    def record(self, record):
        super().record(record)
        if record["kind"] == "train":
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
            self.memory[record["step"]] = pages * resource.getpagesize()


class Compilations(logging.Handler):
    """What JAX's own log says it compiles, with the step after which it did."""

    def __init__(self, callback):
        super().__init__()
        self.callback, self.found = callback, []

    def emit(self, record):
        if "Compiling" in record.getMessage():
            self.found.append((max(self.callback.memory, default=0), record.getMessage()))


def soak(tiny_base, folder, dtype):
    flags = short("lora3", epochs=STEPS, max_steps=STEPS, eval_every=500, dtype=dtype)
    settings = make_settings("lora3", base=str(tiny_base), data_dir=folder / "data", **flags)
    callback = Watching()
    handler, logger = Compilations(callback), logging.getLogger("jax")
    logger.addHandler(handler)
    try:
        with jax.log_compiles(True):
            run.run(settings, folder / dtype, callback)
    finally:
        logger.removeHandler(handler)
    return callback, handler.found


@pytest.fixture(scope="module")
def soaked(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("soak")
    write_data(folder / "data", SIZES)
    return {dtype: soak(tiny_base, folder, dtype) for dtype in ("float32", "bfloat16")}


def test_the_two_dtypes_stay_close(soaked):
    losses = [
        np.array([list(r["loss"].values()) for r in callback.records if r["kind"] == "train"])
        for callback, _ in soaked.values()
    ]
    assert all(len(found) == STEPS // 10 for found in losses)
    means = [found.reshape(10, -1, 3).mean(1) for found in losses]  # of 500 steps, by task
    print("\n", means)
    np.testing.assert_allclose(means[1], means[0], rtol=DISTANCE, atol=0.01)
    assert (means[0][-1] < 0.95 * means[0][0]).all()  # it learns random labels by heart


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_does_not_grow(soaked, dtype):
    memory = soaked[dtype][0].memory
    print("\n", dtype, {step: memory[step] // 2**20 for step in range(500, STEPS + 1, 500)})
    # The allocator keeps and returns some 20 MB as it likes, so the least of a thousand steps.
    begin, end = (
        min(memory[step] for step in memory if last - 1000 < step <= last)
        for last in (STEPS - 2000, STEPS)
    )
    assert end - begin < 12 * 2**20  # each checkpoint leaves up to half a megabyte with Orbax


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_compiled_after_the_first_epochs(soaked, dtype):
    found = soaked[dtype][1]
    assert any("train_step" in message or "lambda" in message for step, message in found)
    assert [message for step, message in found if WARM < step < STEPS] == []
