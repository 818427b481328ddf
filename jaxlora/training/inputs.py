"""The inputs of a run: load them, check that they fit together, and summarize the run."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from jaxlora.data.order import make_order
from jaxlora.data.sources import Location, where
from jaxlora.data.task_files import TaskSpec
from jaxlora.data.tokenized import SPLITS, Examples, list_blank, load_examples
from jaxlora.formats import families, huggingface
from jaxlora.formats.families import Family
from jaxlora.formats.huggingface import Pretrained
from jaxlora.tasks.sharing import Groups, group_name
from jaxlora.training import parameter_count
from jaxlora.training.config import Settings
from jaxlora.utils import cache
from jaxlora.utils.errors import ConfigError, UserError

# Names of inputs: the prefix for dev sets, and the order of examples.
DEV_SET = "the dev set of "
ORDER = "the order of examples"
Data = dict[str, dict[str, Examples]]  # task → split → examples


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """What a run will do, to be shown before it starts.

    Attributes:
      settings: all settings.
      out: the run's folder.
      base: a line about the base model.
      examples: task → split → number of examples.
      truncated: task → number of sentences cut to the length limit.
      unlabelled: task → number of examples left out because they have no label.
      notes: task → remarks about its files, such as rows left out or how quotes were read.
      storage: numbers of parameters.
      steps: group → number of steps.
      device: number and kind of the devices, and the dtype of matmuls.
    """

    settings: Settings
    out: Path
    base: str
    examples: dict[str, dict[str, int]]
    truncated: dict[str, int]
    unlabelled: dict[str, int]
    notes: dict[str, list[str]]
    storage: parameter_count.ParameterCount
    steps: dict[str, int]
    device: str


def fit_to_base(settings: Settings) -> Settings:
    """Set the adapter's modules and the classifier heads to those of the base's model family.

    Raises:
      UserError: if the base cannot be found or its config cannot be read, or if a classifier head
        does not fit the base or the pooling.
    """
    classify = any(task.head == "classifier" for task in settings.named.values())
    if settings.adapt != "lora" and not classify:
        return settings
    config = huggingface.config_of(settings.model.base)
    if settings.adapt == "lora":
        settings = dataclasses.replace(settings, lora=families.localise(settings.lora, config))
    if classify and settings.model.pooling != "cls":
        raise ConfigError(
            "pooling",
            "a head 'classifier' reads the first token's vector; use cls",
            settings.model.pooling,
        )
    specs = tuple(_with_head(spec, families.of(config)) for spec in settings.tasks)
    return dataclasses.replace(settings, tasks=specs)


def _with_head(spec: TaskSpec, family: Family) -> TaskSpec:
    """Replace the head `classifier` of a task by that of the model family."""
    if spec.task.head != "classifier":
        return spec
    if family.classifier is None:
        raise ConfigError(
            "tasks",
            f"[{spec.task.name}] head: the classifier of a {family.model} is not supported; leave "
            "`head` out",
        )
    task = dataclasses.replace(spec.task, head=family.classifier.head)
    return dataclasses.replace(spec, task=task)


def check_base(settings: Settings, base: Pretrained) -> None:
    """Check that settings fit the base model.

    Raises:
      ConfigError: if one does not; the error names it.
    """
    limit = base.config.max_length
    if settings.model.max_length > limit:
        raise ConfigError(
            "max_length", f"{settings.model.base} allows {limit} at most", settings.model.max_length
        )
    settings.adaptation.check(base.params)
    if any(task.joint for task in settings.named.values()):
        huggingface.check_pairs(base)


def load_data(settings: Settings, base: Pretrained) -> Data:
    """Load all splits of all tasks, tokenized for the base.

    Raises:
      UserError: if the data is invalid; the error names the file and the line.
    """

    def load(name: str, source: str, place: Location) -> dict[str, Examples]:
        return load_examples(
            settings.named[name], source, place, base.tokenizer, base.fingerprint.tokenizer or "",
            settings.model.max_length, cache.cache_dir(),
        )  # fmt: skip

    data = {name: load(name, settings.data.source, settings.place(name)) for name in settings.named}
    if settings.data.synthetic_sts:
        data["sts"]["train"] = data["sts"]["train"].join(load("sts", "demo", None)["train"])
    return data


def refuse_blank(settings: Settings, data: Data) -> None:
    """Refuse data with blank texts.

    Raises:
      UserError: if there are any; the error names the file and the lines.
    """
    for name, splits in data.items():
        for split in SPLITS:
            if blank := splits[split].blank:
                task, place = settings.named[name], settings.place(name)
                file = where(task, settings.data.source, place, split)
                raise UserError(
                    f"{file}: {list_blank(blank)}; fill them in, or go without `strict=True`, "
                    "which leaves them out"
                )


def notes(splits: Mapping[str, Examples]) -> list[str]:
    """Return remarks about the files of a task, one per line."""
    found = []
    for split in SPLITS:
        examples = splits[split]
        found += [f"{split}: {note}" for note in examples.notes]
        if examples.blank:
            found.append(f"{split}: {list_blank(examples.blank)} left out")
        missing = int(np.isnan(examples.targets).any(-1).sum())
        if split == "dev" and len(examples) > 1 and not np.ptp(examples.labels, axis=0).any():
            found.append("dev: every row has the same label, so no score there means anything")
        if split == "test" and 0 < missing < len(examples):
            found.append(f"test: {missing:,} labels are missing, so it is predicted and not scored")
    return found


def fingerprints(base: Pretrained, data: Data, seed: int) -> dict[str, str]:
    """Return checksums of the inputs of a run: the base, the tasks' data, and their order."""
    order = make_order({task: len(splits["train"]) for task, splits in data.items()}, 64, seed)
    prints = base.fingerprint.to_inputs()
    prints[ORDER] = _checksum([order.at(0)])
    for task, splits in data.items():
        parts = [splits[split] for split in SPLITS]
        arrays = [x for part in parts for x in (part.tokens, part.offsets, part.labels)]
        arrays += [part.types for part in parts if part.types is not None]
        prints[data_of(task)] = _checksum(arrays)
        dev = splits["dev"]
        prints[dev_of(task)] = _checksum([dev.tokens, dev.offsets, dev.labels])
    return prints


