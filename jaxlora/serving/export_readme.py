"""The READMEs of merged and of PEFT folders: a description, and Python code that runs the model."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from jaxlora.formats import huggingface
from jaxlora.formats.families import Family
from jaxlora.formats.heads import HEAD
from jaxlora.serving.task_models import TaskModel, TaskModels
from jaxlora.tasks.kinds import LOSSES, SPAN
from jaxlora.tasks.task import HEADS, Task

_POOL = {
    "cls": "return hidden[:, 0]",
    "mean": 'mask = batch["attention_mask"].unsqueeze(-1)\n'
    "return (hidden * mask).sum(1) / mask.sum(1)",
}
_PAIR = {"concat": "u, v", "interaction": "u, v, (u - v).abs(), u * v"}


def readme(trained: TaskModels, model: TaskModel, family: Family) -> str:
    """Return the README of a merged folder."""
    task, last = model.task, "\n\n\n"
    base = base_name(trained.base)
    merged = ", its adapter merged into the weights" if "lora" in trained.trees[model.tree] else ""
    if family.classifies(task.head):
        kind, code = family.sequence_classifier, [_classifier_imports(), _classify(trained, task)]
    else:
        kind, code = family.model, _by_hand(trained, model, family)
    code.append(f"print(predict([{example(task)}]))\n")
    return (
        f"# {plain(task.title)}\n\nA {kind} trained from `{base}` with jaxlora"
        f"{merged}. {_remark(task, family)}{describe(task)}\n\n"
        f"```python\n{last.join(code)}```\n"
    )


def peft_readme(trained: TaskModels, model: TaskModel, family: Family) -> str:
    """Return the README of a PEFT folder."""
    task, last, base = model.task, "\n\n\n", base_name(trained.base)
    name, revision = huggingface.split_revision(base)
    pinned = f", revision={revision!r}" if revision else ""
    if classifies := family.classifies(task.head):
        kind, options = "AutoModelForSequenceClassification", f", num_labels={task.outputs}"
    else:
        kind, options = "AutoModel", ""
    imports = [
        "import torch",
        "from peft import PeftModel",
        "from safetensors.torch import load_file" if task.outputs and not classifies else "",
        f"from transformers import {kind}, AutoTokenizer\n",
        f'folder, base = ".", {name!r}  # this one; the base that the adapter was trained on',
        f"tokenizer = AutoTokenizer.from_pretrained(base{pinned})",
        f"model = {kind}.from_pretrained(base{pinned}{options})",
        "model = PeftModel.from_pretrained(model, folder).eval()",
        f'head = load_file(f"{{folder}}/{HEAD}")' if task.outputs and not classifies else "",
    ]
    applied = (
        [_classify(trained, task)] if classifies else [_encode(trained, task), _predict(model)]
    )
    code = ["\n".join(line for line in imports if line), *applied]
    code.append(f"print(predict([{example(task)}]))\n")
    return (
        f"# {plain(task.title)}\n\nA PEFT adapter for `{base}`, trained with jaxlora; "
        f"`jaxlora import peft` restores the task. {describe(task)}\n\n"
        f"```python\n{last.join(code)}```\n"
    )


def example(task: Task) -> str:
    """Return an example input of a task as Python source."""
    return '("A dog runs.", "A dog is running.")' if task.pair else '"A lovely film."'


def describe(task: Task) -> str:
    """Describe the inputs and outputs of the README's `predict`."""
    takes = "pairs of sentences" if task.pair else "sentences"
    classes = ", ".join(f"{n}: {plain(name)}" for n, name in enumerate(task.classes))
    span = f", {task.low:g} to {task.high:g}" if HEADS[task.head].scaled else ""
    sets = "sets of " if task.form == "classes" else ""
    gives = f"{sets}classes ({classes})" if classes else f"scores{span}"
    return f"`predict` takes {takes} and gives {gives}."


def _remark(task: Task, family: Family) -> str:
    """Return the instructions for loading the folder."""
    if family.classifies(task.head):
        joint = " or with sentence-transformers' `CrossEncoder`" * task.joint
        return f"Load it with `AutoModelForSequenceClassification`{joint}. "
    without = "It has no pooling layer: load it with `add_pooling_layer=False`. " * family.pooler
    if not task.joint:
        return without
    return (
        f"{without}Its head is not one of a {family.sequence_classifier}: "
        "the code below applies it. "
    )


def _by_hand(trained: TaskModels, model: TaskModel, family: Family) -> list[str]:
    """Return code that applies the encoder and a jaxlora head."""
    return [
        _imports(bool(model.task.outputs), family),
        _encode(trained, model.task),
        _predict(model),
    ]


def base_name(base: str) -> str:
    """Return a base's public name for Markdown code; a local folder without its path."""
    if base == huggingface.MINILM:
        return huggingface.MINILM_HUB
    return _code(Path(base).name if Path(base).is_absolute() else base)


def plain(text: str) -> str:
    """Escape third-party text as one line of plain Markdown.

    Sites create links and mentions after unescaping; a zero-width space prevents it.
    """
    escaped = re.sub(r"([\\`*_\[\]<>#~&])", r"\\\1", text)
    return " ".join(re.sub(r"(?i)@|:(?=//)|www(?=\.)", "\\g<0>\u200b", escaped).split())


def _code(text: str) -> str:
    """Return third-party text as one line that is safe between backticks."""
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


def _classifier_imports() -> str:
    lines = [
        "import torch",
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n",
        'folder = "."  # this one',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "model = AutoModelForSequenceClassification.from_pretrained(folder).eval()",
    ]
    return "\n".join(lines)


def _classify(trained: TaskModels, task: Task) -> str:
    batch = _batch(trained, "examples", task.joint)
    return _function(
        "predict(examples)", f"{batch}x = model(**batch).logits\nreturn {_decode(task)}"
    )


def _batch(trained: TaskModels, given: str, joint: bool) -> str:
    texts = f"*map(list, zip(*{given}))" if joint else given
    return (
        "batch = tokenizer(\n"
        f"    {texts}, padding=True, truncation=True, max_length={trained.max_length},\n"
        '    return_tensors="pt",\n'
        ")\n"
    )


def _encode(trained: TaskModels, task: Task) -> str:
    given = "pairs" if task.joint else "sentences"
    return _function(
        f"encode({given})",
        _batch(trained, given, task.joint)
        + "hidden = model(**batch).last_hidden_state\n"
        + _POOL[trained.pooling],
    )


def _predict(model: TaskModel) -> str:
    task = model.task
    lines = ["x = encode(list(examples))"]
    if task.sentences > 1:
        lines = ["u, v = (encode(list(sentences)) for sentences in zip(*examples))"]
    if task.sentences > 1 and task.outputs:
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
    """Return torch code for `Task.decode`."""
    shown = LOSSES[task.loss].torch
    if task.thresholds:
        shown = shown.replace("> 0", f"> {_cuts(task)}")
    if task.classes or not HEADS[task.head].scaled:
        return shown
    low, high = task.low, task.high
    return f"({low} + {(high - low) / SPAN} * ({shown})).clamp({low}, {high})"


def _cuts(task: Task) -> str:
    """Return the logits of the thresholds as torch code."""
    cuts = task.cuts.tolist()
    return str(cuts) if task.outputs == 1 else f"torch.tensor({cuts})"


def _function(signature: str, body: str) -> str:
    return f"@torch.no_grad()\n{function(signature, body)}"


def function(signature: str, body: str) -> str:
    """Return the source of a function."""
    return f"def {signature}:\n{textwrap.indent(body, '    ')}"
