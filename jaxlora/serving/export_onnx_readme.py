"""The README of an ONNX folder: a description, and Python code that runs the model."""

from __future__ import annotations

from jaxlora.serving.export_readme import base_name, describe, example, function, plain
from jaxlora.serving.task_models import TaskModel, TaskModels
from jaxlora.tasks.kinds import LOSSES
from jaxlora.tasks.task import Task

_SETUP = """\
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

folder = "."  # this one
tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")  # truncates and pads
session = onnxruntime.InferenceSession(f"{folder}/model.onnx")"""
_FIELDS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}


def readme(trained: TaskModels, model: TaskModel, token_types: bool) -> str:
    """Return the README of an ONNX folder.

    Args:
      trained: the task models with the task.
      model: the task.
      token_types: whether the model takes token types.
    """
    task = model.task
    merged = ", its adapter merged into the weights" if "lora" in trained.trees[model.tree] else ""
    code = [_SETUP, _inputs(token_types), _predict(task), f"print(predict([{example(task)}]))\n"]
    blank = "\n\n\n"
    return (
        f"# {plain(task.title)}\n\nAn ONNX model (opset 23: ONNX Runtime 1.23 or newer) trained "
        f"from `{base_name(trained.base)}` with jaxlora{merged}. {_outputs(task)}"
        f"{describe(task)}\n\n```python\n{blank.join(code)}```\n"
    )


def _outputs(task: Task) -> str:
    answer = "`probabilities` of the classes" if task.classes else "`score`"
    if task.sentences == 1:
        of = "pair" if task.joint else "sentence"
        return f"It computes the `vector` of each {of} and {answer}. "
    return (
        "Each sentence of a pair has its own inputs; those of the second end in `_2`. It computes "
        f"`vector` and `vector_2` of the sentences and {answer}. "
    )


def _inputs(token_types: bool) -> str:
    names = [name for name in _FIELDS if token_types or name != "token_type_ids"]
    lines = [f'    f"{n}{{end}}": np.array([one.{_FIELDS[n]} for one in batch]),' for n in names]
    body = ["batch = tokenizer.encode_batch(list(examples))", "return {", *lines, "}"]
    return function('inputs(examples, end="")', "\n".join(body))


def _decode(task: Task) -> str:
    """Return NumPy code that decodes probabilities as `Task.decode` does."""
    shown = LOSSES[task.loss].numpy or "score"
    if not task.thresholds:
        return shown
    cuts = list(task.thresholds)
    return shown.replace("0.5", str(cuts if task.outputs > 1 else cuts[0]))


def _predict(task: Task) -> str:
    lines, given = [], "inputs(examples)"
    if task.sentences > 1:
        lines, given = ["first, second = zip(*examples)"], 'inputs(first) | inputs(second, "_2")'
    output = "probabilities" if task.classes else "score"
    lines.append(f'({output},) = session.run(["{output}"], {given})')
    lines.append(f"return {_decode(task)}")
    return function("predict(examples)", "\n".join(lines))
