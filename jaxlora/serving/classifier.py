"""Import the head of a transformers sequence classifier as a task.

The head is read from a full model (`BertForSequenceClassification`, a cross-encoder) or from a PEFT
folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlora.formats import families, huggingface
from jaxlora.formats.families import Classifier
from jaxlora.formats.huggingface import Pretrained
from jaxlora.formats.peft import HeadParts
from jaxlora.nn.heads import HeadName
from jaxlora.serving.task_models import Facts, TaskModel, TaskModels
from jaxlora.tasks.kinds import KINDS, KindName
from jaxlora.tasks.task import Task
from jaxlora.utils import schema
from jaxlora.utils.errors import UserError
from jaxlora.utils.files import read_object
from jaxlora.utils.trees import Tree


class Source(NamedTuple):
    """The files of a classifier.

    Attributes:
      folder: the folder of the model or of PEFT, for error messages.
      base: the base model.
      parts: the head's parameters in the PEFT folder; empty for a full model.
      model: the folder with the rest of the head's weights, and the config.json with class names.
      remedy: advice for error messages.
      problem: its `problem_type`; None: read from config.json.
    """

    folder: Path
    base: Pretrained
    parts: HeadParts
    model: Path
    remedy: str
    problem: str | None = None

    @property
    def about(self) -> dict[str, Any]:
        """The content of config.json."""
        return read_object(self.model / "config.json")


def read(
    source: Source, name: str, like: TaskModels, classes: Sequence[str], pair: bool
) -> TaskModel:
    """Read a sequence classifier as a task.

    Args:
      source: the files.
      name: the name of the task.
      like: task models whose pooling must be `cls`.
      classes: class names; `()`: from `id2label` in config.json if their number fits, else indices.
      pair: whether the classifier reads two texts together.

    Raises:
      UserError: naming the file and what is unsupported.
    """
    if like.pooling != "cls":
        raise UserError(
            f"{source.folder}: its classifier reads the first token's vector, and {like.origin} "
            f"has pooling {like.pooling}; import it into a bank of its own, or {source.remedy}"
        )
    family = families.of(source.base.config)
    if family.classifier is None:
        raise UserError(
            f"{source.folder}: the classifier of a {family.model} cannot be imported yet; "
            f"{source.remedy}"
        )
    head = _head(source, family.classifier)
    try:
        task = _task(source, name, head, family.classifier.head, classes)
    except ValueError as error:
        raise UserError(f"{source.folder}: {error}; name them with `classes`") from error
    facts = Facts(imported_from=str(source.folder))
    return TaskModel(as_pair(task) if pair else task, name, head, "concat", facts)


def refuse_names(folder: Path, classes: Sequence[str], pair: bool) -> None:
    """Refuse options that apply only to a classifier.

    Raises:
      UserError: if one is set.
    """
    if classes or pair:
        named = "classes" if classes else "pair"
        raise UserError(f"{folder}: `{named}` goes with a classifier from another library")


def as_pair(task: Task) -> Task:
    """Return a single-text task as a task of joint pairs."""
    return dataclasses.replace(task, pair=True, pair_encoding="joint")


def _head(source: Source, classifier: Classifier) -> Tree:
    family = families.of(source.base.config)
    of_model = huggingface.read_head(source.model, family)
    if odd := set(source.parts.modules) - set(classifier.modules.values()):
        raise UserError(
            f"{source.folder}: has {', '.join(sorted(odd))}, which "
            f"{family.sequence_classifier} lacks; {source.remedy}"
        )
    head = {ours: _linear(source, of_model, module) for ours, module in classifier.modules.items()}
    first, width = next(iter(classifier.modules)), source.base.config.hidden_size
    if head[first]["bias"].size != width:
        raise UserError(
            f"{source.folder}: its {classifier.modules[first]} is not one of {source.base.name}, "
            f"{width} wide"
        )
    return head


def _linear(source: Source, of_model: Mapping[str, np.ndarray], module: str) -> Tree:
    """Return a Linear layer: the saved tensors or else the model's, plus the LoRA update."""
    folder, parts, width = source.folder, source.parts, source.base.config.hidden_size
    names = [f"{module}.weight", f"{module}.bias"]
    saved = [name in parts.saved for name in names]
    if any(saved) and (not all(saved) or module in parts.changes):
        raise UserError(
            f"{folder}: {module} is neither wholly saved nor only adapted; {source.remedy}"
        )
    tensors = parts.saved if any(saved) else of_model
    if not all(name in tensors for name in names):
        too = "" if source.model == folder else ", and neither has the base"
        raise UserError(f"{folder}: has no {module}{too}; {source.remedy}")
    weight, bias = (tensors[name] for name in names)
    change = parts.changes.get(module, np.zeros_like(weight))
    if weight.shape != (bias.size, width) or change.shape != weight.shape or bias.ndim != 1:
        raise UserError(
            f"{folder}: {module} has shapes {weight.shape}, {bias.shape} and {change.shape} for "
            f"weight, bias and LoRA's part, where the base is {width} wide"
        )
    return {"kernel": np.ascontiguousarray((weight + change).T), "bias": bias}


# Label delimiters; the first that occurs in no label is used.
_MARKS = ("|", ";", "/", " ~ ")
# (`problem_type`, whether there is a single output) → task kind.
_KINDS: dict[tuple[str, bool], KindName] = {
    ("single_label_classification", False): "classification",
    ("multi_label_classification", True): "binary",  # a single label: yes or no
    ("multi_label_classification", False): "multilabel",
    ("regression", True): "regression",
}


def _task(
    source: Source, name: str, head: Tree, head_kind: HeadName, classes: Sequence[str]
) -> Task:
    """Return the task of a classifier, inferred as transformers does.

    Raises:
      ValueError: if the number of class names is wrong, or they are blank or not distinct.
    """
    outputs, about = head["out"]["bias"].size, source.about
    usual = "regression" if outputs == 1 else "single_label_classification"
    problem = source.problem or about.get("problem_type") or usual
    kind = _KINDS.get((problem, outputs == 1)) if isinstance(problem, str) else None
    if kind is None:
        raise UserError(
            f"{source.model / 'config.json'}: problem_type {problem!r} with {outputs} outputs has "
            f"no kind of task here; {source.remedy}"
        )
    if KINDS[kind].form == "score":
        refuse_names(source.folder, classes, pair=False)
        names: tuple[str, ...] = ()
    else:
        names = tuple(classes) or _labels(about.get("id2label"), max(2, outputs))
        _check_names(names, max(2, outputs))
    title = f"{kind}, {source.folder.name}"
    # transformers decides at 0.5, and there is no dev set to tune other thresholds on.
    mark = next((mark for mark in _MARKS if not any(mark in one for one in names)), _MARKS[0])
    return Task(
        name, kind, classes=names, title=title, head=head_kind, tune_thresholds=False,
        label_delimiter=mark,
    )  # fmt: skip


def _check_names(names: Sequence[str], count: int) -> None:
    if not all(map(str.strip, names)):
        raise ValueError("a class has a blank name")
    if len(names) != count:
        raise ValueError(f"{len(names)} classes are named, the classifier has {count}")


def _labels(id2label: Any, count: int) -> tuple[str, ...]:
    """Return the class names in `id2label`, or indices if it does not have exactly `count`."""
    numbers = tuple(map(str, range(count)))
    if not isinstance(id2label, dict) or id2label.keys() != set(numbers):
        return numbers
    return tuple(schema.build(str, id2label[number]) for number in numbers)
