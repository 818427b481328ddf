"""Padding of adapters with different ranks, scales and layers to one shape, to stack them.

Zero padding turns an adapter of rank r into one of rank R ≥ r, and a scale can be moved into B:
`s · A B = A (s B)`. Neither changes what an adapter computes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jaxlora.lora.adapter import Adapter, Path
from jaxlora.utils import trees
from jaxlora.utils.trees import Tree


def widen(adapter: Adapter, shapes: Mapping[Path, tuple[int, ...]]) -> Tree:
    """Zero-pad an adapter to given shapes and move its scale into B, so that the scale is 1.

    Args:
      adapter: tree and configuration.
      shapes: shape of each factor by path, at least as large as the adapter's. Factors that the
        adapter lacks become zero.

    Returns:
      A tree of `f32` NumPy arrays with these shapes.

    >>> from jaxlora.lora import LoraConfig
    >>> one = {"q": {"A": np.ones((3, 1)), "B": np.ones((1, 2))}}
    >>> shapes = {("q", "A"): (3, 2), ("q", "B"): (2, 2), ("k", "A"): (3, 2), ("k", "B"): (2, 2)}
    >>> wide = widen((one, LoraConfig(1, 2.0, ("q",))), shapes)
    >>> wide["q"]["B"].tolist(), wide["k"]["B"].tolist()
    ([[2.0, 2.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]])
    """
    factors, config = trees.flatten(adapter[0]), adapter[1]
    out = {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
    for path, factor in factors.items():
        scale = config.scale_of(path[:-1]) if path[-1] == "B" else 1.0
        out[path][tuple(map(slice, factor.shape))] = np.asarray(factor) * np.float32(scale)
    return trees.unflatten(out)
