"""Export a task as a PEFT folder, and import PEFT folders as tasks.

PEFT reads only `adapter_config.json` and `adapter_model.safetensors`. jaxlora also writes and reads
`jaxlora.json` and `head.safetensors`, so that an exported task can be restored bit for bit, and
writes a README.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from jaxlora.formats import families, huggingface, peft, peft_config
from jaxlora.formats import heads as head_files
from jaxlora.formats.huggingface import Pretrained
from jaxlora.lora import LoraConfig
from jaxlora.serving import classifier
from jaxlora.serving.classifier import Source
from jaxlora.serving.export_merged import README
from jaxlora.serving.export_readme import peft_readme
from jaxlora.serving.task_models import (
    BaseSpec,
    Facts,
    PairFeatures,
    TaskModel,
    TaskModels,
    upgrade,
)
from jaxlora.tasks.task import HEADS, Task
from jaxlora.utils import schema
from jaxlora.utils.errors import UserError
from jaxlora.utils.files import atomic_dir, read_object, write_json, write_text
from jaxlora.utils.trees import Tree

ABOUT = "jaxlora.json"
_ALONE = "take the encoder's adapter alone with `encoder_only=True`"


@dataclasses.dataclass(frozen=True)
class About(BaseSpec):
    """The content of `jaxlora.json`; see `TaskModel` for the fields.

    Raises:
      ValueError: if the head needs another pooling.
    """

    task: Task
    pair_features: PairFeatures
    facts: Facts

    def __post_init__(self) -> None:
        if HEADS[self.task.head].pooling not in (None, self.pooling):
            raise ValueError(f"its head does not go with pooling {self.pooling}")


def save(folder: str | Path, trained: TaskModels, name: str) -> None:
    """Write a task as a folder for `PeftModel.from_pretrained` and `load`.

    Args:
      folder: new or empty; written atomically.
      trained: the task models with the task.
      name: the name of the task.

    Raises:
      UserError: if the task has no adapter, or the folder is not empty.
    """
    model = trained.find(name)
    adapter = trained.trees[model.tree].get("lora")
    if not adapter:
        raise UserError(f"{trained.origin}: {name} has no adapter; use export merged")
    hub = huggingface.MINILM_HUB if trained.base == huggingface.MINILM else trained.base
    about = About(
        **trained.base_spec(), task=model.task, pair_features=model.pair_features, facts=model.facts
    )
    encoder = families.config_like(trained.fingerprint.model_type, adapter)
    family = families.of(encoder)
    head = model.head if family.classifies(model.task.head) else None
    with atomic_dir(folder) as temporary:
        peft.write(temporary, adapter, trained.configs[model.tree], hub, encoder, head)
        head_files.write(temporary, model.head)
        write_json(temporary / ABOUT, dataclasses.asdict(about))
        write_text(temporary / README, peft_readme(trained, model, family))


def described(folder: str | Path) -> bool:
    """Return whether a folder has the `jaxlora.json` that `save` writes."""
    return (Path(folder).expanduser() / ABOUT).exists()


def classifies(folder: str | Path) -> bool:
    """Return whether a PEFT folder is for a sequence classifier.

    Raises:
      UserError: if its `adapter_config.json` cannot be read or is unsupported.
    """
    return peft_config.read_config(Path(folder).expanduser()).classifies


def load(
    folder: str | Path,
    name: str,
    like: TaskModels | None = None,
    base: str | None = None,
    *,
    any_base: bool = False,
    encoder_only: bool = False,
    classes: Sequence[str] = (),
    pair: bool = False,
) -> TaskModels:
    """Read a task from a PEFT folder.

    If PEFT trained a sequence classifier (`task_type` SEQ_CLS), the classifier and its pooler
    become the head of the task. Without a classifier, the task is the similarity of two texts: the
    cosine of their vectors (0 to 1), which needs no head.

    Args:
      folder: written by `save` or by PEFT.
      name: the name of the task.
      like: task models that define the base and pooling, unless `save` wrote the folder.
      base: the base's new location; None: as recorded in the folder or `like`.
      any_base: accept an adapter whose folder names no base, or another one than `like`.
      encoder_only: ignore the classifier, and the task and head that `save` wrote.
      classes: class names of the classifier; default: the base's `id2label`, else indices.
      pair: whether the classifier reads pairs of texts together.

    Raises:
      UserError: naming the file and what is missing, broken or unsupported.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    if described(folder) and not encoder_only:
        classifier.refuse_names(folder, classes, pair)
        return _load_ours(folder, name, base)
    if like is None:
        raise UserError(f"{folder}: has no {ABOUT} to say its base; name one with `base`")
    like = like.at(base)
    there = like.load_base()
    if not any_base:
        _check_base(folder / peft_config.CONFIG, peft_config.read_config(folder), there)
    found = peft.read(folder, there.config)
    if found.written.classifies and not encoder_only:
        source = Source(folder, there, found.head, huggingface.find(there.name), _ALONE)
        model = classifier.read(source, name, like, classes, pair)
    else:
        classifier.refuse_names(folder, classes, pair)
        model = _similarity(folder, name, found, encoder_only)
    return _one(like, folder, model, found.adapter, found.config)


