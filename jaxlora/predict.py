"""Load what a run has trained, and predict."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import bert, checkpoint, evaluate, pretrained, rundir, step
from jaxlora.data.examples import Examples, tokenize
from jaxlora.errors import UserError
from jaxlora.pretrained import Pretrained
from jaxlora.settings import Settings
from jaxlora.tasks import Task, tasks
from jaxlora.trees import Tree
from jaxlora.variants import group_name


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A trained run: its base, and what it adds to it.

    Attributes:
      settings: of the run.
      base: the base model.
      adapters: encoder tree by group: `{}`, `{"lora": …}` or `{"params": …}`.
      heads: head parameters by task.
    """

    settings: Settings
    base: Pretrained
    adapters: dict[str, Tree]
    heads: dict[str, Tree]
    _frozen: Tree
    _encode: evaluate.EncodeRows
    _encode_mixed: evaluate.EncodeRows

    @property
    def tasks(self) -> dict[str, Task]:
        """The tasks it can do, by name."""
        return tasks(self.settings.sts_loss)

    def encode(self, task: str, examples: Sequence[str | tuple[str, str]]) -> np.ndarray:
        """Sentence vectors as a task sees them.

        Args:
          task: name of a task.
          examples: sentences, or pairs for a pair task.

        Returns:
          `f32[len(examples) · sentences, H]`.

        Raises:
          UserError: for an unknown task, or sentences where pairs are needed.
        """
        chosen = self._task(task)
        tokenized = self._tokenize(chosen, examples)
        if not len(tokenized):
            return np.zeros((0, self.base.config.hidden_size), np.float32)
        length = self.settings.max_length
        return evaluate.encode(self._encode, self._frozen, self._tree(task), tokenized, length)

    def predict(self, task: str, examples: Sequence[str | tuple[str, str]]) -> np.ndarray:
        """Predictions on the label's scale: class 0–4, 0/1, or a score 0–5; `f32[len(examples)]`.

        Args and errors as in `encode`.
        """
        chosen = self._task(task)
        vectors = self.encode(task, examples)
        return self._decode(chosen, vectors) if len(vectors) else np.zeros(0, np.float32)

    def predict_mixed(self, requests: Sequence[tuple[str, ...]]) -> np.ndarray:
        """Answer requests to different tasks, together and in order.

        All sentences share packed rows, and each uses its own task's adapter. (A variant with a
        whole BERT for each task needs a pass for each.)

        Args:
          requests: `(task, sentence)` or `(task, first sentence, second sentence)`.

        Returns:
          Predictions on each label's scale, `f32[len(requests)]`.

        Raises:
          UserError: for an unknown task, or the wrong number of sentences for one.
        """
        checked = [self._request(number, request) for number, request in enumerate(requests)]
        if not checked:
            return np.zeros(0, np.float32)
        sentences = np.array([task.sentences for task, _ in checked])
        first = np.cumsum(sentences) - sentences
        names = np.array([task.name for task, _ in checked])
        vectors = self._vectors(
            self._examples([text for _, texts in checked for text in texts], 1),
            np.repeat([self._owners[name] for name in names], sentences),
        )
        out = np.empty(len(checked), np.float32)
        for name in dict.fromkeys(names.tolist()):
            task, mine = self.tasks[name], np.flatnonzero(names == name)
            numbers = (first[mine, None] + np.arange(task.sentences)).ravel()
            out[mine] = self._decode(task, vectors[numbers])
        return out

    def _request(self, number: int, request: Any) -> tuple[Task, tuple[str, ...]]:
        wanted = "(task, sentence) or (task, first sentence, second sentence)"
        if not isinstance(request, tuple | list) or not all(isinstance(s, str) for s in request):
            raise UserError(f"request {number} is {request!r}; give {wanted}")
        if len(request) < 2:
            raise UserError(f"request {number} is {request!r}, without a sentence; give {wanted}")
        task = self._task(request[0])
        self._check(task, f"request {number}", tuple(request[1:]))
        return task, tuple(request[1:])

    @functools.cached_property
    def _stack(self) -> Tree:
        """All groups' adapters, leaves `[T, ...]`."""
        return jax.tree.map(lambda *x: jnp.stack(x), *self.adapters.values())

    def _vectors(self, examples: Examples, owner: np.ndarray) -> np.ndarray:
        """Vectors of sentences that use adapter `owner[n]` of `self.adapters`."""
        length, trees = self.settings.max_length, list(self.adapters.values())
        if self.settings.adapt == "lora":
            return evaluate.encode(
                self._encode_mixed, self._frozen, self._stack, examples, length, owner
            )
        out = np.empty((len(owner), self.base.config.hidden_size), np.float32)
        for number in set(owner.tolist()):
            mine = np.flatnonzero(owner == number)
            part = examples.take(mine)
            out[mine] = evaluate.encode(self._encode, self._frozen, trees[number], part, length)
        return out

    def _decode(self, task: Task, vectors: np.ndarray) -> np.ndarray:
        head = self.heads[task.name]
        outputs = evaluate.outputs(task, head, vectors, task.sentences, self.settings.pair_features)
        return evaluate.decode(task, outputs)

    @property
    def _owners(self) -> dict[str, int]:
        """Which adapter, counted in the order of the groups, a task uses; a frozen BERT is one."""
        if self.settings.adapt == "frozen":
            return dict.fromkeys(self.tasks, 0)
        return {task: n for n, group in enumerate(self.settings.groups) for task in group}

    def _task(self, name: str) -> Task:
        if name not in self.tasks:
            raise UserError(f"unknown task {name!r}; this model knows {', '.join(self.tasks)}")
        return self.tasks[name]

    def _tree(self, task: str) -> Tree:
        group = next(names for names in self.settings.groups if task in names)
        return self.adapters[group_name(group)]

    def _tokenize(self, task: Task, examples: Sequence[str | tuple[str, str]]) -> Examples:
        if isinstance(examples, str):
            raise UserError(f"{task.name}: give a list of examples, not one string")
        parts = [tuple(e) if isinstance(e, tuple | list) else (e,) for e in examples]
        for number, part in enumerate(parts):
            self._check(task, f"example {number}", part)
        return self._examples([text for part in parts for text in part], task.sentences)

    def _check(self, task: Task, which: str, texts: tuple[Any, ...]) -> None:
        if len(texts) != task.sentences or not all(isinstance(s, str) for s in texts):
            wanted = "pairs of sentences" if task.pair else "single sentences"
            shown = texts[0] if len(texts) == 1 else texts
            raise UserError(f"{task.name} takes {wanted}; {which} is {shown!r}")
        if not all(sentence.strip() for sentence in texts):
            raise UserError(f"{task.name}: {which} has a blank sentence")

    def _examples(self, texts: list[str], sentences: int) -> Examples:
        tokens, offsets, cut = tokenize(self.base.tokenizer, texts, self.settings.max_length)
        count = len(texts) // sentences
        labels = np.full(count, np.nan, np.float32)
        return Examples(np.arange(count).astype(str), tokens, offsets, labels, sentences, cut)


