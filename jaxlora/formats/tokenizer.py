"""The tokenizer of a base model: the one that transformers' `AutoTokenizer` gives, or a refusal.

transformers decides by many files and fields what the ids are (for a `BertTokenizer` it takes the
vocabulary of tokenizer.json, but lower-casing from tokenizer_config.json), so it is asked. It can
also run what those files name; all that is let through are its own classes around the `tokenizers`
library. No code of the folder is run. Its answer is kept in the cache: importing transformers takes
longer than all the rest of a start.
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
# Files that transformers' tokenizers read; none is a pickle, and the hub is asked for these alone.
_VOCABULARIES = (
    "tokenizer.json", "tokenizer.*.json", "vocab.txt", "vocab.json", "tokenizer.model",
    "sentencepiece.model", "sentencepiece.bpe.model", "spiece.model", "spm.model",
)  # fmt: skip
FILES = (
    *_VOCABULARIES, CONFIG, "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "normalizer.json", "entity_vocab.json",
)  # fmt: skip
_JSON = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json")
# Arguments of a tokenizer that a saved one never has: they stand for other files.
_ELSEWHERE = ("init_inputs", "vocab", "merges", "merges_file", "tokenizer_object", "gguf_file")
_CLASS = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_VERSIONED = re.compile(r"tokenizer\.[A-Za-z0-9.]+\.json")
_PROBES = ("", "a", "Ünï [MASK] [CLS]test")
_CHECKS = 1  # of the module; one more for each change, so that what is kept is checked again


def load(folder: Path, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a folder, without truncation and padding.

    Args:
      folder: of the base model; no other place is read.
      vocab_size: how many ids the model has embeddings for.

    Raises:
      UserError: if there is none, it cannot be had without code of others or the slow classes of
        transformers, or it does not fit the model.
    """
    kept = cache.cache_dir() / "tokenizers" / f"{_key(folder)}.json"
    tokenizer = _read_kept(kept)
    if tokenizer is None:
        tokenizer = _resolve(folder)
        with contextlib.suppress(OSError):  # a full disk: the next start takes longer, too
            files.make(kept.parent)
            files.write_text(kept, tokenizer.to_str())
    _check_fit(folder, tokenizer, vocab_size)
    return tokenizer


def _key(folder: Path) -> str:
    """Return a checksum of all that decides a folder's tokenizer, and whether it is let through."""
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
    """Return the tokenizer that an earlier call left in the cache, if it did and it is whole."""
    with explained():
        from tokenizers import Tokenizer
    try:
        return Tokenizer.from_str(path.read_text("utf-8"))
    except Exception:  # none there, or damaged; tokenizers has no type of its own
        return None


def _resolve(folder: Path) -> Tokenizer:
    """Have transformers decide, and refuse what its tokenizer does beyond `tokenizers`' own."""
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
    """Return what decides a tokenizer's ids, as JSON.

    Left out is what it does with long and short texts (truncation, padding), how ids become text
    again, and in which of several ways [CLS] and [SEP] are put around a sentence. For pairs that
    are read together see `pair_template`.
    """
    about = json.loads(tokenizer.to_str())
    parts = ("normalizer", "pre_tokenizer", "model", "added_tokens")
    around = [tokenizer.encode(text).ids for text in ("", "a")]
    return {part: about[part] for part in parts} | {"around": around}


def pair_template(tokenizer: Tokenizer) -> list[list[int]]:
    """Return what shows how two texts become one sequence: ids and types of a short pair."""
    pair = tokenizer.encode("a", "b")
    return [pair.ids, pair.type_ids]


def _import_transformers() -> Any:
    """transformers, which would say at each start that torch is missing."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    with explained():
        import transformers

    return transformers


def _check_files(folder: Path) -> None:
    """Refuse files that are no JSON, or that name what must not be loaded."""
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
    """Refuse a tokenizer_class that is not one of transformers' around the `tokenizers` library."""
    transformers = _import_transformers()
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    name = about.get("tokenizer_class")
    if name is None:
        return
    if not isinstance(name, str) or not _CLASS.fullmatch(name):
        raise UserError(f"{path}: tokenizer_class {name!r} is not the name of a class")
    found = tokenizer_class_from_name(name)
    # For a name that it does not know, and for the bare slow class, it takes the bare fast one.
    if found is None or found is transformers.PreTrainedTokenizer:
        return
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedTokenizerFast)):
        raise UserError(
            f"{path}: tokenizer_class {name!r} is no fast tokenizer (one of the tokenizers "
            "library), and only such can be used"
        )


def _check_own(path: Path, about: dict[str, Any]) -> None:
    """Refuse fields of tokenizer_config.json that name other places."""
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
    except Exception as error:  # transformers, tokenizers and what they call have no common type
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{folder}: transformers cannot load its tokenizer ({reason})") from error
    if not isinstance(found, transformers.PreTrainedTokenizerFast):
        raise UserError(
            f"{folder}: its tokenizer is a {type(found).__name__}, which is no fast tokenizer (one "
            "of the tokenizers library); only such can be used"
        )
    return found


def _check_settings(folder: Path, wrapped: Any) -> None:
    """Refuse settings that are kept beside the tokenizer, where copies of it would lose them."""
    if wrapped.truncation_side != "right":
        raise UserError(
            f"{folder}: its tokenizer cuts long sentences on the left (truncation_side), which is "
            "not supported"
        )
    if wrapped.split_special_tokens:
        raise UserError(f"{folder}: its tokenizer has split_special_tokens, which is not supported")


def _check_alone(folder: Path, wrapped: Any, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that does more than its backend, or marks a single sentence's parts."""
    try:
        wanted = wrapped(list(_PROBES))["input_ids"]
        found = tokenizer.encode_batch(list(_PROBES))
    except Exception as error:  # such as a missing [UNK]; tokenizers has no type of its own
        raise UserError(f"{folder}: its tokenizer cannot be applied ({error})") from error
    if wanted != [encoding.ids for encoding in found]:
        raise UserError(
            f"{folder}: its {type(wrapped).__name__} does more than its fast tokenizer, which "
            "alone can be used"
        )
    if any(any(encoding.type_ids) for encoding in found):
        raise UserError(f"{folder}: its tokenizer gives token types other than 0 to a sentence")


def _check_words(folder: Path, tokenizer: Tokenizer, special: list[str]) -> None:
    """Refuse a tokenizer without a vocabulary, as transformers makes where its file is missing."""
    if not tokenizer.get_vocab(with_added_tokens=False).keys() - set(special):
        raise UserError(
            f"{folder}: the tokenizer has no words; is its vocabulary (tokenizer.json, vocab.txt) "
            "there?"
        )


def _check_fit(folder: Path, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse ids without an embedding, which JAX would silently take for the last one."""
    words = tokenizer.get_vocab(with_added_tokens=True)
    word = max(words, key=words.__getitem__, default="")
    if words.get(word, 0) >= vocab_size:
        raise UserError(
            f"{folder}: the tokenizer's {word!r} has id {words[word]}, the model has embeddings "
            f"for {vocab_size} ids; they do not belong together"
        )
    if len(tokenizer.encode("").ids) != 2:
        raise UserError(f"{folder}: the tokenizer does not put [CLS] and [SEP] around a sentence")
