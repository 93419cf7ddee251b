"""Root-mean-square norms with a backward pass of a few passes over memory, in place of autograd's dozen."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from helpsteer_rloo.model.heads import at_least_float32
from helpsteer_rloo.model.shadowing import shadow


def fuse_norms(model: nn.Module) -> int:
    """Let the norms of a Qwen3 or Llama compute in fewer passes; how many there are."""
    return shadow(model, (Qwen3RMSNorm, LlamaRMSNorm), FusedNorm)


@dataclass(frozen=True)
class FusedNorm:
    """The forward of one norm."""

    norm: nn.Module

    def __call__(self, hidden: Tensor) -> Tensor:
        """As transformers', `[…, D]` to `[…, D]`."""
        norm = cast(Any, self.norm)
        return _Norm.apply(hidden, norm.weight, norm.variance_epsilon)


class _Norm(torch.autograd.Function):
    """`normed` with a gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Any:
        result, inverse = normed(hidden, weight, epsilon)
        ctx.save_for_backward(hidden, weight, inverse)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, inverse = ctx.saved_tensors
        return *norm_gradients(gradients[0], hidden, weight, inverse, ctx.needs_input_grad[:2]), None


def normed(hidden: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The norm y = w · round(x r), r = (mean(x²) + ε)^(-1/2), in float32 at least; `round` is to the type of x.

    Returns:
        y, and r with a last axis of 1.
    """
    wide = at_least_float32(hidden)
    square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
    inverse = torch.rsqrt(square / hidden.shape[-1] + epsilon)
    rounded = (wide * inverse).to(hidden.dtype)
    return rounded.mul_(weight) if weight.dtype == hidden.dtype else rounded * weight, inverse


def norm_gradients(
    gradient: Tensor, hidden: Tensor, weight: Tensor, inverse: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients for x and w of `normed`, as far as they are needed.

    With g the gradient for y and h = g · w:  dx = r h - x r³ mean(h · x);  dw = Σ g · x r  over all but the last axis.
    """
    g, wide = at_least_float32(gradient), at_least_float32(hidden)
    d_hidden = d_weight = None
    if needed[1]:
        d_weight = (g * (wide * inverse)).flatten(0, -2).sum(0).to(weight.dtype)
    if needed[0]:
        h = g * weight
        share = torch.linalg.vecdot(h, wide)[..., None] * inverse**3 / hidden.shape[-1]
        d_hidden = h.mul_(inverse).addcmul_(wide, share, value=-1).to(hidden.dtype)
    return d_hidden, d_weight
