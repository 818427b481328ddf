"""Atomic writes of files and folders, and a lock for one writer at a time.

Everything is written under a temporary name that begins with `TEMPORARY`, flushed to the disk and
then renamed. Files are never world-writable, for any umask.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import filelock

from jaxlora.utils.errors import UserError
from jaxlora.utils.schema import encodable

TEMPORARY = ".tmp-"  # prefix of unfinished files and folders, see `sweep`
LOCK = ".lock"
MOST_JSON = 64 * 2**20  # bytes; the manifest of ten thousand tasks has 15 million
_FILE_MODE, _FOLDER_MODE = 0o664, 0o775  # the umask may remove further permissions
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # `Path` reduces two slashes to one
_LONGEST_NAME, _LONGEST_PATH = 255, 3500  # bytes; Linux allows 4096, the rest is for files inside


def local(path: str | Path) -> Path:
    """Return the path of a local file or folder, with `~` replaced by the home folder.

    Raises:
      UserError: if it is an address such as gs://bucket, if there is no home folder for `~`, or if
        no file can have this name.
    """
    text = os.fspath(path)
    if _ADDRESS.match(text):
        raise UserError(f"{text}: is an address; name a folder of this machine, or mount it first")
    if "\0" in text or not encodable(text):
        raise UserError(f"{text!a}: is not a valid UTF-8 file name; use another name")
    try:
        found = Path(text).expanduser()
    except RuntimeError:
        if text == "~" or text.startswith("~/"):
            raise UserError(f"{text}: there is no home folder; write the path out") from None
        found = Path(text)  # `~name` of an unknown user: kept unchanged, as a shell does
    names = [len(name.encode()) for name in found.parts]
    if max(names, default=0) > _LONGEST_NAME or len(os.fsencode(found.absolute())) > _LONGEST_PATH:
        raise UserError(f"{text[:60]}…: the path is too long; use a shorter one")
    return found


def make(folder: Path) -> None:
    """Create a folder and its missing parents."""
    missing = itertools.takewhile(lambda path: not path.is_dir(), (folder, *folder.parents))
    for path in reversed(list(missing)):
        path.mkdir(_FOLDER_MODE, exist_ok=True)
        sync(path.parent)


def writable(folder: Path) -> Path:
    """Create a folder if it is missing, check that it can be written to, and return it.

    Raises:
      OSError: if it cannot.
    """
    make(folder)
    with tempfile.TemporaryFile(dir=folder):
        return folder


@functools.cache
def own_temporary() -> Path:
    """Return a private folder of this user in the system's temporary folder.

    All processes of the user share it, unless its name is taken by another user.
    """
    folder = Path(tempfile.gettempdir()).absolute() / f"jaxlora-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(0o700)
    found = folder.lstat()  # not `stat`: a link may lead to another user's folder
    if found.st_uid == os.getuid() and found.st_mode == stat.S_IFDIR | 0o700:
        return folder
    folder = Path(tempfile.mkdtemp(prefix="jaxlora-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk if the file system supports it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def guard(path: Path) -> None:
    """Make a file or folder not world-writable."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & stat.S_IWOTH:
        path.chmod(mode & ~stat.S_IWOTH)


