"""Compare caching a frozen encoder's vectors with encoding: `python -m benchmarks.frozen`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import tyro

from benchmarks import harness
from benchmarks.work import Ours, Work, make_data
from jaxlora.formats import huggingface
from jaxlora.nn import bert
from jaxlora.nn.encode import encoder, make_encode
from jaxlora.serving import inference


@dataclasses.dataclass(frozen=True)
class Flags:
    """Measure an epoch of baseline1, with cached vectors and without.

    Attributes:
      base: the base model.
      examples: number of examples of each task.
      rounds: number of timed runs.
      out: folder of the JSON file.
    """

    base: str = "minilm"
    examples: int = 2048
    rounds: int = 5
    out: Path = harness.OUT


def make_cached(work: Work, base: str) -> Callable[[], float]:
    """Build an epoch of all three heads, which returns the seconds of loading and encoding."""
    began = time.perf_counter()
    ours = Ours(work, huggingface.load(base))
    setup = time.perf_counter() - began
    ours.compile()
    steps = ours.cohorts[0].batches.order.orders[0].steps_per_epoch

    def epoch() -> float:
        ours.run(steps)
        return setup

    return epoch


def make_encoding(work: Work, base: str) -> Callable[[], None]:
    """Build an encoding of all training sentences, as in every epoch of a run without a cache."""
    loaded = huggingface.load(base)
    settings = work.settings
    encode = make_encode(encoder(loaded.config, work.dtype, settings.lora, settings.model.pooling))
    frozen = {"params": bert.matmul_ready(loaded.params, work.dtype)}
    data = make_data(work, loaded)

    def epoch() -> None:
        for splits in data.values():
            inference.encode(encode, frozen, {}, splits["train"], settings.model.max_length)

    return epoch


def main(flags: Flags) -> None:
    """Measure both; encoding alone is a lower bound for an epoch without a cache."""
    work = Work("baseline1", 16, "float32", examples=flags.examples)
    cached = harness.Worker(make_cached, work, flags.base)
    seconds = cached()  # measured before the other process starts
    encoding = harness.Worker(make_encoding, work, flags.base)
    spreads = harness.interleave({"cached": cached, "encoding": encoding}, flags.rounds)
    row = {
        "examples of each task": flags.examples,
        "cached, ms an epoch": spreads["cached"],
        "encoding, ms an epoch": spreads["encoding"],
        "× faster": spreads["encoding"].median / spreads["cached"].median,
        "load and encode s": seconds,
    }
    harness.show("frozen", "baseline1: cached vectors", [row], flags.out)


if __name__ == "__main__":
    main(tyro.cli(Flags))
