"""A bank: a folder with the adapters and heads of many tasks for one base model.

    bank.json                 the manifest: name and checksums of the base; the definition, adapter,
                              head, scores, data and versions of each task
    adapters/<name>-<hash>/   an Orbax checkpoint, shared by tasks that were trained together
    heads/<task>-<hash>/      an Orbax checkpoint (a task with the cosine loss has none)

Each folder is named by the checksum of its content and never modified. A change writes new folders,
then replaces the manifest by a rename, then deletes folders that are no longer used. If it is
killed at any moment, the bank is in the old state or the new one.

A finished run also stores its trained parameters as a bank, in its folder `model`. Fully fine-tuned
encoders are allowed only there; imported full encoders are allowed in any bank.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import numpy as np

from jaxlora import lora
from jaxlora.data.task_files import check_name
from jaxlora.formats import fingerprint
from jaxlora.lora import LoraConfig
from jaxlora.serving import manifest as manifests
from jaxlora.serving import old_run, tree_files
from jaxlora.serving.finished_run import find_bank
from jaxlora.serving.manifest import ADAPTERS, HEADS, Manifest, Size, Stamp, TaskEntry
from jaxlora.serving.task_models import TaskModel, TaskModels
from jaxlora.serving.tree_cache import StoredTrees, TreeCache
from jaxlora.utils import files, trees
from jaxlora.utils.errors import UserError
from jaxlora.utils.files import LOCK, TEMPORARY
from jaxlora.utils.trees import Tree

T = TypeVar("T")
PARTS = (ADAPTERS, HEADS)
MEMORY = 2**29  # bytes of trees cached in host memory
MOST_VERSIONS = 5  # earlier versions that are kept of each task
MOST_CHANGES = 100  # attempts to read a bank that other processes change
_REPAIR = "restore a backup, or repair the task with bank update, or delete it with bank remove"


# ---- reading


def load(folder: Path, memory: int = MEMORY) -> TaskModels:
    """Open a bank or a finished run.

    Only the manifest is read now. Each tree is read and compared with its checksum on first use,
    which raises a `UserError` if it is missing or damaged. (A run of an older jaxlora is read
    completely.)

    Args:
      folder: the bank or the run.
      memory: bytes of trees to cache in host memory; the most recently used are kept.

    Raises:
      UserError: if the manifest, or a run of an older jaxlora, is missing or damaged.
    """
    named = files.local(folder)
    if old_run.exists(named):
        return old_run.load(named)
    folder = find_bank(named)
    stamp = manifests.stamp(folder)
    manifest = manifests.read(folder)
    read = TreeCache(_Reader(folder.absolute(), stamp, manifest.adapters), memory)
    return dataclasses.replace(_open(folder, manifest, read), origin=str(named))


def load_base_spec(folder: Path) -> TaskModels:
    """Read only the description of a bank's base; the result has no tasks.

    Raises:
      UserError: if the manifest cannot be read.
    """
    folder = find_bank(files.local(folder))
    return _without_tasks(folder, manifests.read(folder))


def _without_tasks(folder: Path, manifest: Manifest) -> TaskModels:
    return TaskModels(**manifest.base_spec(), models={}, trees={}, configs={}, origin=str(folder))


def _at_one_moment(folder: Path, read: Callable[[Manifest], T]) -> T:
    """Call `read` with the manifest, again if another process changed the bank meanwhile.

    Raises:
      UserError: if the bank is damaged, or changed during each of `MOST_CHANGES` attempts.
    """
    for _ in range(MOST_CHANGES):
        stamp = manifests.stamp(folder)
        manifest = manifests.read(folder)
        try:
            return read(manifest)
        except (UserError, OSError):  # another process may delete a folder at any time
            if manifests.stamp(folder) == stamp:
                raise
    raise UserError(f"{folder}: other processes keep changing it; try again")


def _open(folder: Path, manifest: Manifest, read: TreeCache[tuple[str, str]]) -> TaskModels:
    """Return the tasks of a manifest; their trees are read on first use."""
    models = {
        name: TaskModel(
            entry.task,
            entry.adapter or "",  # "": the frozen base
            functools.partial(read, (HEADS, entry.head)) if entry.head else {},
            entry.pair_features,
            entry.facts,
        )
        for name, entry in manifest.tasks.items()
    }
    used = manifest.used
    return dataclasses.replace(
        _without_tasks(folder, manifest),
        models=models,
        trees=StoredTrees({m.tree: (ADAPTERS, m.tree) for m in models.values()}, read),
        configs={n: config for n, config in manifest.adapters.items() if config and n in used},
    )


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads the trees of a manifest; the bank may have changed since it was opened.

    Attributes:
      folder: the bank.
      stamp: the stamp of its manifest when the bank was opened.
      adapters: see `Manifest`.
    """

    folder: Path
    stamp: Stamp
    adapters: Mapping[str, LoraConfig | None]

    def __call__(self, which: tuple[str, str]) -> Tree:
        """Read and check a tree, given as `(part, name)`.

        Raises:
          UserError: if it is missing or damaged, or contradicts the manifest.
        """
        part, name = which
        if not name:
            return {}
        try:
            tree = _load_tree(self.folder, part, name)
        except UserError as error:
            if self._gone(part, name):
                raise UserError(
                    f"{self.folder / part / name}: the bank was changed since it was opened, and "
                    "no longer has this; open it again"
                ) from error
            raise
        if part == ADAPTERS:
            _check_kind(self.folder / manifests.NAME, name, tree, self.adapters[name])
        return tree

    def _gone(self, part: str, name: str) -> bool:
        """Return whether another process has removed a tree from the bank."""
        if not manifests.exist(self.folder):
            return True
        if manifests.stamp(self.folder) == self.stamp:
            return False
        return (part, name) not in manifests.read(self.folder).folders()


