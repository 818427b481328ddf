"""An estimate of the bytes that a step holds when the backward pass begins, fitted to XLA on CPU.

Other backends fuse and schedule differently. The tests compare the estimate with XLA's analysis of
steps compiled for CPU.
"""

from __future__ import annotations

from jaxlora import lora
from jaxlora.nn import bert
from jaxlora.training.cost.work import FLOAT, Work, held, kernels
from jaxlora.utils import trees

# float32 values per layer and token, as multiples of H, of F and of the attention weights.
NORMS = 6  # two LayerNorms: input, centred input and output
BEFORE_GELU = 1  # the feed-forward layer before its activation
DROPPED = 2  # with dropout: the attention weights after it, and its mask
# Query, key and value in the dtype of matmuls, as multiples of H.
HEADS = 3
# Workspace of the current layer, fitted to measurements.
WORKSPACE_WEIGHTS, WORKSPACE_WIDE = 2, 1.6


def bytes_held(work: Work) -> float:
    """Estimate the bytes on a device: residuals of all layers, kernels, and the current layer."""
    here = work.tokens / work.devices
    wide = WORKSPACE_WIDE * work.config.intermediate_size
    at_hand = here * FLOAT * (WORKSPACE_WEIGHTS * _attention_weights(work) + wide)
    new_heads = 3 * FLOAT * trees.count(work.heads)
    return here * _layers(work) * _layer(work) + _cut_kernels(work) + at_hand + new_heads


def _layers(work: Work) -> int:
    """Count the layers whose residuals are held; a loop holds those of its last iteration twice."""
    layers = work.config.num_hidden_layers
    return layers if layers <= bert.MOST_UNROLLED else layers + bert.MOST_UNROLLED


def _layer(work: Work) -> float:
    """Estimate the bytes per token that a layer keeps for the backward pass."""
    c, weights = work.config, _attention_weights(work)
    plain = NORMS * c.hidden_size + BEFORE_GELU * c.intermediate_size
    if c.attention_probs_dropout_prob:
        plain += DROPPED * weights
    return FLOAT * plain + work.width * (HEADS * c.hidden_size + weights + _matmul_inputs(work))


def _attention_weights(work: Work) -> int:
    """Count the attention weights of a token in a layer."""
    return work.config.num_attention_heads * work.row_length


def _matmul_inputs(work: Work) -> int:
    """Count a token's inputs to trained matmuls in a layer; query, key and value share one."""
    if work.adapt == "frozen":
        return 0
    if work.adapt == "full":
        return 3 * work.config.hidden_size + work.config.intermediate_size
    paths = lora.targets(work.params, work.adapter)
    shared = {path[:-1] if path[-2] == "self" else path: kernel for path, kernel in paths.items()}
    ranks = sum(map(work.adapter.rank_of, paths))
    return sum(kernel.shape[-2] for kernel in shared.values()) + work.groups * ranks


def _cut_kernels(work: Work) -> float:
    """Estimate the bytes of kernels that are sliced from their stack, or gathered over `fsdp`.

    A loop slices only the kernels of its current iteration. Without a loop, frozen layers are
    unstacked before training, so they are only gathered. In full fine-tuning, a loop also copies
    the stacked kernels, and likewise their gradients.
    """
    layers, stacked = work.config.num_hidden_layers, kernels(work.params)
    looped = layers > bert.MOST_UNROLLED
    cut = work.width * trees.count(stacked) * min(layers, bert.MOST_UNROLLED) / layers
    if work.adapt != "full":
        return cut * (work.adapt == "lora" and (work.fsdp > 1 or looped))
    stacks = 2 * FLOAT * held(stacked, work.fsdp) * looped
    # Each task's gradient of the embedding lookup starts as zeros for the whole table.
    table = FLOAT * held(work.params["embeddings"]["word_embeddings"], work.fsdp)
    return cut + stacks + len(work.tasks) * table
