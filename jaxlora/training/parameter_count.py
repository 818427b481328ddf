"""What a run stores: parameters of the base, of each group's tree and of the heads (Table 3)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import jax

from jaxlora.lora import LoraConfig
from jaxlora.nn.bert import BertConfig, EncoderConfig, param_shapes
from jaxlora.tasks.sharing import Groups, Variant
from jaxlora.tasks.task import Task, paper_tasks
from jaxlora.training.adaptation import Adaptation, make_adaptation
from jaxlora.utils import trees


class ParameterCount(NamedTuple):
    """Numbers of parameters.

    Attributes:
      base: the pretrained encoder, without the pooler, which nothing here uses.
      encoder: what is trained in the encoder, over all groups.
      heads: all heads.
      incremental: what a run adds to a disk that holds the base: encoder + heads.
      bundled: what it takes to run all tasks: incremental, and the base where it is still used.
    """

    base: int
    encoder: int
    heads: int
    incremental: int
    bundled: int


def count(
    config: EncoderConfig,
    adaptation: Adaptation,
    groups: Groups,
    tasks: Iterable[Task],
    pair_features: str = "concat",
) -> ParameterCount:
    """Count by shapes alone; nothing is allocated.

    >>> from jaxlora.training.adaptation import Full
    >>> count(BertConfig(), Full(), (("sst", "sts"),), []).incremental
    108891648
    """
    params, key = param_shapes(config), jax.random.key(0)
    base = trees.count(params)
    encoder = len(groups) * trees.count(jax.eval_shape(adaptation.init, key, params))
    heads = sum(
        trees.count(
            jax.eval_shape(lambda t=task: t.init_head(key, config.hidden_size, pair_features))
        )
        for task in tasks
    )
    incremental = encoder + heads
    return ParameterCount(
        base, encoder, heads, incremental, incremental + adaptation.keeps_base * base
    )


def of_variant(variant: Variant) -> ParameterCount:
    """Count a variant's with bert-base, the paper's adapters and its heads.

    >>> from jaxlora.tasks.sharing import VARIANTS
    >>> of_variant(VARIANTS["lora3"]).incremental
    2881543
    """
    adaptation, tasks = make_adaptation(variant.adapt, LoraConfig()), paper_tasks(variant.sts_loss)
    return count(BertConfig(), adaptation, variant.groups, tasks)
