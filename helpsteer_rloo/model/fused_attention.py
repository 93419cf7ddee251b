"""What queries and keys go through before they attend, norm and rotation, in fewer passes over memory than autograd's.

Autograd takes some ten passes for a norm and a rotation forward and twenty backward, over views whose heads and tokens
are transposed. Here both are one function on the layout that the projections yield, and it keeps what they yield alone.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from helpsteer_rloo.model.fused_norms import norm_gradients, normed
from helpsteer_rloo.model.shadowing import is_hooked, shadow

_NORMS = (qwen3.Qwen3RMSNorm, llama.LlamaRMSNorm)


def fuse_attention(model: nn.Module) -> int:
    """Let the attention layers of a Qwen3 or Llama rotate as this module does; how many there are."""
    return shadow(model, (qwen3.Qwen3Attention, llama.LlamaAttention), FusedAttention)


@dataclass(frozen=True)
class FusedAttention:
    """The forward of one attention layer."""

    module: nn.Module

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """As transformers', `[B, T, D]` to `[B, T, D]`; by it, where there is a cache or something hangs on a norm."""
        module = cast(Any, self.module)
        if past_key_values is not None or not self._is_plain():
            return type(module).forward(
                module, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )
        heads = (*hidden_states.shape[:-1], -1, module.head_dim)
        turn = Turn(*position_embeddings)
        query = turn(module.q_proj(hidden_states).view(heads), getattr(module, "q_norm", None))
        key = turn(module.k_proj(hidden_states).view(heads), getattr(module, "k_norm", None))
        value = module.v_proj(hidden_states).view(heads)
        attend = cast(Any, ALL_ATTENTION_FUNCTIONS).get_interface(module.config._attn_implementation, None)
        if getattr(module, "sliding_window", None) is not None:
            kwargs["sliding_window"] = module.sliding_window
        attended, weights = attend(
            module,
            *(states.transpose(1, 2) for states in (query, key, value)),
            attention_mask,
            dropout=module.attention_dropout if module.training else 0.0,
            scaling=module.scaling,
            **kwargs,
        )
        return module.o_proj(attended.reshape(*hidden_states.shape[:-1], -1)), weights

    def _is_plain(self) -> bool:
        norms = [norm for name in ("q_norm", "k_norm") if (norm := getattr(self.module, name, None)) is not None]
        plain = all(type(norm) in _NORMS and not is_hooked(norm) for norm in norms)
        return plain and cast(Any, self.module).config._attn_implementation != "eager"


class Turn:
    """Rotary positions of a call (Su et al. 2021, arXiv 2104.09864), for heads in the layout `[B, T, H, E]`.

    Args:
        cos: `[B, T, E]`, as transformers makes it: the same angles in both halves.
        sin: As `cos`.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        half = sin.shape[-1] // 2
        self._cos = cos[..., None, :]
        self._sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)[..., None, :]

    def __call__(self, heads: Tensor, norm: nn.Module | None) -> Tensor:
        """Queries or keys, `[B, T, H, E]`, normed if there is a norm, and turned."""
        weight, epsilon = (None, 0.0) if norm is None else (norm.weight, cast(Any, norm).variance_epsilon)
        return cast(Tensor, _Turned.apply(heads, weight, epsilon, self._cos, self._sin))


class _Turned(torch.autograd.Function):
    """z = y · c + swap(y) · s of the normed y, with s the sines, negative in the first half, and swap of the halves.

    With g the gradient for z, that for y is  g · c + swap(g) · swap(s).
    """

    @staticmethod
    def forward(ctx: Any, heads: Tensor, weight: Tensor | None, epsilon: float, cos: Tensor, sin: Tensor) -> Any:
        before, inverse = (heads, None) if weight is None else normed(heads, weight, epsilon)
        ctx.save_for_backward(None if weight is None else heads, weight, inverse, cos, sin)
        return _turned(before, cos, sin).to(heads.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        heads, weight, inverse, cos, sin = ctx.saved_tensors
        d_before = _turned(gradients[0], cos, _swapped(sin))
        if weight is None:
            return d_before, None, None, None, None
        return *norm_gradients(d_before, heads, weight, inverse, ctx.needs_input_grad[:2]), None, None, None


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """In the type of `heads`."""
    return _swapped(heads).mul_(sin).addcmul_(heads, cos)


def _swapped(x: Tensor) -> Tensor:
    """The halves of the last axis changed over."""
    half = x.shape[-1] // 2
    return torch.cat([x[..., half:], x[..., :half]], dim=-1)
