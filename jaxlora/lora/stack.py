"""Pad adapters of different ranks, scales and layers to equal shapes so that they can be stacked.

An adapter of rank r is also one of rank R ≥ r with zeros in the last columns of A and rows of B,
and its scale can be moved into B: `s · A B = A (s B)`. Neither changes what it computes.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxlora.lora.adapter import Adapter, LoraConfig, Path, describe
from jaxlora.utils import trees
from jaxlora.utils.trees import Tree


def stack(adapters: Sequence[Adapter | None]) -> tuple[list[Tree], LoraConfig]:
    """Pad adapters of one base to the union of their layers, each layer's largest rank and scale 1.

    Args:
      adapters: trees with their configurations; None means no adapter, and becomes zeros.

    Returns:
      `(trees, config)`: trees of equal structure and shapes, and the configuration they share.
      Without any adapter the trees are empty.

    >>> one = {"q": {"A": jnp.ones((3, 1)), "B": jnp.ones((1, 2))}}
    >>> (wide, zero), config = stack([(one, LoraConfig(1, 2.0, ("q",))), None])
    >>> wide["q"]["B"].tolist(), zero["q"]["A"].shape, config.scale_of(("q",))
    ([[2.0, 2.0]], (3, 1), 1.0)
    """
    flat = [None if a is None else (trees.flatten(a[0]), a[1]) for a in adapters]
    shapes: dict[Path, tuple[int, ...]] = {}
    for found in flat:
        for path, x in found[0].items() if found else ():
            shapes[path] = tuple(map(max, shapes.get(path, x.shape), x.shape))
    ranks = {path[:-1]: shape[-1] for path, shape in sorted(shapes.items()) if path[-1] == "A"}
    config = LoraConfig(target_modules=())
    if ranks:
        config = describe({path: (rank, float(rank)) for path, rank in ranks.items()})
    return [_widen(found, shapes) for found in flat], config


def _widen(
    found: tuple[dict[Path, jax.Array], LoraConfig] | None,
    shapes: dict[Path, tuple[int, ...]],
) -> Tree:
    out = {}
    for path, shape in shapes.items():
        x = jnp.zeros(shape)
        if found is not None and path in found[0]:
            x = jnp.asarray(found[0][path])
            x = x * found[1].scale_of(path[:-1]) if path[-1] == "B" else x
        out[path] = jnp.pad(x, [(0, size - n) for n, size in zip(x.shape, shape, strict=True)])
    return trees.unflatten(out)
