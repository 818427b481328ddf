"""Compare all aggregators with torchjd's, and time surgery: `python -m benchmarks.aggregators`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from benchmarks import harness
from jaxlora.aggregation import MEMBERS, aggregate, per_task_grads
from jaxlora.aggregation.transform import make_method

# Member → torchjd's constructor; the other members have no peer that works on gradients.
PEERS: dict[str, Callable[[Any, int], Any]] = {
    "mgda": lambda m, tasks: m.MGDA(),
    "cagrad": lambda m, tasks: m.CAGrad(c=0.5),
    "imtl_g": lambda m, tasks: m.IMTLG(),
    "aligned_mtl": lambda m, tasks: m.AlignedMTL(),
    "nash_mtl": lambda m, tasks: m.NashMTL(n_tasks=tasks),
    "fairgrad": lambda m, tasks: m.FairGrad(2.0),
    "upgrad": lambda m, tasks: m.UPGrad(),
    "dualproj": lambda m, tasks: m.DualProj(),
    "config": lambda m, tasks: m.ConFIG(),
    "pcgrad": lambda m, tasks: m.PCGrad(),
    "gradvac": lambda m, tasks: m.GradVac(),
}


@dataclasses.dataclass(frozen=True)
class Flags:
    """Time all aggregators on given gradients, in turn with torchjd's; then per-task gradients.

    Attributes:
      tasks: number of tasks.
      millions: number of parameters, in millions.
      members: aggregators to measure; default: all.
      rounds: number of timed runs.
      device: the peer's device.
      out: folder of the JSON files.
    """

    tasks: int = 8
    millions: int = 23
    members: tuple[str, ...] = ()
    rounds: int = 7
    device: str = dataclasses.field(default_factory=harness.peer_device)
    out: Path = harness.OUT


def waiting(run: Callable[..., Any], *args: Any) -> Callable[[], None]:
    """Return a function that calls a program and waits for its result."""

    def side() -> None:
        jax.block_until_ready(run(*args))

    return side


def make_ours(name: str, tasks: int, size: int) -> Callable[[], None]:
    """Build a member's update of one leaf with `size` numbers per task."""
    tx, losses = aggregate(name, tasks), jnp.linspace(1.0, 2.0, tasks)
    grads = jax.random.normal(jax.random.key(0), (tasks, size))
    state = tx.init(None)
    update = jax.jit(lambda grads, state: tx.update(grads, state, losses=losses)[0])
    return waiting(update, grads, state)


def make_weights(name: str, tasks: int) -> Callable[[], None]:
    """Build the computation of a member's weights alone, from a given Gram matrix."""
    J = jax.random.normal(jax.random.key(0), (tasks, 2 * tasks))
    K, losses, method = J @ J.T, jnp.linspace(1.0, 2.0, tasks), make_method(name)
    state = method.init(tasks, 0)
    weights = jax.jit(lambda K: method.weights(K, losses, state)[0])
    return waiting(weights, K)


def make_peer(name: str, tasks: int, size: int, device: str) -> Callable[[], None]:
    """Build torchjd's aggregator, on a matrix whose construction is not timed."""
    import torch
    from torchjd import aggregation

    jacobian = torch.randn(tasks, size, device=device)
    aggregator = PEERS[name](aggregation, tasks)

    def run() -> None:
        aggregator(jacobian)
        if device != "cpu":
            torch.cuda.synchronize()

    return run


def make_step(way: str, tasks: int = 3, width: int = 1024) -> Callable[[], None]:
    """Build a backward pass of one batch per task, 4.5M parameters: `"sum"` or `per_task_grads`."""
    sizes = ((768, width), (width, 2 * width), (2 * width, 768))
    keys = jax.random.split(jax.random.key(0), len(sizes) + tasks)
    trunk = [jax.random.normal(k, s) / s[0] ** 0.5 for k, s in zip(keys, sizes, strict=False)]
    batches = [jax.random.normal(k, (64, 768)) for k in keys[len(sizes) :]]
    tx = aggregate("pcgrad", tasks)

    def loss(trunk: list[jax.Array], head: None, x: jax.Array) -> jax.Array:
        for kernel in trunk:
            x = jnp.tanh(x @ kernel)
        return jnp.mean(x**2)

    def total(trunk: list[jax.Array]) -> jax.Array:
        return jnp.sum(jnp.stack([loss(trunk, None, x) for x in batches]))

    def surgery(trunk: list[jax.Array]) -> Any:
        _, grads, _ = per_task_grads([loss] * tasks, trunk, None, batches)
        return tx.update(grads, tx.init(trunk), trunk)[0]

    run = jax.jit(jax.grad(total) if way == "sum" else surgery)
    return waiting(run, trunk)


def measure(name: str, flags: Flags) -> dict[str, Any]:
    """Measure one row of the table."""
    size = flags.millions * 1_000_000
    sides = {
        "ours": harness.Worker(make_ours, name, flags.tasks, size),
        "weights": harness.Worker(make_weights, name, flags.tasks),
    }
    if name in PEERS:
        sides["peer"] = harness.Worker(make_peer, name, flags.tasks, size, flags.device)
    spreads = harness.interleave(sides, flags.rounds, warmups=2)
    for side in sides.values():
        side.close()
    peer = spreads.get("peer")
    return {
        "method": name,
        "ours ms": spreads["ours"],
        "torchjd ms": "–" if peer is None else peer,
        "× peer": "–" if peer is None else peer.median / spreads["ours"].median,
        "weights alone ms": spreads["weights"],
    }


def main(flags: Flags) -> None:
    """Measure the members, then a step with and without surgery."""
    rows = [measure(name, flags) for name in flags.members or sorted(MEMBERS)]
    title = f"Aggregators, {flags.tasks} tasks × {flags.millions}M numbers (median, low–high)"
    harness.show("aggregators", title, rows, flags.out)
    ways = {way: harness.Worker(make_step, way) for way in ("sum", "surgery")}
    spreads = harness.interleave(ways, flags.rounds, warmups=2)
    ratio = spreads["surgery"].median / spreads["sum"].median
    row = {"plain sum ms": spreads["sum"], "with pcgrad ms": spreads["surgery"], "×": ratio}
    harness.show(
        "per-task", "Gradients of 3 tasks, a batch each, 4.5M parameters", [row], flags.out
    )


if __name__ == "__main__":
    main(tyro.cli(Flags))
