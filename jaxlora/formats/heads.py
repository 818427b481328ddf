"""Heads in safetensors files, with the names and shapes of torch's Linear."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from jaxlora.formats.families import Family
from jaxlora.formats.huggingface import read_safetensors
from jaxlora.utils.errors import UserError
from jaxlora.utils.trees import Tree

HEAD = "head.safetensors"
_TORCH = {"kernel": "weight", "bias": "bias"}
_OURS = {name: ours for ours, name in _TORCH.items()}


def write(folder: Path, head: Tree) -> None:
    """Write a head's parameters to `head.safetensors`; write no file for an empty head."""
    if not head:
        return
    tensors = {
        ".".join([*path[:-1], _TORCH[path[-1]]]): np.ascontiguousarray(
            np.asarray(leaf, np.float32).T
        )
        for path, leaf in traverse_util.flatten_dict(head).items()
    }
    save_file(tensors, folder / HEAD, metadata={"format": "pt"})


def classifier_tensors(head: Tree, family: Family) -> dict[str, np.ndarray]:
    """Return a head's tensors, named as in the family's sequence classifier.

    Args:
      head: a head of the kind `family.classifier.head`.
      family: the family of the base.
    """
    found = {}
    for ours, theirs in family.classifier.modules.items() if family.classifier else ():
        # The pooler is part of the encoder's class.
        name = f"{family.prefix}.{theirs}" if theirs.startswith("pooler.") else theirs
        for leaf, torch_leaf in _TORCH.items():
            tensor = np.asarray(head[ours][leaf], np.float32).T
            found[f"{name}.{torch_leaf}"] = np.ascontiguousarray(tensor)
    return found


def read(folder: Path, like: Tree) -> Tree:
    """Read a head that `write` wrote.

    Args:
      folder: the folder.
      like: a tree with the head's shapes, `{}` for no head.

    Raises:
      UserError: if the file is missing or damaged, or has other shapes.
    """
    if not like:
        return {}
    path = folder / HEAD
    flat = {}
    for name, tensor in read_safetensors(path):
        *middle, last = name.split(".")
        flat[*middle, _OURS.get(last, last)] = tensor.T
    found = {".".join(p): x.shape for p, x in flat.items()}
    wanted = {".".join(p): x.shape for p, x in traverse_util.flatten_dict(like).items()}
    if found != wanted:
        raise UserError(f"{path}: holds {found}, the task's head is {wanted}")
    return jax.tree.map(np.ascontiguousarray, traverse_util.unflatten_dict(flat))
