"""Examples of one split: ragged token ids and labels, tokenised once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from jaxlora.data import sources
from jaxlora.data.rows import Row, sentences
from jaxlora.errors import UserError
from jaxlora.plain import encodable
from jaxlora.tasks import Task


@dataclasses.dataclass(frozen=True)
class Examples:
    """Tokenised examples; sentence `k` of example `i` is number `i * sentences + k`.

    Attributes:
      ids: `str[E]`, the examples' ids as the source gives them.
      tokens: `i32[total]`, all sentences end to end, each `[CLS] … [SEP]`.
      offsets: `i64[E * sentences + 1]`, where each sentence starts; the last is `total`.
      labels: `f32[E]`; NaN where the source has none.
      sentences: sentences per example, 1 or 2.
      truncated: how many sentences were cut to the length limit.
      unlabelled: how many examples were left out because they have no label.
    """

    ids: np.ndarray
    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    sentences: int
    truncated: int = 0
    unlabelled: int = 0

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
        )

    @property
    def labelled(self) -> bool:
        """Whether every example has a label."""
        return bool(np.all(~np.isnan(self.labels)))


SPLITS = ("train", "dev", "test")
# Raise this when `tokenize` or the layout of the cache file changes.
FORMAT = "2"
# Encodings are bulky: turn this many at a time into arrays.
_CHUNK = 10_000
# What reading a damaged or half-copied .npz may raise (zipfile has an error for what it does not
# know, and one for what looks encrypted).
_DAMAGED = (
    OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError,
    RuntimeError,
)  # fmt: skip


def load_examples(
    task: Task,
    source: str,
    place: sources.Place,
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
    splits = {
        split: _examples(found, task, tokenizer, max_length, labelled=split != "test")
        for split, found in rows.items()
    }
    _save(path, splits)
    return splits


def truncating(tokenizer: Tokenizer, max_length: int) -> Tokenizer:
    """A copy that cuts sentences to a length and pads none; the copy takes some 25 ms.

    Args:
      tokenizer: a fast tokenizer; its own truncation and padding stay as set.
      max_length: longer sentences lose their last words and keep `[CLS]` and `[SEP]`.
    """
    copy = Tokenizer.from_str(tokenizer.to_str())
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
    rows: list[Row], task: Task, tokenizer: Tokenizer, max_length: int, *, labelled: bool
) -> Examples:
    found = len(rows)
    rows = [row for row in rows if not (labelled and math.isnan(row.label))]
    texts = [text for row in rows for text in sentences(row, task).values()]
    tokens, offsets, truncated = tokenize(truncating(tokenizer, max_length), texts)
    ids = np.array([row.id for row in rows], dtype=np.str_)
    labels = np.array([row.label for row in rows], np.float32)
    return Examples(
        ids, tokens, offsets, labels, task.sentences, truncated, unlabelled=found - len(rows)
    )


def _save(path: Path, splits: dict[str, Examples]) -> None:
    """Write all or nothing: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        f"{split}.{field.name}": getattr(examples, field.name)
        for split, examples in splits.items()
        for field in dataclasses.fields(Examples)
    }
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            np.savez(file, allow_pickle=False, **arrays)
            file.close()
            Path(file.name).replace(path)
        finally:
            Path(file.name).unlink(missing_ok=True)


def _restore(path: Path) -> dict[str, Examples] | None:
    """The splits in a cache file; None if it is missing or damaged."""
    if not path.exists():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {split: _split(arrays, split) for split in SPLITS}
    except _DAMAGED:
        return None


def _split(arrays: Mapping[str, np.ndarray], split: str) -> Examples:
    return Examples(
        ids=arrays[f"{split}.ids"],
        tokens=arrays[f"{split}.tokens"],
        offsets=arrays[f"{split}.offsets"],
        labels=arrays[f"{split}.labels"],
        sentences=int(arrays[f"{split}.sentences"]),
        truncated=int(arrays[f"{split}.truncated"]),
        unlabelled=int(arrays[f"{split}.unlabelled"]),
    )
