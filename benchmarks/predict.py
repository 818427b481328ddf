"""Measure mixed-task inference, also of transformers + peft: `python -m benchmarks.predict`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from jaxlora.nn.encode import encoder, make_mixed_encode
from jaxlora.serving import inference as evaluate
from jaxlora.utils.trees import Tree

WORK = Work("lora1", 8, "float32")  # an adapter for each task


@dataclasses.dataclass(frozen=True)
class Flags:
    """Measure requests to three tasks with one adapter each.

    Both sides start from token ids and end with sentence vectors; heads cost nothing beside them.

    Attributes:
      base: the base model.
      batch_sizes: requests (one sentence each, tasks in turn).
      rounds: timed runs.
      device: the peer's device.
      out: folder of the JSON file.
    """

    base: str = "minilm"
    batch_sizes: tuple[int, ...] = (1, 32, 256)
    rounds: int = 15
    device: str = dataclasses.field(default_factory=harness.peer_device)
    out: Path = harness.OUT


def make_requests(size: int, base: Pretrained) -> tuple[Examples, np.ndarray]:
    """Draw sentences of the tasks in turn, and the task of each."""
    owner = np.arange(size) % len(TASKS)
    parts = [make_examples(task, size, base.config.vocab_size) for task in TASKS]
    tokens = [parts[t].sentence(n) for n, t in enumerate(owner)]
    offsets = np.cumsum([0, *map(len, tokens)])
    labels = np.zeros(size, np.float32)
    ids = np.arange(size).astype(str)
    return Examples(ids, np.concatenate(tokens), offsets, labels, 1), owner


def make_adapters(base: Pretrained) -> list[Tree]:
    """Initialize one adapter per task, with a B that is not zero."""
    keys = jax.random.split(jax.random.key(0), len(TASKS))
    adapters = [lora.init(key, base.params, WORK.settings.lora) for key in keys]
    return jax.tree.map(lambda x: x + 0.01, adapters)


def make_ours(size: int, base: str) -> Callable[[], np.ndarray]:
    """Build our side: all requests in one pass, adapters by sentence."""
    loaded, chosen = huggingface.load(base), WORK.settings
    encode = encoder(loaded.config, jnp.float32, chosen.lora, chosen.model.pooling)
    encode_mixed = make_mixed_encode(encode)
    frozen = {"params": bert.matmul_ready(loaded.params, jnp.float32)}
    adapters = map(bert.unstack_layers, make_adapters(loaded))
    stack = jax.tree.map(lambda *x: jnp.stack(x), *adapters)
    requests, owner = make_requests(size, loaded)
    return lambda: evaluate.encode(
        encode_mixed, frozen, stack, requests, chosen.model.max_length, owner
    )


def make_peer(size: int, base: str, device: str) -> Callable[[], np.ndarray]:
    """Build the peer's side: peft's `adapter_names`, one name per row."""
    import torch

    from benchmarks.peer import load_adapter, make_bert, pad, pool, with_adapter

    loaded, chosen = huggingface.load(base), WORK.settings
    names = [task.name for task in TASKS]
    model: Any = with_adapter(make_bert(loaded, 0.0), chosen.lora, names[0])
    for name in names[1:]:
        model.add_adapter(name, model.peft_config[names[0]])
    for name, adapter in zip(names, make_adapters(loaded), strict=True):
        load_adapter(model, adapter, name)
    model = model.to(device).eval()
    requests, owner = make_requests(size, loaded)

    def run() -> np.ndarray:
        tokens, mask = pad(requests, np.arange(size))
        with torch.inference_mode():
            hidden = model(
                input_ids=tokens.to(device), attention_mask=mask.to(device),
                adapter_names=[names[t] for t in owner],
            ).last_hidden_state  # fmt: skip
            return pool(hidden, mask.to(device), chosen.model.pooling).float().cpu().numpy()

    return run


def measure(size: int, flags: Flags) -> dict[str, Any]:
    """Measure one row of the table."""
    ours = harness.Worker(make_ours, size, flags.base)
    peer = harness.Worker(make_peer, size, flags.base, flags.device)
    difference = float(np.abs(ours() - peer()).max())
    spreads = harness.interleave({"ours": ours, "peer": peer}, flags.rounds, warmups=3)
    ours.close()
    peer.close()
    return {
        "requests": size,
        "ours ms": spreads["ours"],
        "peer ms": spreads["peer"],
        "sentences a second": round(size / spreads["ours"].median),
        "× peer": spreads["peer"].median / spreads["ours"].median,
        "largest difference": difference,
    }


def main(flags: Flags) -> None:
    """Measure all sizes."""
    rows = [measure(size, flags) for size in flags.batch_sizes]
    harness.show("predict", "Mixed-task inference, three adapters, float32", rows, flags.out)


if __name__ == "__main__":
    main(tyro.cli(Flags))
