"""A merged encoder as a Hugging Face folder, with a task's head and the code that applies it.

Who gets the folder needs transformers and torch, and nothing of ours.
"""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from jaxlora import pretrained
from jaxlora.folders import whole
from jaxlora.pretrained import Pretrained
from jaxlora.rundir import write_json, write_text
from jaxlora.tasks import Task
from jaxlora.trees import Tree

HEAD, README = "head.safetensors", "README.md"
_METADATA = {"format": "pt"}


@dataclasses.dataclass(frozen=True, eq=False)
class TaskHead:
    """What turns the encoder's vectors into a task's predictions.

    Attributes:
      task: the task.
      head: its head parameters, `{}` where it has none.
      pooling: see `bert.pool`.
      pair_features: see `heads.pair_vector`.
      max_length: tokens that a sentence is cut to.
    """

    task: Task
    head: Tree
    pooling: str
    pair_features: str
    max_length: int


def save(
    folder: str | Path, base: Pretrained, params: Tree, task_head: TaskHead | None = None
) -> None:
    """Write an encoder, and if given a head, for `AutoModel.from_pretrained`.

    Args:
      folder: new or empty; appears whole or not at all.
      base: the base model, for its shape and its tokenizer.
      params: `params` collection of `bert.Encoder`, for example from `lora.merge`.
      task_head: a task that was trained with this encoder.

    Raises:
      UserError: if the folder is not empty.
    """
    tensors = pretrained.export(params, base.config)
    with whole(folder) as temporary:
        save_file(tensors, temporary / "model.safetensors", metadata=_METADATA)
        write_json(temporary / "config.json", _config(base))
        write_text(temporary / "tokenizer.json", base.tokenizer.to_str())
        write_json(temporary / "tokenizer_config.json", _tokenizer_config(base))
        if task_head and task_head.head:
            save_file(_linear_layers(task_head.head), temporary / HEAD, metadata=_METADATA)
        write_text(temporary / README, readme(base.name, task_head))


def _config(base: Pretrained) -> dict[str, Any]:
    about = {"architectures": ["BertModel"], "model_type": "bert", "dtype": "float32"}
    return about | dataclasses.asdict(base.config) | {"pad_token_id": _padding(base)}


def _padding(base: Pretrained) -> int:
    return base.tokenizer.token_to_id("[PAD]") or 0


def _tokenizer_config(base: Pretrained) -> dict[str, Any]:
    names = {n: f"[{n.upper()}]" for n in ("pad", "unk", "cls", "sep", "mask")}
    known = {
        f"{name}_token": token
        for name, token in names.items()
        if base.tokenizer.token_to_id(token) is not None
    }
    # The class that takes tokenizer.json as it is.
    rest = {"tokenizer_class": "PreTrainedTokenizerFast"}
    return rest | known | {"model_max_length": base.config.max_position_embeddings}


def _linear_layers(head: Tree) -> dict[str, np.ndarray]:
    """Head parameters under the names, and in the shapes, of torch's Linear."""
    return {
        ".".join([*path[:-1], {"kernel": "weight"}.get(path[-1], path[-1])]): np.ascontiguousarray(
            np.asarray(leaf, np.float32).T
        )
        for path, leaf in traverse_util.flatten_dict(head).items()
    }


# ---- the code that applies it

_POOL = {
    "cls": "return hidden[:, 0]",
    "mean": 'mask = batch["attention_mask"].unsqueeze(-1)\n'
    "return (hidden * mask).sum(1) / mask.sum(1)",
}
_PAIR = {"concat": "u, v", "interaction": "u, v, (u - v).abs(), u * v"}


def readme(base_name: str, task_head: TaskHead | None) -> str:
    """The folder's README: what it holds, and Python code that applies it."""
    about = (
        f"A BERT encoder trained from `{base_name}` with jaxlora, its adapter merged into the "
        "weights. It has no pooling layer: load it with `add_pooling_layer=False`."
    )
    if task_head is None:
        code = [_imports(head=False), 'print(bert(**tokenizer("A film.", return_tensors="pt")))']
        return f"# A merged encoder\n\n{about}\n\n```python\n{'\n'.join(code)}\n```\n"
    task = task_head.task
    code = [_imports(bool(task_head.head)), _encode(task_head), _predict(task_head)]
    example = '("A dog runs.", "A dog is running.")' if task.pair else '"A lovely film."'
    takes = "pairs of sentences" if task.pair else "sentences"
    gives = f"whole numbers {task.low:g}–{task.high:g}" if task.integer else "scores"
    return (
        f"# {task.title}\n\n{about} `predict` takes {takes} and gives {gives} "
        f"(labels are {task.low:g}–{task.high:g}).\n\n"
        f"```python\n{'\n\n\n'.join(code)}\n\n\nprint(predict([{example}]))\n```\n"
    )


def _imports(head: bool) -> str:
    lines = [
        "import torch",
        "from safetensors.torch import load_file" if head else "",
        "from transformers import AutoModel, AutoTokenizer\n",
        'folder = "."  # this one',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "bert = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()",
        f'head = load_file(f"{{folder}}/{HEAD}")' if head else "",
    ]
    return "\n".join(line for line in lines if line)


def _encode(task_head: TaskHead) -> str:
    return _function(
        "encode(sentences)",
        "batch = tokenizer(\n"
        f"    sentences, padding=True, truncation=True, max_length={task_head.max_length},\n"
        '    return_tensors="pt",\n'
        ")\n"
        "hidden = bert(**batch).last_hidden_state\n" + _POOL[task_head.pooling],
    )


def _predict(task_head: TaskHead) -> str:
    task = task_head.task
    lines = ["x = encode(examples)"]
    if task.pair:
        lines = [
            "u, v = (encode(list(sentences)) for sentences in zip(*examples))",
            f"x = torch.cat([{_PAIR[task_head.pair_features]}], -1)",
        ]
    lines += [
        'x = torch.relu(x @ head["hidden.weight"].T + head["hidden.bias"])',
        'x = x @ head["out.weight"].T + head["out.bias"]',
    ]
    if not task.outputs:
        lines = [lines[0], "x = torch.nn.functional.cosine_similarity(u, v)"]
    return _function("predict(examples)", "\n".join([*lines, f"return {_decode(task)}"]))


def _decode(task: Task) -> str:
    """`Task.decode` in torch."""
    if task.outputs > 1:
        return "x.argmax(-1)"
    if task.integer:
        return "(x[:, 0] > 0).long()"
    score = "x[:, 0]" if task.outputs else f"({task.high} * x)"
    return f"{score}.clamp({task.low}, {task.high})"


def _function(signature: str, body: str) -> str:
    return f"@torch.no_grad()\ndef {signature}:\n{textwrap.indent(body, '    ')}"
