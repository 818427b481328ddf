"""Measure inference, ours and the peers': `python -m benchmarks.predict`."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import harness
from benchmarks.work import TASKS, Work, make_examples
from jaxlora import lora
from jaxlora.data.tokenized import Examples
from jaxlora.formats import huggingface
from jaxlora.formats.huggingface import Pretrained
from jaxlora.nn import bert
from jaxlora.nn.encode import encoder, make_encode, make_mixed_encode
from jaxlora.serving import inference
from jaxlora.utils.trees import Tree

WORK = Work("lora1", 8, "float32")  # an adapter for each task
Kind = Literal["mixed", "merged"]
Side = Callable[[int], np.ndarray]
"""`requests → f32[requests, H]`."""

# Name → module and function of `benchmarks.peers`.
PEERS: Mapping[str, tuple[str, str]] = {
    "padded, adapter_names": ("adapter_names", "make"),
    "merged, sorted": ("merged", "make"),
    "merged, sorted, oneDNN": ("merged", "make_onednn"),
    "sentence-transformers": ("sentence_transformer", "make"),
    "ONNX Runtime": ("onnx_runtime", "make"),
    "ONNX Runtime, int8": ("onnx_runtime", "make_int8"),
    "OpenVINO": ("openvino_runtime", "make"),
}
APPROXIMATE = frozenset({"ONNX Runtime, int8"})  # shown, but not compared as a peer
ONLY_MIXED = frozenset({"padded, adapter_names"})
ONLY_CPU = frozenset(
    ("merged, sorted, oneDNN", "ONNX Runtime", "ONNX Runtime, int8", "OpenVINO"),
)


@dataclasses.dataclass(frozen=True)
class Flags:
    """Measure requests to three tasks with one adapter each, and to one merged task.

    All sides start from token ids and end with sentence vectors; the cost of heads is negligible.

    Attributes:
      base: the base model.
      kinds: mixed, merged.
      batch_sizes: numbers of requests (one sentence each, tasks in turn).
      rounds: number of timed runs.
      most_seconds: seconds per row after which no further round begins.
      device: the peers' device.
      out: folder of the JSON files.
    """

    base: str = "minilm"
    kinds: tuple[Kind, ...] = ("mixed", "merged")
    batch_sizes: tuple[int, ...] = (1, 32, 256)
    rounds: int = 9
    most_seconds: float = 20.0
    device: str = dataclasses.field(default_factory=harness.peer_device)
    out: Path = harness.OUT


def make_requests(size: int, base: Pretrained, kind: Kind = "mixed") -> tuple[Examples, np.ndarray]:
    """Draw sentences of the tasks in turn, and each one's task; `merged`: always the first task."""
    owner = np.arange(size) % len(TASKS)
    parts = [make_examples(task, size, base.config.vocab_size) for task in TASKS]
    tokens = [parts[t].sentence(n) for n, t in enumerate(owner)]
    offsets = np.cumsum([0, *map(len, tokens)])
    labels = np.zeros(size, np.float32)
    ids = np.arange(size).astype(str)
    examples = Examples(ids, np.concatenate(tokens), offsets, labels, 1)
    return examples, owner if kind == "mixed" else np.zeros_like(owner)


def make_adapters(base: Pretrained, kind: Kind = "mixed") -> list[Tree]:
    """Initialize the adapters to serve, with nonzero B."""
    keys = jax.random.split(jax.random.key(0), len(TASKS) if kind == "mixed" else 1)
    adapters = [lora.init(key, base.params, WORK.settings.lora) for key in keys]
    return jax.tree.map(lambda x: x + 0.01, adapters)


