"""The gate of a feed-forward network, silu(g) · u, with fewer and smaller tensors than autograd makes of it.

Autograd keeps silu(g) for the backward pass beside g and u, and makes four more tensors there; each is as large as the
network is wide, and on a CPU most of the time of such a pass goes into memory that is touched for the first time. Here
only g and u are kept, and results are written over what they are made of.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from helpsteer_rloo.model.shadowing import is_hooked, shadow

_NETWORKS = Qwen3MLP, LlamaMLP


def fuse_gates(model: nn.Module) -> int:
    """Let the feed-forward networks of a Qwen3 or Llama compute their gates as this module does; how many there are."""
    return shadow(model, _NETWORKS, FusedNetwork)


@dataclass(frozen=True)
class FusedNetwork:
    """The forward of one feed-forward network."""

    module: nn.Module

    def __call__(self, hidden: Tensor) -> Tensor:
        """As transformers', `[…, D]` to `[…, D]`."""
        module = cast(Any, self.module)
        stock = type(module) in _NETWORKS and type(module.act_fn) in (nn.SiLU, SiLUActivation)
        if not stock or is_hooked(module.act_fn):
            return type(module).forward(module, hidden)
        return module.down_proj(_Gate.apply(module.gate_proj(hidden), module.up_proj(hidden)))


class _Gate(torch.autograd.Function):
    """y = silu(g) · u with silu(g) = g σ(g).

    With d the gradient for y:  du = d · silu(g);  dg = d · u · σ(g) (1 + g (1 - σ(g)))
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Any:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        d_gate = gradients[0] * up
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        return d_gate, silu(gate).mul_(gradients[0])
