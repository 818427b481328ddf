"""A table of the differences between encoder families of transformers.

A family's entry maps the fields of `config.json` to our configuration, gives the names of stored
tensors, and describes the modules around the encoder. Our parameter trees name modules as BERT does
(`layers.attention.self.query`); ModernBERT has its own names.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from jaxlora import lora
from jaxlora.lora import LoraConfig
from jaxlora.nn.bert import ACTIVATIONS, BertConfig, EncoderConfig, param_shapes
from jaxlora.nn.heads import HeadName
from jaxlora.nn.modernbert import GLOBAL, LOCAL, ModernBertConfig
from jaxlora.utils import trees
from jaxlora.utils.errors import UserError

Raw = dict[str, Any]


class Classifier(NamedTuple):
    """A family's sequence classifier: a head with one hidden layer on the first token's vector.

    Attributes:
      head: kind of the head.
      modules: layer of our head → module of the classifier.
    """

    head: HeadName
    modules: Mapping[str, str]


_LEAVES = {"kernel": "weight", "scale": "weight"}


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of transformers, identified by its `model_type`.

    "Our" fields are those of `config`, "its" fields those of the family's `config.json`.

    Attributes:
      model: class name of the bare encoder.
      prefix: attribute name of the encoder inside models with a head, such as `bert`.
      config: class of our configuration.
      fields: our field → its field, where the names differ.
      more: our fields that this family has and BERT lacks.
      fixed: our fields that this family lacks and BERT has, with their fixed values.
      defaults: our fields with the values to use if its `config.json` omits them.
      old_fields: its fields from other versions of transformers, which `upgrade` converts.
      upgrade: converts all versions of its `config.json` to one; raises ValueError if it cannot.
      only: its fields with a restricted set of supported values.
      harmless: its fields that do not change what the encoder computes.
      layer: prefix of the modules of layer `{}`.
      modules: our module → its module, where they differ. Modules of layers are named without
        `layers.`; `{next}` is the number of the following layer.
      last: the same, for the last layer only.
      heads: modules around its encoder, besides those in `HEADS`.
      pooler: whether its class has a pooling layer by default.
      token_types: whether its class takes token types.
      classifier: its sequence classifier; None: not supported.
      roles: BERT's module → its module, so that default `target_modules` apply to this family.
    """

    model: str
    prefix: str
    config: type[EncoderConfig] = BertConfig
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    more: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    old_fields: tuple[str, ...] = ()
    upgrade: Callable[[Raw], Raw] = lambda raw: raw
    only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
    layer: str = "encoder.layer.{}."
    modules: Mapping[str, str] = dataclasses.field(default_factory=dict)
    last: Mapping[str, str] = dataclasses.field(default_factory=dict)
    heads: tuple[str, ...] = ()
    pooler: bool = False
    token_types: bool = False
    classifier: Classifier | None = None
    roles: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def sequence_classifier(self) -> str:
        """Class name for sequence classification."""
        return f"{self.model.removesuffix('Model')}ForSequenceClassification"

    @property
    def read_fields(self) -> dict[str, str]:
        """All fields that are read: our field → its field."""
        ours = (
            f.name
            for f in dataclasses.fields(self.config)
            if f.name not in self.fixed and (f.name in self.more or not f.metadata.get("of some"))
        )
        return {name: self.fields.get(name, name) for name in ours}

    @property
    def values(self) -> dict[str, tuple[Any, ...]]:
        """Its fields with a restricted set of values → the supported values."""
        return {
            self.fields.get("hidden_act", "hidden_act"): tuple(ACTIVATIONS),
            **{field: v for field, v in ONLY.items() if field not in self.read_fields},
            **self.only,
        }

    def classifies(self, head: str) -> bool:
        """Return whether a kind of head is that of the family's sequence classifier."""
        return self.classifier is not None and self.classifier.head == head

    @property
    def left_out(self) -> re.Pattern[str]:
        """Pattern for names of head tensors; the first group is the head's name."""
        return re.compile(rf"({'|'.join((*HEADS, *self.heads))})\.")


