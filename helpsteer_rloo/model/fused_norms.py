"""Root-mean-square norms with a backward pass of a few passes over memory, in place of autograd's dozen."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from helpsteer_rloo.model.heads import at_least_float32


def fuse_norms(model: nn.Module) -> int:
    """Let the norms of a Qwen3 or Llama compute in fewer passes; how many there are.

    Modules, parameters and what is saved stay as they are: only `forward` is shadowed.
    """
    norms = [m for m in model.modules() if type(m) in (Qwen3RMSNorm, LlamaRMSNorm) and "forward" not in m.__dict__]
    for norm in norms:
        cast(Any, norm).forward = FusedNorm(norm)
    return len(norms)


@dataclass(frozen=True)
class FusedNorm:
    """The forward of one norm."""

    norm: nn.Module

    def __call__(self, hidden: Tensor) -> Tensor:
        """As transformers', `[…, D]` to `[…, D]`."""
        norm = cast(Any, self.norm)
        return _Norm.apply(hidden, norm.weight, norm.variance_epsilon)


class _Norm(torch.autograd.Function):
    """y = w · round(x r) with r = (mean(x²) + ε)^(-1/2), `round` to the type of x, all else in float32 at least.

    With g the gradient for y and h = g · w:  dx = r h - x r³ mean(h · x);  dw = Σ g · x r  over all but the last axis.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Any:
        wide = at_least_float32(hidden)
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        inverse = torch.rsqrt(square / hidden.shape[-1] + epsilon)
        ctx.save_for_backward(hidden, weight, inverse)
        normed = (wide * inverse).to(hidden.dtype)
        return normed.mul_(weight) if weight.dtype == hidden.dtype else normed * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        hidden, weight, inverse = ctx.saved_tensors
        g, wide = at_least_float32(gradients[0]), at_least_float32(hidden)
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (g * (wide * inverse)).flatten(0, -2).sum(0).to(weight.dtype)
        d_hidden = None
        if ctx.needs_input_grad[0]:
            h = g * weight
            share = torch.linalg.vecdot(h, wide)[..., None] * inverse**3 / hidden.shape[-1]
            d_hidden = h.mul_(inverse).addcmul_(wide, share, value=-1).to(hidden.dtype)
        return d_hidden, d_weight, None
