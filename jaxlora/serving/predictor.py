"""Predict with one base model and the adapters and heads of many tasks."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
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

# Most recently used full encoders on the device; they do not count towards `memory`.
MOST_ON_DEVICE = 4
MEMORY = 2**31
ADAPTER_SHARE, HEAD_SHARE, HOST_SHARE = 2, 4, 4  # divisors of `memory`: 1/2, 1/4, 1/4
WANTED = "(task, sentence) or (task, first sentence, second sentence)"


# An encode function and its variable collections: frozen and trainable.
Model = tuple[inference.EncodeRows, Tree, Tree]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Predictor:
    """A base model with the adapters and heads of any number of tasks.

    A predictor is thread-safe; threads take turns on the device. It can be pickled (without
    compiled programs and cached trees), so it can be sent to workers that were started with
    `multiprocessing.get_context("spawn")`. Forked processes are refused: they lack JAX's threads
    and would deadlock.

    Attributes:
      base: the base model.
      trained: the tasks with their encoder trees and heads.
      memory: budget in bytes for cached trees: half for adapters on the device (16 per width
        regardless), a quarter for heads on the device, a quarter for a bank's trees in host memory.

    Raises:
      UserError: in a process that was forked from one with a predictor.
    """

    base: Pretrained
    trained: TaskModels
    memory: int = MEMORY
    _lock: threading.Lock = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        _refuse_forked()
        _check_memory(self.memory)
        # Serializes passes, since the next pass may reuse a slot for another adapter. Created
        # eagerly, since two threads could each create a lazy one.
        object.__setattr__(self, "_lock", threading.Lock())

    def __reduce__(self) -> tuple[Any, ...]:
        # Only the fields: caches belong to this process.
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
        """Open a bank or a finished run for prediction.

        The manifest and the base are read now and checked against their checksums; trees are read
        and checked when a request first needs them. The predictor serves the bank as it was opened:
        if another process updates a task, the old version is still served; if its trees are
        deleted, requests to it are refused.

        Args:
          folder: the bank or run.
          base: the base's new location, if it has moved; its checksums must be the same.
          memory: see `Predictor`.
          warm: compile all programs now, see `warm`.

        Raises:
          UserError: if the folder is neither, its manifest is damaged, or the base is missing or
            has other checksums; in a process that was forked from one with a predictor.
        """
        _refuse_forked()
        _check_memory(memory)
        trained = bank.load(Path(folder), memory // HOST_SHARE).at(base)
        predictor = Predictor(trained.load_base(), trained, memory)
        if warm:
            predictor.warm()
        return predictor

    @property
    def tasks(self) -> dict[str, Task]:
        """The tasks by name."""
        return {name: model.task for name, model in self.trained.models.items()}

    def __call__(
        self,
        requests: Sequence[tuple[str, ...]],
        truncated: Callable[[int], Any] = lambda _: None,
    ) -> list[Answer]:
        """Answer requests to any mix of tasks, in order.

        Tasks whose adapters have the same rank, rounded up to a power of two, share rows and a
        forward pass, and each sentence uses the adapter and the head of its task. All tasks without
        an adapter share another pass. Each full encoder needs its own.

        Args:
          requests: `(task, sentence)` or `(task, first sentence, second sentence)`.
          truncated: called with the number of texts that were longer than the bank's `max_length`.

        Raises:
          UserError: for an unknown task, a wrong number of sentences, or a blank one.
        """
        requests = list(requests)  # an iterator will do, too
        checked = [
            self.check(request, f"request {n}" if len(requests) > 1 else "the request")
            for n, request in enumerate(requests)
        ]
        found: dict[int, Answer] = {}
        for task, numbers, outputs in self._outputs(checked, truncated):
            found |= zip(numbers.tolist(), answers.answers(task, outputs), strict=True)
        return [found[number] for number in range(len(checked))]

    def describe_truncated(self, count: int) -> str:
        """Return a remark on the number of texts that were truncated."""
        return f"{count:,} text{'' if count == 1 else 's'} cut to {self.trained.max_length} tokens"

    def predict(self, task: str, examples: Sequence[str | tuple[str, str]]) -> np.ndarray:
        """Predict examples of one task, as numbers.

        Args:
          task: the name of the task.
          examples: sentences, or pairs for a pair task.

        Returns:
          Class indices or scores, `f32[len(examples)]`; for a multilabel task with K classes,
          0 or 1 for each, `f32[len(examples), K]`.

        Raises:
          UserError: for an unknown task, a wrong number of sentences, or a blank one.
        """
        chosen = self.task(task)
        checked = _check_all(chosen, examples, chosen.pair)
        parts = [inference.decode(t, outputs) for t, _, outputs in self._outputs(checked)]
        return parts[0] if parts else np.zeros((0, *chosen.label_shape), np.float32)

    def encode(self, task: str, sentences: Sequence[str]) -> np.ndarray:
        """Compute the vectors of single sentences with a task's adapter, also for a pair task.

        Returns:
          `f32[len(sentences), H]`.

        Raises:
          UserError: for an unknown task, one that reads pairs together, or an invalid sentence.
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
        self,
        checked: list[tuple[Task, tuple[str, ...]]],
        truncated: Callable[[int], Any] = lambda _: None,
    ) -> list[tuple[Task, np.ndarray, np.ndarray]]:
        """Return for each task that occurs: the task, the indices of its requests, its outputs."""
        if not checked:
            return []
        sentences = np.array([task.sentences for task, _ in checked])
        first = np.cumsum(sentences) - sentences
        names = np.array([task.name for task, _ in checked])
        vectors, found = self._vectors(checked, truncated), []
        for name in dict.fromkeys(names.tolist()):
            model, mine = self.trained.models[name], np.flatnonzero(names == name)
            numbers = (first[mine, None] + np.arange(model.task.sentences)).ravel()
            outputs = inference.outputs(
                model.task, self._heads(name), vectors[numbers], model.pair_features
            )
            found.append((model.task, mine, outputs))
        return found

    def _vectors(
        self,
        checked: list[tuple[Task, tuple[str, ...]]],
        truncated: Callable[[int], Any] = lambda _: None,
    ) -> np.ndarray:
        """Return the vectors of all sentences and joint pairs, each encoded by its task's tree."""
        _refuse_forked()
        texts = [(task, text) for task, parts in checked for text in task.encoded(parts)]
        examples = unlabelled(tokenize(self._tokenizer, [text for _, text in texts]))
        truncated(examples.truncated)
        trees = [self.trained.models[task.name].tree for task, _ in texts]
        out = np.empty((len(trees), self.base.config.hidden_size), np.float32)
        with self._lock:
            for mine, model, owner in self._passes(trees):
                out[mine] = inference.encode_apart(
                    *model, examples.take(mine), self.trained.max_length, owner
                )
        return out

    def _passes(self, used: list[str]) -> Iterator[tuple[np.ndarray, Model, np.ndarray | None]]:
        """Yield forward passes: indices of sentences, the model, and each sentence's adapter.

        Adapters of one width share a pass, up to the number of slots; a full encoder needs its own.

        Args:
          used: name of the tree of each sentence.
        """
        names, owner = np.unique(used, return_inverse=True)
        groups: dict[Any, list[int]] = {}
        for number, name in enumerate(names.tolist()):
            groups.setdefault(self._pass_of(name), []).append(number)
        for key, numbers in groups.items():
            most = self._slots(key).most if isinstance(key, int) else 1
            for start in range(0, len(numbers), most):
                chosen = np.array(numbers[start : start + most])
                mine = np.flatnonzero(np.isin(owner, chosen))
                model, places = self._model(key, names[chosen].tolist())
                places = None if places is None else places[np.searchsorted(chosen, owner[mine])]
                yield mine, model, places

    def _pass_of(self, name: str) -> int | str:
        """Return the key of a tree's pass: the width of an adapter, the name of any other tree."""
        config = self.trained.configs.get(name)
        if config is None:
            return name
        if config not in self._adapted:
            self.trained.check_adapter(name, self.base)  # raises
        return _width(config)

    def _model(self, key: int | str, names: list[str]) -> tuple[Model, np.ndarray | None]:
        """Return the model for the trees of a pass, and the slots of adapters among its arrays."""
        if isinstance(key, int):
            slots, places = self._slots(key)(names)
            return (self._mixed(key), self._frozen, slots), places
        if self.trained.trees[key]:
            return (self._plain, {}, self._on_device(key)), None
        return (self._plain, self._frozen, {}), None

    def warm(self) -> None:
        """Compile everything that later calls can need.

        This compiles the encoder at every shape of packed rows (see `serving.chunks`), for one and
        for several adapters, the frozen base and full encoders; and the head, predictions and
        probabilities of each form of task, for batches of 16, 256 and 4,096 examples. Since
        programs depend on the number of adapter slots, slots for all adapters are allocated, as far
        as `memory` allows. One tree of each kind is read. With JAX's persistent compilation cache
        (`jax_compilation_cache_dir`), the next process compiles faster.

        Raises:
          UserError: if one of these trees is missing or damaged.
        """
        models, configs = self.trained.models.values(), self.trained.configs
        # Kind → one of its trees.
        found: dict[int | str, str] = {
            _width(config): name for name, config in configs.items() if config in self._adapted
        }
        found |= {one.tree and "whole": one.tree for one in models if one.tree not in configs}
        typed = self.trained.reads_jointly
        with self._lock:
            for width, adapters in self._widths.items():
                self._slots(width).reserve(adapters)
            for kind, name in found.items():
                model, _ = self._model(self._pass_of(name), [name])
                owners = self._widths[kind] if isinstance(kind, int) else 0
                inference.warm(*model, self.trained.max_length, typed, owners)
        for one in {(inference.form(one.task), one.pair_features): one for one in models}.values():
            self._warm_head(one)

    def _warm_head(self, model: TaskModel) -> None:
        width, task = self.base.config.hidden_size, model.task
        head = jax.tree.map(lambda x: jnp.zeros(x.shape), model.head_shapes(width))
        for size in inference.PART_SIZES:
            vectors = np.zeros((size * task.sentences, width), np.float32)
            answers.answers(task, inference.outputs(task, head, vectors, model.pair_features))

    @property
    def _dtype(self) -> Any:
        return jnp.dtype(self.trained.dtype)

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return truncating(self.base.tokenizer, self.trained.max_length)

    @functools.cached_property
    def _heads(self) -> TreeCache[str]:
        """The cache of heads on the device, by task."""
        return TreeCache(
            lambda name: jax.device_put(self.trained.head(name, self.base)),
            self.memory // HEAD_SHARE,
        )

    @functools.cached_property
    def _on_device(self) -> Callable[[str], Tree]:
        """The cache of full encoders on the device, by tree name."""

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
        """The encode functions for mixed adapters, by width; `lora.widen` made their scale 1."""

        def make(width: int) -> inference.EncodeRows:
            config = LoraConfig(width, float(width))
            return make_mixed_encode(
                encoder(self.base.config, self._dtype, config, self.trained.pooling)
            )

        return functools.cache(make)

    @functools.cached_property
    def _adapted(self) -> Mapping[LoraConfig, Mapping[lora.Path, Any]]:
        """The kernels that each configuration adapts; those that do not fit the base are absent."""
        found = {}
        for config in set(self.trained.configs.values()):
            with contextlib.suppress(ConfigError):
                found[config] = lora.targets(self.base.params, config)
        return found

    @functools.cached_property
    def _widths(self) -> Mapping[int, int]:
        """The number of adapters of each width."""
        configs = self.trained.configs.values()
        return collections.Counter(_width(config) for config in configs if config in self._adapted)

    @functools.cached_property
    def _slots(self) -> Callable[[int], AdapterSlots]:
        """The cached adapters on the device, by width; allocated when a width is first used."""
        budget = self.memory // ADAPTER_SHARE // max(1, len(self._widths))

        def make(width: int) -> AdapterSlots:
            return AdapterSlots(self._adapter, self._shapes(width), budget, self._widths[width])

        return functools.cache(make)

    def _adapter(self, name: str) -> lora.Adapter:
        return self.trained.trees[name]["lora"], self.trained.configs[name]

    def _shapes(self, width: int) -> dict[lora.Path, Any]:
        """Return the factor shapes of an adapter of this width at all layers that any has."""
        shapes = {}
        for config, kernels in self._adapted.items():
            for path, kernel in kernels.items() if _width(config) == width else ():
                *lead, fan_in, fan_out = kernel.shape
                shapes[*path, "A"] = (*lead, fan_in, width)
                shapes[*path, "B"] = (*lead, width, fan_out)
        return shapes

    def check(self, request: Any, which: str = "the request") -> tuple[Task, tuple[str, ...]]:
        """Check a request; return its task and sentences.

        Raises:
          UserError: if the request is invalid.
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
          UserError: if no task has that name.
        """
        return self.trained.find(name).task


