"""Linear layers with the faster of PyTorch's two CPU libraries, MKL and oneDNN.

PyTorch uses MKL for float32, whose kernels are slower than oneDNN's on AMD processors.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

_PACKED_FOR = 2048  # number of tokens for which oneDNN packs frozen weights


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@functools.cache
def onednn_is_faster(dtype: torch.dtype, inputs: int, outputs: int) -> bool:
    """Measure whether oneDNN is faster than MKL for a layer of this size.

    False where oneDNN has no bfloat16: without AVX-512.
    """
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    x, weight = torch.randn(1024, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1024)
    return _least(lambda: _onednn(x, packed, None)) < _least(lambda: functional.linear(x, weight))


def _least(call: Callable[[], object], times: int = 15) -> float:
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


class Frozen:
    """`x Wᵀ + b` with frozen weights, and `dy W`.

    Args:
      weight: `[out, in]`, in the dtype of computation.
      bias: `[out]`.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self.bias, self._weights = bias, (weight, weight.t())
        outputs, inputs = weight.shape
        self._onednn = weight.device.type == "cpu" and onednn_is_faster(
            weight.dtype, inputs, outputs
        )
        if self._onednn:
            pack = torch.ops.mkldnn._reorder_linear_weight
            self._weights = (pack(weight, _PACKED_FOR), pack(weight.t().contiguous(), _PACKED_FOR))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[..., in]` to `[..., out]`."""
        apply = _onednn if self._onednn else functional.linear
        return apply(x, self._weights[0], self.bias)

    def backward(self, grad: torch.Tensor) -> torch.Tensor:
        """Map `[..., out]` to `[..., in]`."""
        apply = _onednn if self._onednn else functional.linear
        return apply(grad, self._weights[1], None)


class FrozenLinear(torch.autograd.Function):
    """`Frozen` with its derivative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, frozen: Frozen) -> torch.Tensor:
        """Map `[..., in]` to `[..., out]`."""
        ctx.frozen = frozen
        return frozen.forward(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Return the input's gradient."""
        return ctx.frozen.backward(grad.contiguous()), None


class TrainedLinear(torch.autograd.Function):
    """A trained linear layer whose three products use oneDNN."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        """Map `[..., in]` to `[..., out]`."""
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Return the gradients of input, weight and bias."""
        x, weight = ctx.saved_tensors
        flat, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = _onednn(flat, weight.t().contiguous(), None).view_as(x)
        dw = _onednn(flat.t().contiguous(), rows.t().contiguous(), None)
        return dx, dw, flat.sum(0)


def is_frozen(module: torch.nn.Module) -> bool:
    """Return whether a module is a linear layer with frozen weights."""
    return isinstance(module, torch.nn.Linear) and not module.weight.requires_grad


def use_fastest(model: torch.nn.Module) -> None:
    """Make a model's wide linear layers use oneDNN if it is faster."""
    for module in _wide(model):
        weight = module.weight
        if not is_frozen(module):
            module.forward = _trained_forward(module)
        elif onednn_is_faster(weight.dtype, *reversed(weight.shape)):
            module.forward = _frozen_forward(Frozen(weight.detach(), module.bias.detach()))


def _wide(model: torch.nn.Module) -> list[Any]:
    """Return the linear layers with a bias, which excludes the adapters' factors."""
    linear = (module for module in model.modules() if isinstance(module, torch.nn.Linear))
    return [module for module in linear if module.bias is not None]


def _frozen_forward(frozen: Frozen) -> Callable[[torch.Tensor], torch.Tensor]:
    apply: Callable[..., torch.Tensor] = FrozenLinear.apply
    return lambda x: apply(x.to(frozen.bias.dtype), frozen)


def _trained_forward(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    apply: Callable[..., torch.Tensor] = TrainedLinear.apply

    def forward(x: torch.Tensor) -> torch.Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if not onednn_is_faster(dtype, *reversed(module.weight.shape)):
            return functional.linear(x, module.weight, module.bias)
        return apply(x.to(dtype), module.weight.to(dtype), module.bias.to(dtype))

    return forward
