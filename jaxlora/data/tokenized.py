"""Tokenized examples of a split, and their on-disk cache."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxlora.data import sources
from jaxlora.data.raw_examples import TextExample, is_blank, sentences, to_array
from jaxlora.formats.tokenizer import pair_template
from jaxlora.tasks.task import Task
from jaxlora.utils import files
from jaxlora.utils.errors import UserError
from jaxlora.utils.schema import encodable

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

MOST_LISTED = 10


class Blank(NamedTuple):
    """A row that was skipped because a sentence is blank or has no tokens.

    Attributes:
      at: index among the rows of its split.
      line: line or row in the file, from 1; 0 if it does not come from a file.
      id: id in the source.
    """

    at: int
    line: int
    id: str


def list_blank(rows: Sequence[Blank]) -> str:
    """Describe rows with a blank text: their number, and the location of the first ten.

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
    """Tokenized examples; sentence `k` of example `i` has index `i * sentences + k`.

    Attributes:
      ids: `object[E]`, ids in the source, as strings.
      tokens: `i32[total]`, all sentences concatenated, each `[CLS] … [SEP]`; a joint pair is one.
      offsets: `i64[E * sentences + 1]`, the start of each sentence; the last is `total`.
      labels: `f32[E]`, or `f32[E, K]` for multilabel tasks; NaN for unlabelled examples.
      sentences: sentences per example: 2 for separately encoded pairs, else 1.
      truncated: number of truncated sentences.
      unlabelled: number of rows skipped because they have no label.
      blank: rows skipped because a sentence is blank.
      notes: notes for the user on how the file was read.
      types: `u8[total]`, token types; None: all are 0.
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
    types: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each sentence, `i64[E * sentences]`."""
        return np.diff(self.offsets)

    def sentence(self, number: int) -> np.ndarray:
        """Return the token ids of one sentence, `i32[length]`."""
        return self.tokens[self._span(number)]

    def types_of(self, numbers: Sequence[int] | np.ndarray) -> list[Any]:
        """Return the token types of sentences, `u8[length]` each, or 0 each if `types` is None."""
        types = self.types
        return [0 if types is None else types[self._span(n)] for n in numbers]

    def _span(self, number: int) -> slice:
        return slice(self.offsets[number], self.offsets[number + 1])

    def take(self, numbers: np.ndarray) -> Examples:
        """Select examples by index, `i64[n]`; only for one sentence per example."""
        if self.sentences != 1:
            raise ValueError("take() needs examples of one sentence")
        tokens, types = [self.sentence(n) for n in numbers], self.types_of(numbers)
        offsets = np.concatenate([[0], np.cumsum([len(t) for t in tokens])])
        return Examples(
            self.ids[numbers], np.concatenate(tokens), offsets, self.labels[numbers], 1,
            types=None if self.types is None else np.concatenate(types),
        )  # fmt: skip

    def join(self, other: Examples) -> Examples:
        """Append the examples of `other`, which must have the same number of sentences each."""
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
            _joined_types([self, other]),
        )

    @property
    def targets(self) -> np.ndarray:
        """Labels as columns: `f32[E, 1]`, or `f32[E, K]` for multilabel tasks."""
        return self.labels if self.labels.ndim == 2 else self.labels[:, None]

    @property
    def labelled(self) -> bool:
        """Whether every example has a label."""
        return bool(np.all(~np.isnan(self.labels)))


def _joined_types(parts: Sequence[Examples]) -> np.ndarray | None:
    """Concatenate token types; None if all are 0."""
    if all(part.types is None for part in parts):
        return None
    return np.concatenate(
        [np.zeros_like(p.tokens, np.uint8) if p.types is None else p.types for p in parts]
    )


SPLITS = ("train", "dev", "test")
# Increase this when `tokenize` or the layout of the cache file changes.
FORMAT = "5"
# Tokenizer encodings take much memory, so they are converted to arrays in chunks of this size.
_CHUNK = 10_000
# Errors that reading a damaged or incomplete .npz file may raise; zipfile raises separate ones for
# unknown formats and for members that look encrypted.
_DAMAGED = (
    OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError,
    RuntimeError, TypeError,
)  # fmt: skip


