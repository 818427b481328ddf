"""Hand-written: all tasks' tokens as one unpadded batch, one forward and one backward pass.

Frozen kernels have the dtype of the computation; query, key and value are one kernel. A task's
tokens are consecutive, so its adapter's gradient is a product of slices. Attention is computed in
buckets of sentences with similar lengths. Element-wise functions can be compiled.

Shapes: N tokens, H hidden size, k layers side by side in a site, r rank, P padded tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from benchmarks.peers import common
from benchmarks.peers.common import Drawn, Group, Peer
from benchmarks.peers.kernels import Frozen
from benchmarks.work import Work
from jaxlora.formats.huggingface import Pretrained
from jaxlora.training.step import TrainState
from jaxlora.training.task_group import Cohort

# The adapted sites of a layer: paths of the linear layers that are computed side by side.
SITES = (
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    ("attention.output.dense",),
    ("intermediate.dense",),
    ("output.dense",),
)
MULTIPLE = 8  # attention pads sentences to a multiple of this


class Slices(NamedTuple):
    """The token ranges of a group and of its tasks."""

    group: slice
    tasks: list[slice]


@dataclasses.dataclass
class Adapter:
    """A group's adapter at a site: views of its flat parameter and of its gradients.

    Attributes:
      a: `[k r, in]`.
      b: `[k, out, r]`.
      grad_a, grad_b: the gradients of `a` and `b` for each task.
    """

    a: torch.Tensor
    b: torch.Tensor
    grad_a: list[torch.Tensor]
    grad_b: list[torch.Tensor]


class Site(NamedTuple):
    """A frozen kernel, the groups' adapters on it, and their scale."""

    frozen: Frozen
    adapters: list[Adapter]
    scale: float


class AdaptedLinear(torch.autograd.Function):
    """`x Wᵀ + b + s x Aᵀ Bᵀ`; the backward pass writes each task's gradients of A and B."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, tape: torch.Tensor, site: Site, slices: list[Slices]
    ) -> torch.Tensor:
        """Map `[N, in]` to `[N, k out]`; `tape` only makes autograd record the call."""
        y, thin = site.frozen.forward(x), []
        for adapter, where in zip(site.adapters, slices, strict=True):
            xa = (x[where.group] @ adapter.a.to(x.dtype).t()).mul_(site.scale)
            for part, side, b in _sides(xa, y[where.group], adapter.b):
                side.addmm_(part, b.t())
            thin.append(xa)
        ctx.save_for_backward(x, *thin)
        ctx.rest = site, slices
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Return the input's gradient."""
        (x, *thin), (site, slices) = ctx.saved_tensors, ctx.rest
        dx = site.frozen.backward(grad) if ctx.needs_input_grad[0] else None
        for xa, adapter, where in zip(thin, site.adapters, slices, strict=True):
            dxa = torch.empty_like(xa)
            for part, side, b in _sides(dxa, grad[where.group], adapter.b):
                torch.mm(side, b, out=part)
            dxa.mul_(site.scale)
            if dx is not None:
                dx[where.group].addmm_(dxa, adapter.a.to(x.dtype))
            _write_grads(adapter, where, x, xa, grad, dxa)
        return dx, None, None, None


def _sides(thin: torch.Tensor, wide: torch.Tensor, b: torch.Tensor) -> Any:
    """Yield the thin columns, the wide columns and B of each layer of a site."""
    count, out, rank = b.shape
    return zip(
        thin.view(-1, count, rank).unbind(1),
        wide.view(-1, count, out).unbind(1),
        b.to(thin.dtype).unbind(),
        strict=True,
    )


def _write_grads(
    adapter: Adapter, where: Slices, x: torch.Tensor, xa: torch.Tensor, grad: torch.Tensor,
    dxa: torch.Tensor,
) -> None:  # fmt: skip
    for n, task in enumerate(where.tasks):
        own = slice(task.start - where.group.start, task.stop - where.group.start)
        _product(dxa[own].t(), x[task], adapter.grad_a[n])
        wide, into = grad[task], adapter.grad_b[n]
        for (part, side, _), out in zip(_sides(xa[own], wide, adapter.b), into, strict=True):
            _product(side.t(), part, out)


