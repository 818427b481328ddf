"""Export a task as a Hugging Face folder: merged encoder, head, and code that applies both.

Using the folder needs only transformers and torch, or sentence-transformers. A task whose head is
that of the base family's sequence classifier is exported as one, which is also a cross-encoder if
the task reads pairs together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.numpy import save_file

from jaxlora import lora
from jaxlora.formats import families, heads, huggingface
from jaxlora.formats.families import Family
from jaxlora.formats.huggingface import Pretrained
from jaxlora.nn.bert import BertConfig
from jaxlora.serving.export_readme import readme
from jaxlora.serving.task_models import TaskModels
from jaxlora.tasks.task import Task
from jaxlora.utils.files import atomic_dir, read_object, write_json, write_text
from jaxlora.utils.trees import Tree

if TYPE_CHECKING:
    from tokenizers import Tokenizer

README, TOKENIZER = "README.md", "tokenizer.json"


def save(folder: str | Path, base: Pretrained, trained: TaskModels, name: str) -> None:
    """Write a task for transformers and sentence-transformers.

    With the head of the family's sequence classifier, the folder is for
    `AutoModelForSequenceClassification` (and, if the task reads pairs together, for
    sentence-transformers' `CrossEncoder`), else for `AutoModel`. Any task that does not read pairs
    together can be loaded as a `SentenceTransformer`.

    Args:
      folder: new or empty; written atomically.
      base: the base model, see `TaskModels.load_base`.
      trained: the task models with the task.
      name: the name of the task.

    Raises:
      UserError: if the folder is not empty.
    """
    model, family = trained.find(name), families.of(base.config)
    head = trained.head(name, base)
    classifies = family.classifies(model.task.head)
    tensors = huggingface.export(encoder_params(base, trained, name), base.config)
    if classifies:
        tensors = {f"{family.prefix}.{key}": tensor for key, tensor in tensors.items()}
        tensors |= heads.classifier_tensors(head, family)
    special = special_tokens(base)
    with atomic_dir(folder) as temporary:
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        write_json(
            temporary / "config.json",
            _config(base, special["pad_token"])
            | (_labels(model.task, family) if classifies else {}),
        )
        length = trained.max_length if model.task.joint else None
        write_tokenizer(temporary, base, special, base.tokenizer.to_str(), length)
        if not model.task.joint:  # a joint task has vectors of pairs, not of sentences
            for file, value in _sentence_transformers(base, trained).items():
                write_json(temporary / file, value)
        if not classifies:
            heads.write(temporary, head)
        write_text(temporary / README, readme(trained, model, family))


def encoder_params(base: Pretrained, trained: TaskModels, name: str) -> Tree:
    """Return the `params` tree of a task's encoder, with its adapter merged into the base."""
    tree = trained.models[name].tree
    found = trained.trees[tree]
    if "lora" in found:
        return lora.merge(base.params, found["lora"], trained.configs[tree])
    return found.get("params", base.params)


def _sentence_transformers(base: Pretrained, trained: TaskModels) -> dict[str, Any]:
    """Return sentence-transformers' configuration files: file name → content."""
    width, kind = base.config.hidden_size, "sentence_transformers.models."
    mode = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens"}
    return {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": f"{kind}Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{kind}Pooling"},
        ],
        "sentence_bert_config.json": {"max_seq_length": trained.max_length},
        "1_Pooling/config.json": {"word_embedding_dimension": width}
        | {field: pooling == trained.pooling for pooling, field in mode.items()},
    }


def _config(base: Pretrained, padding: str) -> dict[str, Any]:
    """Return the base's config.json without the fields of heads and training."""
    family = families.of(base.config)
    path = huggingface.find(base.name) / "config.json"
    kept = {k: v for k, v in read_object(path).items() if k in huggingface.known_fields(family)}
    about = {"architectures": [family.model], "model_type": base.config.model_type}
    padded = {"pad_token_id": base.tokenizer.token_to_id(padding)}
    if isinstance(base.config, BertConfig) and base.config.padding_idx >= 0:
        padded = {"pad_token_id": base.config.padding_idx}  # RoBERTa counts positions from this id
    return about | {"dtype": "float32"} | kept | padded


def _labels(task: Task, family: Family) -> dict[str, Any]:
    """Return the fields of a sequence classifier's config.json that describe its outputs."""
    whole = task.outputs == len(task.classes)
    names, problem = task.classes if whole else task.classes[1:] or ("score",), task.problem
    found: dict[str, Any] = {
        "architectures": [family.sequence_classifier],
        "problem_type": problem,
        "id2label": {str(n): name for n, name in enumerate(names)},
        "label2id": {name: n for n, name in enumerate(names)},
    }
    if task.joint:  # the activation that a CrossEncoder applies
        each = problem == "multi_label_classification"
        applied = "activation.Sigmoid" if each else "linear.Identity"
        found["sentence_transformers"] = {"activation_fn": f"torch.nn.modules.{applied}"}
    return found


def write_tokenizer(
    folder: Path, base: Pretrained, special: dict[str, str], tokenizer: str, max_length: int | None
) -> None:
    """Write a tokenizer's files; `tokenizer` is the content of tokenizer.json."""
    types = ["token_type_ids"] * families.of(base.config).token_types
    rest = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", *types, "attention_mask"],
    }
    length = {"model_max_length": max_length or base.config.max_length}
    write_text(folder / TOKENIZER, tokenizer)
    write_json(folder / "tokenizer_config.json", rest | special | length)
    write_json(folder / "special_tokens_map.json", special)


# ---- special tokens

_ROLES = ("pad", "unk", "cls", "sep", "mask", "bos", "eos")
_USUAL = {"pad": ("[PAD]", "<pad>"), "mask": ("[MASK]", "<mask>")}


def special_tokens(base: Pretrained) -> dict[str, str]:
    """Find the special tokens of a base.

    A token is taken from the tokenizer, else from the declarations in its files, else by its usual
    name. Without a padding token, the unknown token (or `[SEP]`) pads; the mask hides it.

    Returns:
      Field of transformers' files, e.g. `pad_token`, → token; at least `pad_token`, `cls_token` and
      `sep_token`.
    """
    used, declared = _used(base.tokenizer), _declared(huggingface.find(base.name))
    found = {}
    for role in _ROLES:
        options = (used.get(role), declared.get(f"{role}_token"), *_USUAL.get(role, ()))
        known = (t for t in options if t and base.tokenizer.token_to_id(t) is not None)
        if token := next(known, None):
            found[f"{role}_token"] = token
    return {"pad_token": found.get("unk_token", found["sep_token"])} | found


def _used(tokenizer: Tokenizer) -> dict[str, str | None]:
    """Return the tokens that a tokenizer puts around a sentence, and its unknown token."""
    # Looked up by id, since a template may name tokens differently from the vocabulary.
    first, last = map(tokenizer.id_to_token, tokenizer.encode("").ids)
    model = json.loads(tokenizer.to_str())["model"]
    unknown = model.get("unk_token")
    if model.get("unk_id") is not None:  # Unigram stores an id
        unknown = tokenizer.id_to_token(model["unk_id"])
    return {"cls": first, "sep": last, "unk": unknown}


def _declared(folder: Path) -> dict[str, str]:
    """Return the special tokens declared in a base's files, field → token."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the later file wins
        if (folder / name).is_file():
            for field, value in read_object(folder / name).items():
                token = value.get("content") if isinstance(value, dict) else value
                if field.endswith("_token") and isinstance(token, str):
                    found[field] = token
    return found