def _load_tree(folder: Path, part: str, stored: str) -> Tree:
    path = folder / part / stored
    if not path.is_dir():
        raise UserError(f"{path}: missing; {_REPAIR}")
    try:
        tree = tree_files.load(path)
    except UserError as error:
        raise UserError(f"{error}; {_REPAIR}") from error
    if not stored.endswith(trees.checksum(tree)[:16]):
        raise UserError(f"{path}: damaged, its checksum does not match; {_REPAIR}")
    return tree


def _check_kind(path: Path, name: str, tree: Tree, config: LoraConfig | None) -> None:
    """Refuse a tree whose kind or ranks differ from the manifest."""
    if not isinstance(tree, dict) or list(tree) != ["params" if config is None else "lora"]:
        raise UserError(f"{path}: {name} is not the kind of tree that it says; restore a backup")
    try:
        if config is not None:
            lora.check_fit(tree["lora"], config)
    except ValueError as error:
        raise UserError(
            f"{path}: was changed by hand or damaged (adapter {name}: {error}); restore a backup"
        ) from error


def verify(folder: Path, base: str | None = None) -> list[str]:
    """Check all files of a bank and its base; return one line per problem, `[]` if there are none.

    Args:
      folder: the bank, or a finished run.
      base: the base's new location, if it has moved.

    Raises:
      UserError: if the manifest itself cannot be read.
    """
    folder = find_bank(files.local(folder))
    manifests.read(folder)

    def check(manifest: Manifest) -> list[str]:
        reader = _Reader(folder, manifests.stamp(folder), manifest.adapters)
        read = TreeCache(reader, MEMORY)
        every = {name: config for name, config in manifest.adapters.items() if config}
        trained = dataclasses.replace(_open(folder, manifest, read).at(base), configs=every)
        problems = _problems(functools.partial(read, which) for which in manifest.folders())

        def check_rest() -> None:
            found = trained.load_base()
            for name in trained.configs:
                trained.check_adapter(name, found)
            for name in () if problems else trained.models:
                trained.head(name, found)

        if problems := problems + _problems([check_rest]):
            raise UserError("\n".join(problems))
        return problems

    try:
        return _at_one_moment(folder, check)
    except UserError as error:
        return str(error).split("\n")


def _problems(checks: Iterable[Callable[[], object]]) -> list[str]:
    """Run the checks and return the messages of their errors."""
    found = []
    for check in checks:
        try:
            check()
        except UserError as error:
            found.append(str(error))
    return found


# ---- contents