ONLY: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
    "per_layer_config": (None,),
    "use_bfloat16": (False, None),
    "quantization_config": (None,),
    "layer_types": (None,),
}
"""Fields of any `config.json` → the supported values."""

# Heads of transformers' Bert classes and of common third-party models.
HEADS = ("cls", "classifier", "pre_classifier", "score", "qa_outputs", "lm_head", "crf")
_POOLER = Classifier("pooler", {"pooler": "pooler.dense", "out": "classifier"})
_CLASSIFIER = Classifier("pooler", {"pooler": "classifier.dense", "out": "classifier.out_proj"})


def _upgrade_modernbert(raw: Raw) -> Raw:
    """Convert ModernBERT's fields of transformers 4 and 5 to a common form.

    Version 4 has `global_attn_every_n_layers`, `global_rope_theta` and `local_rope_theta`; version
    5 has `layer_types` and `rope_parameters`, which take precedence.
    """
    raw = dict(raw)
    every, count = raw.pop("global_attn_every_n_layers", 3), raw.get("num_hidden_layers")
    if type(every) is not int or every < 1:
        raise ValueError(f"global_attn_every_n_layers: {every!r} is not a whole number above 0")
    if count is not None and (type(count) is not int or not 1 <= count <= 1000):
        raise ValueError(f"num_hidden_layers: {count!r} is not from 1 to 1,000")
    if raw.get("layer_types") is None:
        raw["layer_types"] = [LOCAL if i % every else GLOBAL for i in range(count or 0)]
    ropes = raw.pop("rope_parameters", None)
    if not isinstance(ropes, dict | None):
        raise ValueError(f"rope_parameters: {ropes!r} is not an object")
    ropes = dict(ropes or {})
    for kind, field in ((GLOBAL, "global_rope_theta"), (LOCAL, "local_rope_theta")):
        rope = ropes.pop(kind, None) or {}
        if not isinstance(rope, dict) or rope.keys() - {"rope_type", "type", "rope_theta"}:
            raise ValueError(f"rope_parameters: {kind} is {rope!r}; only rope_theta is supported")
        if {rope.get("rope_type", "default"), rope.get("type", "default")} != {"default"}:
            raise ValueError(f"rope_parameters: {kind} is {rope!r}; only 'default' is supported")
        if rope.get("rope_theta") is not None:
            raw[field] = rope["rope_theta"]
    if ropes:
        raise ValueError(f"rope_parameters: {ropes!r} is not supported")
    return raw


