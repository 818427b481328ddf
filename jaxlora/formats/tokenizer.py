"""Load the tokenizer of a base model exactly as transformers' `AutoTokenizer` does, or refuse it.

transformers combines many files and fields (for a `BertTokenizer`, the vocabulary is from
tokenizer.json, but lower-casing from tokenizer_config.json), so it does the loading. Since it can
also run code that these files name, only its own fast tokenizer classes are accepted, and no code
of the folder is run. The result is cached, since importing transformers takes longer than the rest
of the start-up.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlora.utils import cache, files
from jaxlora.utils.errors import UserError
from jaxlora.utils.extras import explained
from jaxlora.utils.files import read_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONFIG = "tokenizer_config.json"
# Files that transformers' tokenizers read. None is a pickle; only these are downloaded.
_VOCABULARIES = (
    "tokenizer.json", "tokenizer.*.json", "vocab.txt", "vocab.json", "tokenizer.model",
    "sentencepiece.model", "sentencepiece.bpe.model", "spiece.model", "spm.model",
)  # fmt: skip
FILES = (
    *_VOCABULARIES, CONFIG, "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "normalizer.json", "entity_vocab.json",
)  # fmt: skip
_JSON = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json")
# Arguments that saved tokenizers never have: they would refer to other files.
_ELSEWHERE = ("init_inputs", "vocab", "merges", "merges_file", "tokenizer_object", "gguf_file")
_CLASS = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_VERSIONED = re.compile(r"tokenizer\.[A-Za-z0-9.]+\.json")
_PROBES = ("", "a", "Ünï [MASK] [CLS]test")
_CHECKS = 1  # version of the checks; increment it to invalidate cached tokenizers


def load(folder: Path, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a folder, without truncation or padding.

    Args:
      folder: folder of the base model; nothing else is read, except the cache.
      vocab_size: number of token embeddings of the model.

    Raises:
      UserError: if there is no tokenizer, it needs third-party code or a slow tokenizer class, or
        it does not fit the model.
    """
    kept = cache.cache_dir() / "tokenizers" / f"{_key(folder)}.json"
    tokenizer = _read_kept(kept)
    if tokenizer is None:
        tokenizer = _resolve(folder)
        with contextlib.suppress(OSError):  # a full disk: the next start is slow again
            files.make(kept.parent)
            files.write_text(kept, tokenizer.to_str())
    _check_fit(folder, tokenizer, vocab_size)
    return tokenizer