def data_of(task: str) -> str:
    """Return the name of a task's data in the inputs of a run."""
    return f"the data of {task}"


def dev_of(task: str) -> str:
    """Return the name of a task's dev set in the inputs of a run."""
    return f"{DEV_SET}{task}"


def _checksum(arrays: Iterable[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of the packages that affect the numbers of a run."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
    return {name: importlib.metadata.version(name) for name in names}


def count(settings: Settings, base: Pretrained) -> parameter_count.ParameterCount:
    """Count the parameters of a run."""
    return parameter_count.count(
        base.config, settings.adaptation, settings.groups, settings.named.values(),
        settings.model.pair_features,
    )  # fmt: skip


def summarize_run(
    settings: Settings, out: Path, base: Pretrained, data: Data, mesh: Mesh
) -> RunSummary:
    """Return a summary of what the run will do."""
    shape = base.config
    return RunSummary(
        settings=settings,
        out=out,
        base=f"{base.name}: {families.of(shape).model}, {shape.num_hidden_layers} layers, "
        f"{shape.hidden_size} wide, "
        f"{shape.num_attention_heads} heads, sha256 {base.fingerprint.weights[:12]}…{base.without}",
        examples={task: {k: len(v) for k, v in splits.items()} for task, splits in data.items()},
        truncated={t: sum(e.truncated for e in splits.values()) for t, splits in data.items()},
        unlabelled={t: sum(e.unlabelled for e in splits.values()) for t, splits in data.items()},
        notes={task: notes(splits) for task, splits in data.items()},
        storage=count(settings, base),
        steps=count_steps(settings, data),
        device=f"{mesh.size} × {mesh.devices.flat[0].device_kind}, {settings.dtype} matmuls",
    )


def count_steps(settings: Settings, data: Data, groups: Groups | None = None) -> dict[str, int]:
    """Return the number of steps of each group, by name.

    Args:
      settings: settings of the run.
      data: examples of all tasks.
      groups: a subset of the run's groups; None: all.
    """
    return {
        group_name(names): make_steps(
            settings.of_group(names), {n: data[n]["train"] for n in names}
        )
        for names in groups or settings.groups
    }


def make_steps(settings: Settings, train: Mapping[str, Examples]) -> int:
    """Return the steps of a group: its epochs over its largest set, at most `max_steps`."""
    per_epoch = -(-max(map(len, train.values())) // settings.loop.batch_size)
    return min(
        settings.loop.epochs * per_epoch,
        settings.loop.max_steps or settings.loop.epochs * per_epoch,
    )