_ROBERTA = Family(
    "RobertaModel",
    "roberta",
    fields={"padding_idx": "pad_token_id"},
    more=("padding_idx",),
    defaults={"padding_idx": 1},
    pooler=True,
    classifier=_CLASSIFIER,
)
FAMILIES: dict[str, Family] = {
    "bert": Family("BertModel", "bert", pooler=True, token_types=True, classifier=_POOLER),
    "roberta": _ROBERTA,
    "xlm-roberta": dataclasses.replace(_ROBERTA, model="XLMRobertaModel"),
    "camembert": dataclasses.replace(_ROBERTA, model="CamembertModel"),
    "electra": Family(
        "ElectraModel",
        "electra",
        more=("embedding_size",),
        defaults={"embedding_size": 128},
        harmless=frozenset(
            {"summary_type", "summary_use_proj", "summary_activation", "summary_last_dropout"}
        ),
        heads=(
            "discriminator_predictions", "generator_predictions", "generator_lm_head",
            "sequence_summary",
        ),
        token_types=True,
        classifier=Classifier(
            "dense_gelu", {"dense": "classifier.dense", "out": "classifier.out_proj"}
        ),
    ),
    "distilbert": Family(
        "DistilBertModel",
        "distilbert",
        fields={
            "hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim", "hidden_act": "activation",
            "hidden_dropout_prob": "dropout", "attention_probs_dropout_prob": "attention_dropout",
        },
        fixed={"type_vocab_size": 0, "layer_norm_eps": 1e-12},
        # The position embeddings are stored, so it does not matter how they were initialized.
        harmless=frozenset(
            {"sinusoidal_pos_embds", "qa_dropout", "seq_classif_dropout", "tie_weights_"}
        ),
        layer="transformer.layer.{}.",
        modules={
            "attention.self.query": "attention.q_lin",
            "attention.self.key": "attention.k_lin",
            "attention.self.value": "attention.v_lin",
            "attention.output.dense": "attention.out_lin",
            "attention.output.LayerNorm": "sa_layer_norm",
            "intermediate.dense": "ffn.lin1",
            "output.dense": "ffn.lin2",
            "output.LayerNorm": "output_layer_norm",
        },
        heads=("vocab_transform", "vocab_layer_norm", "vocab_projector"),
        classifier=Classifier("dense_relu", {"dense": "pre_classifier", "out": "classifier"}),
    ),
    "mpnet": Family(
        "MPNetModel",
        "mpnet",
        # transformers ignores the config here: padding_idx is always 1, with 32 buckets.
        more=("relative_attention_num_buckets",),
        fixed={"padding_idx": 1, "type_vocab_size": 0},
        defaults={"relative_attention_num_buckets": 32},
        only={"relative_attention_num_buckets": (32,)},
        modules={
            "attention.self.query": "attention.attn.q",
            "attention.self.key": "attention.attn.k",
            "attention.self.value": "attention.attn.v",
            "attention.output.dense": "attention.attn.o",
            "attention.output.LayerNorm": "attention.LayerNorm",
            "relative_attention_bias": "encoder.relative_attention_bias",
        },
        pooler=True,
        classifier=_CLASSIFIER,
    ),
    "modernbert": Family(
        "ModernBertModel",
        "model",
        config=ModernBertConfig,
        fields={
            "hidden_act": "hidden_activation", "layer_norm_eps": "norm_eps",
            "hidden_dropout_prob": "mlp_dropout",
            "attention_probs_dropout_prob": "attention_dropout",
        },
        fixed={"type_vocab_size": 0},
        old_fields=("global_attn_every_n_layers", "rope_parameters"),
        upgrade=_upgrade_modernbert,
        only={"rope_scaling": (None,)},
        harmless=frozenset({
            "initializer_cutoff_factor", "decoder_bias", "classifier_pooling", "classifier_bias",
            "classifier_activation", "deterministic_flash_attn", "sparse_prediction",
            "sparse_pred_ignore_index", "reference_compile", "repad_logits_with_grad",
            "layer_norm_eps", "cls_token_id",
        }),
        layer="layers.{}.",
        modules={
            "embeddings.word_embeddings": "embeddings.tok_embeddings",
            "embeddings.LayerNorm": "embeddings.norm",
            "next_norm": "layers.{next}.attn_norm",
        },
        last={"next_norm": "final_norm"},
        heads=("head", "decoder"),
        roles={
            "query": "attn.Wqkv", "key": "attn.Wqkv", "value": "attn.Wqkv",
            "attention.output.dense": "attn.Wo", "intermediate.dense": "mlp.Wi",
            "output.dense": "Wo", "dense": "Wo",
        },
    ),
}  # fmt: skip


def of(config: EncoderConfig) -> Family:
    """Return the family of a configuration."""
    return FAMILIES[config.model_type]


def tensor_names(path: lora.Path, config: EncoderConfig) -> list[str]:
    """Return the names of the stored tensors of a parameter leaf.

    Args:
      path: path of the leaf.
      config: configuration with the family and the number of layers.

    Returns:
      One name per layer for a leaf of `layers`, else a single name.

    >>> tensor_names(("layers", "output", "dense", "kernel"), BertConfig(num_hidden_layers=2))
    ['encoder.layer.0.output.dense.weight', 'encoder.layer.1.output.dense.weight']
    """
    *module, leaf = path
    if leaf.endswith(("_embeddings", "_bias")):  # an embedding table: a module with one leaf
        module, leaf = [*module, leaf], "weight"
    leaf = _LEAVES.get(leaf, leaf)
    return [f"{name}.{leaf}" for name in module_names(tuple(module), config)]


