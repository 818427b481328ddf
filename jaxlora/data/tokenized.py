"""Examples of one split: ragged token ids and labels, tokenised once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxlora.data import sources
from jaxlora.data.raw_examples import TextExample, is_blank, sentences
from jaxlora.tasks.task import Task
from jaxlora.utils import files
from jaxlora.utils.errors import UserError
from jaxlora.utils.schema import encodable

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MOST_LISTED = 10


class Blank(NamedTuple):
    """A row that was left out since a text of it is blank, or nothing that the tokenizer knows.

    Attributes:
      at: its number among the rows of its split, from 0.
      line: where it stands in its file, from 1; 0 if it is in no file.
      id: its name.
    """

    at: int
    line: int
    id: str


def list_blank(rows: Sequence[Blank]) -> str:
    """Count rows with a blank text and name the first ten.

    >>> list_blank([Blank(0, 2, "a"), Blank(5, 7, "f")])
    '2 rows with a blank text (lines 2, 7)'
    """
    named = [str(row.line or row.id) for row in rows[:MOST_LISTED]]
    more = ", …" if len(rows) > MOST_LISTED else ""
    what = ("line" if rows[0].line else "id") + ("s" if len(rows) > 1 else "")
    count = "1 row" if len(rows) == 1 else f"{len(rows):,} rows"
    return f"{count} with a blank text ({what} {', '.join(named)}{more})"


@dataclasses.dataclass(frozen=True)
class Examples:
    """Tokenised examples; sentence `k` of example `i` is number `i * sentences + k`.

    Attributes:
      ids: `object[E]`, the examples' ids as the source gives them, strings of any length.
      tokens: `i32[total]`, all sentences end to end, each `[CLS] … [SEP]`.
      offsets: `i64[E * sentences + 1]`, where each sentence starts; the last is `total`.
      labels: `f32[E]`; NaN where the source has none.
      sentences: sentences per example, 1 or 2.
      truncated: how many sentences were cut to the length limit.
      unlabelled: how many examples were left out because they have no label.
      blank: the rows that were left out because a text of theirs is blank.
      notes: what must be known of how their file was read.
    """

    ids: np.ndarray
    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    sentences: int
    truncated: int = 0
    unlabelled: int = 0
    blank: tuple[Blank, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """`i64[E * sentences]`: tokens in each sentence."""
        return np.diff(self.offsets)

    def sentence(self, number: int) -> np.ndarray:
        """Token ids of one sentence, `i32[length]`."""
        return self.tokens[self.offsets[number] : self.offsets[number + 1]]

    def take(self, numbers: np.ndarray) -> Examples:
        """Some of these examples of one sentence, `numbers: i64[n]`, in that order."""
        if self.sentences != 1:
            raise ValueError("take() is for examples of one sentence")
        tokens = [self.sentence(n) for n in numbers]
        offsets = np.concatenate([[0], np.cumsum([len(t) for t in tokens])])
        return Examples(self.ids[numbers], np.concatenate(tokens), offsets, self.labels[numbers], 1)

    def join(self, other: Examples) -> Examples:
        """These examples and then another's of as many sentences."""
        if self.sentences != other.sentences:
            raise ValueError(f"sentences: {self.sentences} and {other.sentences}")
        return Examples(
            np.concatenate([self.ids, other.ids]),
            np.concatenate([self.tokens, other.tokens]),
            np.concatenate([self.offsets, self.offsets[-1] + other.offsets[1:]]),
            np.concatenate([self.labels, other.labels]),
            self.sentences,
            self.truncated + other.truncated,
            self.unlabelled + other.unlabelled,
            self.blank + other.blank,
            self.notes + other.notes,
        )

    @property
    def labelled(self) -> bool:
        """Whether every example has a label."""
        return bool(np.all(~np.isnan(self.labels)))


SPLITS = ("train", "dev", "test")
# Raise this when `tokenize` or the layout of the cache file changes.
FORMAT = "3"
# Encodings are bulky: turn this many at a time into arrays.
_CHUNK = 10_000
# What reading a damaged or half-copied .npz may raise (zipfile has an error for what it does not
# know, and one for what looks encrypted).
_DAMAGED = (
    OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError,
    RuntimeError, TypeError,
)  # fmt: skip


def load_examples(
    task: Task,
    source: str,
    place: sources.Location,
    tokenizer: Tokenizer,
    tokenizer_key: str,
    max_length: int,
    cache: Path,
) -> dict[str, Examples]:
    """Tokenised splits of a task; tokenised once, then read from the cache without TFDS.

    Args:
      task: whose examples.
      source, place: see `sources.load_rows`.
      tokenizer: a fast tokenizer whose post-processor adds `[CLS]` and `[SEP]`; left as it is.
      tokenizer_key: names the tokenizer's content, e.g. a checksum.
      max_length: the most tokens a sentence may have, `[CLS]` and `[SEP]` included.
      cache: folder for datasets and token files; deleting it costs only time.

    Raises:
      UserError: anything wrong with the source.
    """
    content = sources.fingerprint(task, source, place)
    key = json.dumps([FORMAT, content, tokenizer_key, max_length])
    name = f"{task.name}-{hashlib.sha256(key.encode()).hexdigest()[:20]}.npz"
    path = cache / "tokens" / name
    found = _restore(path)
    if found is not None:
        return found
    rows, _ = sources.load_rows(task, source, place, cache)
    notes = sources.notes(task, source, place)
    splits = {
        split: dataclasses.replace(
            _examples(found, task, tokenizer, max_length, labelled=split != "test"),
            notes=tuple(notes.get(split, ())),
        )
        for split, found in rows.items()
    }
    for split in ("train", "dev"):
        if not len(splits[split]):
            where = sources.where(task, source, place, split)
            raise UserError(f"{where}: no example is left; {_why_none(splits[split])}")
    _save(path, splits)
    return splits


