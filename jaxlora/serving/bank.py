"""A bank: a folder that keeps the adapters and heads of many tasks of one base model.

    bank.json                 the manifest: the base by name and checksums; for each task what it
                              is, which adapter and head it uses, its scores, data and versions
    adapters/<name>-<hash>/   an Orbax tree; tasks that were trained together share one
    heads/<task>-<hash>/      an Orbax tree (a task judged by the cosine has none)

Folders bear the checksum of what they hold and are never written again. A change writes new folders
first, then the manifest in one rename, then drops what no task uses any more: killed at any moment,
the bank holds the old state or the new one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax import traverse_util

from jaxlora import lora
from jaxlora.data.task_files import check_name
from jaxlora.formats.fingerprint import Fingerprint
from jaxlora.lora import LoraConfig
from jaxlora.serving import finished_run, tree_files
from jaxlora.serving import manifest as manifests
from jaxlora.serving.manifest import ADAPTERS, HEADS
from jaxlora.serving.task_models import TaskModel, TaskModels, from_of_base
from jaxlora.tasks.task import Task
from jaxlora.utils import files, trees
from jaxlora.utils.errors import UserError
from jaxlora.utils.files import LOCK, TEMPORARY
from jaxlora.utils.schema import build
from jaxlora.utils.trees import Tree

T = TypeVar("T")
MOST_CHANGES = 100  # while a bank is read
_REPAIR = "put back a copy, or bring the task back with bank update, or take it out: bank remove"


def add(folder: Path, source: TaskModels, names: Sequence[str], *, replace: bool = False) -> None:
    """Put trained tasks into a bank, which is made if need be; no other file is touched.

    Args:
      folder: the bank.
      source: where the tasks come from, see `finished_run.load_run`.
      names: which of its tasks.
      replace: the tasks must be there already and are replaced; else they must be new.

    Raises:
      UserError: if a task is (not) there already, or the base, the pooling or the dtype differ.
    """
    folder = files.local(folder)
    for name in names:
        source.find(name)
        check_name(name, source.origin)
    for name in names:
        _check_tree(source, name)
    if not manifests.exist(folder) and folder.is_dir():
        _check_empty(folder)
    with _locked(folder, make=not replace):
        there = manifests.exist(folder)
        manifest = manifests.read(folder) if there else manifests.empty(source)
        _check_fits(folder, manifest, source)
        present = [name for name in names if name in manifest["tasks"]]
        if present and not replace:
            raise UserError(
                f"{folder}: has {', '.join(present)} already; update it, or take another name"
            )
        absent = [name for name in names if name not in manifest["tasks"]]
        if absent and replace:
            raise UserError(f"{folder}: has no {', '.join(absent)} yet; add it instead")
        _complete_fingerprint(folder, manifest, source)
        for name in names:
            manifest["tasks"][name] = _store(folder, manifest, name, source)
        _commit(folder, manifest)


def remove(folder: Path, name: str) -> None:
    """Take a task out.

    Raises:
      UserError: if there is none of that name.
    """
    folder = files.local(folder)
    with _locked(folder, make=False):
        manifest = manifests.read(folder)
        if name not in manifest["tasks"]:
            raise UserError(f"{folder}: no task {name!r}; it has {', '.join(manifest['tasks'])}")
        del manifest["tasks"][name]
        _commit(folder, manifest)


def load(folder: Path) -> TaskModels:
    """Read a bank; every tree is compared with its checksum.

    Raises:
      UserError: naming what is missing, damaged or not understood.
    """
    folder = files.local(folder)
    return _at_one_moment(folder, lambda manifest: _load_by(folder, manifest))


def _at_one_moment(folder: Path, read: Callable[[dict[str, Any]], T]) -> T:
    """Read what a manifest names; once more if another process has changed the bank meanwhile.

    Raises:
      UserError: if something is wrong with the bank, or it never stays as it is.
    """
    for _ in range(MOST_CHANGES):
        stamp = manifests.stamp(folder)
        manifest = manifests.read(folder)
        try:
            return read(manifest)
        except (UserError, OSError):  # a folder may go at any time
            if manifests.stamp(folder) == stamp:
                raise
    raise UserError(f"{folder}: other processes change it all the time; try again")


def _load_by(folder: Path, manifest: Mapping[str, Any]) -> TaskModels:
    kept = {name: _load_tree(folder, ADAPTERS, name) for name in manifest["adapters"]}
    configs = {name: build(LoraConfig, plain) for name, plain in manifest["adapters"].items()}
    for name, config in configs.items():
        _check_ranks(folder / manifests.NAME, name, kept[name], config)
    models = {}
    for name, entry in manifest["tasks"].items():
        head = {} if entry["head"] is None else _load_tree(folder, HEADS, entry["head"])
        tree = entry["adapter"] or ""
        task = build(Task, entry["task"])
        models[name] = TaskModel(task, tree, head, entry["pair_features"], entry["facts"])
    if any(one.tree == "" for one in models.values()):
        kept[""] = {}  # the frozen base itself
    return TaskModels(
        **from_of_base(manifest), models=models, trees=kept, configs=configs, origin=str(folder)
    )


def load_any(folder: Path) -> TaskModels:
    """Read a bank or a finished run.

    Raises:
      UserError: if it is neither, or damaged.
    """
    folder = files.local(folder)
    if not (manifests.exist(folder) or finished_run.exists(folder)):
        raise UserError(f"{folder}: neither a bank nor a finished run")
    return load(folder) if manifests.exist(folder) else finished_run.load_run(folder)


def verify(folder: Path, base: str | None = None) -> list[str]:
    """What is wrong with a bank's files and its base, one line each; nothing if all is well.

    Args:
      folder: the bank.
      base: where its base is now; None: where it was.

    Raises:
      UserError: if the manifest itself cannot be read.
    """
    folder = files.local(folder)
    manifests.read(folder)

    def check(manifest: dict[str, Any]) -> list[str]:
        found = [_problem(folder, part, name) for part, name in manifests.used(manifest)]
        problems = [one for one in found if one]
        try:
            whole = _without_tasks(folder, manifest) if problems else _load_by(folder, manifest)
            whole.at(base).load_base()
        except UserError as error:
            problems.append(str(error))
        if problems:
            raise UserError("\n".join(problems))
        return problems

    try:
        return _at_one_moment(folder, check)
    except UserError as error:
        return str(error).split("\n")


def _problem(folder: Path, part: str, name: str) -> str | None:
    try:
        _load_tree(folder, part, name)
    except UserError as error:
        return str(error)
    return None


def _without_tasks(folder: Path, manifest: Mapping[str, Any]) -> TaskModels:
    return TaskModels(**from_of_base(manifest), models={}, trees={}, configs={}, origin=str(folder))


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a task keeps in a bank: numbers of parameters, and bytes on disk.

    Attributes:
      task: its name.
      title, metric, score: what it is, and how it did on dev.
      adapter: name of its adapter.
      adapter_parameters, head_parameters: numbers of each.
      bytes: on disk, a shared adapter's divided among its tasks.
    """

    task: str
    title: str
    metric: str
    score: float | None
    adapter: str
    adapter_parameters: int
    head_parameters: int
    bytes: int