def module_names(module: lora.Path, config: EncoderConfig) -> list[str]:
    """Return transformers' names of a module: one per layer for a module of `layers`, else one.

    >>> config = BertConfig(model_type="distilbert")
    >>> module_names(("layers", "attention", "self", "query"), config)[1]
    'transformer.layer.1.attention.q_lin'
    """
    family = of(config)
    name = ".".join(module)
    if module[0] != "layers":
        return [family.modules.get(name, name)]
    name = name.removeprefix("layers.")
    theirs = family.modules.get(name, name)
    if "{next}" not in theirs:
        theirs = family.layer + theirs
    count = config.num_hidden_layers
    names = [theirs.format(i, next=i + 1) for i in range(count)]
    return [*names[:-1], family.last.get(name, names[-1])]


class Place(NamedTuple):
    """The place of a Linear of transformers in our parameters.

    Attributes:
      path: path of our Dense layer.
      layer: index of the encoder layer; None: outside the layers.
    """

    path: lora.Path
    layer: int | None


@functools.lru_cache(maxsize=8)
def linears(config: EncoderConfig) -> dict[str, Place]:
    """Return name → place of all Linears of transformers' encoder; do not modify the result."""
    found: dict[str, Place] = {}
    for path in dense_layers(config):
        names = module_names(path, config)
        numbers = range(len(names)) if path[0] == "layers" else (None,)
        found |= {name: Place(path, i) for name, i in zip(names, numbers, strict=True)}
    return found


def dense_layers(config: EncoderConfig) -> list[lora.Path]:
    """Return the paths of all Dense layers."""
    flat = trees.flatten(param_shapes(config))
    return [path[:-1] for path in flat if path[-1] == "kernel"]


def renames_layers(config: EncoderConfig) -> bool:
    """Return whether the family names Dense layers differently from our parameters."""
    names = (module_names(path, config)[0] for path in dense_layers(config))
    own = (".".join(path) for path in dense_layers(config))
    first = of(config).layer.format(0)
    return any(
        theirs != our.replace("layers.", first, 1) for theirs, our in zip(names, own, strict=True)
    )


def config_like(model_type: str, adapter: trees.Tree) -> EncoderConfig:
    """Return a configuration with the modules of an adapter's base, but with default sizes.

    Raises:
      UserError: if the family is unknown.
    """
    if model_type not in FAMILIES:
        raise UserError(
            f"the base model's family {model_type!r} is not one of {', '.join(FAMILIES)}"
        )
    layers = [x.shape[0] for x in jax.tree.leaves(adapter.get("layers", {}))]
    more: dict[str, Any] = {"embedding_size": 1} if "embeddings_project" in adapter else {}
    count = max(layers, default=1)
    return FAMILIES[model_type].config(num_hidden_layers=count, model_type=model_type, **more)


def localise(adapter: LoraConfig, config: EncoderConfig) -> LoraConfig:
    """Translate the module names of an adapter's configuration to those of our parameters.

    A name may be ours, the family's own (as in PEFT), or BERT's name for the corresponding layer.
    Unknown names are kept, so that `lora.targets` refuses them.

    >>> localise(LoraConfig(8, 8.0, ("q_lin", "ffn.lin2")), BertConfig(model_type="distilbert"))
    ... # doctest: +ELLIPSIS
    LoraConfig(rank=8, alpha=8.0, target_modules=('attention.self.query', 'output.dense'), ...)
    """
    known = functools.partial(_own_names, config=config)

    def patterns(items: tuple[tuple[str, Any], ...]) -> tuple[tuple[str, Any], ...]:
        return tuple({own: value for name, value in items for own in known(name)}.items())

    targets = dict.fromkeys(own for name in adapter.target_modules for own in known(name))
    return dataclasses.replace(
        adapter,
        target_modules=tuple(targets),
        rank_pattern=patterns(adapter.rank_pattern),
        alpha_pattern=patterns(adapter.alpha_pattern),
    )


def _own_names(name: str, config: EncoderConfig) -> list[str]:
    """Return our names for the modules that a name refers to."""
    if any(lora.matches(name, path) for path in dense_layers(config)):
        return [name]
    meant = {
        ".".join(place.path).removeprefix("layers.")
        for module, place in linears(config).items()
        if f".{module}".endswith(f".{name}")
    }
    return sorted(meant) or [of(config).roles.get(name, name)]
