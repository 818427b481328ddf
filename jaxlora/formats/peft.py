"""Read and write adapters in the format of Hugging Face PEFT, without PEFT or torch.

The conversion preserves the adapter's function exactly in both directions; unsupported features are
refused by name. PEFT stores factors per layer: `encoder.layer.3.attention.self.query` has
`lora_A: [r, in]` and `lora_B: [out, r]`. Ours are stacked: `layers.attention.self.query` has
`A: [L, in, r]` and `B: [L, r, out]`. See `families` for the names in other families.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from jaxlora import lora
from jaxlora.formats import families, heads
from jaxlora.formats.families import Family
from jaxlora.formats.huggingface import local_folder, read_safetensors, split_revision
from jaxlora.formats.peft_config import CONFIG, MERGE, SEQUENCE_CLASSIFIER, PeftConfig, read_config
from jaxlora.lora import LoraConfig
from jaxlora.nn.bert import EncoderConfig, param_shapes
from jaxlora.utils.errors import UserError
from jaxlora.utils.files import atomic_dir, write_json
from jaxlora.utils.trees import Tree

TENSORS = "adapter_model.safetensors"
_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+?)"
    r"\.(?:lora_(?P<factor>[AB])(?:\.[^.]+)?\.weight|(?P<leaf>weight|bias))"
)
# Some versions of PEFT, and third-party state dicts, keep the names of PEFT's wrappers in keys.
_WRAPPER = re.compile(
    r"\.modules_to_save(?:\.(?!(?:dense\.)?(?:weight|bias)$)[^.]+)?|\.default(?=\.)"
)
_REPLACED = ".original_module."  # tensors that those under modules_to_save replace
_POOLER = ("pooler", "dense")


# ---- writing


def save(
    folder: str | Path, adapter: Tree, config: LoraConfig, base_name: str, encoder: EncoderConfig
) -> None:
    """Write an adapter as a PEFT folder, for `PeftModel.from_pretrained`.

    Args:
      folder: new or empty; written atomically.
      adapter: an adapter with the structure of `lora.init`.
      config: configuration of the adapter.
      base_name: hub id or folder under which PEFT finds the base model.
      encoder: configuration of the base model.

    Raises:
      UserError: if the folder is not empty, or the adapter does not match its configuration.
    """
    with atomic_dir(folder) as temporary:
        write(temporary, adapter, config, base_name, encoder)


def write(
    folder: Path,
    adapter: Tree,
    config: LoraConfig,
    base_name: str,
    encoder: EncoderConfig,
    head: Tree | None = None,
) -> None:
    """Write as `save` does, into an existing folder.

    Args:
      head: a head of the kind of the family's sequence classifier, e.g. `{"pooler": …, "out": …}`,
        for PEFT to load with the adapter; None: no head.
    """
    factors = traverse_util.flatten_dict(adapter)
    _check_fit(factors, config, encoder)
    tensors = {
        f"base_model.model.{name}.lora_{path[-1]}.weight": np.ascontiguousarray(factor.T)
        for path, stacked in factors.items()
        for name, factor in zip(
            families.module_names(path[:-1], encoder), _by_layer(path, stacked), strict=True
        )
    }
    about = _to_peft(config, base_name, encoder)
    if head is not None:
        tensors, saved = _with_head(tensors, head, families.of(encoder))
        about |= {"task_type": SEQUENCE_CLASSIFIER, "modules_to_save": saved}
    write_json(folder / CONFIG, about)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def _by_layer(path: lora.Path, stacked: Any) -> np.ndarray:
    """Return the factors of a leaf by layer, `f32[L, ...]`; outside the layers `f32[1, ...]`."""
    factors = np.asarray(stacked, np.float32)
    return factors if path[0] == "layers" else factors[None]


def _with_head(
    tensors: Mapping[str, np.ndarray], head: Tree, family: Family
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the tensors of a sequence classifier with this head, and the head's module names."""
    inside = f"model.model.{family.prefix}."
    found = {key.replace("model.model.", inside, 1): x for key, x in tensors.items()}
    tensors_of_head = heads.classifier_tensors(head, family)
    found |= {f"base_model.model.{name}": tensor for name, tensor in tensors_of_head.items()}
    modules = (name.removeprefix(f"{family.prefix}.") for name in tensors_of_head)
    return found, list(dict.fromkeys(name.partition(".")[0] for name in modules))


