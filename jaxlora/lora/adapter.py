"""A LoRA adapter: its configuration, initialization, and merging into kernels."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.utils import trees
from jaxlora.utils.errors import ConfigError, suggestion
from jaxlora.utils.trees import Tree

__all__ = [
    "LoraConfig", "check_fit", "count_params", "delta", "describe", "init", "matches", "merge",
    "targets", "unmerge",
]  # fmt: skip

PAPER_TARGETS = ("query", "key", "value", "attention.output.dense")
"""Target modules of the paper: the four Dense layers of BERT's attention."""

ALL_TARGETS = ("query", "key", "value", "intermediate.dense", "output.dense")
"""Target modules that match every Dense layer of BERT's encoder layers."""

Path = tuple[str, ...]
"""Keys from the root of a parameter tree to a layer, such as `("encoder", "query")`."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Configuration of an adapter, with the field names of Hugging Face PEFT.

    A module name matches a layer if the layer's dotted path equals the name or ends with `.` and
    the name: `query` and `attention.output.dense` both work, and `output.dense` matches both
    layers whose paths end with it. Lists are converted to tuples, and so are patterns given as
    dicts.

    Attributes:
      rank: r, the inner dimension of the adapters.
      alpha: numerator of the scale.
      target_modules: names of the Dense layers that get an adapter.
      rslora: scale by `alpha / √r` instead of `alpha / r`, so that a high rank learns as fast as a
        low one (Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with
        LoRA").
      rank_pattern: `(name, rank)` of modules whose rank differs. If several names match, the
        longest one applies; they are sorted longest first.
      alpha_pattern: `(name, alpha)` of modules whose alpha differs, likewise.
      dropout: dropout rate of the adapter's input during training.

    Raises:
      ConfigError: if a rank is below 1, an alpha is not positive and finite, the dropout rate is
        outside [0, 1), or `target_modules` is a single string.

    >>> config = LoraConfig(4, 8.0, rank_pattern=(("query", 16),), rslora=True)
    >>> config.rank_of(("self", "query")), config.scale_of(("self", "query"))
    (16, 2.0)
    >>> config.rank_of(("self", "key")), config.scale_of(("self", "key"))
    (4, 4.0)
    """

    rank: int = 15
    alpha: float = 15.0
    target_modules: tuple[str, ...] = PAPER_TARGETS
    rslora: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, str):
            raise ConfigError(
                "target_modules", f"must be a tuple of names: ({self.target_modules!r},)"
            )
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        for field in ("rank_pattern", "alpha_pattern"):
            given = getattr(self, field)
            if isinstance(given, str):
                raise ConfigError(field, f"must map names of modules to numbers, not {given!r}")
            items = map(tuple, given.items() if isinstance(given, Mapping) else given)
            # Sorted, so that configurations with the same meaning compare equal.
            ordered = sorted(items, key=lambda item: (-len(item[0]), item[0]))
            object.__setattr__(self, field, tuple(ordered))
        self._check_numbers()

    def _check_numbers(self) -> None:
        for field, name, rank in _each("rank", self.rank, self.rank_pattern):
            if not isinstance(rank, numbers.Integral):
                raise ConfigError(field, "must be a whole number", f"{name}{rank!r}")
            if rank < 1:
                raise ConfigError(field, "must be at least 1", f"{name}{rank}")
        for field, name, alpha in _each("alpha", self.alpha, self.alpha_pattern):
            if not isinstance(alpha, numbers.Real) or not 0 < alpha < math.inf:
                raise ConfigError(field, "must be a number above 0", f"{name}{alpha}")
        if not isinstance(self.dropout, numbers.Real) or not 0 <= self.dropout < 1:
            raise ConfigError("dropout", "must be from 0 to below 1", self.dropout)

    def rank_of(self, path: Path) -> int:
        """Return the rank of the adapter of the module at `path`."""
        return next((rank for name, rank in self.rank_pattern if matches(name, path)), self.rank)

    def alpha_of(self, path: Path) -> float:
        """Return the numerator of the scale of the module at `path`."""
        return next((a for name, a in self.alpha_pattern if matches(name, path)), self.alpha)

    def scale_of(self, path: Path) -> float:
        """Return the factor of `A B` of the module: `alpha / r` (rsLoRA: `alpha / √r`)."""
        rank = self.rank_of(path)
        return self.alpha_of(path) / (math.sqrt(rank) if self.rslora else rank)


def _each(
    field: str, value: float, pattern: tuple[tuple[str, float], ...]
) -> Iterator[tuple[str, str, float]]:
    """Yield a field's value and those of its pattern: the field, the module, the value."""
    yield field, "", value
    yield from ((f"{field}_pattern", f"{name} ", one) for name, one in pattern)


