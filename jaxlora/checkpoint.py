"""Orbax: the state of a running group, and what has been trained.

Both are written to a temporary place and renamed when complete, so a killed run leaves either the
old checkpoint or the new one.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxlora.errors import UserError
from jaxlora.trees import Tree


class GroupCheckpoints:
    """The latest state of one group's training, with its progress.

    Args:
      folder: where they live; made if need be.
    """

    def __init__(self, folder: Path) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, tree: Tree, progress: dict[str, Any]) -> None:
        """Replace the checkpoint: a pytree of arrays (PRNG keys too) and plain JSON values."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_keys_to_data(tree)),
                progress=ocp.args.JsonSave(progress),
            ),
            force=True,
        )
        self._manager.wait_until_finished()

    def restore(self, like: Tree) -> tuple[Tree, dict[str, Any]] | None:
        """The latest checkpoint as (tree, progress), or None if there is none.

        Args:
          like: a tree of the same structure, shapes and dtypes.
        """
        step = self.latest_step()
        if not step:
            return None
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _keys_to_data(like))
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(target), progress=ocp.args.JsonRestore()
            ),
        )
        return _data_to_keys(found.state, like), found.progress

    def latest_step(self) -> int:
        """Step of the latest checkpoint, 0 if there is none."""
        return self._manager.latest_step() or 0

    def close(self) -> None:
        """Release the manager's threads."""
        self._manager.close()


def save_tree(folder: Path, tree: Tree) -> None:
    """Write a tree of trained arrays.

    Host arrays are written, so that what one kind of device trained can be read on any other.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), jax.device_get(tree), force=True)


def load_tree(folder: Path) -> Tree:
    """Read what `save_tree` wrote.

    Raises:
      UserError: if there is none, or it is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no trained model here; finish the run with --resume")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder.absolute())
    except Exception as error:  # whatever a damaged file makes Orbax raise
        raise UserError(f"{folder}: damaged ({type(error).__name__}: {error})") from error


def remove_states(folder: Path) -> None:
    """Delete the running groups' states once the bank is written."""
    shutil.rmtree(folder, ignore_errors=True)


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _keys_to_data(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)


def _data_to_keys(tree: Tree, like: Tree) -> Tree:
    return jax.tree.map(
        lambda x, old: (
            jax.random.wrap_key_data(x, impl=jax.random.key_impl(old)) if _is_key(old) else x
        ),
        tree,
        like,
    )
