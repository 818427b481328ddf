"""Orbax: the state of a running group, and what has been trained.

Both are written to a temporary place and renamed when complete, so nothing half written bears their
names. A state never takes another's place, so a killed run leaves the earlier ones; a tree does,
see `save_tree`.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxlora import cluster
from jaxlora.errors import UserError
from jaxlora.rundir import read_json, write_json
from jaxlora.trees import Tree

KEPT = 2  # the newest may be damaged


class GroupCheckpoints:
    """The latest states of one group's training, each with its progress.

    Beside a checkpoint's folder stands a file with the checksums of what is in it. One that does
    not fit them, or has none since the process was killed, is dropped when the folder is opened.

    Args:
      folder: where they live; made if need be.

    Attributes:
      dropped: the folders of the damaged ones.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self.dropped = _drop_damaged(self._folder) if cluster.first() else []
        cluster.wait(f"checked {folder}")
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def save(self, step: int, tree: Tree, progress: dict[str, Any]) -> None:
        """Add a checkpoint: a pytree of arrays (PRNG keys too) and plain JSON values.

        Raises:
          UserError: if it cannot be written; the earlier ones stay.
        """
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_keys_to_data(tree)),
                    progress=ocp.args.JsonSave(progress),
                ),
                force=True,
            )
            self._manager.wait_until_finished()
            if cluster.first():
                write_json(_sums_file(self._folder / str(step)), _sums(self._folder / str(step)))
                _drop_lone_sums(self._folder)
        except Exception as error:  # whatever a full disk makes Orbax and TensorStore raise
            raise UserError(
                f"{self._folder / str(step)}: the checkpoint cannot be written ({error}); make "
                "room, then go on with --resume"
            ) from error

    def restore(self, like: Tree) -> tuple[Tree, dict[str, Any]] | None:
        """The latest checkpoint as (tree, progress), or None if there is none.

        Args:
          like: a tree of the same structure, shapes and dtypes, of arrays or of shapes with their
            shardings; the arrays come to where its own are, wherever they were when they were
            saved. Shapes alone cost no memory beside what is restored.
        """
        step = self.latest_step()
        if not step:
            return None
        target = jax.tree.map(_shape_of, like)
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


def _drop_damaged(folder: Path) -> list[Path]:
    damaged = []
    for path in sorted(folder.glob("[0-9]*")) if folder.is_dir() else []:
        if path.is_dir() and not _fits(path):
            shutil.rmtree(path)
            damaged.append(path)
    _drop_lone_sums(folder)
    return damaged


def _drop_lone_sums(folder: Path) -> None:
    """Of checkpoints that are there no more."""
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
    """sha256 of each file below a folder."""
    sums = {}
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        with file.open("rb") as content:
            sums[str(file.relative_to(path))] = hashlib.file_digest(content, "sha256").hexdigest()
    return sums


def save_tree(folder: Path, tree: Tree) -> None:
    """Write a tree of trained arrays.

    Host arrays are written, so that what one kind of device trained can be read on any other. What
    `folder` held is deleted first: a process that is killed then leaves no tree, and must write it
    again (a run does with --resume, a bank with the next change).
    """
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), cluster.host_tree(tree), force=True)


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
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _shape_of(x: Any) -> jax.ShapeDtypeStruct:
    """Say what is restored for a leaf, and where to; for a PRNG key its data."""
    data = jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=x.sharding)


def _keys_to_data(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)


def _data_to_keys(tree: Tree, like: Tree) -> Tree:
    return jax.tree.map(
        lambda x, old: jax.random.wrap_key_data(x) if _is_key(old) else x, tree, like
    )
