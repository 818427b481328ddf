"""Pytrees: broadcast, split, count and name their leaves."""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any
Path = tuple[str, ...]


def broadcast(tree: Tree, count: int) -> Tree:
    """Repeat every leaf `[...]` along a new leading axis: `[count, ...]`.

    Differentiating with respect to the result gives each of the `count` users of the tree its own
    gradient, in one backward pass.

    >>> broadcast({"a": jnp.zeros((2, 3))}, 4)["a"].shape
    (4, 2, 3)
    """
    return jax.tree.map(lambda x: jnp.broadcast_to(x[None], (count, *x.shape)), tree)


def split(tree: Tree, sizes: Sequence[int]) -> list[Tree]:
    """Split every leaf along its first axis into parts of these sizes, one tree per part.

    >>> [part["a"].tolist() for part in split({"a": jnp.arange(3)}, (1, 2))]
    [[0], [1, 2]]
    """
    ends = np.cumsum(sizes)
    parts = zip(ends - np.array(sizes), ends, strict=True)
    return [jax.tree.map(operator.itemgetter(slice(*part)), tree) for part in parts]


def count(tree: Tree) -> int:
    """Count the parameters of a tree of arrays or `jax.ShapeDtypeStruct`s.

    >>> count({"a": jnp.zeros((2, 3)), "b": jnp.zeros(4)})
    10
    """
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def names(tree: Tree) -> list[str]:
    """Return the dotted path of every leaf, in the order of `jax.tree.leaves`.

    >>> names({"layer": {"kernel": 1, "bias": 2}})
    ['layer.bias', 'layer.kernel']
    """
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]


def flatten(tree: Mapping[str, Any], keep_empty: bool = False) -> dict[Path, Any]:
    """Flatten nested dicts to a dict of leaves by path.

    Flax's `traverse_util` does the same but takes longer to import than optax.

    Args:
      tree: nested dicts with string keys.
      keep_empty: treat empty dicts as leaves, so that `unflatten` restores them.

    >>> flatten({"layer": {"kernel": 1, "bias": 2}, "pooler": {}})
    {('layer', 'kernel'): 1, ('layer', 'bias'): 2}
    """
    flat: dict[Path, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            below = flatten(value, keep_empty)
            flat |= {(key, *path): leaf for path, leaf in below.items()}
        elif keep_empty or not isinstance(value, Mapping):
            flat[key,] = value
    return flat


def unflatten(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """Build nested dicts from leaves by path, the inverse of `flatten`.

    >>> unflatten({("layer", "kernel"): 1, ("layer", "bias"): 2})
    {'layer': {'kernel': 1, 'bias': 2}}
    """
    tree: dict[str, Any] = {}
    for (*parents, last), value in flat.items():
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def checksum(tree: Tree) -> str:
    """Compute the sha256 of a tree: its paths, shapes, dtypes and values.

    >>> checksum({"a": np.zeros(2)}) == checksum({"a": np.zeros((2, 1))})
    False
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