def load_examples(
    task: Task,
    source: str,
    location: sources.Location,
    tokenizer: Tokenizer,
    tokenizer_key: str,
    max_length: int,
    cache: Path,
) -> dict[str, Examples]:
    """Load and tokenize the splits of a task; later calls read them from the cache without TFDS.

    Args:
      task: the task.
      source, location: see `sources.load_rows`.
      tokenizer: a fast tokenizer whose post-processor adds `[CLS]` and `[SEP]`; not changed.
      tokenizer_key: identifies the content of the tokenizer, e.g. a checksum.
      max_length: maximum number of tokens of a sentence, including `[CLS]` and `[SEP]`.
      cache: folder for datasets and token files; it may be deleted at any time.

    Raises:
      UserError: if the source is invalid, or no example is left in train or dev.
    """
    content = sources.fingerprint(task, source, location)
    around = pair_template(tokenizer) if task.joint else []  # `tokenizer_key` does not cover it
    key = json.dumps([FORMAT, content, tokenizer_key, max_length, around])
    name = f"{task.name}-{hashlib.sha256(key.encode()).hexdigest()[:20]}.npz"
    path = cache / "tokens" / name
    found = _restore(path)
    if found is not None:
        return found
    rows, _ = sources.load_rows(task, source, location, cache)
    notes = sources.notes(task, source, location)
    splits = {
        split: dataclasses.replace(
            _examples(found, task, tokenizer, max_length, labelled=split != "test"),
            notes=tuple(notes.get(split, ())),
        )
        for split, found in rows.items()
    }
    for split in ("train", "dev"):
        if not len(splits[split]):
            where = sources.where(task, source, location, split)
            raise UserError(f"{where}: no example is left; {_left_out(splits[split])}")
    _save(path, splits)
    return splits


def _left_out(examples: Examples) -> str:
    blank = list_blank(examples.blank) if examples.blank else "no blank rows"
    return f"there are {examples.unlabelled:,} rows without a label and {blank}."


def truncating(tokenizer: Tokenizer, max_length: int) -> Tokenizer:
    """Copy a tokenizer, with truncation and without padding; takes about 25 ms.

    Args:
      tokenizer: a fast tokenizer; not changed.
      max_length: maximum number of tokens. Truncation removes the last words of a sentence, in a
        joint pair those of the longer sentence first, and keeps `[CLS]` and `[SEP]`.
    """
    copy = type(tokenizer).from_str(tokenizer.to_str())
    copy.no_padding()
    copy.enable_truncation(max_length)
    return copy