def _key(folder: Path) -> str:
    """Return a checksum of all that determines a folder's tokenizer and whether it is accepted."""
    digest = hashlib.sha256()
    for package in ("transformers", "tokenizers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            digest.update(f"{package} {importlib.metadata.version(package)} {_CHECKS}\n".encode())
    found = {path for name in (*FILES, "config.json") for path in folder.glob(name)}
    for path in sorted(path for path in found if path.is_file()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()


def _read_kept(path: Path) -> Tokenizer | None:
    """Return the cached tokenizer; None if it is missing or damaged."""
    with explained():
        from tokenizers import Tokenizer
    try:
        return Tokenizer.from_str(path.read_text("utf-8"))
    except Exception:  # missing or damaged; tokenizers raises no specific type
        return None


def _resolve(folder: Path) -> Tokenizer:
    """Load the tokenizer with transformers; refuse one that does more than its backend."""
    _check_files(folder)
    wrapped = _from_transformers(folder)
    tokenizer = wrapped.backend_tokenizer
    _check_settings(folder, wrapped)
    _check_alone(folder, wrapped, tokenizer)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    _check_words(folder, tokenizer, wrapped.all_special_tokens)
    return tokenizer


def essence(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return all that determines a tokenizer's ids for single texts, as JSON values.

    This omits truncation, padding, decoding, and which of the equivalent post-processors adds [CLS]
    and [SEP]. For pairs that are read together, see `pair_template`.
    """
    about = json.loads(tokenizer.to_str())
    parts = ("normalizer", "pre_tokenizer", "model", "added_tokens")
    around = [tokenizer.encode(text).ids for text in ("", "a")]
    return {part: about[part] for part in parts} | {"around": around}


def pair_template(tokenizer: Tokenizer) -> list[list[int]]:
    """Return ids and types of a short pair, which show how the tokenizer joins two texts."""
    pair = tokenizer.encode("a", "b")
    return [pair.ids, pair.type_ids]


def _import_transformers() -> Any:
    """Import transformers without its warning that torch is missing."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    with explained():
        import transformers

    return transformers


def _check_files(folder: Path) -> None:
    """Refuse files that are not valid JSON, or that name what must not be loaded."""
    if not any(path.is_file() for name in _VOCABULARIES for path in folder.glob(name)):
        raise UserError(f"{folder}: no tokenizer.json or vocab.txt; `base` needs a tokenizer")
    for name in _JSON:
        if (folder / name).is_file():
            read_object(folder / name)
    if (folder / "config.json").is_file():
        _check_class(folder / "config.json", read_object(folder / "config.json"))
    if (folder / CONFIG).is_file():
        about = read_object(folder / CONFIG)
        _check_class(folder / CONFIG, about)
        _check_own(folder / CONFIG, about)


def _check_class(path: Path, about: dict[str, Any]) -> None:
    """Refuse a tokenizer_class that is not one of transformers' fast tokenizers."""
    transformers = _import_transformers()
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    name = about.get("tokenizer_class")
    if name is None:
        return
    if not isinstance(name, str) or not _CLASS.fullmatch(name):
        raise UserError(f"{path}: tokenizer_class {name!r} is not the name of a class")
    found = tokenizer_class_from_name(name)
    # For unknown names and the slow base class, transformers uses the fast base class.
    if found is None or found is transformers.PreTrainedTokenizer:
        return
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedTokenizerFast)):
        raise UserError(
            f"{path}: tokenizer_class {name!r} is no fast tokenizer (of the tokenizers "
            "library); only fast tokenizers are supported"
        )


def _check_own(path: Path, about: dict[str, Any]) -> None:
    """Refuse fields of tokenizer_config.json that refer to files elsewhere."""
    if odd := [name for name in _ELSEWHERE if about.get(name)]:
        raise UserError(f"{path}: {odd[0]} is not supported; save the tokenizer again without it")
    versions = about.get("fast_tokenizer_files") or []
    plain = isinstance(versions, list) and all(isinstance(name, str) for name in versions)
    if not plain or not all(_VERSIONED.fullmatch(n) for n in versions if n != "tokenizer.json"):
        raise UserError(f"{path}: fast_tokenizer_files does not name files beside it")


def _from_transformers(folder: Path) -> Any:
    transformers = _import_transformers()
    try:
        found = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # there is no common exception type
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{folder}: transformers cannot load its tokenizer ({reason})") from error
    if not isinstance(found, transformers.PreTrainedTokenizerFast):
        raise UserError(
            f"{folder}: its tokenizer is a {type(found).__name__}, which is no fast tokenizer (of "
            "the tokenizers library); only fast tokenizers are supported"
        )
    return found


def _check_settings(folder: Path, wrapped: Any) -> None:
    """Refuse settings outside the `tokenizers` backend, which copies of it would lose."""
    if wrapped.truncation_side != "right":
        raise UserError(
            f"{folder}: its tokenizer cuts long sentences on the left (truncation_side), which is "
            "not supported"
        )
    if wrapped.split_special_tokens:
        raise UserError(f"{folder}: its tokenizer has split_special_tokens, which is not supported")


def _check_alone(folder: Path, wrapped: Any, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that does more than its backend, or gives a sentence nonzero types."""
    try:
        wanted = wrapped(list(_PROBES))["input_ids"]
        found = tokenizer.encode_batch(list(_PROBES))
    except Exception as error:  # such as a missing [UNK]; there is no specific type
        raise UserError(f"{folder}: its tokenizer cannot be applied ({error})") from error
    if wanted != [encoding.ids for encoding in found]:
        raise UserError(
            f"{folder}: its {type(wrapped).__name__} does more than its fast tokenizer, and "
            "only that can be used"
        )
    if any(any(encoding.type_ids) for encoding in found):
        raise UserError(f"{folder}: its tokenizer gives token types other than 0 to a sentence")


def _check_words(folder: Path, tokenizer: Tokenizer, special: list[str]) -> None:
    """Refuse an empty vocabulary, which transformers creates if the file is missing."""
    if not tokenizer.get_vocab(with_added_tokens=False).keys() - set(special):
        raise UserError(
            f"{folder}: the tokenizer has no words; is its vocabulary (tokenizer.json, vocab.txt) "
            "there?"
        )


def _check_fit(folder: Path, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse ids without an embedding, since JAX silently clamps out-of-range indices."""
    words = tokenizer.get_vocab(with_added_tokens=True)
    word = max(words, key=words.__getitem__, default="")
    if words.get(word, 0) >= vocab_size:
        raise UserError(
            f"{folder}: the tokenizer's {word!r} has id {words[word]}, the model has embeddings "
            f"for {vocab_size} ids; they do not belong together"
        )
    if len(tokenizer.encode("").ids) != 2:
        raise UserError(f"{folder}: the tokenizer does not put [CLS] and [SEP] around a sentence")
