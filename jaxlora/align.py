"""Adapters of different ranks, scales and layers, brought to one shape so that they can be stacked.

An adapter of rank r is one of rank R ≥ r whose last rows and columns are zero, and a scale can be
moved into B: `s · A B = A (s B)`. Neither changes what an adapter computes.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import traverse_util

from jaxlora.lora import LoraConfig
from jaxlora.trees import Tree

Adapter = tuple[Tree, LoraConfig]


def align(adapters: Sequence[Adapter | None]) -> tuple[list[Tree], LoraConfig]:
    """Bring adapters of one base to the largest rank, to all layers, and to a scale of 1.

    Args:
      adapters: trees with their configurations; None stands for one that changes nothing.

    Returns:
      `(trees of equal structure and shapes, the configuration that all have now)`; empty trees if
      there is no adapter at all.

    >>> one = {"q": {"A": jnp.ones((3, 1)), "B": jnp.ones((1, 2))}}
    >>> (wide, zero), config = align([(one, LoraConfig(1, 2.0, ("q",))), None])
    >>> wide["q"]["B"].tolist(), zero["q"]["A"].shape, config.scale
    ([[2.0, 2.0]], (3, 1), 1.0)
    """
    flat = [None if a is None else (traverse_util.flatten_dict(a[0]), a[1]) for a in adapters]
    shapes: dict[tuple[str, ...], tuple[int, ...]] = {}
    for found in flat:
        for path, x in found[0].items() if found else ():
            shapes[path] = tuple(map(max, shapes.get(path, x.shape), x.shape))
    modules = sorted({".".join(path[:-1]) for path in shapes})
    rank = max((shape[-1] for path, shape in shapes.items() if path[-1] == "A"), default=1)
    config = LoraConfig(rank, float(rank), tuple(modules))
    return [_widen(found, shapes, rank) for found in flat], config


def _widen(
    found: tuple[dict[tuple[str, ...], jax.Array], LoraConfig] | None,
    shapes: dict[tuple[str, ...], tuple[int, ...]],
    rank: int,
) -> Tree:
    out = {}
    for path, widest in shapes.items():
        is_a = path[-1] == "A"
        shape = (*widest[:-1], rank) if is_a else (*widest[:-2], rank, widest[-1])
        x = jnp.zeros(shape) if found is None else found[0].get(path, jnp.zeros(shape))
        x = jnp.asarray(x) if is_a or found is None else x * found[1].scale
        out[path] = jnp.pad(x, [(0, to - n) for n, to in zip(x.shape, shape, strict=True)])
    return traverse_util.unflatten_dict(out)