@dataclasses.dataclass(frozen=True)
class Stored:
    """A task in a bank, with its parameter counts and its size on disk.

    Attributes:
      task: its name.
      title, metric, score: its title, its metric and its dev score; None: unknown.
      adapter: the folder of its adapter, or `none`.
      adapter_parameters, head_parameters: parameter counts.
      bytes: size on disk; that of a shared adapter is divided among its tasks.
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
    """Return the tasks of a bank from its manifest; trees are read only if it lacks their sizes.

    Raises:
      UserError: if the manifest is damaged or not understood.
    """
    folder = find_bank(files.local(folder))
    return _at_one_moment(folder, lambda manifest: _contents(folder, manifest))


def _contents(folder: Path, manifest: Manifest) -> list[Stored]:
    sizes, rows = _sizes(folder, manifest), []
    sharers = collections.Counter(entry.adapter for entry in manifest.tasks.values())
    for name, entry in manifest.tasks.items():
        adapter = sizes.get(f"{ADAPTERS}/{entry.adapter}", Size(0, 0))
        head = sizes.get(f"{HEADS}/{entry.head}", Size(0, 0))
        rows.append(
            Stored(
                name,
                entry.task.title,
                entry.task.metric_name,
                entry.facts.dev.get(entry.task.metric),
                entry.adapter or "none",
                adapter.parameters,
                head.parameters,
                adapter.bytes // sharers[entry.adapter] + head.bytes,
            )
        )
    return rows


def _sizes(folder: Path, manifest: Manifest) -> dict[str, Size]:
    """Return the sizes of all trees; measure those that the manifest lacks."""
    return {
        f"{part}/{name}": manifest.sizes.get(f"{part}/{name}") or _measure(folder, part, name)
        for part, name in manifest.folders()
    }


def _measure(folder: Path, part: str, name: str) -> Size:
    return _size(folder / part / name, _load_tree(folder, part, name))


def _size(stored: Path, tree: Tree) -> Size:
    kept = [path for path in stored.rglob("*") if path.is_file()]
    return Size(trees.count(tree), sum(path.stat().st_size for path in kept))


def history(folder: Path, name: str) -> list[TaskEntry]:
    """Return all versions of a task in a bank: the oldest first, the current one last.

    Raises:
      UserError: if no task has that name.
    """
    folder = find_bank(files.local(folder))
    manifest = manifests.read(folder)
    return [*manifest.history.get(name, ()), manifest.find(folder, name)]


def describe(folder: Path, name: str) -> str:
    """Return a task's manifest entry as JSON, with its base and LoRA configuration.

    Raises:
      UserError: if no task has that name.
    """
    folder = find_bank(files.local(folder))
    manifest = manifests.read(folder)
    entry = manifest.find(folder, name)
    adapted = manifest.adapters[entry.adapter] if entry.adapter else None
    shown = {
        "base": manifest.base,
        **dataclasses.asdict(entry),
        "lora": dataclasses.asdict(adapted) if adapted else None,
    }
    return json.dumps(shown, indent=2, ensure_ascii=False)


# ---- writing


def write(folder: Path, source: TaskModels) -> None:
    """Write all tasks of a source as a new bank that replaces `folder`; allow full encoders.

    A process that is killed during the final swap may leave no bank.
    """
    with files.building(folder.absolute(), replace=True) as content:
        manifest = manifests.empty(source)
        _commit(content, _store(content, manifest, source, tuple(source.models)))


class Change(NamedTuple):
    """The effect of an update on one task.

    Attributes:
      task: its name.
      metric: the metric of the scores.
      before, after: dev scores; None if unknown.
      same_dev: whether both are known to be of the same dev set and metric.
      made: whether the task was replaced.
      greater: whether a greater score is better.
    """

    task: str
    metric: str
    before: float | None
    after: float | None
    same_dev: bool
    made: bool
    greater: bool = True

    @property
    def better(self) -> bool:
        """Whether the score improved; False if either score is unknown."""
        if self.before is None or self.after is None:
            return False
        return self.after > self.before if self.greater else self.after < self.before


def add(
    folder: Path,
    source: TaskModels,
    names: Sequence[str],
    *,
    replace: bool = False,
    if_better: bool = False,
) -> list[Change]:
    """Add new tasks to a bank, or replace existing ones; files of other tasks stay untouched.

    Args:
      folder: the bank; created if it is missing and tasks are added.
      source: the trained tasks, see `load`.
      names: the tasks to take from it.
      replace: replace existing tasks; their last `MOST_VERSIONS` versions are kept for `rollback`.
        Otherwise all tasks must be new.
      if_better: replace only tasks whose score on the same dev set improves.

    Returns:
      With `replace` the effect on each task, else `[]`.

    Raises:
      UserError: if a task exists already, or with `replace` does not; if it is fully fine-tuned or
        has non-finite parameters; if base, pooling, maximum length or dtype differ from the bank's;
        if `if_better` would compare scores of different dev sets; if its adapter does not fit its
        configuration or has a higher rank than its layers.
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
        _check_names(folder, manifest, names, replace)
        manifest = _complete_fingerprint(folder, manifest, source)
        changes = [_compare(folder, manifest, source, name, if_better) for name in names if replace]
        skipped = {change.task for change in changes if not change.made}
        names = [name for name in names if name not in skipped]
        if names:
            _commit(folder, _store(folder, manifest, source, names))
    return changes


