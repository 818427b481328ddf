"""Import full models as tasks: sequence classifiers, cross-encoders, sentence-transformers.

In a new bank, the model becomes the base and its task needs no adapter. A bank of another base with
the same shape and tokenizer stores the model's full encoder for the task.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlora.formats import fingerprint, huggingface
from jaxlora.formats.huggingface import Pretrained
from jaxlora.formats.peft import HeadParts
from jaxlora.serving import classifier
from jaxlora.serving.classifier import Source
from jaxlora.serving.task_models import Facts, Pooling, TaskModel, TaskModels
from jaxlora.tasks.task import Task
from jaxlora.utils.errors import UserError
from jaxlora.utils.files import read_json, read_object

MODULES, OF_SENTENCES = "modules.json", "config_sentence_transformers.json"
SETFIT = "model_head.pkl"
_OF_TRANSFORMER, _OF_TOKENIZER = "sentence_bert_config.json", "tokenizer_config.json"
MOST_TOKENS = 512
_REMEDY = "take the folder as `base` and train a head of your own"
_CLASSIFIER = "ForSequenceClassification"
# Activation of a cross-encoder → its `problem_type`; None: see config.json.
_PROBLEMS = {"Sigmoid": "multi_label_classification", "Identity": None}


def load(
    model: str,
    name: str,
    like: TaskModels | None = None,
    *,
    classes: Sequence[str] = (),
    pair: bool = False,
) -> TaskModels:
    """Read a model of transformers or sentence-transformers as one task.

    A sequence classifier keeps its head; a cross-encoder also reads pairs together. A
    `SentenceTransformer` becomes a similarity task: the cosine of two texts' vectors.

    Args:
      model: its folder or hub id.
      name: the name of the task.
      like: the bank to import into; None: the model becomes the base of a new one.
      classes: class names of a classifier; default: its `id2label`, else indices.
      pair: whether a classifier reads two texts together; a cross-encoder always does.

    Raises:
      UserError: naming the file, and the unsupported module or field.
    """
    model = huggingface.absolute(model)
    base = huggingface.load(model)
    folder = huggingface.find(model)
    modules = read_modules(folder)
    _refuse_pickle(folder)
    sentences = any(kind == "Pooling" for kind, _ in modules)
    pooling = read_pooling(folder, modules) if sentences else "cls"
    _check_settings(folder)
    there = (
        _new(base, model, pooling, folder)
        if like is None
        else _fitting(like, base, pooling, folder, joint=not sentences)
    )
    if sentences:
        classifier.refuse_names(folder, classes, pair)
        title = f"similarity, {folder.name}"
        found = TaskModel(Task(name, "similarity", pair=True, title=title), name, {}, "concat")
    else:
        found = _classifier(folder, base, name, there, classes, pair)
    same = not there.fingerprint.differing(base.fingerprint)
    found = dataclasses.replace(
        found, tree="" if same else name, facts=Facts(imported_from=str(model))
    )
    return dataclasses.replace(
        there, models={name: found}, trees={found.tree: {} if same else {"params": base.params}},
        configs={}, origin=str(folder),
    )  # fmt: skip


def _refuse_pickle(folder: Path) -> None:
    if (folder / SETFIT).exists():
        raise UserError(
            f"{folder / SETFIT}: the head of a SetFit model is a pickle, which can run code, and "
            f"is not opened; {_REMEDY}"
        )


def _classifier(
    folder: Path, base: Pretrained, name: str, like: TaskModels, classes: Sequence[str], pair: bool
) -> TaskModel:
    _check_architecture(folder)
    applied = _activation(folder)
    if applied is not None and applied not in _PROBLEMS:
        raise UserError(f"{folder}: the activation {applied} is not supported; {_REMEDY}")
    problem = None if applied is None else _PROBLEMS[applied]
    source = Source(folder, base, HeadParts({}, {}), folder, _REMEDY, problem)
    return classifier.read(source, name, like, classes, pair or applied is not None)


def _check_architecture(folder: Path) -> None:
    """Refuse a model whose config.json names another architecture than a sequence classifier."""
    named = read_object(folder / "config.json").get("architectures") or []
    if named and not any(str(one).endswith(_CLASSIFIER) for one in named):
        shown = ", ".join(map(str, named))
        raise UserError(
            f"{folder / 'config.json'}: architectures {shown}: only sequence classifiers have a "
            f"head that can be imported; {_REMEDY}"
        )


def _activation(folder: Path) -> str | None:
    """Return a cross-encoder's output activation; None for any other classifier."""
    about = read_object(folder / "config.json")
    named = about.get("sentence_transformers")
    found = named.get("activation_fn") if isinstance(named, dict) else None
    found = found or about.get("sbert_ce_default_activation_function")
    if (folder / OF_SENTENCES).exists():
        of_sentences = read_object(folder / OF_SENTENCES)
        if of_sentences.get("model_type") == "CrossEncoder":
            found = of_sentences.get("activation_fn") or found or "Sigmoid"
    return found if found is None else str(found).rpartition(".")[2]