def _check_fit(
    factors: Mapping[lora.Path, Any], config: LoraConfig, encoder: EncoderConfig
) -> None:
    modules = {path[:-1] for path in factors}
    dense = families.dense_layers(encoder)
    wanted = {p for p in dense if any(lora.matches(t, p) for t in config.target_modules)}
    if modules != wanted or not modules:
        odd = ", ".join(sorted(".".join(path) for path in modules ^ wanted)) or "none at all"
        raise UserError(f"the adapter's modules are not its configuration's targets ({odd})")
    try:
        lora.check_fit(traverse_util.unflatten_dict(dict(factors)), config)
    except ValueError as error:
        raise UserError(f"{error}; save it with the configuration it was made with") from error


def _to_peft(config: LoraConfig, base_name: str, encoder: EncoderConfig) -> dict[str, Any]:
    names = _Names(encoder)
    # Names that would also match the pooler, which our encoder lacks.
    pooler = families.of(encoder).pooler and any(
        lora.matches(name, _POOLER) for name in config.target_modules
    )
    name, revision = split_revision(base_name)
    return {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": name,
        "revision": revision,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": names.to_targets(config.target_modules),
        "exclude_modules": [".".join(_POOLER)] if pooler else None,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "rank_pattern": names.to_patterns(config.rank_pattern),
        "alpha_pattern": names.to_patterns(config.alpha_pattern),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": None,
        "use_dora": False,
    }