class Tokenized(NamedTuple):
    """Sentences, or joint pairs, as token ids.

    Attributes:
      tokens: `i32[total]`, token ids of all sentences, concatenated.
      offsets: `i64[n + 1]`, the start of each sentence; the last is `total`.
      truncated: number of truncated sentences.
      empty: indices of sentences without tokens, and of pairs with such a sentence.
      types: `u8[total]`, token types; None: all are 0.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    truncated: int
    empty: list[int]
    types: np.ndarray | None


def unlabelled(made: Tokenized) -> Examples:
    """Return sentences, or joint pairs, as examples of one sentence without ids or labels."""
    nothing = np.full(len(made.offsets) - 1, np.nan, np.float32)
    return Examples(
        nothing.astype(str), made.tokens, made.offsets, nothing, 1, made.truncated,
        types=made.types,
    )  # fmt: skip


def tokenize(tokenizer: Tokenizer, texts: Sequence[str | tuple[str, ...]]) -> Tokenized:
    """Tokenize sentences into one array of token ids.

    Args:
      tokenizer: a tokenizer from `truncating`.
      texts: the sentences; a tuple of two is a joint pair and becomes one sequence.

    Raises:
      UserError: if a sentence contains a lone surrogate, the tokenizer cannot join pairs, or its
        maximum length leaves no room for two sentences.
    """
    paired = any(isinstance(text, tuple) for text in texts)
    if paired:
        _check_template(tokenizer)
    _check_encodable(texts)
    parts, types, lengths = [np.zeros(0, np.int32)], [np.zeros(0, np.uint8)], [0]
    truncated, empty = 0, []
    special = tokenizer.num_special_tokens_to_add(is_pair=False)
    for start in range(0, len(texts), _CHUNK):
        chunk = list(texts[start : start + _CHUNK])
        for text, encoding in zip(chunk, tokenizer.encode_batch(chunk), strict=True):
            if _has_empty(text, encoding, special):
                empty.append(len(lengths) - 1)
            parts.append(np.array(encoding.ids, np.int32))
            lengths.append(len(encoding.ids))
            truncated += bool(encoding.overflowing)
            if paired:
                types.append(np.array(encoding.type_ids, np.uint8))
    kinds = np.concatenate(types)
    return Tokenized(
        np.concatenate(parts), np.cumsum(lengths, dtype=np.int64), truncated, empty,
        kinds if kinds.any() else None,
    )  # fmt: skip


def _check_encodable(texts: Iterable[str | tuple[str, ...]]) -> None:
    for text in texts:
        for part in (text,) if isinstance(text, str) else text:
            if not encodable(part):
                shown = ascii(part)[:60]
                raise UserError(f"{shown}: is not Unicode text; remove the lone surrogates")


def _check_template(tokenizer: Tokenizer) -> None:
    """Check that the tokenizer puts special tokens between a pair and has room for both."""
    special = tokenizer.num_special_tokens_to_add(is_pair=True)
    if special < 3:
        raise UserError(
            "the base's tokenizer has no template for pairs, such as [CLS] a [SEP] b [SEP], so "
            "they cannot be read together; read them separately"
        )
    most = (tokenizer.truncation or {"max_length": special + 2})["max_length"]
    if most < special + 2:  # tokenizers would not truncate, or keep only one sentence
        raise UserError(
            f"max_length {most}: joint pairs need at least {special + 2}, since the tokenizer adds "
            f"{special} special tokens"
        )


def _has_empty(text: str | tuple[str, ...], encoding: Encoding, special: int) -> bool:
    """Return whether the tokenizer dropped every character of a text, or of one text of a pair.

    It adds `special` tokens to a text that is not in a pair.
    """
    if isinstance(text, str):
        return len(encoding.ids) <= special
    return not {0, 1} <= set(encoding.sequence_ids)


def _examples(
    rows: Sequence[TextExample],
    task: Task,
    tokenizer: Tokenizer,
    max_length: int,
    *,
    labelled: bool,
) -> Examples:
    """Tokenize the rows of a split, without blank and, if `labelled`, unlabelled ones."""
    blank = {n for n, row in enumerate(rows) if any(map(is_blank, sentences(row, task).values()))}
    cut = truncating(tokenizer, max_length)
    while True:
        found = [n for n in range(len(rows)) if n not in blank]
        kept = [n for n in found if rows[n].labelled or not labelled]
        texts = [tuple(sentences(rows[n], task).values()) for n in kept]
        made = tokenize(cut, [one for example in texts for one in task.encoded(example)])
        if not made.empty:
            break
        blank |= {kept[n // task.sentences] for n in made.empty}
    return Examples(
        _strings(rows[n].id for n in kept), made.tokens, made.offsets,
        to_array([rows[n].label for n in kept], task), task.sentences, made.truncated,
        unlabelled=len(found) - len(kept),
        blank=tuple(Blank(n, rows[n].line, rows[n].id) for n in sorted(blank)), types=made.types,
    )  # fmt: skip


def _strings(values: Iterable[str]) -> np.ndarray:
    """Build an object array of strings; NumPy's string arrays would pad all to the longest.

    >>> _strings(["a", "bcd"]).tolist()
    ['a', 'bcd']
    """
    return np.array([*values, None], dtype=object)[:-1]


def _save(path: Path, splits: dict[str, Examples]) -> None:
    """Write the cache file atomically; if that fails, e.g. on a full disk, only print a note."""
    arrays = {
        f"{split}.{field.name}": _to_array(getattr(examples, field.name))
        for split, examples in splits.items()
        for field in dataclasses.fields(Examples)
    }
    try:
        with files.replacing(path) as file:
            np.savez(file, allow_pickle=False, **arrays)
    except OSError as error:
        print(f"note: {path} is not cached ({error})", file=sys.stderr)


def _restore(path: Path) -> dict[str, Examples] | None:
    """Read the splits from a cache file; None if it is missing or damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {split: _split(arrays, split) for split in SPLITS}
    except _DAMAGED:
        return None


def _to_array(value: Any) -> Any:
    """Encode tuples and string arrays as JSON bytes, which need no pickle, and None as no bytes."""
    if value is None:
        return np.zeros(0, np.uint8)
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = value.tolist()
    if not isinstance(value, list | tuple):
        return value
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _from_json(array: np.ndarray) -> Any:
    """Decode JSON bytes written by `_to_array`."""
    return json.loads(np.asarray(array, np.uint8).tobytes())


def _split(arrays: Mapping[str, np.ndarray], split: str) -> Examples:
    types = arrays[f"{split}.types"]
    return Examples(
        ids=_strings(_from_json(arrays[f"{split}.ids"])),
        tokens=arrays[f"{split}.tokens"],
        offsets=arrays[f"{split}.offsets"],
        labels=arrays[f"{split}.labels"],
        sentences=int(arrays[f"{split}.sentences"]),
        truncated=int(arrays[f"{split}.truncated"]),
        unlabelled=int(arrays[f"{split}.unlabelled"]),
        blank=tuple(Blank(*row) for row in _from_json(arrays[f"{split}.blank"])),
        notes=tuple(_from_json(arrays[f"{split}.notes"])),
        types=types if len(types) else None,
    )