def contents(folder: Path) -> list[Stored]:
    """What a bank holds, task by task.

    Raises:
      UserError: see `load`.
    """
    folder = files.local(folder)
    return _at_one_moment(folder, lambda manifest: _contents(folder, manifest))


def _contents(folder: Path, manifest: Mapping[str, Any]) -> list[Stored]:
    trained, rows = _load_by(folder, manifest), []
    for name, one in trained.models.items():
        entry = manifest["tasks"][name]
        sharers = sum(other.tree == one.tree for other in trained.models.values())
        size = _size(folder / ADAPTERS / one.tree) // sharers if one.tree else 0
        size += _size(folder / HEADS / entry["head"]) if entry["head"] else 0
        score = one.facts.get("dev", {}).get(one.task.metric)
        rows.append(
            Stored(
                name,
                one.task.title,
                one.task.metric_name,
                score,
                one.tree or "none",
                trees.count(trained.trees[one.tree]),
                trees.count(one.head),
                size,
            )
        )
    if manifests.read(folder) != manifest:  # then folders may have gone while they were measured
        raise UserError(f"{folder}: was changed meanwhile")
    return rows


def describe(folder: Path, name: str) -> str:
    """A task's manifest entry as JSON.

    Raises:
      UserError: if there is none of that name.
    """
    manifest = manifests.read(files.local(folder))
    if name not in manifest["tasks"]:
        raise UserError(f"{folder}: no task {name!r}; it has {', '.join(manifest['tasks'])}")
    entry = manifest["tasks"][name]
    shown = {"base": manifest["base"], **entry, "lora": manifest["adapters"].get(entry["adapter"])}
    return json.dumps(shown, indent=2, ensure_ascii=False)


def _store(folder: Path, manifest: dict[str, Any], name: str, source: TaskModels) -> dict[str, Any]:
    """Write a task's trees, as far as they are not there yet; returns its manifest entry."""
    one, adapter = source.models[name], None
    tree = source.trees[one.tree]
    if tree:
        adapter = _save_tree(folder, ADAPTERS, one.tree, tree)
        manifest["adapters"][adapter] = dataclasses.asdict(source.configs[one.tree])
    return {
        "task": dataclasses.asdict(one.task),
        "adapter": adapter,
        "head": _save_tree(folder, HEADS, name, one.head) if one.head else None,
        "pair_features": one.pair_features,
        "facts": dict(one.facts),
    }


