"""Many devices: where the arrays of a run live. One device is a mesh of one.

A mesh has two axes. A batch's rows are split over both. The encoder's trees, frozen and trained,
and the optimizer's moments are split over `fsdp`; heads, labels and metrics are replicated.
Nothing else in the library knows of devices: how the parts meet is XLA's affair (Xu et al. 2021,
"GSPMD").
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
# Smaller leaves (biases, LayerNorm) are replicated: fetching their parts would cost more.
LEAST_SPLIT = 2**13


def make_mesh(text: str) -> Mesh:
    """Make a mesh of JAX's devices.

    Args:
      text: see `sizes`.

    Raises:
      UserError: see `sizes`; or if many processes leave devices out.
    """
    shape = tuple(sizes(text, jax.device_count()).values())
    if jax.process_count() > 1 and np.prod(shape) < jax.device_count():
        raise ConfigError("mesh", f"many processes need all {jax.device_count()} devices", text)
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def sizes(text: str, count: int) -> dict[str, int]:
    """How many devices each axis has.

    Args:
      text: `data=4,fsdp=2`, either part alone, or `auto`: all devices, rows only.
      count: devices there are.

    Raises:
      UserError: if it is not of that form, or there are fewer devices.

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
    """On every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_axis(shape: tuple[int, ...], parts: int) -> int | None:
    """Return the axis of a leaf that is split: the longest one that can be.

    The layers' axis is not, since one layer is needed at a time.

    >>> split_axis((6, 384, 1536), 8), split_axis((384,), 8)
    (2, None)
    """
    first = 1 if len(shape) > 2 else 0
    can = [axis for axis in range(first, len(shape)) if shape[axis] % parts == 0]
    if math.prod(shape) < LEAST_SPLIT or not can:
        return None
    return max(can, key=lambda axis: shape[axis])


def split(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Where a leaf of an encoder's tree lives."""
    axis = split_axis(shape, mesh.shape["fsdp"])
    if axis is None:
        return replicated(mesh)
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "fsdp"))


def of_tree(mesh: Mesh, tree: Tree) -> Tree:
    """Where an encoder's tree, or its optimizer's state, lives."""
    return jax.tree.map(lambda x: split(mesh, x.shape), tree)


def of_state(mesh: Mesh, state: TrainState) -> TrainState:
    """Where a train state lives."""
    shardings: TrainState = jax.tree.map(lambda _: replicated(mesh), state)
    return dataclasses.replace(
        shardings,
        trainable=of_tree(mesh, state.trainable),
        opt_state=of_tree(mesh, state.opt_state),
    )


def of_rows(mesh: Mesh, rows: PackedTokens) -> PackedTokens:
    """Return the sharding of packed rows; rows too few for all devices are replicated."""
    *lead, count, _ = rows.tokens.shape
    part = replicated(mesh)
    if count % mesh.size == 0:
        part = NamedSharding(mesh, PartitionSpec(*(None,) * len(lead), AXES))
    types = None if rows.types is None else part
    return PackedTokens(part, part, part, replicated(mesh), types)


def of_batch(mesh: Mesh, batch: Batch) -> Batch:
    """Where a batch lives."""
    mixed = isinstance(batch.inputs, PackedTokens)
    return Batch(
        of_rows(mesh, batch.inputs) if mixed else replicated(mesh),
        replicated(mesh),
        replicated(mesh),
    )


def shapes_at(shapes: Tree, shardings: Tree) -> Tree:
    """Return the shapes of arrays that live there; nothing is allocated."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def on_host() -> contextlib.AbstractContextManager[Any]:
    """While this lasts, what is computed lives in the host's memory, if JAX may use its CPU.

    What `put` splits must not be whole on a device before: it may not fit there.
    """
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return contextlib.nullcontext()


def put(tree: Tree, shardings: Tree) -> Tree:
    """Arrays that every process has, each device with its part of them."""
    return jax.tree.map(_put, tree, shardings)


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    here = np.asarray(x)
    return jax.make_array_from_callback(here.shape, sharding, lambda index: here[index])
