"""Predict with what was trained: one base, and for each task its adapter and its head."""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import lora
from jaxlora.data.raw_examples import is_blank
from jaxlora.data.tokenized import tokenize, truncating, unlabelled
from jaxlora.formats.huggingface import Pretrained
from jaxlora.lora import LoraConfig
from jaxlora.nn import bert
from jaxlora.nn.encode import encoder, make_encode, make_mixed_encode
from jaxlora.serving import answers, bank, inference
from jaxlora.serving.adapter_slots import AdapterSlots
from jaxlora.serving.answers import Answer
from jaxlora.serving.task_models import TaskModel, TaskModels
from jaxlora.serving.tree_cache import TreeCache
from jaxlora.tasks.task import Task
from jaxlora.utils.errors import ConfigError, UserError
from jaxlora.utils.trees import Tree

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Whole encoders that a predictor keeps on the device, those used last, beside its `memory`.
MOST_ON_DEVICE = 4
MEMORY = 2**31
ADAPTER_SHARE, HEAD_SHARE, HOST_SHARE = 2, 4, 4  # parts of `memory`: a half and two quarters
WANTED = "(task, sentence) or (task, first sentence, second sentence)"


# What encodes, and its collections: frozen and trained.
Model = tuple[inference.EncodeRows, Tree, Tree]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Predictor:
    """A base model with the adapters and heads of any number of tasks.

    It can be pickled at any time (compiled programs and trees of a bank are left out), so that
    `multiprocessing.get_context("spawn")` can send it to workers. A forked process cannot use
    one: JAX's threads are not there and it would wait for ever, so it is refused. Several threads
    may use one; they take turns on the device, and each call has the answers that it has alone.

    Attributes:
      base: the base model.
      trained: the tasks, their trees and their heads.
      memory: bytes that trees may take, those used last: a half for adapters on the device (16 at
        least), a quarter for heads there, a quarter for trees of a bank in host memory.

    Raises:
      UserError: in a process that was forked from one with a predictor.
    """

    base: Pretrained
    trained: TaskModels
    memory: int = MEMORY
    _lock: threading.Lock = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        _refuse_forked()
        if self.memory < 0:
            raise ConfigError("memory", "must be at least 0 bytes", self.memory)
        # One pass at a time: the next may give a slot to another adapter. Made here, since two
        # threads might each make one when it is first used.
        object.__setattr__(self, "_lock", threading.Lock())

    def __reduce__(self) -> tuple[Any, ...]:
        # Made of its fields alone: what is cached belongs to this process.
        return type(self), tuple(
            getattr(self, field.name) for field in dataclasses.fields(self) if field.init
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.trained.origin!r}: {self.trained.summary}, "
            f"{self.memory / 2**20:,.0f} MiB for trees)"
        )

    @staticmethod
    def load(
        folder: str | Path, base: str | None = None, memory: int = MEMORY, *, warm: bool = False
    ) -> Predictor:
        """Open a finished run, or a bank: the base by name and checksums, tasks by the manifest.

        Trees are read and compared with their checksums when a request first needs them. The
        answers are those of the bank as it was opened: a task that another process updates is
        answered as before, and one whose trees it removes is refused, until the bank is opened
        again. Load it in each worker process, or send it there, see `Predictor`; not before a fork.

        Args:
          folder: the run or the bank.
          base: where its base is now, if it has moved; it must be the same.
          memory: see `Predictor`.
          warm: compile now what requests will need, see `warm`.

        Raises:
          UserError: if it is neither, its manifest is damaged, or the base is not the one it was
            trained on; in a process that was forked from one with a predictor.
        """
        _refuse_forked()
        trained = bank.load(Path(folder), memory // HOST_SHARE).at(base)
        predictor = Predictor(trained.load_base(), trained, memory)
        if warm:
            predictor.warm()
        return predictor

    @property
    def tasks(self) -> dict[str, Task]:
        """The tasks it can do, by name."""
        return {name: model.task for name, model in self.trained.models.items()}

    def __call__(self, requests: Sequence[tuple[str, ...]]) -> list[Answer]:
        """Answer requests to any mix of tasks, in order.

        All sentences share packed rows, each uses its own task's adapter, and each task's head
        sees its own. (Whole BERTs of different tasks need a pass each.)

        Args:
          requests: `(task, sentence)` or `(task, first sentence, second sentence)`.

        Raises:
          UserError: for an unknown task, or the wrong number of sentences for one.
        """
        checked = [self.check(request, f"request {n}") for n, request in enumerate(requests)]
        found: dict[int, Answer] = {}
        for task, numbers, outputs in self._outputs(checked):
            found |= zip(numbers.tolist(), answers.answers(task, outputs), strict=True)
        return [found[number] for number in range(len(checked))]

    def predict(self, task: str, examples: Sequence[str | tuple[str, str]]) -> np.ndarray:
        """Return predictions of one task on the label's scale: a class's number, a set, or a score.

        Args:
          task: name of a task.
          examples: sentences, or pairs for a pair task.

        Returns:
          `f32[len(examples)]`, of sets of K classes `f32[len(examples), K]`, 0 or 1 for each.

        Raises:
          UserError: for an unknown task, or sentences where pairs are needed.
        """
        chosen = self.task(task)
        checked = _check_all(chosen, examples, chosen.pair)
        parts = [inference.decode(t, outputs) for t, _, outputs in self._outputs(checked)]
        return parts[0] if parts else np.zeros((0, *chosen.label_shape), np.float32)

    def encode(self, task: str, sentences: Sequence[str]) -> np.ndarray:
        """Return the vectors of single sentences as a task sees them, be it of pairs or not.

        Returns:
          `f32[len(sentences), H]`.

        Raises:
          UserError: for an unknown task, one that reads pairs together, or what is no sentence.
        """
        chosen = self.task(task)
        if chosen.joint:
            raise UserError(
                f"{task} reads both sentences of a pair together, so neither has a vector of its "
                "own; use predict, or a task whose pairs are separate"
            )
        checked = _check_all(chosen, sentences, pairs=False)
        if not checked:
            return np.zeros((0, self.base.config.hidden_size), np.float32)
        return self._vectors(checked)

    def _outputs(
        self, checked: list[tuple[Task, tuple[str, ...]]]
    ) -> list[tuple[Task, np.ndarray, np.ndarray]]:
        """Each task that occurs, which requests are its own, and what its head says of them."""
        if not checked:
            return []
        sentences = np.array([task.sentences for task, _ in checked])
        first = np.cumsum(sentences) - sentences
        names = np.array([task.name for task, _ in checked])
        vectors, found = self._vectors(checked), []
        for name in dict.fromkeys(names.tolist()):
            model, mine = self.trained.models[name], np.flatnonzero(names == name)
            numbers = (first[mine, None] + np.arange(model.task.sentences)).ravel()
            outputs = inference.outputs(
                model.task, self._heads(name), vectors[numbers], model.task.sentences,
                model.pair_features,
            )  # fmt: skip
            found.append((model.task, mine, outputs))
        return found

    def _vectors(self, checked: list[tuple[Task, tuple[str, ...]]]) -> np.ndarray:
        """Return vectors of all sentences and joint pairs, each through its own task's tree."""
        _refuse_forked()
        texts = [(task, text) for task, parts in checked for text in task.encoded(parts)]
        examples = unlabelled(tokenize(self._tokenizer, [text for _, text in texts]))
        trees = [self.trained.models[task.name].tree for task, _ in texts]
        out = np.empty((len(trees), self.base.config.hidden_size), np.float32)
        with self._lock:
            for mine, model, owner in self._passes(trees):
                out[mine] = inference.encode(
                    *model, examples.take(mine), self.trained.max_length, owner
                )
        return out

    def _passes(self, used: list[str]) -> Iterator[tuple[np.ndarray, Model, np.ndarray | None]]:
        """Give the passes of a call: which sentences, what encodes them, and the adapter of each.

        Adapters of one width share a pass, as many as there are slots; a whole BERT needs one of
        its own.

        Args:
          used: the tree of each sentence.
        """
        names, owner = np.unique(used, return_inverse=True)
        groups: dict[Any, list[int]] = {}
        for number, name in enumerate(names.tolist()):
            groups.setdefault(self._pass_of(name), []).append(number)
        for key, numbers in groups.items():
            most = self._slots[key].most if isinstance(key, int) else 1
            for start in range(0, len(numbers), most):
                chosen = np.array(numbers[start : start + most])
                mine = np.flatnonzero(np.isin(owner, chosen))
                model, places = self._model(key, names[chosen].tolist())
                places = None if places is None else places[np.searchsorted(chosen, owner[mine])]
                yield mine, model, places

    def _pass_of(self, name: str) -> int | str:
        """Return an adapter's width, or the name of a tree that is none."""
        return _width(self.trained.configs[name]) if name in self.trained.configs else name

    def _model(self, key: int | str, names: list[str]) -> tuple[Model, np.ndarray | None]:
        """Return what encodes with some trees of a pass; where it takes several, each's place."""
        if isinstance(key, int):
            slots, places = self._slots[key](names)
            return (self._mixed(key), self._frozen, slots), places
        if self.trained.trees[key]:
            return (self._plain, {}, self._on_device(key)), None
        return (self._plain, self._frozen, {}), None

    def warm(self) -> None:
        """Compile all that a later call can need, so that none waits for it.

        Compiled are the encoder at every shape of packed rows (see `serving.chunks`) for calls to
        one adapter and to several, for the frozen base and for whole encoders; heads, predictions
        and probabilities of each form of task that there is, 16, 256 and 4,096 examples at a time.
        Places on the device are made for all adapters, as far as `memory` allows, since programs
        depend on their number. One tree of each kind is read.
        JAX keeps the programs on the disk if it has a folder for them
        (`jax_compilation_cache_dir`); then the next process is warm in less time.

        Raises:
          UserError: if one of those trees is missing or damaged.
        """
        models = self.trained.models.values()
        found: dict[int | str, str] = {}  # of each kind a tree
        for one in models:
            key = self._pass_of(one.tree)
            found.setdefault(key if isinstance(key, int) or not key else "whole", one.tree)
        typed = self.trained.reads_jointly
        adapters = collections.Counter(map(_width, self.trained.configs.values()))
        with self._lock:
            for width, slots in self._slots.items():
                slots.reserve(adapters[width])
            for kind, name in found.items():
                model, _ = self._model(self._pass_of(name), [name])
                owners = adapters[kind] if isinstance(kind, int) else 0
                inference.warm(*model, self.trained.max_length, typed, owners)
        for one in {(inference.form(one.task), one.pair_features): one for one in models}.values():
            self._warm_head(one)

    def _warm_head(self, model: TaskModel) -> None:
        width, task = self.base.config.hidden_size, model.task
        head = jax.tree.map(lambda x: jnp.zeros(x.shape), model.head_shapes(width))
        for size in inference.PART_SIZES:
            vectors = np.zeros((size * task.sentences, width), np.float32)
            answers.answers(task, inference.outputs(
                task, head, vectors, task.sentences, model.pair_features
            ))  # fmt: skip

    @property
    def _dtype(self) -> Any:
        return jnp.dtype(self.trained.dtype)

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return truncating(self.base.tokenizer, self.trained.max_length)

    @functools.cached_property
    def _heads(self) -> TreeCache[str]:
        """The heads by task, on the device."""
        return TreeCache(
            lambda name: jax.device_put(self.trained.head(name, self.base)),
            self.memory // HEAD_SHARE,
        )

    @functools.cached_property
    def _on_device(self) -> Callable[[str], Tree]:
        """Whole encoders by name, each sent to the device when first used, as programs want it."""

        def send(name: str) -> Tree:
            return {"params": bert.matmul_ready(self.trained.trees[name]["params"], self._dtype)}

        return functools.lru_cache(MOST_ON_DEVICE)(send)

    @functools.cached_property
    def _frozen(self) -> Tree:
        return {"params": bert.matmul_ready(self.base.params, self._dtype)}

    @functools.cached_property
    def _plain(self) -> inference.EncodeRows:
        return make_encode(
            encoder(self.base.config, self._dtype, LoraConfig(), self.trained.pooling)
        )

    @functools.cached_property
    def _mixed(self) -> Callable[[int], inference.EncodeRows]:
        """The encoders for mixed adapters, by width; their scales are 1."""

        def make(width: int) -> inference.EncodeRows:
            config = LoraConfig(width, float(width))
            return make_mixed_encode(
                encoder(self.base.config, self._dtype, config, self.trained.pooling)
            )

        return functools.cache(make)

    @functools.cached_property
    def _slots(self) -> Mapping[int, AdapterSlots]:
        """The adapters on the device, by width."""
        by_width: dict[int, set[LoraConfig]] = {}
        for config in self.trained.configs.values():
            by_width.setdefault(_width(config), set()).add(config)
        budget = self.memory // ADAPTER_SHARE // max(1, len(by_width))
        return {
            width: AdapterSlots(self._adapter, self._shapes(width, configs), budget)
            for width, configs in by_width.items()
        }

    def _adapter(self, name: str) -> lora.Adapter:
        return self.trained.trees[name]["lora"], self.trained.configs[name]

    def _shapes(self, width: int, configs: Iterable[LoraConfig]) -> dict[lora.Path, Any]:
        """Return the shapes of an adapter of a width at all layers that any has."""
        shapes = {}
        for config in configs:
            for path, kernel in lora.targets(self.base.params, config).items():
                *lead, fan_in, fan_out = kernel.shape
                shapes[*path, "A"] = (*lead, fan_in, width)
                shapes[*path, "B"] = (*lead, width, fan_out)
        return shapes

    def check(self, request: Any, which: str = "the request") -> tuple[Task, tuple[str, ...]]:
        """Return the task of a request, and its sentences.

        Raises:
          UserError: if it cannot be answered.
        """
        if not isinstance(request, tuple | list) or not all(isinstance(s, str) for s in request):
            raise UserError(f"{which} is {request!r}; give {WANTED}")
        if len(request) < 2:
            raise UserError(f"{which} is {request!r}, without a sentence; give {WANTED}")
        task = self.task(request[0])
        return task, _check(task, which, tuple(request[1:]), task.pair)

    def task(self, name: str) -> Task:
        """Return a task by its name.

        Raises:
          UserError: if there is none of that name.
        """
        return self.trained.find(name).task


def _width(config: LoraConfig) -> int:
    """Return the power of two that holds an adapter's ranks, so that there are few widths."""
    widest = max([config.rank, *(rank for _, rank in config.rank_pattern)])
    return 1 << (widest - 1).bit_length()


@functools.cache
def _first_process() -> int:
    """Return the id of the process that had the first predictor; a fork inherits it."""
    return os.getpid()


def _refuse_forked() -> None:
    if os.getpid() != _first_process():
        raise UserError(
            "a predictor cannot be used in a process that was forked from one with a predictor, "
            "since JAX would wait there for ever; start workers with "
            'multiprocessing.get_context("spawn") and send it to them, or load it there'
        )


def _check_all(
    task: Task, examples: Sequence[str | tuple[str, str]], pairs: bool
) -> list[tuple[Task, tuple[str, ...]]]:
    if isinstance(examples, str):
        raise UserError(f"{task.name}: give a list of examples, not one string")
    parts = [tuple(e) if isinstance(e, tuple | list) else (e,) for e in examples]
    return [(task, _check(task, f"example {n}", part, pairs)) for n, part in enumerate(parts)]


def _check(task: Task, which: str, texts: tuple[Any, ...], pairs: bool) -> tuple[str, ...]:
    if len(texts) != 1 + pairs or not all(isinstance(s, str) for s in texts):
        wanted = "pairs of sentences" if pairs else "single sentences"
        shown = texts[0] if len(texts) == 1 else texts
        raise UserError(f"{task.name} takes {wanted}; {which} is {shown!r}")
    if any(map(is_blank, texts)):
        raise UserError(f"{task.name}: {which} has a blank sentence")
    return texts


load = Predictor.load
