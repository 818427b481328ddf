"""Check an accelerator against the CPU: `python experiments/accelerator.py [--base minilm]`.

Runs PCGrad, two train steps of every variant and requests to many adapters on JAX's default device
and on the CPU, from the same numbers and without dropout. Prints the differences of the second
step's gradients and of the sentence vectors, and the time of a step or a call. Steps are plain SGD:
AdamW's first steps are the signs of the gradients, which rounding flips where a gradient is nearly
zero. Needs neither data nor TFDS nor Grain. Exits with 1 if a difference exceeds the tolerance, and
with 2 if JAX finds no accelerator.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from jaxlora import lora
from jaxlora.cli.flags import exit_code
from jaxlora.data import packing
from jaxlora.data.batches import Batch
from jaxlora.data.tokenized import Examples
from jaxlora.formats import huggingface
from jaxlora.nn import bert
from jaxlora.nn.encode import Encode, encoder, make_mixed_encode
from jaxlora.pcgrad import combine, gram, orders, pcgrad, project
from jaxlora.serving import inference
from jaxlora.tasks import task as tasks
from jaxlora.tasks.sharing import VARIANTS, Adapt, Variant, group_name
from jaxlora.training.adaptation import EncodeTasks, Frozen, Full, make_adaptation
from jaxlora.training.config import PaperVariant
from jaxlora.training.step import GroupStep, make_train_step
from jaxlora.utils import trees
from jaxlora.utils.errors import UserError

TOLERANCE = 1e-4  # relative, for float32 gradients; TF32 would exceed it
RATE = 0.1
SHAPE, BATCH = packing.Shape(6, 64), 8
REQUESTS = 256


def pcgrad_difference(devices: list[jax.Device], sizes: tuple[int, ...]) -> float:
    """Return the relative difference of three tasks' combined gradients between two devices."""
    key = jax.random.key(0)
    grads = {str(n): np.asarray(jax.random.normal(key, (3, n))) for n in sizes}

    @jax.jit
    def combined(grads: Any) -> Any:
        return combine(grads, project(gram(grads), orders(key, 3)).sum(0))

    return difference(*(combined(jax.device_put(grads, d)) for d in devices))


def difference(a: Any, b: Any) -> float:
    """Compute `‖a - b‖ / ‖b‖` over all leaves; NaN if any element is NaN."""
    a, b = (
        np.concatenate([[0.0], *(np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree))])
        for tree in (a, b)
    )
    return float(np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-30))


def random_batch(num_tasks: int, vocabulary: int, adapt: Adapt) -> Batch:
    """Return sentences of 5 to 19 random tokens, in shared rows or, without LoRA, rows per task."""
    rng, slots = np.random.default_rng(0), 2 * BATCH
    count = num_tasks * slots
    sentences = [
        rng.integers(1, vocabulary, n).astype(np.int32) for n in rng.integers(5, 20, count)
    ]
    labels = rng.integers(0, 2, (num_tasks, BATCH)).astype(np.float32)
    if adapt == "lora":
        shape = packing.Shape(num_tasks * SHAPE.rows, SHAPE.length)
        inputs = packing.fill(sentences, range(count), count, shape)
    else:
        parts = [sentences[t * slots : (t + 1) * slots] for t in range(num_tasks)]
        rows = [packing.fill(part, range(slots), slots, SHAPE) for part in parts]
        inputs = packing.stack(rows)
    return Batch(inputs, labels, np.ones_like(labels))


class EncodedInSteps(Frozen):
    """A frozen encoder that encodes in every step, so that its encoding is compared, too."""

    def encode_tasks(self, encode: Encode, sizes: Sequence[int]) -> EncodeTasks:
        """Encode each task's rows."""
        return Full().encode_tasks(encode, sizes)