def _product(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    if x.dtype == out.dtype:
        torch.mm(x, y, out=out)
    else:
        out.copy_(x @ y)


class Bucket(NamedTuple):
    """Sentences of similar lengths: padded tokens `start … stop`, as rows of `length`.

    `mask: f32[rows, 1, 1, length]`, minus infinity at padding.
    """

    start: int
    stop: int
    rows: int
    length: int
    mask: torch.Tensor


class Layout(NamedTuple):
    """The index of each token among the padded tokens, `i64[N]`, and the buckets."""

    place: torch.Tensor
    padded: int
    buckets: list[Bucket]


def make_layout(lengths: np.ndarray, device: torch.device) -> Layout:
    """Put sentences into buckets by length, rounded up to a multiple of `MULTIPLE`."""
    rounded = -(-lengths // MULTIPLE) * MULTIPLE
    starts = np.zeros(len(lengths), np.int64)
    buckets, start = [], 0
    for length in map(int, np.unique(rounded)):
        mine = np.flatnonzero(rounded == length)
        starts[mine] = start + np.arange(len(mine)) * length
        padding = np.arange(length) >= lengths[mine][:, None]
        mask = np.where(padding, -np.inf, 0).astype(np.float32)[:, None, None]
        stop = start + len(mine) * length
        buckets.append(Bucket(start, stop, len(mine), length, torch.from_numpy(mask).to(device)))
        start = stop
    place = torch.from_numpy(np.repeat(starts, lengths) + positions(lengths)).to(device)
    return Layout(place, start, buckets)


def positions(lengths: np.ndarray) -> np.ndarray:
    """Return the position of each token in its sentence, `i64[N]`."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)


def _spread(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Scatter `[N, width]` to `[P, width]`, with 0 at padding."""
    return x.new_zeros(layout.padded, x.shape[1]).index_copy_(0, layout.place, x)


class Attention(torch.autograd.Function):
    """Softmax attention within sentences, with dropout on the weights."""

    @staticmethod
    def forward(
        ctx: Any, qkv: torch.Tensor, layout: Layout, heads: int, rate: float
    ) -> torch.Tensor:
        """Map `[N, 3 H]` to `[N, H]`."""
        wide, kept = _spread(qkv, layout), []
        width = qkv.shape[1] // 3
        size = width // heads
        out = qkv.new_empty(layout.padded, width)
        for start, stop, count, length, mask in layout.buckets:
            shape = (count, length, 3, heads, size)
            q, k, v = wide[start:stop].view(shape).permute(2, 0, 3, 1, 4).contiguous().unbind()
            scores = (q @ k.mT).mul_(size**-0.5).add_(mask)
            weights = torch.softmax(scores, -1)
            noise = None
            if rate:
                noise = torch.empty_like(weights).bernoulli_(1 - rate).div_(1 - rate)
            used = weights if noise is None else weights * noise
            out[start:stop].view(count, length, heads, size).copy_((used @ v).transpose(1, 2))
            kept.append((q, k, v, weights, noise))
        ctx.kept, ctx.layout = kept, layout
        return out.index_select(0, layout.place)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Return the gradient `[N, 3 H]`."""
        layout = ctx.layout
        wide = _spread(grad, layout)
        out = grad.new_empty(layout.padded, 3 * grad.shape[1])
        for bucket, (q, k, v, weights, noise) in zip(layout.buckets, ctx.kept, strict=True):
            start, stop, count, length, _ = bucket
            _, heads, _, size = q.shape
            g = wide[start:stop].view(count, length, heads, size).transpose(1, 2)
            dweights, used = g @ v.mT, weights
            if noise is not None:
                dweights, used = dweights.mul_(noise), weights * noise
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
            dscores.mul_(size**-0.5)
            into = out[start:stop].view(count, length, 3, heads, size).permute(2, 0, 3, 1, 4)
            for into_one, value in zip(
                into, (dscores @ k, dscores.mT @ q, used.mT @ g), strict=True
            ):
                into_one.copy_(value)
        ctx.kept = None
        return out.index_select(0, layout.place), None, None, None


class Mean(torch.autograd.Function):
    """The mean over each sentence's tokens."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Map `[N, H]` to `[sentences, H]`."""
        ctx.save_for_backward(lengths)
        return torch.segment_reduce(x, "mean", lengths=lengths, unsafe=True)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Return the gradient `[N, H]`."""
        (lengths,) = ctx.saved_tensors
        return (grad / lengths[:, None]).repeat_interleave(lengths, 0), None


# `apply` is untyped.
adapted_linear: Callable[..., torch.Tensor] = AdaptedLinear.apply
attention: Callable[..., torch.Tensor] = Attention.apply
mean: Callable[..., torch.Tensor] = Mean.apply


def add_norm(
    y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float,
    rate: float,
) -> torch.Tensor:  # fmt: skip
    """Return `LayerNorm(dropout(y) + x)`."""
    return functional.layer_norm(functional.dropout(y, rate) + x, (x.shape[-1],), weight, bias, eps)


class Flat(Peer):
    """All groups of a cohort in one batch.

    Args:
      compiled: whether `torch.compile` fuses the element-wise functions.
    """

    def __init__(
        self,
        work: Work,
        base: Pretrained,
        cohort: Cohort,
        *,
        states: Mapping[str, TrainState] | None = None,
        compiled: bool = False,
        device: str = "cpu",
    ) -> None:
        super().__init__(cohort, device)
        self._config, self._rate = base.config, work.settings.model.encoder_dropout
        self._dtype = torch.bfloat16 if work.dtype == "bfloat16" else torch.float32
        self._add_norm: Callable[..., torch.Tensor] = add_norm
        self._gelu: Callable[..., torch.Tensor] = functional.gelu
        if compiled:
            self._add_norm, self._gelu = (
                torch.compile(f, dynamic=True) for f in (add_norm, functional.gelu)
            )
        self._jacobians: list[torch.Tensor] = []
        found = [
            self._make_group(work, name, state) for name, state in common.in_order(cohort, states)
        ]
        self._tape = torch.zeros((), requires_grad=True)
        self._load(base, list(zip(*found, strict=True)), work.settings.lora.scale_of(()))

    def _make_group(self, work: Work, name: str, state: TrainState) -> list[Adapter]:
        """Create a group's flat parameter; return its adapters by layer and site."""
        layers = state.trainable["lora"]["layers"]
        factors = [
            (np.concatenate([a[i].T for a, _ in parts]), np.stack([b[i].T for _, b in parts]))
            for i in range(self._config.num_hidden_layers)
            for parts in ([_factors(layers, path) for path in site] for site in SITES)
        ]
        values = [torch.tensor(x, device=self.device) for pair in factors for x in pair]
        theta = torch.nn.Parameter(torch.cat([x.reshape(-1) for x in values]))
        group = Group(work, self.cohort, name, state, [theta], str(self.device))
        jacobian = torch.zeros(len(group.heads), len(theta), device=self.device)
        self.groups.append(group)
        self._jacobians.append(jacobian)
        views, *grads = (_views(flat, values) for flat in (theta.detach(), *jacobian))
        return [
            Adapter(views[n], views[n + 1], [g[n] for g in grads], [g[n + 1] for g in grads])
            for n in range(0, len(values), 2)
        ]

    def _load(self, base: Pretrained, adapters: list[Any], scale: float) -> None:
        """Load the frozen weights from a transformers model."""
        model = common.make_bert(base, 0.0).to(self.device).requires_grad_(False)
        e = model.embeddings
        self._words = e.word_embeddings.weight
        self._positions = e.position_embeddings.weight + e.token_type_embeddings.weight[0]
        self._first_norm = (e.LayerNorm.weight, e.LayerNorm.bias)
        self._layers = []
        sites = iter(adapters)
        for layer in model.encoder.layer:
            made = [Site(self._frozen(layer, paths), list(next(sites)), scale) for paths in SITES]
            norms = [
                (norm.weight.to(self._dtype), norm.bias.to(self._dtype))
                for norm in (layer.attention.output.LayerNorm, layer.output.LayerNorm)
            ]
            self._layers.append((made, norms))

    def _frozen(self, layer: Any, paths: tuple[str, ...]) -> Frozen:
        linears = [layer.get_submodule(path) for path in paths]
        weight, bias = (
            torch.cat([getattr(one, name) for one in linears]).to(self._dtype)
            for name in ("weight", "bias")
        )
        return Frozen(weight, bias)

    def gradients(self, step: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Run one backward pass for all tasks."""
        drawn = common.draw(self.cohort, step)
        vectors = iter(self._encode(drawn).split([len(one.numbers) for one in drawn]))
        losses, total = [], torch.zeros((), device=self.device)
        parts = iter(drawn)
        for group in self.groups:
            for head, weight in zip(group.heads, group.weights, strict=True):
                labels = torch.tensor(next(parts).labels, device=self.device)
                losses.append(head.loss(next(vectors), labels))
                total = total + losses[-1] * weight
        total.backward()
        return [loss.detach() for loss in losses], self._jacobians

    def _slices(self, sizes: list[int]) -> list[Slices]:
        """Return each group's token ranges, given the number of tokens of each task."""
        ends = np.cumsum([0, *sizes]).tolist()
        tasks = [slice(*pair) for pair in itertools.pairwise(ends)]
        found, first = [], 0
        for group in self.groups:
            own = tasks[first : first + len(group.heads)]
            found.append(Slices(slice(own[0].start, own[-1].stop), own))
            first += len(own)
        return found

    def _encode(self, drawn: list[Drawn]) -> torch.Tensor:
        """Return the vectors of all tasks' sentences."""
        each = [one.examples.lengths[one.numbers] for one in drawn]
        tokens = np.concatenate([one.examples.sentence(n) for one in drawn for n in one.numbers])
        lengths, slices = np.concatenate(each), self._slices([int(x.sum()) for x in each])
        layout, config, rate = make_layout(lengths, self.device), self._config, self._rate
        x = self._embed(tokens, lengths)
        for (qkv, out, up, down), (first, second) in self._layers:
            y = adapted_linear(x, self._tape, qkv, slices)
            y = attention(y, layout, config.num_attention_heads, rate)
            y = adapted_linear(y, self._tape, out, slices)
            x = self._add_norm(y, x, *first, config.layer_norm_eps, rate)
            y = self._gelu(adapted_linear(x, self._tape, up, slices))
            y = adapted_linear(y, self._tape, down, slices)
            x = self._add_norm(y, x, *second, config.layer_norm_eps, rate)
        return mean(x.float(), torch.from_numpy(lengths).to(self.device))

    @torch.no_grad()
    def _embed(self, tokens: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
        words = self._words[torch.from_numpy(tokens.astype(np.int64)).to(self.device)]
        x = words + self._positions[torch.from_numpy(positions(lengths)).to(self.device)]
        shape, eps = (x.shape[-1],), self._config.layer_norm_eps
        x = functional.layer_norm(x, shape, *self._first_norm, eps)
        return functional.dropout(x, self._rate).to(self._dtype)


def _factors(layers: Any, path: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a module's factors, `[L, in, r]` and `[L, r, out]`."""
    for name in path.split("."):
        layers = layers[name]
    return np.array(layers["A"]), np.array(layers["B"])


def _views(flat: torch.Tensor, like: list[torch.Tensor]) -> list[torch.Tensor]:
    parts = flat.split([x.numel() for x in like])
    return [part.view(x.shape) for part, x in zip(parts, like, strict=True)]