def _compare(
    folder: Path, manifest: Manifest, source: TaskModels, name: str, if_better: bool
) -> Change:
    """Compare a task's current and new dev scores, and decide whether to update it."""
    there, model = manifest.tasks[name], source.models[name]
    metric, old, new = model.task.metric, there.facts, model.facts
    same = old.dev_data == new.dev_data is not None and metric == there.task.metric
    if if_better and not same:
        raise UserError(
            f"{folder}: the scores of {name} here and in {source.origin} are not known to be of "
            "one dev set; compare both on one table with jaxlora evaluate and `against`, or update "
            "without `if_better=True`"
        )
    change = Change(
        name, model.task.metric_name, old.dev.get(metric), new.dev.get(metric), same, made=True,
        greater=model.task.greater_is_better,
    )  # fmt: skip
    return change._replace(made=not if_better or change.better)


def rollback(folder: Path, name: str, version: int | None = None) -> None:
    """Restore an earlier version of a task; the current one becomes the latest in its history.

    Args:
      folder: the bank.
      name: the task.
      version: its position in `history`, from 1; None: the latest.

    Raises:
      UserError: if there is no such task or version.
    """
    folder = files.local(folder)
    with _locked(folder, make=False):
        manifest = manifests.read(folder)
        there, earlier = manifest.find(folder, name), list(manifest.history.get(name, ()))
        place = len(earlier) if version is None else version
        if not 1 <= place <= len(earlier):
            wanted = "earlier version" if version is None else f"earlier version {version}"
            raise UserError(f"{folder}: {name} has no {wanted}; see jaxlora bank history")
        chosen = earlier.pop(place - 1)
        tasks = {**manifest.tasks, name: chosen}
        kept = {**manifest.history, name: (*earlier, there)}
        _commit(folder, dataclasses.replace(manifest, tasks=tasks, history=kept))


def remove(folder: Path, name: str) -> None:
    """Remove a task and all its versions.

    Raises:
      UserError: if no task has that name.
    """
    folder = files.local(folder)
    with _locked(folder, make=False):
        manifest = manifests.read(folder)
        manifest.find(folder, name)
        tasks = {other: entry for other, entry in manifest.tasks.items() if other != name}
        kept = {other: entries for other, entries in manifest.history.items() if other != name}
        _commit(folder, dataclasses.replace(manifest, tasks=tasks, history=kept))


def _store(folder: Path, manifest: Manifest, source: TaskModels, names: Sequence[str]) -> Manifest:
    """Write the trees that are not stored yet; return the manifest with the tasks added."""
    tasks, adapters = dict(manifest.tasks), dict(manifest.adapters)
    earlier, sizes = dict(manifest.history), dict(manifest.sizes)

    def save(part: str, name: str, tree: Tree) -> str:
        stored = _save_tree(folder, part, name, tree)
        sizes[f"{part}/{stored}"] = _size(folder / part / stored, tree)
        return stored

    for name in names:
        one, adapter, head = source.models[name], None, source.models[name].head
        if tree := source.trees[one.tree]:
            adapter = save(ADAPTERS, one.tree, tree)
            adapters[adapter] = source.configs.get(one.tree)
        kept = save(HEADS, name, head) if head else None
        entry = TaskEntry(one.task, adapter, kept, one.pair_features, one.facts)
        if name in tasks and tasks[name] != entry and _is_whole(folder, tasks[name]):
            earlier[name] = (*earlier.get(name, ()), tasks[name])[-MOST_VERSIONS:]
        tasks[name] = entry
    return dataclasses.replace(
        manifest, tasks=tasks, adapters=adapters, history=earlier, sizes=sizes
    )


def _is_whole(folder: Path, entry: TaskEntry) -> bool:
    """Return whether the trees of a version can be read; a damaged version is not kept."""
    parts = [(ADAPTERS, entry.adapter), (HEADS, entry.head)]
    read = functools.partial(_load_tree, folder)
    return not _problems(functools.partial(read, *which) for which in parts if which[1])


def _save_tree(folder: Path, part: str, name: str, tree: Tree) -> str:
    ending = f"-{trees.checksum(tree)[:16]}"
    # The name of a tree from another bank already ends with the checksum.
    stored = manifests.folder_name(name.removesuffix(ending)) + ending
    manifests.check_folder(stored)
    try:
        whole = (folder / part / stored).is_dir() and bool(_load_tree(folder, part, stored))
    except UserError:
        whole = False
    if not whole:  # missing or damaged
        tree_files.save(folder / part / stored, tree)
    return stored


