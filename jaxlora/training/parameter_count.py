"""What a run stores: parameters of the base, of each group's tree and of the heads (Table 3)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import jax

from jaxlora import lora
from jaxlora.nn.bert import EncoderConfig, param_shapes
from jaxlora.tasks.sharing import Adapt, Groups
from jaxlora.tasks.task import Task
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
    adapt: Adapt,
    groups: Groups,
    tasks: Iterable[Task],
    adapter: lora.LoraConfig,
    pair_features: str = "concat",
) -> ParameterCount:
    """Count by shapes alone; nothing is allocated.

    >>> from jaxlora.nn.bert import BertConfig
    >>> from jaxlora.tasks.sharing import SHARED
    >>> from jaxlora.tasks.task import paper_tasks
    >>> count(BertConfig(), "lora", SHARED, paper_tasks("mse"), lora.LoraConfig()).incremental
    2881543
    """
    params = param_shapes(config)
    key = jax.random.key(0)
    base = trees.count(params)
    one_tree = {
        "frozen": lambda: 0,
        "full": lambda: base,
        "lora": lambda: trees.count(jax.eval_shape(lambda: lora.init(key, params, adapter))),
    }[adapt]()
    heads = sum(
        trees.count(
            jax.eval_shape(lambda t=task: t.init_head(key, config.hidden_size, pair_features))
        )
        for task in tasks
    )
    encoder = one_tree * len(groups)
    incremental = encoder + heads
    return ParameterCount(base, encoder, heads, incremental, incremental + (adapt != "full") * base)