def _check_tree(source: TaskModels, name: str) -> None:
    one = source.models[name]
    tree = source.trees[one.tree]
    if "params" in tree:
        raise UserError(f"{source.origin}: {name} is a whole fine-tuned BERT; banks keep adapters")
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((tree, one.head))):
        raise UserError(f"{source.origin}: {name} has numbers that are not finite; nothing is kept")


def _save_tree(folder: Path, part: str, name: str, tree: Tree) -> str:
    stored = f"{name[:40]}-{trees.checksum(tree)[:16]}"
    manifests.check_folder(stored)
    try:
        whole = (folder / part / stored).is_dir() and bool(_load_tree(folder, part, stored))
    except UserError:
        whole = False
    if not whole:  # written anew over a damaged one, too
        tree_files.save(folder / part / stored, tree)
    return stored


def _load_tree(folder: Path, part: str, stored: str) -> Tree:
    path = folder / part / stored
    if not path.is_dir():
        raise UserError(f"{path}: missing; {_REPAIR}")
    try:
        tree = tree_files.load(path)
    except UserError as error:
        raise UserError(f"{error}; {_REPAIR}") from error
    if not stored.endswith(trees.checksum(tree)[:16]):
        raise UserError(f"{path}: damaged, its content has another checksum; {_REPAIR}")
    return tree


def _check_ranks(path: Path, name: str, tree: Tree, config: LoraConfig) -> None:
    for place, factor in traverse_util.flatten_dict(tree["lora"]).items():
        layer, rank = place[:-1], factor.shape[-1 if place[-1] == "A" else -2]
        adapted = any(lora.matches(target, layer) for target in config.target_modules)
        if not adapted or rank != config.rank_of(layer):
            raise UserError(
                f"{path}: was changed by hand or damaged (adapter {name} has rank {rank} at "
                f"{'.'.join(layer)}, which is not what is written)"
            )


def _check_fits(folder: Path, manifest: Mapping[str, Any], source: TaskModels) -> None:
    if other := _fingerprint(manifest).differing(source.fingerprint):
        raise UserError(
            f"{folder}: is a bank of {manifest['base']}; {source.base}, which {source.origin} was "
            f"trained on, has another {' and another '.join(other)}"
        )
    for field in ("pooling", "max_length", "dtype"):
        if manifest[field] != getattr(source, field):
            raise UserError(
                f"{folder}: has {field} {manifest[field]}, {source.origin} has "
                f"{getattr(source, field)}; train with {field} {manifest[field]}"
            )


def _fingerprint(manifest: Mapping[str, Any]) -> Fingerprint:
    return build(Fingerprint, manifest["fingerprint"])


def _complete_fingerprint(folder: Path, manifest: dict[str, Any], source: TaskModels) -> None:
    """Take from new tasks what a bank of format 1 does not know of its base."""
    known = _fingerprint(manifest)
    if manifest["tasks"]:
        known.note_if_partial(str(folder))
    source.fingerprint.note_if_partial(source.origin)
    manifest["fingerprint"] = dataclasses.asdict(known.completed(source.fingerprint))


def _check_empty(folder: Path) -> None:
    ours = (LOCK, ADAPTERS, HEADS, manifests.NAME)  # the folders, if the first change was killed
    names = [path.name for path in folder.iterdir()]
    if not all(name in ours or name.startswith(TEMPORARY) for name in names):
        raise UserError(f"{folder}: is not empty and holds no bank; name another folder")


def _commit(folder: Path, manifest: dict[str, Any]) -> None:
    used = {entry["adapter"] for entry in manifest["tasks"].values()}
    manifest["adapters"] = {k: v for k, v in manifest["adapters"].items() if k in used}
    manifests.write(folder, manifest)
    keep = set(manifests.used(manifest))
    for part in (ADAPTERS, HEADS):
        for path in (folder / part).iterdir() if (folder / part).is_dir() else ():
            if (part, path.name) not in keep:
                shutil.rmtree(path, ignore_errors=True)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextlib.contextmanager
def _locked(folder: Path, *, make: bool = True) -> Iterator[None]:
    """One writer at a time.

    Raises:
      UserError: if another process is writing, or the folder cannot be made.
    """
    if make:
        try:
            files.make(folder)
        except OSError as error:
            raise UserError(f"{folder}: cannot be a bank ({error.strerror})") from None
    else:
        manifests.read(folder)
    with files.locked(folder, f"{folder}: another process is changing it; try again"):
        yield
