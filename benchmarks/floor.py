"""The floor of a step: the least time of its matmuls and element-wise work on this machine.

The matmuls are those of the layers' kernels on the real tokens, each at the measured rate of its
shape; the adapters' thin matmuls are left out. The element-wise work is the bytes read and written
by the fewest passes over the activations, at the rate of a copy of that size.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from benchmarks.work import Work, make_data, real_tokens
from jaxlora.formats.huggingface import Pretrained
from jaxlora.nn.bert import EncoderConfig
from jaxlora.utils import trees

Shape = tuple[int, int, int]


def matmuls(config: EncoderConfig, tokens: int, full: bool) -> dict[Shape, int]:
    """Count a step's matmuls `[m, k] [k, n]`: forward, dx, and if `full` also the kernels' dw."""
    width, wide, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    found = {
        (tokens, width, width): 8 * layers,
        (tokens, width, wide): 2 * layers,
        (tokens, wide, width): 2 * layers,
    }
    if full:
        found |= {
            (width, tokens, width): 4 * layers,
            (width, tokens, wide): layers,
            (wide, tokens, width): layers,
        }
    return found


def activation_bytes(config: EncoderConfig, tokens: float, squares: float, itemsize: int) -> float:
    """Count the bytes of the element-wise passes over a step's activations.

    In the forward pass, GELU reads and writes F numbers per token; each of two LayerNorms reads 2 H
    (with the residual) and writes H; softmax reads and writes one number per head for each pair of
    tokens in a sentence. In the backward pass, each also reads its gradient.

    Args:
      config: configuration of the encoder.
      tokens: number of tokens in a step.
      squares: sum of the squared lengths of its sentences.
      itemsize: bytes per number.
    """
    per_token = 5 * config.intermediate_size + 12 * config.hidden_size
    per_pair = 5 * config.num_attention_heads
    return config.num_hidden_layers * itemsize * (per_token * tokens + per_pair * squares)


def sum_of_squares(work: Work, base: Pretrained) -> float:
    """Return the expected sum of the squared lengths of a step's sentences."""
    data = make_data(work, base)
    return sum(
        work.batch_size * task.sentences * float((data[name]["train"].lengths ** 2).mean())
        for name, task in work.tasks.items()
    )


def row(work: Work, base: Pretrained, ours: harness.Spread) -> dict[str, Any]:
    """Compare our time for a step with its floor."""
    config, dtype, full = base.config, jnp.dtype(work.dtype), work.settings.adapt == "full"
    tokens = real_tokens(work, base)
    shapes = matmuls(config, round(tokens), full)
    flops = {shape: 2 * float(np.prod(shape)) * count for shape, count in shapes.items()}
    multiply = sum(flops[shape] / harness.matmul_rate(shape, dtype) for shape in shapes)
    size = round(tokens) * config.intermediate_size * dtype.itemsize
    moved = activation_bytes(config, tokens, sum_of_squares(work, base), dtype.itemsize)
    move = moved / harness.copy_rate(size)
    if full:  # PCGrad reads all gradients twice, AdamW reads and writes the parameters and moments
        passes = 7 + 2 * len(work.tasks)
        move += 4 * passes * trees.count(base.params) / harness.copy_rate()
    rate = sum(flops.values()) / multiply
    return {
        "variant": work.variant,
        "batch": work.batch_size,
        "dtype": work.dtype,
        "tokens": round(tokens),
        "ours ms": ours,
        "matmuls ms": 1e3 * multiply,
        "element-wise ms": 1e3 * move,
        "× floor": ours.median / (multiply + move),
        "% of the matmul rate": 100 * multiply / ours.median,
        "matmul GFLOP/s": rate / 1e9,
    }
