"""Generators of bad input: odd texts, damaged bytes, JSON with something changed.

They are hypothesis strategies, so that a failure shrinks to the smallest input that shows it. Tests
and the fuzz command share them.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import gzip
import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

# What has broken readers before.
NASTY = (
    "", " ", "\t", "\n", "\r\n", "\r", "\0", "\ufeff", '"', '""', "'", ",", ";", "|", "\\", "=",
    "..", "../", "/", "~", "~nobody", "e\u0301\u0323", "\u05e9\u05dc\u05d5\u05dd",
    "\u202eabc\u202c",
    "\U0001f937\U0001f3fd\u200d\u2640\ufe0f", "\u2028", "\u0085", "\x1a", "\ud800", "\udcff",
    "[CLS]", "[SEP]", "nan", "inf", "-1", "1e400", "1_0", "\u0663", "²",
    "9" * 5000, "NULL", "%s", "{}",
)  # fmt: skip

texts = st.lists(
    st.one_of(st.sampled_from(NASTY), st.text(max_size=8)), min_size=1, max_size=5
).map("".join)
# Texts as a file can have them.
written = texts.map(lambda text: text.encode("utf-8", "ignore").decode())
# Sentences with quotes at their ends and inside, as fields may have them.
quoted = st.lists(st.sampled_from(('"', '""', "a", "b c", ",", " ")), max_size=6).map("".join)
# Labels, and names of classes.
labels = st.one_of(
    st.sampled_from(
        ("0", "1", "2", "1.0", "01", " 1 ", "1e0", "+1", "-0", "unknown", "nan", "NaN", "NA",
         "None", "NULL", "", "inf", "9007199254740993", "9007199254740992.0", "yes", "Yes", "1_0")
    ),
    st.integers(-2, 5).map(str),
    texts,
)  # fmt: skip
# Files that are no tables of text.
FOREIGN = (
    b"PAR1\x15\x04\x15\x10", gzip.compress(b"a,b\n1,2\n"), b'{"text": "a", "label": 1}\n',
    b'[\n{"text": "a"}\n]', "text\tlabel\na\t1\n".encode("utf-16"), b"sep=;\ntext;label\na;1\n",
    b"PK\x03\x04\x14\x00", b"<html>", "text,label\n\u200b,1\n".encode(),
)  # fmt: skip


def is_safe(name: str) -> bool:
    """Return whether a file may be named by a task, wherever it is."""
    odd = any(character in "/\\|,+=:*?<>\"' \t" for character in name)
    return name.isprintable() and not odd and name[0].isalnum() and len(name.encode()) <= 160


@dataclasses.dataclass(frozen=True)
class Edit:
    """Put `put` in the place of `cut` bytes, `at` some place of a document."""

    at: int
    cut: int
    put: bytes

    def apply(self, document: bytes) -> bytes:
        """The document after it."""
        at = self.at % (len(document) + 1)
        return document[:at] + self.put + document[at + self.cut :]


_edits = st.builds(
    Edit,
    at=st.integers(0, 1 << 16),
    cut=st.one_of(st.just(0), st.integers(0, 8), st.integers(0, 1 << 16)),
    put=st.one_of(
        st.sampled_from(NASTY).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.binary(max_size=4),
    ),
)


def damaged(*documents: bytes) -> st.SearchStrategy[bytes]:
    """One of some sound documents after a few edits, or bytes that never were one."""
    edited = st.builds(_apply, st.sampled_from(documents), st.lists(_edits, max_size=4))
    return st.one_of(edited, edited, st.binary(max_size=64))


def _apply(document: bytes, edits: Sequence[Edit]) -> bytes:
    for edit in edits:
        document = edit.apply(document)
    return document


def tables(sample: bytes, delimiter: str) -> st.SearchStrategy[bytes]:
    """Tables with the header of a sound one, some of its cells, and cells that are anything.

    Args:
      sample: the sound table.
      delimiter: what separates its fields.
    """
    header, *found = csv.reader(sample.decode().splitlines(keepends=True), delimiter=delimiter)
    right = st.sampled_from(found).flatmap(
        lambda row: st.tuples(*(st.one_of(st.just(cell), st.just(cell), texts) for cell in row))
    )
    row = st.one_of(right.map(_quoted), right.map(list), st.lists(written, max_size=6))
    return st.builds(
        lambda bom, delimiter, end, rows: (
            bom + end.join(delimiter.join(cells) for cells in [header, *rows])
        ).encode("utf-8", "ignore"),
        st.sampled_from(("", "", "\ufeff")),
        st.just(delimiter),
        st.sampled_from(("\n", "\r\n", "\r", "\n\n")),
        st.lists(row, min_size=1, max_size=3),
    )


def _quoted(cells: Sequence[str]) -> list[str]:
    return ['"{}"'.format(cell.replace('"', '""')) for cell in cells]


numbers = st.one_of(
    st.integers(-3, 40), st.floats(), st.sampled_from((10**400, -(2**63), 2**31, True, False))
)
values = st.recursive(
    st.one_of(st.none(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=5,
)
_GONE = object()


def changed(document: Any, most: int = 3) -> st.SearchStrategy[Any]:
    """JSON documents that differ from a sound one in up to `most` places, or altogether."""
    place = st.sampled_from(list(_places(document)))
    value = st.one_of(values, st.just(_GONE), st.sampled_from(list(_parts(document))))
    changes = st.lists(st.tuples(place, value), max_size=most)
    return st.one_of(changes.map(lambda found: _change(document, found)), values)


def _places(document: Any, path: tuple[Any, ...] = ()) -> Any:
    """Paths of all parts; a dict has one more, a key that is not there."""
    keys: Any = ()
    if isinstance(document, dict | list):
        keys = [*document, "extra"] if isinstance(document, dict) else range(len(document))
    for key in keys:
        yield (*path, key)
        if key != "extra":
            yield from _places(document[key], (*path, key))


def _parts(document: Any) -> Any:
    yield document
    for part in document.values() if isinstance(document, dict) else ():
        yield from _parts(part)


def _change(document: Any, changes: Sequence[tuple[tuple[Any, ...], Any]]) -> Any:
    document = copy.deepcopy(document)
    for (*path, last), value in changes:
        part = document
        try:
            for key in path:
                part = part[key]
            if value is _GONE:
                del part[last]
            else:
                part[last] = copy.deepcopy(value)
        except (KeyError, IndexError, TypeError):
            pass  # an earlier change took the place away
    return document


def json_files(document: Any) -> st.SearchStrategy[bytes]:
    """Files that should hold a sound JSON document: with other content, or damaged."""
    other = changed(document).map(lambda value: json.dumps(value).encode())
    return st.one_of(other, other, damaged(json.dumps(document).encode()), st.just(b"[" * 2000))
