"""Files and folders that appear complete or not at all, and are written by one process at a time.

There is one way to write: under a name that begins with `TEMPORARY`, flushed to the disk, then
renamed. Whatever the umask, nothing is made that everybody may write to.
"""

from __future__ import annotations

import atexit
import contextlib
import csv
import functools
import itertools
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import filelock

from jaxlora.utils.errors import UserError
from jaxlora.utils.schema import encodable

TEMPORARY = ".tmp-"  # what a killed process left bears such a name, see `sweep`
LOCK = ".lock"
_FILE, _FOLDER = 0o664, 0o775  # the umask may take more away
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # `Path` makes one slash of two
_LONGEST_NAME, _LONGEST_PATH = 255, 3500  # bytes; Linux takes 4096, the rest is for what is inside


def local(path: str | Path) -> Path:
    """Return the path of a local file or folder, with `~` replaced by the home folder.

    Raises:
      UserError: for an address such as gs://bucket, for `~` where nobody knows the home folder, and
        for what no file can be called.
    """
    text = os.fspath(path)
    if _ADDRESS.match(text):
        raise UserError(f"{text}: is an address; name a folder of this machine, or mount it first")
    if "\0" in text or not encodable(text):
        raise UserError(f"{text!a}: is not a name in UTF-8; take another")
    try:
        found = Path(text).expanduser()
    except RuntimeError:
        if text == "~" or text.startswith("~/"):
            raise UserError(f"{text}: there is no home folder; write the path out") from None
        found = Path(text)  # nobody is called so; a shell keeps it, too
    names = [len(name.encode()) for name in found.parts]
    if max(names, default=0) > _LONGEST_NAME or len(os.fsencode(found.absolute())) > _LONGEST_PATH:
        raise UserError(f"{text[:60]}…: is too long a path; take a shorter one")
    return found


def make(folder: Path) -> None:
    """Make a folder and those above it, as far as they are missing."""
    missing = itertools.takewhile(lambda path: not path.is_dir(), (folder, *folder.parents))
    for path in reversed(list(missing)):
        path.mkdir(_FOLDER, exist_ok=True)
        sync(path.parent)


def writable(folder: Path) -> Path:
    """Make a folder if need be, and try whether it can be written to.

    Raises:
      OSError: if not.
    """
    make(folder)
    with tempfile.TemporaryFile(dir=folder):
        return folder


@functools.cache
def own_temporary() -> Path:
    """Return a folder for this user alone in the system's temporary one, where all may write.

    It is the same for all processes of the user, unless somebody else has taken the name.
    """
    folder = Path(tempfile.gettempdir()).absolute() / f"jaxlora-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(0o700)
    found = folder.lstat()  # what a link leads to is not ours
    if found.st_uid == os.getuid() and found.st_mode == stat.S_IFDIR | 0o700:
        return folder
    folder = Path(tempfile.mkdtemp(prefix="jaxlora-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk, if the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def guard(path: Path) -> None:
    """Take the right to write to a file or folder from everybody."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & stat.S_IWOTH:
        path.chmod(mode & ~stat.S_IWOTH)


def settle(folder: Path) -> None:
    """Guard what Orbax, TFDS and other libraries wrote into a folder, and flush it to the disk."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            guard(path)
            sync(path)


def _temporary(path: Path) -> Path:
    return path.with_name(TEMPORARY + secrets.token_hex(8))  # a name of any length has room


@contextlib.contextmanager
def replacing(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Give a file, which takes the place of `path` when the block ends well.

    Args:
      path: the file; its folder is made if need be.
      mode: `wb`, or `w` for UTF-8 text whose line ends stay as they are written.
    """
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    make(path.parent)
    temporary = _temporary(path)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _FILE)
        with open(descriptor, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def building(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Give a folder, which becomes `folder` when the block ends well.

    Nobody else can reach it before, so it does not matter what modes its files are made with.

    Args:
      folder: its place.
      replace: what is there may hold something, and is deleted.

    Raises:
      OSError: if it cannot be written, or `folder` holds what may not be replaced.
    """
    make(folder.parent)
    hidden = _temporary(folder)
    try:
        hidden.mkdir(0o700)
        content = hidden / "content"
        content.mkdir(_FOLDER)
        yield content
        settle(content)
        if replace and folder.exists():
            folder.rename(hidden / "old")
        content.replace(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


@contextlib.contextmanager
def atomic_dir(folder: str | Path) -> Iterator[Path]:
    """Give a temporary folder beside `folder`, which takes its place when the block ends well.

    Raises:
      UserError: if `folder` is a file, holds something, or cannot be written.
    """
    folder = local(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty; name a new folder, or remove it first")
    try:
        with building(Path(os.path.realpath(folder))) as content:  # no rename replaces a link
            yield content
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error})") from error


@contextlib.contextmanager
def locked(folder: Path, taken: str) -> Iterator[None]:
    """Keep other processes out of a folder, and remove what a killed one left half written.

    Args:
      folder: must exist.
      taken: what to say if another process is in there.

    Raises:
      UserError: saying so, or that the folder cannot be locked.
    """
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(taken) from None
    except (OSError, NotImplementedError) as error:
        raise UserError(
            f"{folder / LOCK}: cannot be locked ({error}); may it be written?"
        ) from None
    try:
        guard(folder / LOCK)
        sweep(folder)
        yield
    finally:
        lock.release()


def sweep(folder: Path) -> None:
    """Remove what killed processes left half written, anywhere in a folder that is locked."""
    for path in list(folder.rglob(f"{TEMPORARY}*")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file, complete or not at all, see `replacing`."""
    with replacing(path, "w") as file:
        file.write(text)


class _UnixLines:
    """A text file that is given rows ending in CR LF, and ends them in LF."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, row: str) -> int:
        return self._file.write(row.removesuffix("\r\n") + "\n")


def csv_writer(file: IO[str]) -> Any:
    r"""Make a `csv.writer` whose rows end in LF and whose fields may hold any line break.

    The module quotes a carriage return only where it ends rows, too; readers would take one that is
    not quoted for the end of a row.

    >>> import io
    >>> text = io.StringIO()
    >>> _ = csv_writer(text).writerow(["a", "b\rc"])
    >>> text.getvalue()
    'a,"b\rc"\n'
    """
    return csv.writer(_UnixLines(file), lineterminator="\r\n")


def write_json(path: Path, value: Any) -> None:
    """Write JSON, indented, see `write_text`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def loads(text: str | bytes) -> Any:
    """Parse JSON; whole numbers that no float could hold are refused.

    Raises:
      ValueError, RecursionError: if it is none.

    >>> loads("[1, 2.5]")
    [1, 2.5]
    """
    return json.loads(text, parse_int=_whole)


def _whole(digits: str) -> int:
    value = int(digits)
    try:
        float(value)
    except OverflowError:
        raise ValueError(f"a number of {len(digits)} digits") from None
    return value


def read_json(path: Path) -> Any:
    """Read any JSON from a file.

    Raises:
      UserError: if the file cannot be read, or is not JSON.
    """
    try:
        return loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # also UTF-8, long numbers, deep nesting
        raise UserError(f"{path}: not valid JSON ({error})") from error


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
      UserError: see `read_json`; or if it is no object.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value
