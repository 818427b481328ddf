"""Reading of text files by line, optionally compressed with gzip."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, cast

from jaxlora.data import foreign
from jaxlora.utils.errors import UserError

GZIP = ".gz"


def is_packed(path: Path) -> bool:
    """Return whether a file is compressed with gzip, judging by its name."""
    return path.suffix.lower() == GZIP


def stream(
    file: Path, path: Path, refused: tuple[foreign.Kind, ...] = foreign.KINDS
) -> Iterator[str]:
    """Yield the physical lines of a file, without a leading byte order mark.

    Args:
      file: the file to read.
      path: path for messages; its suffix determines whether the file is compressed.
      refused: kinds of files to reject by their first bytes.

    Raises:
      UserError: if the file cannot be read, is of a refused kind, is not UTF-8, or contains NUL.
    """
    try:
        with _open(file, path) as raw:
            foreign.refuse(raw.read(foreign.HEAD), path, refused)
            raw.seek(0)
            for number, line in enumerate(raw, 1):
                yield from _decode(line, number, path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(
            f"{path}: not a sound gzip file ({error}); compress it again, or name it without {GZIP}"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path.") from None


def _open(file: Path, path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(file)) if is_packed(path) else file.open("rb")


def _decode(line: bytes, number: int, path: Path) -> Iterable[str]:
    """Decode a line that ends in LF, and split it at any CR that ends a line."""
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}:{number}: not UTF-8; save the file as UTF-8.") from None
    if "\0" in text:
        raise UserError(
            f"{path}:{number}: a NUL character; the file is damaged or not UTF-8 text: "
            "copy it again or save it as UTF-8."
        )
    return io.StringIO(text, newline="") if "\r" in text else (text,)
