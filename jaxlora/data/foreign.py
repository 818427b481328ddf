"""Detection of files that are not text tables, with advice on how to convert them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from jaxlora.utils.errors import UserError

HEAD = 4096  # number of leading bytes to inspect


class Kind(NamedTuple):
    """A kind of file: a pattern for its first bytes, its name, and the advice to the user."""

    start: str
    name: str
    remedy: str


_PANDAS = "write it as a CSV file, for instance with pandas: read_{}(…).to_csv(…, index=False)"
_UNPACK = "unpack it first, with {}"
_SAVE = "save it as UTF-8"
_FETCH = "get the file itself"
# Patterns are regular expressions over bytes decoded as Latin-1.
JSON = Kind(
    r"\s*(\{\s*[\"}]|\[\s*(\{|\[|(\"[^\"]*\"|-?\d[\d.]*|null|true|false)\s*[,\]]))",
    "JSON, or JSON lines",
    "write an object on each line, and let the name end with .jsonl",
)
KINDS = (
    Kind(r"PAR[1E][\x00-\x08\x0e-\x1f]", "a Parquet file", "let its name end with .parquet"),
    Kind(r"ARROW1\x00|\xff\xff\xff\xff", "an Arrow or Feather file", _PANDAS.format("feather")),
    Kind(r"ORC\s?[\x00-\x08\x0e-\x1f]", "an ORC file", _PANDAS.format("orc")),
    Kind(r"Obj\x01", "an Avro file", "write it as a CSV file"),
    Kind(r"\x89HDF\r\n", "an HDF5 file", _PANDAS.format("hdf")),
    Kind(r"\x93NUMPY", "a NumPy file", "write it as a CSV file"),
    Kind(r"<stata_dta>", "a Stata file", _PANDAS.format("stata")),
    Kind(r"\$FL[23]@\(#\)", "an SPSS file", _PANDAS.format("spss")),
    Kind(r"\x1f\x8b", "compressed with gzip", "let its name end with .gz"),
    Kind("BZh[1-9]1AY", "compressed with bzip2", _UNPACK.format("bunzip2")),
    Kind(r"\xfd7zXZ\x00", "compressed with xz", _UNPACK.format("unxz")),
    Kind(r"\x28\xb5\x2f\xfd", "compressed with zstd", _UNPACK.format("unzstd")),
    Kind(r"\x04\x22M\x18", "compressed with lz4", _UNPACK.format("unlz4")),
    Kind(r"\x1f[\x9d\xa0]", "compressed with compress", _UNPACK.format("uncompress")),
    Kind(r"Rar!\x1a", "a RAR archive", _UNPACK.format("unrar x")),
    Kind(r"[^\x00]+\x00.{0,256}ustar", "a tar archive", _UNPACK.format("tar -x")),
    Kind(r"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK.format("7z x")),
    Kind(
        r"PK(\x03\x04|\x05\x06)",
        "a zip archive or an Excel workbook",
        "unpack it first, or save the sheet as CSV UTF-8",
    ),
    Kind(r"\xd0\xcf\x11\xe0", "an Excel workbook", "save the sheet as CSV UTF-8"),
    Kind(r"SQLite format 3\x00", "an SQLite database", _PANDAS.format("sql")),
    Kind(r"\{\\rtf", "a document in RTF", "save its table as CSV"),
    Kind("%PDF-", "a PDF document", "save its table as CSV"),
    Kind(r"\x80[\x02-\x05]", "a Python pickle", "write it as a CSV file"),
    Kind(r"(\xff\xfe|\xfe\xff)", "UTF-16 (Excel's “Unicode text”), not UTF-8", _SAVE),
    Kind(r"([^\x00]\x00){8}|(\x00[^\x00]){8}", "UTF-16, not UTF-8", _SAVE),
    Kind("version https://git-lfs", "a pointer of Git LFS", _FETCH + " with git lfs pull"),
    Kind(r"\s*<(!doctype|html|\?xml)", "a web page or XML", _FETCH),
    JSON,
)


def refuse(head: bytes, path: Path, kinds: tuple[Kind, ...] = KINDS) -> None:
    """Raise an error if the first bytes of a file match one of `kinds`.

    Raises:
      UserError: if a kind matches; the message states the kind and a fix.
    """
    text = head.removeprefix(b"\xef\xbb\xbf").decode("latin-1")
    for start, name, remedy in kinds:
        if re.match(start, text, re.IGNORECASE if "html" in start else 0):
            raise UserError(f"{path}:1: is {name}; {remedy}.")