def _commit(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest, then delete the folders that no version of a task uses."""
    used = {entry.adapter for _, entry in manifest.versions()}
    adapters = {name: config for name, config in manifest.adapters.items() if name in used}
    manifest = dataclasses.replace(manifest, adapters=adapters)
    manifest = dataclasses.replace(manifest, sizes=_sizes(folder, manifest))
    manifests.write(folder, manifest)
    keep = set(manifest.folders())
    for part in PARTS:
        for path in (folder / part).iterdir() if (folder / part).is_dir() else ():
            if (part, path.name) not in keep:
                shutil.rmtree(path, ignore_errors=True)


def _check_tree(source: TaskModels, name: str) -> None:
    one = source.models[name]
    tree = source.trees[one.tree]
    if "params" in tree and one.facts.imported_from is None:
        raise UserError(f"{source.origin}: {name} is a fully fine-tuned BERT; banks keep adapters")
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((tree, one.head))):
        raise UserError(f"{source.origin}: {name} has parameters that are not finite; not stored")
    try:
        if "lora" in tree:
            lora.targets(_kernels(tree["lora"]), source.configs[one.tree])
    except ValueError as error:
        raise UserError(
            f"{source.origin}: the adapter of {name} cannot be used ({error}); not stored"
        ) from error


def _kernels(adapter: Tree) -> Tree:
    """Return the shapes of the kernels that an adapter changes, as far as its factors show them."""
    flat = trees.flatten(adapter)
    shapes = {
        (*path, "kernel"): (*flat[*path, "A"].shape[:-1], flat[*path, "B"].shape[-1])
        for path in {path[:-1] for path in flat}
    }
    return trees.unflatten(
        {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()}
    )


def _check_names(folder: Path, manifest: Manifest, names: Sequence[str], replace: bool) -> None:
    present = [name for name in names if name in manifest.tasks]
    if present and not replace:
        raise UserError(
            f"{folder}: has {', '.join(present)} already; replace it by jaxlora bank update, "
            "or take another name"
        )
    absent = [name for name in names if name not in manifest.tasks]
    if absent and replace:
        raise UserError(f"{folder}: has no {', '.join(absent)} yet; add it instead")


def _check_fits(folder: Path, manifest: Manifest, source: TaskModels) -> None:
    whole = {name for name, config in manifest.adapters.items() if config is None}
    entries = manifest.tasks.values()
    if any(one.adapter in whole and one.facts.imported_from is None for one in entries):
        raise UserError(f"{folder}: holds the full encoders of a run; name another bank")
    joint = source.reads_jointly or any(one.task.joint for one in manifest.tasks.values())
    if other := manifest.fingerprint.differing(source.fingerprint, joint=joint):
        raise UserError(
            f"{folder}: is a bank of {manifest.base}; {source.base}, which {source.origin} was "
            f"trained on, has {fingerprint.another(other)}"
        )
    for field in ("pooling", "max_length", "dtype"):
        has, wants = getattr(manifest, field), getattr(source, field)
        if has != wants:
            raise UserError(
                f"{folder}: has {field} {has}, {source.origin} has {wants}; train with {field} "
                f"{has}"
            )


def _complete_fingerprint(folder: Path, manifest: Manifest, source: TaskModels) -> Manifest:
    """Add the checksums of the base that a bank of format 1 lacks, from the new tasks."""
    if manifest.tasks:
        manifest.fingerprint.note_if_partial(str(folder))
    source.fingerprint.note_if_partial(source.origin)
    whole = manifest.fingerprint.completed(source.fingerprint)
    return dataclasses.replace(manifest, fingerprint=whole)


def _check_empty(folder: Path) -> None:
    ours = (LOCK, ADAPTERS, HEADS, manifests.NAME)  # all but the manifest remain if killed
    names = [path.name for path in folder.iterdir()]
    if not all(name in ours or name.startswith(TEMPORARY) for name in names):
        raise UserError(f"{folder}: is not empty and holds no bank; name another folder")


@contextlib.contextmanager
def _locked(folder: Path, *, make: bool = True) -> Iterator[None]:
    """Hold the bank's write lock; with `make`, create the folder.

    Raises:
      UserError: if another process holds the lock, or the bank is missing or cannot be created.
    """
    if make:
        try:
            files.make(folder)
        except FileExistsError:
            raise UserError(f"{folder}: is a file; name a folder for the bank") from None
        except OSError as error:
            raise UserError(f"{folder}: cannot be a bank ({error.strerror})") from None
    else:
        manifests.stamp(folder)
    unfinished = (f"{TEMPORARY}*", f"*/{TEMPORARY}*")  # no deeper: a bank has many folders
    with files.locked(folder, f"{folder}: another process is changing it; try again", unfinished):
        yield
