"""LoRA: low-rank adapters as plain pytrees beside a frozen one.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1:
`W' = W + (alpha / rank) · A B` with `W: [in, out]` (Flax kernels), `A: [in, r]`, `B: [r, out]`.
An adapter mirrors the parameter tree: where the base has `{"query": {"kernel": W, "bias": b}}`
the adapter has `{"query": {"A": A, "B": B}}`. Leading axes (stacked layers) are carried along.
Adapters of several tasks are a dict keyed by task or group, one adapter each.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import traverse_util

from jaxlora import trees
from jaxlora.trees import Tree

PAPER_TARGETS = ("query", "key", "value", "attention.output.dense")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """How to adapt (the names are Hugging Face PEFT's).

    Attributes:
      rank: r, the inner width of the adapters.
      alpha: numerator of the scale.
      target_modules: which Dense layers get an adapter; a name matches a layer whose dotted path
        is it or ends with `.` + it, so `query` and `attention.output.dense` both work.
    """

    rank: int = 15
    alpha: float = 15.0
    target_modules: tuple[str, ...] = PAPER_TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")

    @property
    def scale(self) -> float:
        """`alpha / rank`, the factor of `A B`."""
        return self.alpha / self.rank


def targets(params: Tree, config: LoraConfig) -> dict[tuple[str, ...], jax.Array]:
    """The kernels that `config` adapts: path of the Dense layer → kernel `[..., in, out]`.

    Args:
      params: a parameter tree, of arrays or of `jax.ShapeDtypeStruct`s.
      config: what to adapt.

    Raises:
      ValueError: if a target matches nothing (with the names there are), or the rank is below 1
        or above the smaller side of a kernel.

    >>> params = {"self": {"query": {"kernel": jnp.zeros((4, 4))}}}
    >>> list(targets(params, LoraConfig(rank=2, target_modules=("query",))))
    [('self', 'query')]
    """
    kernels = {
        path[:-1]: leaf
        for path, leaf in traverse_util.flatten_dict(params).items()
        if path[-1] == "kernel"
    }
    chosen: dict[tuple[str, ...], jax.Array] = {}
    for target in config.target_modules:
        hits = {p: k for p, k in kernels.items() if f".{'.'.join(p)}".endswith(f".{target}")}
        if not hits:
            raise ValueError(_unknown_target(target, kernels))
        chosen |= hits
    for path, kernel in chosen.items():
        _check_rank(config.rank, path, kernel)
    return chosen


def _unknown_target(target: str, kernels: dict[tuple[str, ...], jax.Array]) -> str:
    known = sorted(".".join(path) for path in kernels)
    close = difflib.get_close_matches(target, {k.rsplit(".", 1)[-1] for k in known}, 1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"unknown target module {target!r}{hint}; the Dense layers are {', '.join(known)}"


def _check_rank(rank: int, path: tuple[str, ...], kernel: jax.Array) -> None:
    limit = min(kernel.shape[-2:])
    if not 1 <= rank <= limit:
        raise ValueError(
            f"rank must be between 1 and {limit} for {'.'.join(path)} "
            f"(kernel {kernel.shape[-2]} × {kernel.shape[-1]}), got {rank}"
        )


def init(key: jax.Array, params: Tree, config: LoraConfig) -> Tree:
    """A fresh adapter: A uniform in ±1/√in (as in PEFT), B zero, so the model starts unchanged.

    Args:
      key: PRNG key.
      params: base parameters (arrays or shapes); only shapes are read.
      config: what to adapt, and how.

    Returns:
      A tree of `f32[..., in, r]` (`A`) and `f32[..., r, out]` (`B`).

    Raises:
      ValueError: see `targets`.

    >>> params = {"query": {"kernel": jnp.ones((4, 6)), "bias": jnp.zeros(6)}}
    >>> adapter = init(jax.random.key(0), params, LoraConfig(2, 4.0, ("query",)))
    >>> jax.tree.map(jnp.shape, adapter)
    {'query': {'A': (4, 2), 'B': (2, 6)}}
    """
    chosen = targets(params, config)
    flat = {}
    for k, (path, kernel) in zip(
        jax.random.split(key, len(chosen)), sorted(chosen.items()), strict=True
    ):
        *lead, fan_in, fan_out = kernel.shape
        bound = fan_in**-0.5
        flat[*path, "A"] = jax.random.uniform(
            k, (*lead, fan_in, config.rank), jnp.float32, -bound, bound
        )
        flat[*path, "B"] = jnp.zeros((*lead, config.rank, fan_out), jnp.float32)
    return traverse_util.unflatten_dict(flat)


def delta(a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """`scale · A B` in float32: `[..., in, r], [..., r, out]` → `f32[..., in, out]`."""
    return scale * jnp.matmul(
        a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def merge(params: Tree, adapter: Tree, config: LoraConfig) -> Tree:
    """Fold an adapter into the kernels: `W + scale · A B`; the result needs no adapter to run.

    Args:
      params: base parameters; not changed.
      adapter: from `init`, trained.
      config: the adapter's configuration (only its scale is read).

    Raises:
      ValueError: if the adapter has a layer that the base has not.

    >>> params = {"query": {"kernel": jnp.zeros((1, 1))}}
    >>> adapter = {"query": {"A": jnp.array([[2.0]]), "B": jnp.array([[3.0]])}}
    >>> merge(params, adapter, LoraConfig(rank=1, alpha=0.5))["query"]["kernel"].tolist()
    [[3.0]]
    """
    return _fold(params, adapter, lambda w, d: w + d, config.scale)


def unmerge(params: Tree, adapter: Tree, config: LoraConfig) -> Tree:
    """Take a merged adapter out again, `W - scale · A B` (equal to the base up to rounding).

    >>> params = {"query": {"kernel": jnp.array([[3.0]])}}
    >>> adapter = {"query": {"A": jnp.array([[2.0]]), "B": jnp.array([[3.0]])}}
    >>> unmerge(params, adapter, LoraConfig(rank=1, alpha=0.5))["query"]["kernel"].tolist()
    [[0.0]]
    """
    return _fold(params, adapter, lambda w, d: w - d, config.scale)


def _fold(
    params: Tree,
    adapter: Tree,
    op: Callable[[jax.Array, jax.Array], jax.Array],
    scale: float,
) -> Tree:
    flat = traverse_util.flatten_dict(params)
    factors = traverse_util.flatten_dict(adapter)
    for path in {p[:-1] for p in factors}:
        kernel = (*path, "kernel")
        if kernel not in flat:
            raise ValueError(f"the adapter has {'.'.join(path)}, which the base model has not")
        change = delta(factors[*path, "A"], factors[*path, "B"], scale)
        flat[kernel] = op(flat[kernel].astype(jnp.float32), change).astype(flat[kernel].dtype)
    return traverse_util.unflatten_dict(flat)


def count_params(adapter: Tree) -> int:
    """Number of parameters of an adapter, or of a dict of adapters.

    >>> count_params({"query": {"A": jnp.zeros((4, 2)), "B": jnp.zeros((2, 6))}})
    20
    """
    return trees.count(adapter)
