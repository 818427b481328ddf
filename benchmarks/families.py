"""Measure a train step of every encoder family: `python -m benchmarks.families`."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import tyro

from benchmarks import harness
from benchmarks.work import Ours, Work
from jaxlora.formats import huggingface
from jaxlora.formats.families import FAMILIES
from jaxlora.formats.huggingface import Pretrained
from jaxlora.nn import bert
from jaxlora.utils import trees

SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Flags:
    """Measure a step of one adapter for three tasks with PCGrad, in families of the same size.

    Weights are random, which does not change the time.

    Attributes:
      base: base model that gives the size and the tokenizer.
      families: families to measure; ratios are relative to the first.
      batch_size: sentences or pairs of each task.
      rounds: number of timed runs of each family.
      out: folder of the JSON file.
    """

    base: str = "minilm"
    families: tuple[str, ...] = (
        "bert", "roberta", "distilbert", "electra", "mpnet", "modernbert",
    )  # fmt: skip
    batch_size: int = 8
    rounds: int = 9
    out: Path = harness.OUT


def make_base(like: Pretrained, family: str) -> Pretrained:
    """Return a random base of a family, with the size of `like`."""
    form = FAMILIES[family]
    sizes = {name: getattr(like.config, name) for name in SIZES}
    config = form.config(**sizes, model_type=family, **form.defaults, **form.fixed)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: (0.02 * rng.standard_normal(x.shape)).astype(np.float32),
        bert.param_shapes(config),
    )
    return dataclasses.replace(like, config=config, params=params)


def main(flags: Flags) -> None:
    """Measure all families in turn."""
    if not flags.families:
        raise SystemExit("--families: name at least one")
    like = huggingface.load(flags.base)
    work = Work("lora3", flags.batch_size, "float32", dropout=0.1)
    sides, counts = {}, {}
    for family in flags.families:
        base = make_base(like, family)
        counts[family] = trees.count(base.params)
        ours = Ours(work, base)
        ours.compile()
        sides[family] = functools.partial(ours.run, 2)
    spreads = harness.interleave(sides, flags.rounds)
    first = spreads[flags.families[0]]
    rows = [
        {
            "family": family,
            "M parameters": round(counts[family] / 1e6, 1),
            "batch": flags.batch_size,
            "ms": spread.per(2),
            f"× {flags.families[0]}": spread.median / first.median,
        }
        for family, spread in spreads.items()
    ]
    title = "A step of encoder families of one size, float32"
    harness.show("families", title, rows, flags.out)


if __name__ == "__main__":
    main(tyro.cli(Flags))
