"""A task as a Hugging Face folder: its merged encoder, its head, and the code that applies both.

Who gets the folder needs transformers and torch, or sentence-transformers, and nothing of ours.
"""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.numpy import save_file

from jaxlora import lora
from jaxlora.formats import families, heads, huggingface
from jaxlora.formats.families import Family
from jaxlora.formats.heads import HEAD
from jaxlora.formats.huggingface import Pretrained
from jaxlora.nn.bert import BertConfig
from jaxlora.serving.task_models import TaskModel, TaskModels
from jaxlora.tasks.task import HEADS, SPAN, Task
from jaxlora.utils.files import atomic_dir, read_object, write_json, write_text
from jaxlora.utils.trees import Tree

if TYPE_CHECKING:
    from tokenizers import Tokenizer

README = "README.md"


def save(folder: str | Path, base: Pretrained, trained: TaskModels, name: str) -> None:
    """Write a task for `AutoModel.from_pretrained` and `SentenceTransformer`.

    Args:
      folder: new or empty; written atomically.
      base: the base model, see `TaskModels.load_base`.
      trained: where the task comes from.
      name: the task.

    Raises:
      UserError: if the folder is not empty.
    """
    model = trained.find(name)
    tensors = huggingface.export(encoder_params(base, trained, name), base.config)
    special = special_tokens(base)
    with atomic_dir(folder) as temporary:
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        write_json(temporary / "config.json", _config(base, special["pad_token"]))
        write_text(temporary / "tokenizer.json", base.tokenizer.to_str())
        write_json(temporary / "tokenizer_config.json", _tokenizer_config(base, special))
        write_json(temporary / "special_tokens_map.json", special)
        for file, value in _sentence_transformers(base, trained).items():
            write_json(temporary / file, value)
        heads.write(temporary, model.head)
        write_text(temporary / README, readme(trained, model, families.of(base.config)))


def encoder_params(base: Pretrained, trained: TaskModels, name: str) -> Tree:
    """The encoder of a task as one `params` tree, its adapter merged into the base's."""
    tree = trained.models[name].tree
    found = trained.trees[tree]
    if "lora" in found:
        return lora.merge(base.params, found["lora"], trained.configs[tree])
    return found.get("params", base.params)


def _sentence_transformers(base: Pretrained, trained: TaskModels) -> dict[str, Any]:
    """The files that tell sentence-transformers how to pool; file name → content."""
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
    """The base's config.json without what is of its heads and its training."""
    family = families.of(base.config)
    path = huggingface.find(base.name) / "config.json"
    kept = {k: v for k, v in read_object(path).items() if k in huggingface.known_fields(family)}
    about = {"architectures": [family.model], "model_type": base.config.model_type}
    padded = {"pad_token_id": base.tokenizer.token_to_id(padding)}
    if isinstance(base.config, BertConfig) and base.config.padding_idx >= 0:
        padded = {"pad_token_id": base.config.padding_idx}  # positions count from its id
    return about | {"dtype": "float32"} | kept | padded


def _tokenizer_config(base: Pretrained, special: dict[str, str]) -> dict[str, Any]:
    # The class that takes tokenizer.json as it is.
    rest: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if not families.of(base.config).token_types:
        rest["model_input_names"] = ["input_ids", "attention_mask"]
    return rest | special | {"model_max_length": base.config.max_length}


# ---- special tokens

_ROLES = ("pad", "unk", "cls", "sep", "mask", "bos", "eos")
_USUAL = {"pad": ("[PAD]", "<pad>"), "mask": ("[MASK]", "<mask>")}


def special_tokens(base: Pretrained) -> dict[str, str]:
    """Find a base's special tokens.

    They are those that its tokenizer uses, or its files declare, or by their usual names. Without
    any for padding, the one for unknown words pads: the attention mask hides it.

    Returns:
      Tokens by the fields of transformers' files, e.g. `pad_token`; always with `pad_token`,
      `cls_token` and `sep_token`.
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
    """The tokens that a tokenizer itself puts around a sentence, and for an unknown word."""
    # By their ids: a template may have another name for what the vocabulary has there.
    first, last = map(tokenizer.id_to_token, tokenizer.encode("").ids)
    model = json.loads(tokenizer.to_str())["model"]
    unknown = model.get("unk_token")
    if model.get("unk_id") is not None:  # Unigram: a number
        unknown = tokenizer.id_to_token(model["unk_id"])
    return {"cls": first, "sep": last, "unk": unknown}


def _declared(folder: Path) -> dict[str, str]:
    """The special tokens that a base's files name, as strings or as objects with their content."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the last counts
        if (folder / name).is_file():
            for field, value in read_object(folder / name).items():
                token = value.get("content") if isinstance(value, dict) else value
                if field.endswith("_token") and isinstance(token, str):
                    found[field] = token
    return found


