"""Checkpoints of groups in training: Orbax checkpoints with checksums.

A checkpoint is written under a temporary name and renamed when it is complete. It never overwrites
an earlier one, so a run that is killed keeps its earlier checkpoints.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxlora.serving.tree_files import PLAIN, brief, plain_path
from jaxlora.utils import distributed, files
from jaxlora.utils.errors import UserError
from jaxlora.utils.files import read_json, write_json
from jaxlora.utils.trees import Tree

KEPT = 2  # the newest may turn out to be damaged


def check_place(folder: Path) -> None:
    """Check that Orbax can write checkpoints to a folder with this path.

    Raises:
      UserError: if it cannot; the error says why.
    """
    if jax.process_count() > 1 and not PLAIN.fullmatch(str(folder.absolute())):
        raise UserError(
            f"{folder}: with several processes, a path may contain only letters, digits and "
            ". _ - + = @ , ~ # %; use another one"
        )
    with plain_path(folder):
        pass


class StateCheckpoints:
    """The latest checkpoints of groups that train in one step: their states and progress.

    A file beside each checkpoint's folder holds the checksums of its content. When this object is
    created, checkpoints whose checksums do not match, or are missing because the process was
    killed, are deleted.

    Args:
      folder: the folder of the checkpoints; created if it is missing.

    Attributes:
      dropped: folders of the damaged checkpoints that were deleted.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self.dropped = _prepare(self._folder) if distributed.is_primary() else []
        distributed.wait(f"checked {folder}")
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
        with contextlib.ExitStack() as stack:
            place = stack.enter_context(plain_path(self._folder))
            self._manager = ocp.CheckpointManager(place, options=options)
            stack.callback(self._manager.close)
            self._open = stack.pop_all()

    def save(self, step: int, tree: Tree, progress: dict[str, Any]) -> None:
        """Write a checkpoint: a pytree of arrays (PRNG keys too) and plain JSON values.

        Once it is complete, all but the newest `KEPT` checkpoints are deleted.

        Raises:
          UserError: if it cannot be written; the earlier checkpoints are kept.
        """
        tree = _keys_to_data(tree)
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(tree), progress=ocp.args.JsonSave(progress)
                ),
                force=True,
            )
            self._manager.wait_until_finished()
            if distributed.is_primary():
                self._complete(step, tree)
            for old in sorted(self._manager.all_steps())[:-KEPT]:
                self._manager.delete(old)
            if distributed.is_primary():
                _drop_lone_sums(self._folder)
        except Exception as error:  # on a full disk, Orbax and TensorStore raise various types
            raise UserError(
                f"{self._folder / str(step)}: the checkpoint cannot be written ({brief(error)}); "
                "make room, then go on with `resume=True`"
            ) from error

    def _complete(self, step: int, tree: Tree) -> None:
        """Check that all arrays were written, flush them to the disk, and write the checksums."""
        found = self._manager.item_metadata(step).state.tree
        if _kinds(found) != _kinds(tree):
            raise OSError("arrays are missing in what was written")
        files.settle(self._folder / str(step))
        write_json(_sums_file(self._folder / str(step)), _sums(self._folder / str(step)))

    def restore(self, like: Tree) -> tuple[Tree, dict[str, Any]] | None:
        """Return the latest checkpoint as (tree, progress), or None if there is none.

        Args:
          like: a tree with the structure, shapes, dtypes and shardings to restore, which may
            differ from the shardings that were saved. Its leaves are arrays, or
            `jax.ShapeDtypeStruct`s, which take no memory.

        Raises:
          UserError: if it cannot be read.
        """
        step = self.latest_step()
        if not step:
            return None
        target = jax.tree.map(_shape_of, like)
        try:
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(target), progress=ocp.args.JsonRestore()
                ),
            )
        except Exception as error:  # damage makes Orbax raise errors of many types
            raise UserError(
                f"{self._folder / str(step)}: the checkpoint cannot be read ({brief(error)}); "
                "delete this folder to go on from an earlier one, or from the start"
            ) from error
        return _data_to_keys(found.state, like), found.progress

    def latest_step(self) -> int:
        """Return the step of the latest checkpoint, or 0 if there is none."""
        return self._manager.latest_step() or 0

    def close(self) -> None:
        """Close Orbax's checkpoint manager."""
        self._open.close()


def _kinds(tree: Tree) -> list[tuple[tuple[int, ...], str]]:
    """Return the sorted shapes and dtypes of a tree's arrays, independent of its containers."""
    return sorted((tuple(x.shape), str(x.dtype)) for x in jax.tree.leaves(tree))


def has_state(folder: Path) -> bool:
    """Return whether a folder of `StateCheckpoints` holds an undamaged checkpoint."""
    return any(path.is_dir() and _fits(path) for path in folder.glob("[0-9]*"))


def _prepare(folder: Path) -> list[Path]:
    """Create the folder if it is missing; delete damaged checkpoints and return their folders."""
    files.make(folder.parent.parent)
    for path in (folder.parent, folder):
        path.mkdir(0o700, exist_ok=True)  # private, since Orbax chooses the modes of its files
    damaged = []
    for path in sorted(folder.glob("[0-9]*")):
        if path.is_dir() and not _fits(path):
            shutil.rmtree(path)
            damaged.append(path)
    _drop_lone_sums(folder)
    return damaged


def _drop_lone_sums(folder: Path) -> None:
    """Delete the checksums of checkpoints that no longer exist."""
    for path in folder.glob("*.sha256.json"):
        if not (folder / path.name.split(".")[0]).is_dir():
            path.unlink()


def _fits(path: Path) -> bool:
    try:
        return bool(read_json(_sums_file(path)) == _sums(path))
    except UserError:
        return False


def _sums_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256.json")


def _sums(path: Path) -> dict[str, str]:
    """Return the sha256 of each file below a folder."""
    sums = {}
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        with file.open("rb") as content:
            sums[str(file.relative_to(path))] = hashlib.file_digest(content, "sha256").hexdigest()
    return sums


def remove_states(folder: Path) -> None:
    """Delete all checkpoints of a run; they are not needed once the bank is written."""
    shutil.rmtree(folder, ignore_errors=True)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _shape_of(x: Any) -> jax.ShapeDtypeStruct:
    """Return the shape, dtype and sharding to restore for a leaf; for a PRNG key, of its data."""
    data = jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=x.sharding)


def _keys_to_data(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)


def _data_to_keys(tree: Tree, like: Tree) -> Tree:
    return jax.tree.map(
        lambda x, old: jax.random.wrap_key_data(x) if _is_key(old) else x, tree, like
    )
