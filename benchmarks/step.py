"""Measure train steps per second, ours and PyTorch + peft's: `python -m benchmarks.step`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import harness
from benchmarks.peer import Mode, Peer
from benchmarks.work import Ours, Work, real_tokens
from jaxlora.formats import huggingface
from jaxlora.formats.huggingface import Pretrained
from jaxlora.nn.bert import EncoderConfig, param_shapes
from jaxlora.training.config import Dtype, VariantName
from jaxlora.training.task_group import Cohort

KINDS = {
    "lora shared, PCGrad": "lora3",
    "lora per task": "lora1",
    "full shared, PCGrad": "baseline2",
}


@dataclasses.dataclass(frozen=True)
class Flags:
    """Measure the three-task step, in turn with the peer's.

    Attributes:
      base: the base model.
      variants: which variants.
      batch_sizes: sentences or pairs of each task.
      dtypes: float32, bfloat16.
      rounds: timed runs of each side.
      steps: steps of a run.
      peers: eager, compile (torch.compile), graphs (that with CUDA graphs).
      together: also measure our side with this many steps in one program; 0: do not.
      device: the peer's device.
      name: of the JSON file.
      out: its folder.
    """

    base: str = "minilm"
    variants: tuple[VariantName, ...] = ("lora3", "lora1", "baseline2")
    batch_sizes: tuple[int, ...] = (8, 32)
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    rounds: int = 5
    steps: int = 4
    peers: tuple[Mode, ...] = ("eager",)
    together: int = 0
    device: str = dataclasses.field(default_factory=harness.peer_device)
    name: str = "step"
    out: Path = harness.OUT


def dense_weights(config: EncoderConfig) -> int:
    """Count the kernel weights of the layers; a forward pass takes two FLOPs per token of each."""
    flat = param_shapes(config)["layers"]
    return sum(int(np.prod(x.shape)) for x in _kernels(flat))


def _kernels(tree: Any) -> list[Any]:
    if "kernel" in tree:
        return [tree["kernel"]]
    return [x for child in tree.values() if isinstance(child, dict) for x in _kernels(child)]


def flops(config: EncoderConfig, tokens: float, full: bool) -> float:
    """Count a step's matmul FLOPs: forward, gradients of inputs, for `full` also of kernels."""
    return 2 * dense_weights(config) * tokens * (3 if full else 2)


def measure(work: Work, base: Pretrained, flags: Flags) -> dict[str, Any]:
    """Measure one row of the table."""
    start = (work, flags.base)
    workers = {"ours": harness.Worker(make_ours, *start)}
    if flags.together:
        workers["ours together"] = harness.Worker(make_ours, *start, flags.together)
    for mode in flags.peers:
        workers[f"peer {mode}"] = harness.Worker(make_peer, *start, flags.device, mode)
    sides = {name: lambda w=worker: w(flags.steps) for name, worker in workers.items()}
    spreads = harness.interleave(sides, flags.rounds, warmups=2)
    counts = dict.fromkeys(sides, flags.steps) | {"ours together": flags.together}
    spreads = {name: spread.per(counts[name]) for name, spread in spreads.items()}
    for worker in workers.values():
        worker.close()
    config = base.config
    tokens = 1024 if jax.default_backend() == "cpu" else 16384
    rate = harness.matmul_rate(
        tokens, jnp.dtype(work.dtype), config.hidden_size, config.intermediate_size
    )
    floor = flops(config, real_tokens(work, base), work.settings.adapt == "full") / rate
    peer, ours = (
        min(spread.median for name, spread in spreads.items() if name.startswith(side))
        for side in ("peer", "ours")
    )
    return {
        "variant": work.variant,
        "batch": work.batch_size,
        "dtype": work.dtype,
        **{f"{name} ms": spread for name, spread in spreads.items()},
        "× peer": peer / ours,
        "floor ms": 1e3 * floor,
        "× floor": ours / floor,
        "MFU %": 100 * floor / ours,
        "GFLOP/s": rate / 1e9,
    }


def make_ours(work: Work, base: str, together: int = 0) -> Callable[[int], Any]:
    """Compile our side on JAX's default device."""
    ours = Ours(work, huggingface.load(base))
    if together:
        return lambda _: ours.run_together(together) and None
    ours.compile()
    return lambda steps: ours.run(steps) and None


@functools.cache
def make_numbers(work: Work, base: str) -> tuple[Pretrained, list[Cohort]]:
    """Load the base, and the groups whose initial parameters the peer copies."""
    loaded = huggingface.load(base)
    return loaded, Ours(work, loaded).cohorts


def make_peer(work: Work, base: str, device: str, mode: Mode = "eager") -> Callable[[int], Any]:
    """Build the peer's side: one or three models."""
    loaded, cohorts = make_numbers(work, base)
    peers = [
        Peer(work, loaded, cohort, group.name, mode=mode, device=device)
        for cohort in cohorts
        for group in cohort.groups
    ]
    return lambda steps: [peer.run(steps) for peer in peers] and None


def main(flags: Flags) -> None:
    """Measure all combinations."""
    base = huggingface.load(flags.base)
    rows = [
        measure(Work(variant, size, dtype), base, flags)
        for variant in flags.variants
        for size in flags.batch_sizes
        for dtype in flags.dtypes
    ]
    harness.show(flags.name, "A step of all three tasks (ms: median, low–high)", rows, flags.out)


if __name__ == "__main__":
    main(tyro.cli(Flags))