def read_modules(folder: Path) -> list[tuple[str, str]]:
    """Return the modules of a sentence-transformers folder as (class, path); else `[]`.

    Raises:
      UserError: for a module other than Transformer, Pooling and Normalize.
    """
    path = folder / MODULES
    if not path.exists():
        return []
    listed = read_json(path)
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise UserError(f"{path}: not a list of modules; {_REMEDY}")
    found = [(str(m.get("type")).rpartition(".")[2], str(m.get("path", ""))) for m in listed]
    if odd := [kind for kind, _ in found if kind not in ("Transformer", "Pooling", "Normalize")]:
        raise UserError(
            f"{path}: the module {odd[0]} is not supported, only Transformer, Pooling and "
            f"Normalize are; {_REMEDY}"
        )
    return found


def read_pooling(folder: Path, modules: Sequence[tuple[str, str]]) -> Pooling:
    """Return the pooling of a sentence-transformers folder.

    Raises:
      UserError: if it is neither cls nor mean.
    """
    place = next(path for kind, path in modules if kind == "Pooling")
    if Path(place).name != place:
        raise UserError(f"{folder / MODULES}: the module Pooling is not in a folder beside it")
    path = folder / place / "config.json"
    about = read_object(path)
    older = {"cls_token": "cls", "mean_tokens": "mean"}
    marked = [
        older.get(field.removeprefix("pooling_mode_"), field)
        for field, value in about.items()
        if field.startswith("pooling_mode_") and value is True
    ]
    mode: Any = about.get("pooling_mode") or (marked[0] if len(marked) == 1 else marked)
    if mode == "cls":
        return "cls"
    if mode != "mean":
        raise UserError(f"{path}: the pooling {mode} is not supported, only cls and mean are")
    return "mean"


def _check_settings(folder: Path) -> None:
    """Refuse sentence-transformers settings that change texts before tokenization."""
    for file, field in ((_OF_TRANSFORMER, "do_lower_case"), (OF_SENTENCES, "default_prompt_name")):
        if (folder / file).exists() and read_object(folder / file).get(field):
            raise UserError(f"{folder / file}: {field} is not supported; {_REMEDY}")


def _max_length(folder: Path, base: Pretrained) -> int:
    """Return the number of tokens at which the model's library truncates, at most 512."""
    lengths: list[float] = [MOST_TOKENS, base.config.max_length]
    for file, field in ((_OF_TRANSFORMER, "max_seq_length"), (_OF_TOKENIZER, "model_max_length")):
        value = read_object(folder / file).get(field) if (folder / file).exists() else None
        lengths += [value] if isinstance(value, int | float) and value >= 3 else []
    return int(min(lengths))


def _new(base: Pretrained, model: str, pooling: Pooling, folder: Path) -> TaskModels:
    """Return task models, still without tasks, whose base is the model."""
    return TaskModels(
        base=model, fingerprint=base.fingerprint, pooling=pooling,
        max_length=_max_length(folder, base), dtype="float32",
        models={}, trees={}, configs={}, origin=model,
    )  # fmt: skip


def _fitting(
    like: TaskModels, base: Pretrained, pooling: Pooling, folder: Path, *, joint: bool
) -> TaskModels:
    """Return `like` after checking that the model can be a task of it."""
    parts = like.fingerprint.differing(base.fingerprint, joint=joint)
    if other := [part for part in parts if part != "weights"]:
        raise UserError(
            f"{folder}: has {fingerprint.another(other)} than {like.base}, the base of "
            f"{like.origin}; import it into a bank of its own"
        )
    if like.pooling != pooling:
        raise UserError(
            f"{folder}: needs pooling {pooling}, and {like.origin} has {like.pooling}; import it "
            "into a bank of its own"
        )
    return like