def _load_ours(folder: Path, name: str, base: str | None) -> TaskModels:
    path = folder / ABOUT
    about = schema.parse(About, upgrade(read_object(path)), path, "was it changed by hand?")
    task = dataclasses.replace(about.task, name=name)
    trained = TaskModels(
        **about.base_spec(), models={}, trees={}, configs={}, origin=str(folder)
    ).at(base)
    found = trained.load_base()
    trained = dataclasses.replace(
        trained, fingerprint=trained.fingerprint.completed(found.fingerprint)
    )
    config = found.config
    adapter, lora_config = peft.load(folder, config, encoder_only=True)
    model = TaskModel(task, name, {}, about.pair_features, about.facts)
    head = head_files.read(folder, model.head_shapes(config.hidden_size))
    model = dataclasses.replace(model, stored_head=head)
    return _one(trained, folder, model, adapter, lora_config)


def _one(
    like: TaskModels, folder: Path, model: TaskModel, adapter: Tree, config: LoraConfig
) -> TaskModels:
    name = model.task.name
    return dataclasses.replace(
        like, models={name: model}, trees={name: {"lora": adapter}}, configs={name: config},
        origin=str(folder),
    )  # fmt: skip


def _similarity(folder: Path, name: str, found: peft.PeftFolder, encoder_only: bool) -> TaskModel:
    """Return a similarity task, which has no head; factors of the unused pooler are left out."""
    rest = [module for module in found.head.modules if not module.startswith("pooler")]
    if rest and not encoder_only:
        raise UserError(
            f"{folder / peft_config.CONFIG}: task_type {found.written.task_type!r}, with a trained "
            f"{', '.join(rest)}: only heads of task_type 'SEQ_CLS' can be imported; {_ALONE}"
        )
    task = Task(name, "similarity", pair=True, title=f"similarity, {folder.name}")
    facts = Facts(imported_from=str(folder), left_out=found.head.modules)
    return TaskModel(task, name, {}, "concat", facts)


# ---- the base of an adapter


def _check_base(path: Path, written: peft_config.PeftConfig, base: Pretrained) -> None:
    """Refuse an adapter that was trained on another base, or does not name its base.

    Revisions are compared only if the folder has one; PEFT usually omits it.
    """
    name = written.base_model_name_or_path
    if name is None:
        raise UserError(
            f"{path}: base_model_name_or_path is empty, so nothing says that the adapter was "
            f"trained on {base.name}; if it was, use `any_base=True`"
        )
    revision = written.revision or _revision(name)
    there = _revision(base.name) or "main"  # the default of the hub
    same = _place(name) == _place(base.name) and revision in (None, there)
    if not same and not (revision is None and _is_same_model(name, base)):
        at = f"@{revision}" if revision else ""
        raise UserError(
            f"{path}: the adapter was trained on {name}{at}, the base here is {base.name}; import "
            f"it into a bank whose base is that, or, if both are the same, use `any_base=True`"
        )


def _place(base: str) -> str:
    """Return a canonical name of a base: the absolute path of a folder, or a hub id.

    >>> _place("minilm"), _place("google-bert/bert-base-uncased"), _place("bert-base-uncased@v1")
    ('sentence-transformers/all-MiniLM-L6-v2', 'bert-base-uncased', 'bert-base-uncased')
    """
    if base == huggingface.MINILM:
        return huggingface.MINILM_HUB
    folder = huggingface.local_folder(base)
    if folder is not None:
        return str(folder.resolve())
    # The oldest models of the hub had no owner; the BERTs among them moved to google-bert.
    return huggingface.split_revision(base)[0].rstrip("/").removeprefix("google-bert/")


def _revision(base: str) -> str | None:
    """Return the revision that a base is pinned to; None for a folder."""
    return huggingface.split_revision(base)[1] if huggingface.local_folder(base) is None else None


def _is_same_model(name: str, base: Pretrained) -> bool:
    """Return whether a base that is available locally under another name is the same model."""
    at_hand = huggingface.MINILM if _place(name) == huggingface.MINILM_HUB else name
    if at_hand != huggingface.MINILM and huggingface.local_folder(name) is None:
        return False
    try:
        other = huggingface.load(at_hand)
    except UserError:
        return False
    return other.fingerprint == base.fingerprint