Adapter = tuple[Tree, LoraConfig]
"""The tree of an adapter and its configuration."""


def matches(name: str, path: Path) -> bool:
    """Return whether a module name, as in `LoraConfig`, matches the layer at `path`.

    >>> matches("output.dense", ("attention", "output", "dense")), matches("ense", ("dense",))
    (True, False)
    """
    return f".{'.'.join(path)}".endswith(f".{name}")


def describe(
    modules: Mapping[Path, tuple[int, float]], rslora: bool = False, dropout: float = 0.0
) -> LoraConfig:
    """Return the configuration that adapts exactly these modules, with these ranks and alphas.

    Args:
      modules: path → (rank, alpha), not empty. The configuration names modules by their full
        paths, so no path may end with another one.
      rslora, dropout: see `LoraConfig`.

    >>> config = describe({("self", "query"): (2, 4.0), ("self", "key"): (3, 4.0)})
    >>> config.target_modules, config.rank, config.rank_pattern, config.alpha_pattern
    (('self.query', 'self.key'), 2, (('self.key', 3),), ())
    """
    named = {".".join(path): values for path, values in modules.items()}
    rank, alpha = next(iter(named.values()))
    ranks = tuple((name, r) for name, (r, _) in named.items() if r != rank)
    alphas = tuple((name, a) for name, (_, a) in named.items() if a != alpha)
    return LoraConfig(rank, alpha, tuple(named), rslora, ranks, alphas, dropout)


def targets(params: Tree, config: LoraConfig) -> dict[Path, jax.Array]:
    """Return the kernels that `config` adapts: path of the Dense layer → kernel `[..., in, out]`.

    All axes of a kernel except the last two are treated as stacked layers. Kernels of Flax's
    `DenseGeneral` with several input or output axes can therefore not be adapted.

    Args:
      params: a parameter tree, of arrays or of `jax.ShapeDtypeStruct` leaves.
      config: selects the layers.

    Raises:
      ConfigError: if a target matches no layer (the message lists the layers), a pattern matches no
        target, or a rank exceeds `min(in, out)` of its kernel.
      ValueError: if a kernel is not `[..., in, out]`.

    >>> params = {"self": {"query": {"kernel": jnp.zeros((4, 4))}}}
    >>> list(targets(params, LoraConfig(rank=2, target_modules=("query",))))
    [('self', 'query')]
    """
    kernels = {
        path[:-1]: leaf for path, leaf in trees.flatten(params).items() if path[-1] == "kernel"
    }
    chosen: dict[Path, jax.Array] = {}
    for target in config.target_modules:
        hits = {p: k for p, k in kernels.items() if matches(target, p)}
        if not hits:
            raise ConfigError("target_modules", _unknown_target(target, kernels))
        chosen |= hits
    for field in ("rank_pattern", "alpha_pattern"):
        for name, _ in getattr(config, field):
            if not any(matches(name, path) for path in chosen):
                known = ", ".join(sorted(".".join(path) for path in chosen))
                raise ConfigError(field, f"{name!r} matches no adapted module; they are {known}")
    for path, kernel in chosen.items():
        _check_rank(config.rank_of(path), path, kernel)
    return chosen


def _unknown_target(target: str, kernels: dict[Path, jax.Array]) -> str:
    known = sorted(".".join(path) for path in kernels)
    hint = suggestion(target, {k.rsplit(".", 1)[-1] for k in known})
    return f"unknown module {target!r}{hint} (the Dense layers are {', '.join(known)})"


def _check_rank(rank: int, path: Path, kernel: jax.Array) -> None:
    if len(kernel.shape) < 2:
        raise ValueError(
            f"{'.'.join(path)} has a kernel of shape {kernel.shape}, not [..., in, out]"
        )
    limit = min(kernel.shape[-2:])
    if rank > limit:
        shape = f"{kernel.shape[-2]} × {kernel.shape[-1]}"
        raise ConfigError(
            "rank", f"must be from 1 to {limit} for {'.'.join(path)} (kernel {shape})", rank
        )


