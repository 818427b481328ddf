"""Load what a run has trained, and predict."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
        outputs = evaluate.outputs(
            chosen, self.heads[task], vectors, chosen.sentences, self.settings.pair_features
        )
        return evaluate.decode(chosen, outputs)

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
            if len(part) != task.sentences or not all(isinstance(s, str) for s in part):
                wanted = "pairs of sentences" if task.pair else "single sentences"
                raise UserError(
                    f"{task.name} takes {wanted}; example {number} is {examples[number]!r}"
                )
            if not all(sentence.strip() for sentence in part):
                raise UserError(f"{task.name}: example {number} has a blank sentence")
        texts = [sentence for part in parts for sentence in part]
        tokens, offsets, cut = tokenize(self.base.tokenizer, texts, self.settings.max_length)
        labels = np.full(len(parts), np.nan, np.float32)
        ids = np.arange(len(parts)).astype(str)
        return Examples(ids, tokens, offsets, labels, task.sentences, cut)


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
    encode = step.encoder(base.config, dtype, settings.lora.scale, settings.pooling)
    groups = [group_name(names) for names in settings.groups]
    return Model(
        settings,
        base,
        _filled(bank.get("adapters"), groups),
        _filled(bank.get("heads"), list(tasks(settings.sts_loss))),
        frozen,
        step.make_encode(encode),
    )


def _filled(trees: Any, names: list[str]) -> dict[str, Tree]:
    """Put back the empty trees, which a checkpoint does not keep."""
    return {name: (trees or {}).get(name) or {} for name in names}