def load(run_dir: str | Path) -> Model:
    """Restore a finished run: its base by name and checksum, what it trained by Orbax.

    Args:
      run_dir: the run's `--out` folder.

    Raises:
      UserError: if it is no finished run, or the base model is not the one it was trained on.
    """
    out = Path(run_dir)
    config = rundir.read_config(out)
    settings = Settings.from_json(config["settings"])
    base = pretrained.load(settings.base)
    if base.sha256 != config["inputs"]["the base model"]:
        raise UserError(
            f"{settings.base}: not the weights that {out} was trained on (sha256 "
            f"{base.sha256[:12]}… instead of {config['inputs']['the base model'][:12]}…)"
        )
    bank = checkpoint.load_bank(out / rundir.MODEL)
    dtype = jnp.dtype(settings.dtype)
    frozen = {} if settings.adapt == "full" else {"params": bert.matmul_ready(base.params, dtype)}
    encode = step.encoder(base.config, dtype, settings.lora, settings.pooling)
    groups = [group_name(names) for names in settings.groups]
    return Model(
        settings,
        base,
        _filled(bank.get("adapters"), groups),
        _filled(bank.get("heads"), list(tasks(settings.sts_loss))),
        frozen,
        step.make_encode(encode),
        step.make_mixed_encode(encode),
    )


def _filled(trees: Any, names: list[str]) -> dict[str, Tree]:
    """Put back the empty trees, which a checkpoint does not keep."""
    return {name: (trees or {}).get(name) or {} for name in names}
