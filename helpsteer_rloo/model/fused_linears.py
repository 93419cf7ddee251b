"""Linear layers, with LoRA or without, in as few passes over memory as their products need.

PEFT's forward computes x Wᵀ, then casts x, scales (x Aᵀ) Bᵀ, adds, and casts again, each in a pass of its own over a
tensor as large as the result, and keeps several of them for the backward pass. Here the last product adds to the result
in place, and the backward pass keeps x and x Aᵀ only. All products with weights of the base are those of
`helpsteer_rloo.model.products`, forward and backward.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from helpsteer_rloo.model.products import product
from helpsteer_rloo.model.shadowing import is_hooked


def fuse_linears(model: nn.Module) -> int:
    """Let the linear layers of a model, with LoRA or without, compute as this module does; how many there are.

    Modules, parameters and what is saved stay as they are: only `forward` is shadowed, and it leaves to PEFT whatever
    is not one plain adapter over a frozen weight (several active adapters, dropout, other variants, quantized layers).
    """
    lora = [module for module in model.modules() if type(module) is LoraLinear]
    factors = {part for layer in lora for part in layer.modules() if part not in (layer, layer.base_layer)}
    layers = [layer for layer in lora if type(layer.base_layer) is nn.Linear and "forward" not in layer.__dict__]
    plain = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in module.__dict__]
    for layer in layers:
        cast(Any, layer).forward = FusedLora(layer)
    for layer in plain:
        if layer not in factors:
            cast(Any, layer).forward = FusedLinear(layer)
    return len(layers) + len(set(plain) - factors)


@dataclass(frozen=True)
class FusedLinear:
    """The forward of one plain layer."""

    layer: nn.Linear

    def __call__(self, x: Tensor) -> Tensor:
        """As torch's, `[…, in]` to `[…, out]`."""
        if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return nn.Linear.forward(self.layer, x)
        return cast(Tensor, _Product.apply(x, self.layer.weight, self.layer.bias))


class _Product(torch.autograd.Function):
    """y = x Wᵀ + b.

    With g the gradient for y:  dx = g W;  dW = gᵀ x;  db = Σ g
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        g = gradients[0]
        rows = g.reshape(-1, weight.shape[0])
        d_x = product(g, weight.T) if ctx.needs_input_grad[0] else None
        d_weight = product(rows.T, x.reshape(-1, weight.shape[1]).T) if ctx.needs_input_grad[1] else None
        return d_x, d_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


@dataclass(frozen=True)
class FusedLora:
    """The forward of one LoRA layer."""

    layer: LoraLinear

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's, `[…, in]` to `[…, out]`.

        In half precision the low-rank product is computed in the type of the base instead of float32: its rounding is
        2^-9 of the update, while the sum with x Wᵀ is rounded to 2^-9 of itself in either case.
        """
        layer = cast(Any, self.layer)
        base = layer.base_layer
        trained = any(parameter.requires_grad for parameter in base.parameters())
        if layer.merged or trained or args or kwargs:
            return type(self.layer).forward(self.layer, x, *args, **kwargs)
        if layer.disable_adapters:
            return base(x)
        name = self._only_adapter()
        if name is None:
            return type(self.layer).forward(self.layer, x)
        device, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        with torch.autocast(device, enabled=False):
            weight = base.weight.to(dtype)
            bias = None if base.bias is None else base.bias.to(dtype)
            return _LoraProduct.apply(x.to(dtype), weight, bias, down, up, layer.scaling[name])

    def _only_adapter(self) -> str | None:
        """The active adapter, if there is one, without bias, dropout, variant or anything that hangs on a factor."""
        layer = cast(Any, self.layer)
        active = [name for name in layer.active_adapters if name in layer.lora_A]
        if len(active) != 1 or active[0] in layer.lora_variant or layer.lora_bias[active[0]]:
            return None
        if any(map(is_hooked, (layer.base_layer, layer.lora_A[active[0]], layer.lora_B[active[0]]))):
            return None
        dropout = layer.lora_dropout[active[0]]
        return None if isinstance(dropout, nn.Dropout) and dropout.p > 0 and dropout.training else active[0]


class _LoraProduct(torch.autograd.Function):
    """y = x Wᵀ + b + s (x Aᵀ) Bᵀ with W and b frozen.

    With g the gradient for y:  dx = g W + s (g B) A;  dA = s (g B)ᵀ x;  dB = s gᵀ (x Aᵀ)
    """

    @staticmethod
    def forward(  # noqa: PLR0913 - what it computes with
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Any:
        rows = x.reshape(-1, x.shape[-1])
        low = product(rows, down.to(rows.dtype))
        result = product(rows, weight, bias)
        result.addmm_(low, up.to(rows.dtype).T, alpha=scale)
        ctx.save_for_backward(rows, low, weight, down, up)
        ctx.scale, ctx.shape = scale, x.shape
        return result.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, low, weight, down, up = ctx.saved_tensors
        g = gradients[0].reshape(-1, weight.shape[0])
        low_g = g @ up.to(g.dtype) * ctx.scale
        d_down = (low_g.T @ rows).to(down.dtype) if ctx.needs_input_grad[3] else None
        d_up = (g.T @ low * ctx.scale).to(up.dtype) if ctx.needs_input_grad[4] else None
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = product(g, weight.T).addmm_(low_g, down.to(g.dtype)).view(ctx.shape)
        return d_x, None, None, d_down, d_up, None