def make_ours(kind: Kind, base: str) -> Side:
    """Build our side: all requests in one call, with an adapter per sentence or a merged one."""
    loaded, chosen = huggingface.load(base), WORK.settings
    encode = encoder(loaded.config, jnp.float32, chosen.lora, chosen.model.pooling)
    adapters, params = make_adapters(loaded, kind), loaded.params
    trainable: Tree = {}
    if kind == "mixed":
        compiled: Any = make_mixed_encode(encode)
        trainable = jax.tree.map(lambda *x: jnp.stack(x), *map(bert.unstack_layers, adapters))
    else:
        compiled, params = make_encode(encode), lora.merge(params, adapters[0], chosen.lora)
    frozen = {"params": bert.matmul_ready(params, jnp.float32)}

    @functools.cache
    def drawn(size: int) -> tuple[Any, ...]:
        examples, owner = make_requests(size, loaded, kind)
        rest = (owner,) if kind == "mixed" else ()
        return examples, chosen.model.max_length, *rest

    return lambda size: inference.encode(compiled, frozen, trainable, *drawn(size))


def make_peers(names: tuple[str, ...], kind: Kind, base: str, device: str) -> Callable[..., Any]:
    """Build the peers' side: `(name, number of requests)` encodes requests with one peer."""
    from benchmarks.peers.requests import Requests, Served

    loaded, chosen = huggingface.load(base), WORK.settings
    adapters = make_adapters(loaded, kind)
    served = Served(loaded, chosen.lora, adapters, chosen.model.pooling, device)
    made = {}
    for name in names:
        module, function = PEERS[name]
        made[name] = getattr(importlib.import_module(f"benchmarks.peers.{module}"), function)(
            served
        )
    drawn = functools.cache(lambda size: Requests(*make_requests(size, loaded, kind)))
    return lambda name, size: made[name](drawn(size))


def peer_names(kind: Kind, device: str) -> tuple[str, ...]:
    """Return the peers that support a kind of requests on a device."""
    excluded = (frozenset() if kind == "mixed" else ONLY_MIXED) | (
        frozenset() if device == "cpu" else ONLY_CPU
    )
    return tuple(name for name in PEERS if name not in excluded)


def measure(kind: Kind, size: int, sides: Mapping[str, Side], flags: Flags) -> dict[str, Any]:
    """Measure one row of the table."""
    vectors = {name: side(size) for name, side in sides.items()}
    difference = max(
        float(np.abs(vectors["ours"] - found).max())
        for name, found in vectors.items()
        if name not in APPROXIMATE
    )
    calls = {name: functools.partial(side, size) for name, side in sides.items()}
    spreads = harness.interleave(calls, flags.rounds, 1, flags.most_seconds)
    raced = {name: spread for name, spread in spreads.items() if name not in APPROXIMATE}
    return {
        "kind": kind,
        "requests": size,
        **harness.against_best(raced),
        **{f"{name} ms": spread for name, spread in spreads.items() if name != "ours"},
        "sentences a second": round(size / spreads["ours"].median),
        "largest difference": difference,
    }


def measure_kind(kind: Kind, flags: Flags) -> list[dict[str, Any]]:
    """Measure all sizes, with our side in one process and the peers in another."""
    names = peer_names(kind, flags.device)
    ours = harness.Worker(make_ours, kind, flags.base)
    peers = harness.Worker(make_peers, names, kind, flags.base, flags.device)
    sides: dict[str, Side] = {"ours": ours}
    sides |= {name: functools.partial(peers, name) for name in names}
    rows = [measure(kind, size, sides, flags) for size in flags.batch_sizes]
    ours.close()
    peers.close()
    return rows


TITLES = {
    "mixed": "Inference: requests to three tasks with an adapter each, float32",
    "merged": "Inference: requests to one task with its adapter merged, float32",
}


def main(flags: Flags) -> None:
    """Measure both kinds."""
    for kind in flags.kinds:
        name = f"predict-{kind}"
        if not harness.is_done(name, flags.out):
            harness.show(name, TITLES[kind], measure_kind(kind, flags), flags.out)


if __name__ == "__main__":
    main(tyro.cli(Flags))
