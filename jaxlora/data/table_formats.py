"""Table formats: the readers and writers of each file suffix."""

from __future__ import annotations

import contextlib
import functools
import gzip
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, NamedTuple, cast

from jaxlora.data import arrow, delimited, hub, json_lines
from jaxlora.data.quoting import Quoting
from jaxlora.data.sheet import Kinds, Sheet, Write
from jaxlora.data.text_lines import GZIP, is_packed
from jaxlora.utils import files
from jaxlora.utils.errors import ConfigError, UserError

Open = Callable[[Mapping[str, tuple[Path, Path]], str | None, Quoting | None], dict[str, Sheet]]


class Format(NamedTuple):
    """A format of tables.

    Attributes:
      name: name for messages.
      open: `(files, delimiter, quoting) → sheets`, see `open_sheets`.
      write: `(file, columns) → writer of records`; None: the format is read-only.
      packs: whether files may be compressed with gzip.
    """

    name: str
    open: Open
    write: Callable[[IO[bytes], Kinds], AbstractContextManager[Write]] | None = None
    packs: bool = True


_WRITE_CSV = functools.partial(delimited.writing, delimiter=",")
_WRITE_TSV = functools.partial(delimited.writing, delimiter="\t")
FORMATS = {
    ".csv": Format("CSV", delimited.open_sheets, _WRITE_CSV),
    ".tsv": Format("TSV", delimited.open_sheets, _WRITE_TSV),
    ".tab": Format("TSV", delimited.open_sheets, _WRITE_TSV),
    ".txt": Format("delimited text", delimited.open_sheets),
    ".jsonl": Format(json_lines.NAME, json_lines.open_sheets, json_lines.writing),
    ".ndjson": Format(json_lines.NAME, json_lines.open_sheets, json_lines.writing),
    ".parquet": Format(arrow.PARQUET, arrow.open_parquet, arrow.writing_parquet, packs=False),
}
FOLDER = Format(arrow.FOLDER, arrow.open_folders)
OTHER = FORMATS[".txt"]  # for names without a known suffix, such as a pipe's


def _inner(path: Path) -> Path:
    """Return the path without `.gz`."""
    return path.with_suffix("") if is_packed(path) else path


def suffix_of(path: Path) -> str:
    """Return the suffix that determines the format, in lower case.

    >>> suffix_of(Path("a.b/tickets.new.CSV.gz"))
    '.csv'
    """
    return _inner(path).suffix.lower()


def stem_of(path: Path) -> str:
    """Return the name of a table without its suffixes.

    >>> stem_of(Path("my.tickets.jsonl.gz")), stem_of(Path("v1.2"))
    ('my.tickets', 'v1.2')
    """
    inner = _inner(path)
    return inner.stem if inner.suffix.lower() in FORMATS else inner.name


def is_table(path: Path) -> bool:
    """Return whether a path is a folder, has the suffix of a table, or names a Hub dataset.

    >>> is_table(Path("tickets.csv")), is_table(Path("x.tsv.gz")), is_table(Path("topics.toml"))
    (True, True, False)
    """
    return suffix_of(path) in FORMATS or os.path.isdir(path) or str(path).startswith(hub.PREFIX)


def find(path: Path) -> Format:
    """Return the format to read a table in.

    Raises:
      UserError: if the name ends in .gz but the format does not support gzip.
    """
    if os.path.isdir(path):  # Path.is_dir raises for names that no file can have
        return FOLDER
    found = FORMATS.get(suffix_of(path), OTHER)
    if is_packed(path) and not found.packs:
        raise UserError(f"{path}: {found.name} is compressed inside; name it without {GZIP}")
    return found


def open_sheets(
    paths: Mapping[str, Path],
    delimiter: str | None = None,
    quoting: Quoting | None = None,
    copies: Mapping[str, Path] = {},
) -> dict[str, Sheet]:
    """Open the files of a table, each in the format given by its name.

    Args:
      paths: name → path.
      delimiter: field delimiter of delimited text; None: detected.
      quoting: meaning of double quotes in delimited text; None: detected.
      copies: name → file to read instead of the path, which is still used in messages.

    Raises:
      UserError: if a file cannot be read, or is not a table.
    """
    paths = {name: Path(hub.find(str(path))) for name, path in paths.items()}
    by_opener: dict[Open, dict[str, tuple[Path, Path]]] = defaultdict(dict)
    for name, path in paths.items():
        by_opener[find(path).open][name] = path, copies.get(name, path)
    found: dict[str, Sheet] = {}
    for opener, own in by_opener.items():
        found |= opener(own, delimiter, quoting)
    return {name: found[name] for name in paths}


def check_written(path: Path) -> Format:
    """Return the format to write a table in.

    Raises:
      ConfigError: if the name does not determine a format that can be written.
    """
    found = FORMATS.get(suffix_of(path))
    if found is None or found.write is None or (is_packed(path) and not found.packs):
        packed = [suffix for suffix, one in FORMATS.items() if one.write and one.packs]
        others = [suffix for suffix, one in FORMATS.items() if one.write and not one.packs]
        raise ConfigError(
            "output",
            f"end the name with {', '.join(others)}, or with one of {', '.join(packed)}, which may "
            f"have {GZIP} after it",
            path,
        )
    return found


@contextlib.contextmanager
def writing(path: Path, columns: Kinds) -> Iterator[Write]:
    """Write a table that replaces `path` if the block ends without an error.

    Args:
      path: the suffix determines the format; symbolic links are followed.
      columns: the columns, in order.

    Raises:
      ConfigError: see `check_written`.
    """
    write = check_written(path).write
    assert write is not None
    with (
        files.replacing(path.resolve()) as raw,
        _packing(raw, path) as file,
        write(file, columns) as writer,
    ):
        yield writer


def _packing(raw: IO[bytes], path: Path) -> AbstractContextManager[IO[bytes]]:
    if not is_packed(path):
        return contextlib.nullcontext(raw)
    # Without a name and a timestamp, the output is reproducible.
    return cast(IO[bytes], gzip.GzipFile("", "wb", fileobj=raw, mtime=0))