# ---- the code that applies it

_POOL = {
    "cls": "return hidden[:, 0]",
    "mean": 'mask = batch["attention_mask"].unsqueeze(-1)\n'
    "return (hidden * mask).sum(1) / mask.sum(1)",
}
_PAIR = {"concat": "u, v", "interaction": "u, v, (u - v).abs(), u * v"}


def readme(trained: TaskModels, model: TaskModel, family: Family) -> str:
    """The folder's README: what it holds, and Python code that applies it."""
    task, last = model.task, "\n\n\n"
    base = _code(_base_name(trained.base))
    merged = ", its adapter merged into the weights" if "lora" in trained.trees[model.tree] else ""
    code = [_imports(bool(task.outputs), family), _encode(trained), _predict(model)]
    no_pooler = "It has no pooling layer: load it with `add_pooling_layer=False`. "
    example = '("A dog runs.", "A dog is running.")' if task.pair else '"A lovely film."'
    code.append(f"print(predict([{example}]))\n")
    takes = "pairs of sentences" if task.pair else "sentences"
    classes = ", ".join(f"{n}: {_plain(name)}" for n, name in enumerate(task.classes))
    span = f", {task.low:g} to {task.high:g}" if HEADS[task.head].scaled else ""
    gives = f"classes ({classes})" if task.integer else f"scores{span}"
    return (
        f"# {_plain(task.title)}\n\nA {family.model} trained from `{base}` with jaxlora"
        f"{merged}. {no_pooler * family.pooler}"
        f"`predict` takes {takes} and gives {gives}.\n\n"
        f"```python\n{last.join(code)}```\n"
    )


def _base_name(base: str) -> str:
    """A base as others may know it: of a local folder its name alone."""
    if base == huggingface.MINILM:
        return huggingface.MINILM_HUB
    return Path(base).name if Path(base).is_absolute() else base


def _plain(text: str) -> str:
    """Names of others' as one line of Markdown that means only itself.

    Sites make links and mentions after Markdown's escapes are gone: a space of no width hinders it.
    """
    escaped = re.sub(r"([\\`*_\[\]<>#~&])", r"\\\1", text)
    return " ".join(re.sub(r"(?i)@|:(?=//)|www(?=\.)", "\\g<0>\u200b", escaped).split())


def _code(text: str) -> str:
    """Likewise, between backticks."""
    return " ".join(text.replace("`", "'").split())


def _imports(head: bool, family: Family) -> str:
    options = ", add_pooling_layer=False" * family.pooler
    lines = [
        "import torch",
        "from safetensors.torch import load_file" if head else "",
        "from transformers import AutoModel, AutoTokenizer\n",
        'folder = "."  # this one',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"model = AutoModel.from_pretrained(folder{options}).eval()",
        f'head = load_file(f"{{folder}}/{HEAD}")' if head else "",
    ]
    return "\n".join(line for line in lines if line)


def _encode(trained: TaskModels) -> str:
    return _function(
        "encode(sentences)",
        "batch = tokenizer(\n"
        f"    sentences, padding=True, truncation=True, max_length={trained.max_length},\n"
        '    return_tensors="pt",\n'
        ")\n"
        "hidden = model(**batch).last_hidden_state\n" + _POOL[trained.pooling],
    )


def _predict(model: TaskModel) -> str:
    task = model.task
    lines = ["x = encode(list(examples))"]
    if task.pair:
        lines = ["u, v = (encode(list(sentences)) for sentences in zip(*examples))"]
    if task.pair and task.outputs:
        lines.append(f"x = torch.cat([{_PAIR[model.pair_features]}], -1)")
    if task.outputs:
        kind = HEADS[task.head]
        layer = f'x @ head["{kind.first}.weight"].T + head["{kind.first}.bias"]'
        lines.append(f"x = torch.{kind.activation}({layer})")
        lines.append('x = x @ head["out.weight"].T + head["out.bias"]')
    else:
        lines.append("x = torch.nn.functional.cosine_similarity(u, v)")
    return _function("predict(examples)", "\n".join([*lines, f"return {_decode(task)}"]))


def _decode(task: Task) -> str:
    """`Task.decode` in torch."""
    if task.loss == "cross_entropy":
        return "x.argmax(-1)"
    if task.loss == "binary_cross_entropy":
        return "(x[:, 0] > 0).long()"
    if not HEADS[task.head].scaled:
        return "x[:, 0]"
    width = task.high - task.low
    score = f"{width} * x" if task.loss == "cosine" else f"{width / SPAN} * x[:, 0]"
    return f"({task.low} + {score}).clamp({task.low}, {task.high})"


def _function(signature: str, body: str) -> str:
    return f"@torch.no_grad()\ndef {signature}:\n{textwrap.indent(body, '    ')}"