def settle(folder: Path) -> None:
    """Guard everything that other libraries wrote into a folder, and flush it to the disk."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            guard(path)
            sync(path)


def _temporary(path: Path) -> Path:
    return path.with_name(TEMPORARY + secrets.token_hex(8))  # short for names of any length


@contextlib.contextmanager
def _naming(path: Path, temporary: Path) -> Iterator[None]:
    """Name a path in errors of the file system instead of its temporary name."""
    try:
        yield
    except OSError as error:
        if str(error.filename).startswith(str(temporary)):
            error.filename, error.filename2 = str(path), None
        raise


@contextlib.contextmanager
def replacing(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file that replaces `path` when the block ends without an error.

    Args:
      path: the file; its folder is created if it is missing.
      mode: `wb`, or `w` for UTF-8 text without conversion of line endings.
    """
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    make(path.parent)
    temporary = _temporary(path)
    try:
        with _naming(path, temporary):
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _FILE_MODE)
        with open(descriptor, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with _naming(path, temporary):
            temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def building(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Create a temporary folder that is renamed to `folder` when the block ends without an error.

    Other users cannot access it before, so the modes of the files in it do not matter until then.

    Args:
      folder: path of the finished folder.
      replace: delete an existing folder, which may hold files.

    Raises:
      OSError: if it cannot be written, or `folder` is not empty and may not be replaced.
    """
    make(folder.parent)
    hidden = _temporary(folder)
    try:
        with _naming(folder, hidden):
            hidden.mkdir(0o700)
        content = hidden / "content"
        content.mkdir(_FOLDER_MODE)
        yield content
        settle(content)
        if replace and folder.exists():
            folder.rename(hidden / "old")
        with _naming(folder, hidden):
            content.replace(folder)
        sync(folder.parent)
    finally:
        if (hidden / "old").exists() and not folder.exists():
            (hidden / "old").rename(folder)  # the exchange was interrupted
        shutil.rmtree(hidden, ignore_errors=True)


@contextlib.contextmanager
def atomic_dir(folder: str | Path) -> Iterator[Path]:
    """Create a temporary folder that is renamed to `folder`, which must be new or empty.

    Raises:
      UserError: if `folder` is a file, is not empty, or cannot be written.
    """
    folder = local(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty; name a new folder, or remove it first")
    try:
        with building(Path(os.path.realpath(folder))) as content:  # a rename cannot replace a link
            yield content
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error})") from error


@contextlib.contextmanager
def locked(
    folder: Path, taken: str, unfinished: Sequence[str] = (f"**/{TEMPORARY}*",)
) -> Iterator[None]:
    """Lock a folder against other processes, and remove what a killed one left unfinished.

    Args:
      folder: must exist.
      taken: error message if another process holds the lock.
      unfinished: patterns of what may have been left, see `Path.glob`.

    Raises:
      UserError: with that message, or if the folder cannot be locked.
    """
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(taken) from None
    except (OSError, NotImplementedError) as error:
        raise UserError(
            f"{folder / LOCK}: cannot be locked ({error}); check its permissions"
        ) from None
    try:
        guard(folder / LOCK)
        sweep(folder, unfinished)
        yield
    finally:
        lock.release()


def sweep(folder: Path, unfinished: Sequence[str]) -> None:
    """Remove what killed processes left unfinished in a folder, which must be locked."""
    for path in [path for pattern in unfinished for path in folder.glob(pattern)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, see `replacing`."""
    with replacing(path, "w") as file:
        file.write(text)


class _UnixLines:
    """A text file that converts the CR LF at the end of each row it receives to LF."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, row: str) -> int:
        return self._file.write(row.removesuffix("\r\n") + "\n")


def csv_writer(file: IO[str], delimiter: str = ",") -> Any:
    r"""Return a `csv.writer` whose rows end in LF and whose fields may contain any line break.

    The `csv` module quotes a carriage return only if rows end in one. Readers would take an
    unquoted one for the end of a row.

    >>> import io
    >>> text = io.StringIO()
    >>> _ = csv_writer(text).writerow(["a", "b\rc"])
    >>> text.getvalue()
    'a,"b\rc"\n'
    """
    return csv.writer(_UnixLines(file), delimiter=delimiter, lineterminator="\r\n")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically, see `replacing`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def loads(text: str | bytes) -> Any:
    """Parse JSON, and refuse integers beyond the range of a float.

    Raises:
      ValueError, RecursionError: if it is not valid JSON.

    >>> loads("[1, 2.5]")
    [1, 2.5]
    """
    return json.loads(text, parse_int=_parse_int)


def _parse_int(digits: str) -> int:
    value = int(digits)
    try:
        float(value)
    except OverflowError:
        raise ValueError(f"a number of {len(digits)} digits") from None
    return value


def read_json(path: Path) -> Any:
    """Read a JSON file of at most `MOST_JSON` bytes.

    Raises:
      UserError: if the file cannot be read, is larger, or is not JSON.
    """
    try:
        if (size := path.stat().st_size) > MOST_JSON:
            raise ValueError(f"{size:,} bytes, at most {MOST_JSON:,} are read")
        return loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # includes bad UTF-8, long numbers, deep nesting
        raise UserError(f"{path}: not valid JSON ({error})") from error


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
      UserError: see `read_json`; also if it is not an object.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value
