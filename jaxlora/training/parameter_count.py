"""Numbers of parameters of a run: the base, the groups' trees and the heads (Table 3)."""

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
      base: the pretrained encoder without its unused pooler.
      encoder: trained parameters of the encoder, summed over groups.
      heads: all heads.
      incremental: stored in addition to the base: encoder + heads.
      bundled: needed to run all tasks: incremental, plus the base if it is still used.
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
    pair_features: str,
) -> ParameterCount:
    """Count the parameters of a run from shapes, without allocating arrays.

    >>> from jaxlora.training.adaptation import Full
    >>> count(BertConfig(), Full(), (("sst", "sts"),), [], "concat").incremental
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
    """Count the parameters of a variant with bert-base and the paper's adapters and heads.

    >>> from jaxlora.tasks.sharing import VARIANTS
    >>> of_variant(VARIANTS["lora3"]).incremental
    2881543
    """
    adaptation, tasks = make_adaptation(variant.adapt, LoraConfig()), paper_tasks(variant.sts_loss)
    return count(BertConfig(), adaptation, variant.groups, tasks, "concat")