def _why_none(examples: Examples) -> str:
    blank = list_blank(examples.blank) if examples.blank else "no blank rows"
    return f"there are {examples.unlabelled:,} rows without a label and {blank}."


def truncating(tokenizer: Tokenizer, max_length: int) -> Tokenizer:
    """A copy that cuts sentences to a length and pads none; the copy takes some 25 ms.

    Args:
      tokenizer: a fast tokenizer; its own truncation and padding stay as set.
      max_length: longer sentences lose their last words and keep `[CLS]` and `[SEP]`.
    """
    copy = type(tokenizer).from_str(tokenizer.to_str())
    copy.no_padding()
    copy.enable_truncation(max_length)
    return copy


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, int]:
    """Token ids of sentences, end to end.

    Args:
      tokenizer: from `truncating`.
      texts: the sentences.

    Returns:
      `(tokens i32[total], offsets i64[len(texts) + 1], how many were cut)`.

    Raises:
      UserError: for half a surrogate pair, which is no character.
    """
    for text in texts:
        if not encodable(text):
            raise UserError(f"{ascii(text)[:60]}: is not Unicode text; take the surrogates out")
    parts, lengths, truncated = [np.zeros(0, np.int32)], [0], 0
    for start in range(0, len(texts), _CHUNK):
        for encoding in tokenizer.encode_batch(list(texts[start : start + _CHUNK])):
            parts.append(np.array(encoding.ids, np.int32))
            lengths.append(len(encoding.ids))
            truncated += bool(encoding.overflowing)
    return np.concatenate(parts), np.cumsum(lengths, dtype=np.int64), truncated


def _examples(
    rows: Sequence[TextExample],
    task: Task,
    tokenizer: Tokenizer,
    max_length: int,
    *,
    labelled: bool,
) -> Examples:
    """Tokenise a split's rows, except for those with a blank text and, if `labelled`, no label."""
    blank = {n for n, row in enumerate(rows) if any(map(is_blank, sentences(row, task).values()))}
    cut = truncating(tokenizer, max_length)
    while True:
        found = [n for n in range(len(rows)) if n not in blank]
        kept = [n for n in found if not (labelled and math.isnan(rows[n].label))]
        texts = [text for n in kept for text in sentences(rows[n], task).values()]
        tokens, offsets, truncated = tokenize(cut, texts)
        # [CLS] and [SEP] alone: the tokenizer dropped every character.
        shortest = np.diff(offsets).reshape(len(kept), task.sentences).min(1, initial=max_length)
        empty = {kept[n] for n in np.flatnonzero(shortest <= 2)}
        if not empty:
            break
        blank |= empty
    return Examples(
        _strings(rows[n].id for n in kept), tokens, offsets,
        np.array([rows[n].label for n in kept], np.float32), task.sentences, truncated,
        unlabelled=len(found) - len(kept),
        blank=tuple(Blank(n, rows[n].line, rows[n].id) for n in sorted(blank)),
    )  # fmt: skip


def _strings(values: Iterable[str]) -> np.ndarray:
    """An array of strings, each as long as it is; NumPy's own would all be as long as the longest.

    >>> _strings(["a", "bcd"]).tolist()
    ['a', 'bcd']
    """
    return np.array([*values, None], dtype=object)[:-1]  # None: or no values would be no array


def _save(path: Path, splits: dict[str, Examples]) -> None:
    """Write all or nothing: a reader never sees half a file. A full disk costs the file only."""
    arrays = {
        f"{split}.{field.name}": _plain(getattr(examples, field.name))
        for split, examples in splits.items()
        for field in dataclasses.fields(Examples)
    }
    try:
        with files.replacing(path) as file:
            np.savez(file, allow_pickle=False, **arrays)
    except OSError as error:
        print(f"note: {path} is not kept ({error})", file=sys.stderr)


def _restore(path: Path) -> dict[str, Examples] | None:
    """The splits in a cache file; None if it is missing or damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {split: _split(arrays, split) for split in SPLITS}
    except _DAMAGED:
        return None


def _plain(value: Any) -> Any:
    """Numbers as they are; what holds strings as the bytes of its JSON."""
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = value.tolist()
    if not isinstance(value, list | tuple):
        return value
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _json(array: np.ndarray) -> Any:
    """The inverse of `_plain` where it made bytes."""
    return json.loads(np.asarray(array, np.uint8).tobytes())


def _split(arrays: Mapping[str, np.ndarray], split: str) -> Examples:
    return Examples(
        ids=_strings(_json(arrays[f"{split}.ids"])),
        tokens=arrays[f"{split}.tokens"],
        offsets=arrays[f"{split}.offsets"],
        labels=arrays[f"{split}.labels"],
        sentences=int(arrays[f"{split}.sentences"]),
        truncated=int(arrays[f"{split}.truncated"]),
        unlabelled=int(arrays[f"{split}.unlabelled"]),
        blank=tuple(Blank(*row) for row in _json(arrays[f"{split}.blank"])),
        notes=tuple(_json(arrays[f"{split}.notes"])),
    )