def init(key: jax.Array, params: Tree, config: LoraConfig) -> Tree:
    """Initialize an adapter: A uniform in ±1/√in (as in PEFT), B zero, so it has no effect yet.

    Args:
      key: PRNG key.
      params: base parameters, or `jax.ShapeDtypeStruct` leaves; only shapes are read.
      config: configuration of the adapter.

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
        bound, rank = fan_in**-0.5, config.rank_of(path)
        shape = (*lead, fan_in, rank)
        # The same numbers drawn in their final shape take several times as long to compile.
        drawn = jax.random.uniform(k, (math.prod(shape),), jnp.float32, -bound, bound)
        flat[*path, "A"] = drawn.reshape(shape)
        flat[*path, "B"] = jnp.zeros((*lead, rank, fan_out), jnp.float32)
    return trees.unflatten(flat)


def delta(a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """Compute `scale · A B` in float32: `[..., in, r], [..., r, out]` → `f32[..., in, out]`."""
    return scale * jnp.matmul(
        a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def merge(params: Tree, adapter: Tree, config: LoraConfig) -> Tree:
    """Merge an adapter into the kernels: `W + scale · A B`.

    Args:
      params: base parameters; not modified.
      adapter: a tree as `init` returns it.
      config: the adapter's configuration; only ranks and scales are read.

    Raises:
      ValueError: if the adapter has a layer that the base lacks, if a layer lacks A or B, or if
        their shapes do not fit the kernel and the configuration.

    >>> params = {"query": {"kernel": jnp.zeros((1, 1))}}
    >>> adapter = {"query": {"A": jnp.array([[2.0]]), "B": jnp.array([[3.0]])}}
    >>> merge(params, adapter, LoraConfig(rank=1, alpha=0.5))["query"]["kernel"].tolist()
    [[3.0]]
    """
    return _fold(params, adapter, lambda w, d: w + d, config)


def unmerge(params: Tree, adapter: Tree, config: LoraConfig) -> Tree:
    """Subtract a merged adapter: `W - scale · A B`, which restores the base up to rounding.

    >>> params = {"query": {"kernel": jnp.array([[3.0]])}}
    >>> adapter = {"query": {"A": jnp.array([[2.0]]), "B": jnp.array([[3.0]])}}
    >>> unmerge(params, adapter, LoraConfig(rank=1, alpha=0.5))["query"]["kernel"].tolist()
    [[0.0]]
    """
    return _fold(params, adapter, lambda w, d: w - d, config)


def _fold(
    params: Tree,
    adapter: Tree,
    op: Callable[[jax.Array, jax.Array], jax.Array],
    config: LoraConfig,
) -> Tree:
    flat = trees.flatten(params, keep_empty=True)
    factors: dict[Path, Any] = trees.flatten(adapter)
    a: Any
    b: Any
    for path in {p[:-1] for p in factors}:
        kernel = (*path, "kernel")
        if kernel not in flat:
            raise ValueError(f"the adapter has {'.'.join(path)}, which the base model lacks")
        a, b = (factors.get((*path, name)) for name in "AB")
        _check_factors(path, a, b, flat[kernel].shape, config.rank_of(path))
        change = delta(a, b, config.scale_of(path))
        flat[kernel] = op(flat[kernel].astype(jnp.float32), change).astype(flat[kernel].dtype)
    return trees.unflatten(flat)


def _check_factors(path: Path, a: Any, b: Any, kernel: tuple[int, ...], rank: int) -> None:
    """Reject factors that would broadcast or be scaled by the wrong rank."""
    name = ".".join(path)
    if a is None or b is None:
        raise ValueError(f"the adapter of {name} lacks {'A' if a is None else 'B'}")
    *lead, fan_in, fan_out = kernel
    wanted = (*lead, fan_in, rank), (*lead, rank, fan_out)
    if (a.shape, b.shape) != wanted:
        raise ValueError(
            f"the adapter of {name} has A {a.shape} and B {b.shape}; a kernel {kernel} and a "
            f"configuration with rank {rank} want {wanted[0]} and {wanted[1]}"
        )


def check_fit(adapter: Tree, config: LoraConfig) -> None:
    """Check that an adapter's modules and ranks are those of its configuration.

    Raises:
      ValueError: names the first module that is not.

    >>> check_fit({"query": {"A": jnp.zeros((4, 2))}}, LoraConfig(3, target_modules=("query",)))
    Traceback (most recent call last):
    ...
    ValueError: query has rank 2, its configuration says 3
    """
    factors: dict[Path, Any] = trees.flatten(adapter)
    for (*module, factor), value in factors.items():
        path = tuple(module)
        if not any(matches(target, path) for target in config.target_modules):
            raise ValueError(f"{'.'.join(path)} is none of its configuration's target modules")
        rank = value.shape[-1 if factor == "A" else -2]
        if rank != config.rank_of(path):
            raise ValueError(
                f"{'.'.join(path)} has rank {rank}, its configuration says {config.rank_of(path)}"
            )


def count_params(adapter: Tree) -> int:
    """Count the parameters of an adapter, or of a dict of adapters.

    >>> count_params({"query": {"A": jnp.zeros((4, 2)), "B": jnp.zeros((2, 6))}})
    20
    """
    return trees.count(adapter)