def sgd(num_tasks: int) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Return PCGrad and SGD for the encoder and SGD for the heads; states hold the gradients."""
    heads = optax.chain(optax.trace(0.0), optax.scale(-RATE))
    return optax.chain(pcgrad(num_tasks), heads), heads


def two_steps(
    variant: Variant, base: huggingface.Pretrained, device: jax.Device
) -> tuple[Any, float]:
    """Return the gradients of a variant's second step, and the seconds per step.

    The adapters of all groups train in one step. Of several whole encoders only the first trains.
    """
    config = base.config.with_dropout(0.0)
    groups = variant.groups[: 1 if variant.adapt == "full" else None]
    named = {task.name: task for task in tasks.paper_tasks(variant.sts_loss)}
    with jax.default_device(device):
        adapted = make_adaptation(variant.adapt, lora.LoraConfig())
        adaptation = EncodedInSteps() if variant.adapt == "frozen" else adapted
        steps = {
            group_name(names): GroupStep(tuple(named[name] for name in names), *sgd(len(names)))
            for names in groups
        }
        made = make_train_step(steps, config, adaptation, dropout=0.0)
        states = made.init(dict.fromkeys(steps, jax.random.key(0)), base.params)
        run, frozen = made.compile(), made.freeze(base.params)
        batch = random_batch(len(made.tasks), config.vocab_size, variant.adapt)
        for _ in range(2):
            states, _ = run(states, frozen, batch)
        optimizers = [(s.opt_state, s.head_opt_state) for s in states.values()]
        grads = [
            jax.tree.map(np.array, optax.tree.get(state, "trace"))
            for both in optimizers
            for state in both
        ]
        seconds = []
        for _ in range(10):
            began = time.perf_counter()
            states, metrics = run(states, frozen, batch)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - began)
    return grads, float(np.median(seconds))


def requests(adapters: int) -> int:
    """Return the number of requests, at least one for each adapter."""
    return max(REQUESTS, adapters)


def serve(
    base: huggingface.Pretrained, adapters: int, device: jax.Device
) -> tuple[np.ndarray, float]:
    """Return the vectors of sentences that use the adapters in turn, and the seconds per call."""
    rng, config, count = np.random.default_rng(0), lora.LoraConfig(), requests(adapters)
    sentences = [rng.integers(1, base.config.vocab_size, n) for n in rng.integers(5, 20, count)]
    examples = Examples(
        np.arange(count).astype(str),
        np.concatenate(sentences).astype(np.int32),
        np.cumsum([0, *map(len, sentences)]),
        np.zeros(count, np.float32),
        1,
    )
    like = bert.unstack_layers(lora.init(jax.random.key(0), base.params, config))
    stack = jax.tree.map(lambda x: 0.05 * rng.standard_normal((adapters, *x.shape), "f4"), like)
    encode = make_mixed_encode(encoder(base.config, jnp.float32, config, "mean"))
    with jax.default_device(device):
        frozen = {"params": bert.matmul_ready(base.params, jnp.float32)}
        call = functools.partial(
            inference.encode, encode, frozen, jax.device_put(stack, device), examples,
            base.config.max_length, np.arange(count) % adapters,
        )  # fmt: skip
        vectors, seconds = call(), []
        for _ in range(5):
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
    return vectors, float(np.median(seconds))


def agree(differences: Sequence[float]) -> bool:
    """Return whether all differences are within the tolerance; NaN is not."""
    return all(found <= TOLERANCE for found in differences)


def main(
    base: str = "minilm",
    variants: tuple[PaperVariant, ...] = get_args(PaperVariant),
    adapters: tuple[int, ...] = (1, 8, 64, 512),
    cpu_only: bool = False,
) -> bool:
    """Print the comparison; return whether both devices agree.

    Args:
      base: minilm, a local Hugging Face folder, or a hub id.
      variants: the paper's variants whose steps are compared.
      adapters: numbers of adapters among which 256 requests, or one for each, are divided.
      cpu_only: compare the CPU with itself if JAX finds no accelerator.

    Raises:
      UserError: if JAX finds no accelerator, unless `cpu_only`.
    """
    device, cpu = jax.devices()[0], jax.devices("cpu")[0]
    if device == cpu and not cpu_only:
        raise UserError(
            "JAX finds no accelerator to compare with the CPU; install JAX for yours, or set "
            "`cpu_only=True` to compare the CPU with itself"
        )
    loaded = huggingface.load(base)
    table = Table(title=f"{device.device_kind} against cpu")
    for column in ("", "difference", "ms", "ms on cpu"):
        table.add_column(column, justify="right")
    sizes = (trees.count(bert.param_shapes(loaded.config)) // 2, 1000, 7)
    differences = [pcgrad_difference([device, cpu], sizes)]
    table.add_row(f"pcgrad, 3 × {sum(sizes):,}", f"{differences[0]:.1e}")
    compared: dict[str, Callable[[jax.Device], tuple[Any, float]]] = {
        f"a step of {name}": functools.partial(two_steps, VARIANTS[name], loaded)
        for name in variants
    }
    compared |= {
        f"{requests(count)} requests, {count} adapters": functools.partial(serve, loaded, count)
        for count in adapters
    }
    for name, run in compared.items():
        (there, fast), (here, slow) = (run(d) for d in (device, cpu))
        differences.append(
            float(np.max([difference(x, y) for x, y in zip(there, here, strict=True)]))
        )
        table.add_row(name, f"{differences[-1]:.1e}", f"{1e3 * fast:.1f}", f"{1e3 * slow:.1f}")
    Console().print(table)
    return agree(differences)


def cli(args: Sequence[str] | None = None) -> int:
    """Parse flags and compare; return the exit code of `flags.exit_code`, or 1 if they differ."""
    agreed: list[bool] = []
    code = exit_code(agreed.append, main, args)
    return code or int(agreed == [False])


if __name__ == "__main__":
    sys.exit(cli())