class _Names:
    """Translates between our module names and those that PEFT uses for a family.

    Usually only the prefix of layers differs. If the family names its Dense layers differently, one
    of our names may translate to several of the family's.
    """

    def __init__(self, encoder: EncoderConfig) -> None:
        self.encoder, self.family = encoder, families.of(encoder)
        self.renamed = families.renames_layers(encoder)
        # For patterns, which are regular expressions in PEFT.
        self._any_layer = rf"{self.family.layer.split('.')[-3]}\.\d+\."
        before = re.escape(self.family.layer).replace(r"\{\}", r"\d+")
        self._layer = re.compile(rf"(?:{self.family.prefix}\.)?{before}")

    def to_targets(self, names: Iterable[str]) -> list[str]:
        """Return PEFT's `target_modules`."""
        if self.renamed:
            return list(dict.fromkeys(theirs for name in names for theirs in self._meant(name)))
        return [theirs for name in names for theirs in self._to_target(name)]

    def to_patterns(self, items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        """Return PEFT's `rank_pattern` or `alpha_pattern`."""
        if not self.renamed:
            return {_swapped(name, "layers.", self._any_layer): value for name, value in items}
        found: dict[str, Any] = {}
        for name, value in items:  # the first match wins
            found = dict.fromkeys(self._meant(name), value) | found
        return found

    def _meant(self, name: str) -> list[str]:
        """Return the family's names of all modules that our name matches, without layer prefix."""
        return [
            self._layer.sub("", families.module_names(path, self.encoder)[0], count=1)
            for path in families.dense_layers(self.encoder)
            if lora.matches(name, path)
        ]

    def _to_target(self, name: str) -> list[str]:
        if not name.startswith("layers."):
            return [name]
        return families.module_names(tuple(name.split(".")), self.encoder)

    def from_target(self, name: str) -> str:
        """Return our name for a full module path; return other names unchanged."""
        return self._layer.sub("layers.", name, count=1)

    def from_pattern(self, name: str) -> str:
        """Return our name for a pattern that `to_patterns` wrote; return others unchanged."""
        return _swapped(name, self._any_layer, "layers.")


def _swapped(name: str, old: str, new: str) -> str:
    """Replace the prefix `old` by `new`, if the name has it."""
    return new + name.removeprefix(old) if name.startswith(old) else name


# ---- reading


class HeadParts(NamedTuple):
    """The trained parameters of a PEFT folder outside the encoder, by canonical torch names.

    Attributes:
      saved: full tensors (PEFT's `modules_to_save`), e.g. `classifier.weight: [out, in]`.
      changes: scaled LoRA updates of module weights, e.g. `pooler.dense: [out, in]`.
    """

    saved: dict[str, np.ndarray]
    changes: dict[str, np.ndarray]

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules, sorted."""
        return tuple(sorted({name.rpartition(".")[0] for name in self.saved} | self.changes.keys()))


class PeftFolder(NamedTuple):
    """The content of a PEFT folder.

    Attributes:
      adapter: adapter of the encoder.
      config: configuration of the adapter.
      head: trained parameters outside the encoder.
      written: the content of `adapter_config.json`.
    """

    adapter: Tree
    config: LoraConfig
    head: HeadParts
    written: PeftConfig


def load(
    folder: str | Path, encoder: EncoderConfig, *, encoder_only: bool = False
) -> tuple[Tree, LoraConfig]:
    """Read the encoder's adapter from a PEFT folder of any model class.

    Factors of the pooler are ignored, since the encoder has none.

    Args:
      folder: a folder with `adapter_config.json` and `adapter_model.safetensors`.
      encoder: configuration of the base model.
      encoder_only: ignore a classifier that was trained with the adapter, instead of refusing it.

    Returns:
      The adapter and its configuration; bit for bit what `save` wrote.

    Raises:
      UserError: naming the file and what is missing, broken or unsupported.
    """
    found = read(folder, encoder)
    rest = [name for name in found.head.modules if not name.startswith("pooler")]
    if rest and not encoder_only:
        raise UserError(
            f"{Path(folder) / TENSORS}: also trains {', '.join(rest)}; import the whole task with "
            "export_peft.load, or only the encoder's adapter with encoder_only=True"
        )
    return found.adapter, found.config


def read(folder: str | Path, encoder: EncoderConfig) -> PeftFolder:
    """Read a PEFT folder; see `load` for arguments and errors.

    Modules and ranks are those of the tensors. Where ranks or scales differ between layers, factors
    are zero-padded to the largest rank, and B is multiplied by the ratio of the scales; layers
    without an adapter are zero. This preserves the function, and padding stays zero in training.
    """
    folder = Path(folder).expanduser()
    written = read_config(folder)
    found, head = _read_factors(folder, written, encoder)
    _check_shapes(folder / TENSORS, found, encoder)
    _check_layers(folder / CONFIG, written, found)
    flat, modules = {}, {}
    for path, by_layer in found.items():
        modules[path], flat[*path, "A"], flat[*path, "B"] = _stack(
            by_layer, written, encoder.num_hidden_layers, folder / CONFIG
        )
    adapter = traverse_util.unflatten_dict(flat)
    return PeftFolder(adapter, _config(written, modules, encoder), head, written)


def find(place: Path, name: str | None = None) -> Path:
    """Return the folder of one adapter; PEFT saves several adapters as subfolders.

    Args:
      place: the folder of an adapter, or one with subfolders of adapters.
      name: name of the adapter; PEFT's `default` is in the folder itself. None: the default or only
        one.

    Raises:
      UserError: if no adapter has that name, or there are several and no name; lists the names.
    """
    folder = local_folder(str(place))
    if folder is None:
        raise UserError(f"{place}: there is no such folder")
    there = {p.name: p for p in sorted(folder.iterdir()) if (p / CONFIG).is_file()}
    if (folder / CONFIG).is_file():
        there["default"] = folder
    if name is None and ("default" in there or len(there) < 2):
        return there.get("default") or next(iter(there.values()), folder)
    if name in there:
        return there[name]
    wrong = "holds several adapters" if name is None else f"holds no adapter {name!r}"
    raise UserError(f"{folder}: {wrong}; choose with `adapter` from {_some(there) or 'none'}")


class Factors(NamedTuple):
    """One Linear's adapter.

    Attributes:
      module: full name of the Linear.
      a: `f32[in, r]`.
      b: `f32[r, out]`.
    """

    module: str
    a: np.ndarray
    b: np.ndarray


def _read_factors(
    folder: Path, written: PeftConfig, encoder: EncoderConfig
) -> tuple[dict[lora.Path, dict[int | None, Factors]], HeadParts]:
    """Return the encoder's factors (our path → layer → factors), and the parts of the head."""
    path, family = folder / TENSORS, families.of(encoder)
    tensors = _read_tensors(path, encoder)
    found: dict[lora.Path, dict[int | None, Factors]] = {}
    changes = {}
    for module, factors in sorted(_pairs(path, tensors).items()):
        if place := families.linears(encoder).get(module):
            found.setdefault(place.path, {})[place.layer] = factors
        elif _is_head(module, family):
            changes[module] = _change(folder / CONFIG, written, factors)
        else:
            raise UserError(f"{path}: the base model has no {factors.module}; name its own")
    if not found:
        raise UserError(f"{path}: has no tensors of a {family.model}'s layers")
    saved = {f"{m}.{leaf}": x for (m, leaf), (_, x) in tensors.items() if leaf not in ("A", "B")}
    _check_saved(folder, written, saved, family)
    return dict(sorted(found.items())), HeadParts(saved, changes)


def _is_head(module: str, family: Family) -> bool:
    """Return whether a module comes after the encoder, so that no sentence vector needs it."""
    return module.partition(".")[0] in ("pooler", *families.HEADS, *family.heads)


def _check_saved(folder: Path, written: PeftConfig, saved: Iterable[str], family: Family) -> None:
    """Refuse a folder whose tensors lack a module of `modules_to_save`."""
    there = {part for name in saved for part in _endings(name.rpartition(".")[0])}
    wanted = {name.removeprefix(f"{family.prefix}.") for name in written.modules_to_save}
    # PEFT lists `classifier` and `score` for any classifier; a model has only one of them.
    if missing := wanted - there - {"score"}:
        raise UserError(
            f"{folder / CONFIG}: modules_to_save names {_some(missing)}, which {TENSORS} lacks; "
            "the two files do not belong together"
        )


def _endings(module: str) -> Iterator[str]:
    """Yield every name by which PEFT may refer to a module or to a parent of it.

    >>> sorted(_endings("pooler.dense"))
    ['dense', 'pooler', 'pooler.dense']
    """
    parts = module.split(".")
    for start in range(len(parts)):
        for end in range(start + 1, len(parts) + 1):
            yield ".".join(parts[start:end])


def _read_tensors(
    path: Path, encoder: EncoderConfig
) -> dict[tuple[str, str], tuple[str, np.ndarray]]:
    """Return (canonical module; `A`, `B`, `weight` or `bias`) → (module, tensor)."""
    prefix, model = f"{families.of(encoder).prefix}.", families.of(encoder).model
    pickle = path.with_suffix(".bin")
    if pickle.exists() and not path.exists():
        raise UserError(
            f"{path}: missing; {pickle.name} is a pickle, which can run code, and is not opened: "
            "save the adapter with PEFT's save_pretrained(folder, safe_serialization=True)"
        )
    found: dict[tuple[str, str], tuple[str, np.ndarray]] = {}
    unknown = []
    for key, tensor in read_safetensors(path):
        match = _KEY.fullmatch(_WRAPPER.sub("", key))
        if match is None or not _is_ours(match, tensor, encoder):
            unknown.append(key)
        elif _REPLACED not in key:
            place = match["module"].removeprefix(prefix), match["factor"] or match["leaf"]
            if place in found:
                raise UserError(
                    f"{path}: {key!r} is there twice, with and without {prefix!r} or an adapter's "
                    "name"
                )
            found[place] = match["module"], tensor
    if unknown:
        raise UserError(
            f"{path}: these tensors are no LoRA factors of a {model}'s layers: {_some(unknown)}; "
            "an adapter that trains or changes anything but these and a head cannot be read; if it "
            f"is of such a model, {MERGE}"
        )
    return found


def _is_ours(match: re.Match[str], tensor: np.ndarray, encoder: EncoderConfig) -> bool:
    """Return whether a tensor is a LoRA factor of the encoder, or part of a head."""
    family = families.of(encoder)
    module = match["module"].removeprefix(f"{family.prefix}.")
    head = _is_head(module, family)
    if not match["factor"]:
        return head
    before = family.layer.partition("{}")[0]
    layer = module.startswith(before) or module in families.linears(encoder)
    return tensor.ndim == 2 and (head or layer)


def _pairs(
    path: Path, tensors: Mapping[tuple[str, str], tuple[str, np.ndarray]]
) -> dict[str, Factors]:
    """Return canonical module → both factors, for each Linear."""
    found = {}
    for (module, which), (name, _) in tensors.items():
        if which not in ("A", "B"):
            continue
        other = "B" if which == "A" else "A"
        if (module, other) not in tensors:
            raise UserError(f"{path}: {name} has lora_{which} but no lora_{other}")
        found[module] = Factors(name, tensors[module, "A"][1].T, tensors[module, "B"][1].T)
    return found


def _change(path: Path, written: PeftConfig, factors: Factors) -> np.ndarray:
    """Return the scaled LoRA update of a Linear's weight, `f32[out, in]`."""
    if factors.a.shape[1] != factors.b.shape[0]:
        raise UserError(
            f"{path.with_name(TENSORS)}: {factors.module} has lora_A {factors.a.T.shape} and "
            f"lora_B {factors.b.T.shape}, whose ranks differ"
        )
    scale = written.scale(*_checked_values(path, written, factors))
    with np.errstate(all="ignore"):  # a bank refuses non-finite parameters
        return np.asarray(scale * (factors.a @ factors.b).T, np.float32)


def _checked_values(path: Path, written: PeftConfig, factors: Factors) -> tuple[int, float]:
    """Return rank and alpha of a Linear, after comparing the rank with the tensors."""
    rank, alpha = written.values_of(factors.module)
    if factors.a.shape[1] != rank:
        raise UserError(
            f"{path}: says that {factors.module} has rank {rank}, its tensors have "
            f"{factors.a.shape[1]}; the two files do not belong together"
        )
    return rank, alpha


def _check_shapes(
    path: Path, found: Mapping[lora.Path, Mapping[int | None, Factors]], encoder: EncoderConfig
) -> None:
    kernels = traverse_util.flatten_dict(param_shapes(encoder))
    for module, by_layer in found.items():
        fan_in, fan_out = kernels[*module, "kernel"].shape[-2:]
        for factors in by_layer.values():
            rank = factors.a.shape[1]
            if factors.a.shape != (fan_in, rank) or factors.b.shape != (rank, fan_out) or not rank:
                raise UserError(
                    f"{path}: {factors.module} has lora_A {factors.a.T.shape} and lora_B "
                    f"{factors.b.T.shape}, the base model wants (r, {fan_in}) and ({fan_out}, r)"
                )


def _check_layers(
    path: Path, written: PeftConfig, found: Mapping[lora.Path, Mapping[int | None, Factors]]
) -> None:
    there = {layer for by_layer in found.values() for layer in by_layer if layer is not None}
    if written.layers and written.layers != there:
        raise UserError(
            f"{path}: layers_to_transform is {sorted(written.layers)}, but the tensors are of the "
            f"layers {sorted(there)}; the two files do not belong together"
        )


def _stack(
    by_layer: Mapping[int | None, Factors], written: PeftConfig, layers: int, path: Path
) -> tuple[tuple[int, float], Any, Any]:
    """Stack the layers of a module: return (rank, alpha), `A: [L, in, r]`, `B: [L, r, out]`.

    A module outside the layers has no L axis.
    """
    values = {layer: _checked_values(path, written, f) for layer, f in by_layer.items()}
    rank, alpha = max(values.values(), key=lambda v: v[0])
    scale = written.scale(rank, alpha)
    example = next(iter(by_layer.values()))
    lead = () if None in by_layer else (layers,)
    a = np.zeros((*lead, example.a.shape[0], rank), np.float32)
    b = np.zeros((*lead, rank, example.b.shape[1]), np.float32)
    for layer, factors in by_layer.items():
        own = written.scale(*values[layer])
        at = () if layer is None else (layer,)
        a[*at, :, : factors.a.shape[1]] = factors.a
        # Equal scales give exactly 1, so that factors stay bit for bit the same.
        b[*at, : factors.b.shape[0]] = factors.b * (1.0 if own == scale else own / scale)
    return (rank, alpha), jnp.asarray(a), jnp.asarray(b)


def _config(
    written: PeftConfig, modules: Mapping[lora.Path, tuple[int, float]], encoder: EncoderConfig
) -> LoraConfig:
    """Return the configuration, with the file's own targets and patterns if they match exactly."""
    names, ours = written.target_modules, _Names(encoder)
    if isinstance(names, tuple):
        kept = LoraConfig(
            written.r,
            written.lora_alpha,
            tuple(dict.fromkeys(map(ours.from_target, names))),
            written.use_rslora,
            tuple((ours.from_pattern(k), v) for k, v in written.rank_pattern.items()),
            tuple((ours.from_pattern(k), v) for k, v in written.alpha_pattern.items()),
            written.lora_dropout,
        )
        if _means(kept, modules, param_shapes(encoder)):
            return kept
    return lora.describe(modules, written.use_rslora, written.lora_dropout)


def _means(
    config: LoraConfig, modules: Mapping[lora.Path, tuple[int, float]], base_shapes: Tree
) -> bool:
    try:
        chosen = lora.targets(base_shapes, config)
    except ValueError:
        return False
    return {path: (config.rank_of(path), config.alpha_of(path)) for path in chosen} == modules


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:8]) + (", …" if len(ordered) > 8 else "")
