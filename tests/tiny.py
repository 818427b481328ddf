"""Small runs: a data folder in the CS224N format, settings, and a listener that can stop a run."""

import dataclasses
import random
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxlora import lora
from jaxlora.serving import bank

WORDS = ("the", "a", "film", "was", "good", "bad", "not", "very", "dog", "cat", "runs", "in")
SIZES = {"sst": 26, "para": 40, "sts": 19}
# Seven steps a group, evaluations after 2, 4, 6 and 7: a stop in between loses some steps.
SHORT = {
    "preset": "cs224n",
    "batch_size": 6,
    "epochs": 1,
    "eval_every": 2,
    "warmup_steps": 2,
    "rank": 4,
    "encoder_dropout": 0.1,
    "max_length": 16,
}


def short(variant: str, **more: object) -> dict[str, object]:
    """Settings of a short run, as far as they mean something to a variant."""
    flags = SHORT | more
    if not variant.startswith("lora"):
        del flags["rank"]
    if variant == "baseline1":
        del flags["encoder_dropout"]
    return flags


def train_flags() -> set[str]:
    """The flags of `jaxlora train`; the tasks have none."""
    from jaxlora.cli.flags import flag
    from jaxlora.cli.train import Flags
    from jaxlora.training.config import flat_names

    names, sections = flat_names(Flags), {section for section, _ in flat_names(Flags).values()}
    own = {field.name for field in dataclasses.fields(Flags)} - sections
    return {flag(name) for name in (names.keys() | own) - {"tasks"}}


def leaves_equal(a: object, b: object) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def trained_trees(run: Path) -> dict[str, object]:
    """What a run has trained: each task's encoder tree and head."""
    found = bank.load(run)
    return {n: {"tree": found.trees[one.tree], "head": one.head} for n, one in found.models.items()}


def random_adapter(params, config: lora.LoraConfig, size: float = 0.2):
    """An adapter in which B is not zero."""
    adapter = lora.init(jax.random.key(0), params, config)
    keys = iter(jax.random.split(jax.random.key(7), len(jax.tree.leaves(adapter))))
    return jax.tree.map(lambda x: x + size * jax.random.normal(next(keys), x.shape), adapter)


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(2, 9)))


def write_data(folder: Path, sizes: dict[str, int] = SIZES) -> Path:
    """Write the nine files; labels are random, so nothing can be learnt from them."""
    rng = random.Random(7)
    folder.mkdir(parents=True, exist_ok=True)
    for split, name in (("train", "train"), ("dev", "dev"), ("test", "test-student")):
        labelled = split != "test"
        for task, file, columns, label in (
            ("sst", "ids-sst", ["sentence"], ("sentiment", lambda: rng.randint(0, 4))),
            (
                "para",
                "quora",
                ["sentence1", "sentence2"],
                ("is_duplicate", lambda: rng.random() > 0.5),
            ),
            ("sts", "sts", ["sentence1", "sentence2"], ("similarity", lambda: rng.uniform(0, 5))),
        ):
            header = ["", "id", *columns, *([label[0]] if labelled else [])]
            lines = ["\t".join(header)]
            for n in range(sizes[task]):
                cells = [str(n), f"{task}-{split}-{n}", *(sentence(rng) for _ in columns)]
                lines.append(
                    "\t".join([*cells, *([f"{float(label[1]()):.1f}"] if labelled else [])])
                )
            (folder / f"{file}-{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


class Silent:
    """A callback that says nothing, and fails at a given training record."""

    def __init__(self, stop_at: tuple[str, int] | None = None) -> None:
        self.stop_at = stop_at
        self.summaries, self.records, self.notes, self.ends = [], [], [], {}

    def summary(self, summary) -> None:
        self.summaries.append(summary)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def group(self, name: str, start: int, steps: int) -> None:
        self.started = (name, start, steps)

    def done(self, name: str, why: str) -> None:
        self.ends[name] = why

    def record(self, record) -> None:
        self.records.append(record)
        if (record["group"], record["step"]) == self.stop_at and record["kind"] == "train":
            raise KeyboardInterrupt


def by_orbax(state: object, folder: Path) -> object:
    """A pytree, saved and restored."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", state)
