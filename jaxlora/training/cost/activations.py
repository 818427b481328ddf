"""Bytes that a step holds when the backward pass begins: an estimate, fitted to XLA on CPU.

Other backends fuse and schedule differently. The tests compare it with XLA's analysis of steps that
are compiled on CPU.
"""

from __future__ import annotations

from jaxlora import lora
from jaxlora.nn import bert
from jaxlora.training.cost.work import FLOAT, Work, held, kernels
from jaxlora.utils import trees

# Numbers of float32 of each layer and token, as multiples of H, of F and of the attention weights.
NORMS = 6  # two LayerNorms: input, centred input and output
BEFORE_GELU = 1  # the feed-forward layer before its activation
DROPPED = 2  # with dropout: the attention weights that it leaves, and its mask
# In the dtype of matmuls: query, key and value, as multiples of H.
HEADS = 3
# Of the layer at hand alone, by trial.
WORKSPACE_WEIGHTS, WORKSPACE_WIDE = 2, 1.6


def bytes_held(work: Work) -> float:
    """Estimate what a device holds: residuals of all layers, kernels, and the layer at hand."""
    here = work.tokens / work.devices
    wide = WORKSPACE_WIDE * work.config.intermediate_size
    at_hand = here * FLOAT * (WORKSPACE_WEIGHTS * _attention_weights(work) + wide)
    new_heads = 3 * FLOAT * trees.count(work.heads)
    return here * _layers(work) * _layer(work) + _cut_kernels(work) + at_hand + new_heads


def _layers(work: Work) -> int:
    """Count the layers whose residuals are held: a loop holds those of its last pass twice."""
    layers = work.config.num_hidden_layers
    return layers if layers <= bert.MOST_UNROLLED else layers + bert.MOST_UNROLLED


def _layer(work: Work) -> float:
    """Estimate the bytes that a layer leaves to the backward pass, of each token."""
    c, weights = work.config, _attention_weights(work)
    plain = NORMS * c.hidden_size + BEFORE_GELU * c.intermediate_size
    if c.attention_probs_dropout_prob:
        plain += DROPPED * weights
    return FLOAT * plain + work.width * (HEADS * c.hidden_size + weights + _matmul_inputs(work))


def _attention_weights(work: Work) -> int:
    """Count a token's attention weights in a layer."""
    return work.config.num_attention_heads * work.row_length


def _matmul_inputs(work: Work) -> int:
    """Count a token's inputs of trained matmuls in a layer; query, key and value share one."""
    if work.adapt == "frozen":
        return 0
    if work.adapt == "full":
        return 3 * work.config.hidden_size + work.config.intermediate_size
    paths = lora.targets(work.params, work.adapter)
    shared = {path[:-1] if path[-2] == "self" else path: kernel for path, kernel in paths.items()}
    ranks = sum(map(work.adapter.rank_of, paths))
    return sum(kernel.shape[-2] for kernel in shared.values()) + work.groups * ranks


def _cut_kernels(work: Work) -> float:
    """Estimate the bytes of kernels cut out of their stack; they are whole wherever they are used.

    A loop cuts out those of its pass alone; few frozen layers are unstacked from the start, and are
    only brought together from `fsdp`. But a loop takes and gives stacks: whole encoders' kernels
    are laid out for it once for each task, and so are their gradients.
    """
    layers, stacked = work.config.num_hidden_layers, kernels(work.params)
    looped = layers > bert.MOST_UNROLLED
    cut = work.width * trees.count(stacked) * min(layers, bert.MOST_UNROLLED) / layers
    if work.adapt != "full":
        return cut * (work.adapt == "lora" and (work.fsdp > 1 or looped))
    stacks = 2 * FLOAT * held(stacked, work.fsdp) * looped
    # The gradient of looking words up starts as zeros for the whole table.
    table = FLOAT * held(work.params["embeddings"]["word_embeddings"], work.fsdp)
    return len(work.tasks) * (cut + stacks + table)
