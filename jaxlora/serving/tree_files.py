"""Trees of trained arrays as Orbax folders: complete or not there, and read back when written.

Orbax looks for patterns and addresses in the paths that it is given, and where it finds none of its
files it loses what it wrote and only logs that. So it is given plain paths alone, and what it wrote
is read back.
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

# No pattern, no backslash, and none of the roots that etils takes for addresses.
PLAIN = re.compile(r"/(?!(?:gs|s3|az|hf)(?:/|$))[\w./ +=@,~#%-]*")
# The process that calls is the only one that writes or reads, however many there are.
_ALONE = ocp.options.MultiprocessingOptions(
    primary_host=0, active_processes={0}, barrier_sync_key_prefix="first"
)


@contextlib.contextmanager
def plain_path(folder: Path) -> Iterator[Path]:
    """Give a path to a folder in which Orbax finds nothing to interpret; a link, if need be.

    Raises:
      UserError: if there is no place for the link.
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
    """Return the first line of an error, which Orbax's and TensorStore's may have dozens of."""
    line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {line[:200]}"


def save(folder: Path, tree: Tree) -> None:
    """Write a tree of trained arrays, and read it back.

    Host arrays are written, so that what one kind of device trained can be read on any other. What
    `folder` held makes room in the last moment: a process that is killed then leaves no tree, and
    must write it again (a resumed run does, a bank with the next change).

    Raises:
      UserError: if what is read is not what was written; then `folder` is as it was.
    """
    with files.building(folder.absolute(), replace=True) as content:
        _write(content, jax.tree.map(np.asarray, tree), folder)


def _write(content: Path, tree: Tree, folder: Path) -> None:
    content.rmdir()  # Orbax makes it
    with (
        plain_path(content.parent) as place,
        ocp.StandardCheckpointer(multiprocessing_options=_ALONE) as checkpointer,
    ):
        checkpointer.save(place / content.name, tree)
    if not content.is_dir() or checksum(_read(content, folder)) != checksum(tree):
        raise UserError(f"{folder}: what was written there is not what is read; is the disk sound?")


def load(folder: Path) -> Tree:
    """Read what `save` wrote.

    Raises:
      UserError: if there is none, or it is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no trained model here; is the run finished?")
    return _read(folder, folder)


def _read(folder: Path, named: Path) -> Tree:
    """Read a tree; errors name it as `named`."""
    try:
        with (
            plain_path(folder) as place,
            ocp.StandardCheckpointer(multiprocessing_options=_ALONE) as checkpointer,
        ):
            return checkpointer.restore(place)
    except Exception as error:  # whatever a damaged file makes Orbax raise
        raise UserError(f"{named}: damaged ({brief(error)})") from error
