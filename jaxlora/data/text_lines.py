"""Lines of text files, compressed by gzip or not."""

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
    """Return whether a file is compressed by gzip, by its name."""
    return path.suffix.lower() == GZIP


def stream(
    file: Path, path: Path, refused: tuple[foreign.Kind, ...] = foreign.KINDS
) -> Iterator[str]:
    """Yield the physical lines of a file, without the byte order mark that Excel writes.

    Args:
      file: the file to read.
      path: its path in messages; says whether it is compressed.
      refused: kinds of files that are refused by their first bytes.

    Raises:
      UserError: if it cannot be read, is another kind of file, is not UTF-8, or contains NUL.
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
    """Decode a line that ends in LF; it is several where CR alone ends lines."""
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
