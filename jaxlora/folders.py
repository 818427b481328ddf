"""Folders that are written whole, or not at all, and that not everybody may write to."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from jaxlora.errors import UserError


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """While this lasts, whatever the umask, nothing is made that everybody may write to.

    The umask is the process's, so threads are guarded, too.
    """
    before = os.umask(0o077)  # it can be read only by setting it
    os.umask(before | 0o002)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def whole(folder: str | Path) -> Iterator[Path]:
    """Give a temporary folder beside `folder`, which takes its place when the block ends well.

    Raises:
      UserError: if `folder` is a file, holds something, or cannot be written.
    """
    folder = Path(folder).expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty; name a new folder, or remove it first")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        with guarded():
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)  # a killed process of the same number
            temporary.mkdir()
            yield temporary
            temporary.replace(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
