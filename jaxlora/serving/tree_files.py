"""Save and load pytrees as Orbax checkpoints, atomically and verified.

Orbax interprets glob patterns and URLs in paths; it can then lose what it wrote and only log that.
So it gets only plain paths, and every checkpoint is read back after writing.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxlora.utils import files
from jaxlora.utils.errors import UserError
from jaxlora.utils.trees import Tree, checksum

# No glob pattern, no backslash, and none of the roots that etils maps to cloud storage.
PLAIN = re.compile(r"/(?!(?:gs|s3|az|hf)(?:/|$))[\w./ +=@,~#%-]*")
# Only the calling process reads or writes, also when JAX runs on several.
_ALONE = ocp.options.MultiprocessingOptions(
    primary_host=0, active_processes={0}, barrier_sync_key_prefix="first"
)


@contextlib.contextmanager
def plain_path(folder: Path) -> Iterator[Path]:
    """Yield a path that Orbax does not interpret: `folder` itself, or a symlink to it.

    Raises:
      UserError: if a link is needed and cannot be created.
    """
    if PLAIN.fullmatch(str(folder.absolute())):
        yield folder.absolute()
        return
    with contextlib.ExitStack() as stack:
        try:
            place = stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxlora-"))
            link = Path(place).absolute() / "link"
            link.symlink_to(folder.absolute(), target_is_directory=True)
        except OSError as error:
            raise UserError(f"{folder}: needs a link in a temporary folder ({error})") from error
        if not PLAIN.fullmatch(str(link)):
            raise UserError(f"{folder}: needs a link, and {place} is no better; set TMPDIR")
        yield link


def brief(error: Exception) -> str:
    """Return the first line of an error; those of Orbax and TensorStore can have dozens."""
    line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {line[:200]}"


def save(folder: Path, tree: Tree) -> None:
    """Write a tree of arrays to `folder`, replacing it, and verify it by reading it back.

    Host arrays are written, so that a tree trained on one kind of device can be read on any other.
    A process that is killed during the final swap may leave no tree; a resumed run, or the next
    change of a bank, then writes it again.

    Raises:
      UserError: if the tree that is read back differs; `folder` is then unchanged.
    """
    with files.building(folder.absolute(), replace=True) as content:
        _write(content, jax.tree.map(np.asarray, tree), folder)


def _write(content: Path, tree: Tree, folder: Path) -> None:
    content.rmdir()  # Orbax creates it
    with (
        plain_path(content.parent) as place,
        ocp.StandardCheckpointer(multiprocessing_options=_ALONE) as checkpointer,
    ):
        checkpointer.save(place / content.name, tree)
    if not content.is_dir() or checksum(_read(content, folder)) != checksum(tree):
        raise UserError(f"{folder}: does not read back as it was written; is the disk healthy?")


def load(folder: Path) -> Tree:
    """Read a tree that `save` wrote.

    Raises:
      UserError: if it is missing or damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no trained model here; is the run finished?")
    return _read(folder, folder)


def _read(folder: Path, named: Path) -> Tree:
    """Read a tree; error messages call it `named`."""
    try:
        with (
            plain_path(folder) as place,
            ocp.StandardCheckpointer(multiprocessing_options=_ALONE) as checkpointer,
        ):
            return checkpointer.restore(place)
    except Exception as error:  # Orbax raises many types for damaged files
        raise UserError(f"{named}: damaged ({brief(error)})") from error
