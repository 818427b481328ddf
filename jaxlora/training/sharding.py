"""The mesh of devices, and the sharding of the arrays of a run. One device is a mesh of size one.

A mesh has two axes. The rows of a batch are split over both. The encoder's frozen and trained trees
and its optimizer state are split over `fsdp`. Heads, labels and metrics are replicated. The step
itself does not depend on the devices: XLA inserts the communication (Xu et al. 2021, "GSPMD").
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlora.data.batches import Batch
from jaxlora.nn.encode import PackedTokens
from jaxlora.training.step import TrainState
from jaxlora.utils.errors import ConfigError
from jaxlora.utils.trees import Tree

AXES = ("data", "fsdp")
# Leaves with fewer elements (biases, LayerNorm) are replicated: gathering them would cost more.
LEAST_SPLIT = 2**13


def make_mesh(text: str) -> Mesh:
    """Make a mesh of JAX's devices.

    Args:
      text: see `sizes`.

    Raises:
      UserError: see `sizes`; also if several processes would not use all devices.
    """
    shape = tuple(sizes(text, jax.device_count()).values())
    if jax.process_count() > 1 and np.prod(shape) < jax.device_count():
        raise ConfigError("mesh", f"many processes need all {jax.device_count()} devices", text)
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def sizes(text: str, count: int) -> dict[str, int]:
    """Parse the number of devices along each axis of a mesh.

    Args:
      text: `data=4,fsdp=2`, either part alone, or `auto`, which puts all devices on `data`.
      count: number of available devices.

    Raises:
      UserError: if the text has another form, or asks for more devices.

    >>> sizes("fsdp=2", 8)
    {'data': 1, 'fsdp': 2}
    """
    found = {"data": count} if text == "auto" else _parse(text)
    found = {axis: found.get(axis, 1) for axis in AXES}
    needed = found["data"] * found["fsdp"]
    if needed > count:
        raise ConfigError("mesh", f"needs {needed} devices, there are {count}", text)
    return found


def _parse(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES or axis in sizes or not size.isdecimal() or int(size) < 1:
            raise ConfigError("mesh", "write data=4,fsdp=2, one of them, or auto", text)
        sizes[axis] = int(size)
    return sizes


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds completely."""
    return NamedSharding(mesh, PartitionSpec())


def split_axis(shape: tuple[int, ...], parts: int) -> int | None:
    """Return the axis along which a leaf is split, or None if it is replicated.

    It is the longest axis that `parts` divides. The leading axis of leaves with more than two axes,
    which are stacked layers, is never split, since one layer is needed at a time.

    >>> split_axis((6, 384, 1536), 8), split_axis((384,), 8)
    (2, None)
    """
    first = 1 if len(shape) > 2 else 0
    can = [axis for axis in range(first, len(shape)) if shape[axis] % parts == 0]
    if math.prod(shape) < LEAST_SPLIT or not can:
        return None
    return max(can, key=lambda axis: shape[axis])


def split(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Return the sharding of a leaf of an encoder's tree."""
    axis = split_axis(shape, mesh.shape["fsdp"])
    if axis is None:
        return replicated(mesh)
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "fsdp"))


def of_tree(mesh: Mesh, tree: Tree) -> Tree:
    """Return the shardings of an encoder's tree, or of its optimizer state."""
    return jax.tree.map(lambda x: split(mesh, x.shape), tree)


def of_state(mesh: Mesh, state: TrainState) -> TrainState:
    """Return the shardings of a train state."""
    shardings: TrainState = jax.tree.map(lambda _: replicated(mesh), state)
    return dataclasses.replace(
        shardings,
        trainable=of_tree(mesh, state.trainable),
        opt_state=of_tree(mesh, state.opt_state),
    )


def of_rows(mesh: Mesh, rows: PackedTokens) -> PackedTokens:
    """Return the shardings of packed rows, replicated if they cannot be split evenly."""
    *lead, count, _ = rows.tokens.shape
    part = replicated(mesh)
    if count % mesh.size == 0:
        part = NamedSharding(mesh, PartitionSpec(*(None,) * len(lead), AXES))
    types = None if rows.types is None else part
    return PackedTokens(part, part, part, replicated(mesh), types)


def of_batch(mesh: Mesh, batch: Batch) -> Batch:
    """Return the shardings of a batch."""
    mixed = isinstance(batch.inputs, PackedTokens)
    return Batch(
        of_rows(mesh, batch.inputs) if mixed else replicated(mesh),
        replicated(mesh),
        replicated(mesh),
    )


def shapes_at(shapes: Tree, shardings: Tree) -> Tree:
    """Add shardings to a tree of shapes and dtypes."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def on_host() -> contextlib.AbstractContextManager[Any]:
    """Return a context that computes in host memory, if JAX has a CPU backend.

    It is for arrays that `put` will split, since a complete one may not fit on a device.
    """
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return contextlib.nullcontext()


def put(tree: Tree, shardings: Tree) -> Tree:
    """Place arrays, which every process has completely, on devices by their shardings."""
    return jax.tree.map(_put, tree, shardings)


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    here = np.asarray(x)
    return jax.make_array_from_callback(here.shape, sharding, lambda index: here[index])