def _width(config: LoraConfig) -> int:
    """Return an adapter's largest rank, rounded up to a power of two for fewer programs."""
    widest = max([config.rank, *(rank for _, rank in config.rank_pattern)])
    return 1 << (widest - 1).bit_length()


@functools.cache
def _first_process() -> int:
    """Return the id of the process that made the first predictor; forks inherit the value."""
    return os.getpid()


def _refuse_forked() -> None:
    if os.getpid() != _first_process():
        raise UserError(
            "a predictor cannot be used in a process that was forked from one with a predictor, "
            "since JAX would deadlock there; start workers with "
            'multiprocessing.get_context("spawn") and send it to them, or load it there'
        )


def _check_memory(memory: int) -> None:
    if not isinstance(memory, int | np.integer) or memory < 0:
        raise ConfigError("memory", "must be a whole number of bytes, at least 0", repr(memory))


def _check_all(
    task: Task, examples: Sequence[str | tuple[str, str]], pairs: bool
) -> list[tuple[Task, tuple[str, ...]]]:
    if isinstance(examples, str):
        raise UserError(f"{task.name}: give a list of examples, not one string")
    parts = [tuple(e) if isinstance(e, tuple | list) else (e,) for e in examples]
    return [
        (task, _check(task, f"example {n}" if len(parts) > 1 else "the example", part, pairs))
        for n, part in enumerate(parts)
    ]


def _check(task: Task, which: str, texts: tuple[Any, ...], pairs: bool) -> tuple[str, ...]:
    if len(texts) != 1 + pairs or not all(isinstance(s, str) for s in texts):
        wanted = "pairs of sentences" if pairs else "single sentences"
        shown = texts[0] if len(texts) == 1 else texts
        raise UserError(f"{task.name} takes {wanted}; {which} is {shown!r}")
    if any(map(is_blank, texts)):
        raise UserError(f"{task.name}: {which} has a blank sentence")
    return texts


load = Predictor.load
