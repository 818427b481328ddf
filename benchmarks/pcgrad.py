"""Compare PCGrad alone with torchjd's: `python -m benchmarks.pcgrad`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

import jaxlora
from benchmarks import harness
from benchmarks.aggregators import make_peer


@dataclasses.dataclass(frozen=True)
class Flags:
    """Measure one projection, in turn with torchjd.

    Attributes:
      tasks: numbers of tasks.
      millions: numbers of parameters, in millions.
      limit: skip cases in which tasks × parameters exceed this many millions.
      rounds: number of timed runs.
      device: the peer's device.
      out: folder of the JSON file.
    """

    tasks: tuple[int, ...] = (2, 3, 8, 16)
    millions: tuple[int, ...] = (1, 23, 110)
    limit: int = 400
    rounds: int = 7
    device: str = dataclasses.field(default_factory=harness.peer_device)
    out: Path = harness.OUT


def make_ours(tasks: int, size: int) -> Callable[[], None]:
    """Build our transform on one leaf of `size` numbers per task."""
    tx = jaxlora.pcgrad(tasks)
    grads = {"w": jax.random.normal(jax.random.key(0), (tasks, size))}
    state = tx.init({"w": jnp.zeros(size)})
    update = jax.jit(lambda grads, state: tx.update(grads, state)[0])
    return lambda: jax.block_until_ready(update(grads, state)) and None


def measure(tasks: int, millions: int, rate: float, flags: Flags) -> dict[str, Any]:
    """Measure one row of the table."""
    size = millions * 1_000_000
    ours = harness.Worker(make_ours, tasks, size)
    peer = harness.Worker(make_peer, "pcgrad", tasks, size, flags.device)
    spreads = harness.interleave({"ours": ours, "peer": peer}, flags.rounds, warmups=2)
    ours.close()
    peer.close()
    floor = 4 * size * 2 * tasks / rate
    return {
        "tasks": tasks,
        "M parameters": millions,
        "ours ms": spreads["ours"],
        "torchjd ms": spreads["peer"],
        "× peer": spreads["peer"].median / spreads["ours"].median,
        "floor ms": 1e3 * floor,
        "× floor": spreads["ours"].median / floor,
    }


def main(flags: Flags) -> None:
    """Measure all combinations."""
    rate = harness.read_rate()
    rows = [
        measure(tasks, millions, rate, flags)
        for millions in flags.millions
        for tasks in flags.tasks
        if tasks * millions <= flags.limit
    ]
    title = f"PCGrad alone (ms: median, low–high; the floor reads twice at {rate / 1e9:.1f} GB/s)"
    harness.show("pcgrad", title, rows, flags.out)


if __name__ == "__main__":
    main(tyro.cli(Flags))
