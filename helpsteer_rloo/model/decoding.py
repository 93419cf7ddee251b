"""A decoding step of a Qwen3 or Llama in few operations.

One token a row is little work, and transformers' modules spend most of it between the matrix products: on norms of a
dozen operations each, on rotations of queries and keys apart, on views. Here the same weights go through fewer of them.
What is not exactly as transformers made it (modules with hooks, of other classes, wrapped for sharding) is run as it
is, by the model's own forward.

Tensor axes as in `helpsteer_rloo.model.cascade`; N are query and key heads together.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from torch.nn.modules import module as torch_module
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from helpsteer_rloo.model.attention import Cascade
from helpsteer_rloo.model.fused_attention import FusedAttention
from helpsteer_rloo.model.fused_gates import FusedNetwork
from helpsteer_rloo.model.fused_norms import FusedNorm
from helpsteer_rloo.model.last_layer import NarrowLayer, NarrowNetwork
from helpsteer_rloo.model.light_linears import Forward
from helpsteer_rloo.model.shadowing import is_hooked

Step = Callable[[Tensor, Tensor, Cascade], Tensor]
"""From ids `[R, 1]`, positions `[R, 1]` and what attends, to hidden states `[R, D]`."""

_BODIES = (qwen3.Qwen3Model, llama.LlamaModel)
_KNOWN = (
    *(qwen3.Qwen3DecoderLayer, qwen3.Qwen3Attention, qwen3.Qwen3MLP, qwen3.Qwen3RMSNorm),
    *(llama.LlamaDecoderLayer, llama.LlamaAttention, llama.LlamaMLP, llama.LlamaRMSNorm),
)
_SHADOWS = (FusedAttention, FusedNetwork, FusedNorm, NarrowLayer, NarrowNetwork)
"""Forwards of ours that compute what the module would."""


def decoding_step(body: nn.Module, joined: Mapping[nn.Module, Forward]) -> Step:
    """A step through a decoder, without gradients and in evaluation mode.

    Args:
        body: The decoder, with embeddings and final norm.
        joined: For the first of several linear layers with one input the product of all, as of
            `helpsteer_rloo.model.light_linears`; what is missing is computed layer by layer.
    """
    if not _is_stock(body):
        return lambda ids_R1, positions_R1, cascade: _as_it_is(body, ids_R1, positions_R1, cascade)
    layers = [_Layer(layer, joined) for layer in _layers(body)]
    return lambda ids_R1, positions_R1, cascade: _through(cast(Any, body), layers, ids_R1, positions_R1, cascade)


def _layers(body: Any) -> list[Any]:
    """The layers that the body's own forward goes through."""
    return list(body.layers[: body.config.num_hidden_layers])


def _is_stock(body: Any) -> bool:
    """Whether the modules that a step passes by are transformers' own, with nothing attached to them."""
    everywhere: Any = torch_module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks or type(body) not in _BODIES:
        return False
    passed: list[Any] = [body]
    for layer in _layers(body):
        passed += [layer, layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm]
        passed += [norm for name in ("q_norm", "k_norm") if (norm := getattr(layer.self_attn, name, None)) is not None]
    return all(
        type(module) in (*_BODIES, *_KNOWN)
        and isinstance(module.__dict__.get("forward"), (*_SHADOWS, type(None)))
        and not is_hooked(module)
        for module in passed
    )


def _as_it_is(body: nn.Module, ids_R1: Tensor, positions_R1: Tensor, cascade: Cascade) -> Tensor:
    output = body(input_ids=ids_R1, position_ids=positions_R1, use_cache=False, cascade=cascade)
    return output.last_hidden_state[:, 0]


def _through(body: Any, layers: Sequence["_Layer"], ids_R1: Tensor, positions_R1: Tensor, cascade: Cascade) -> Tensor:
    hidden_RD = body.embed_tokens(ids_R1)[:, 0]
    cos_R1E, sin_R1E = body.rotary_emb(hidden_RD, positions_R1)
    half = sin_R1E.shape[-1] // 2
    turn = cos_R1E, torch.cat([-sin_R1E[..., :half], sin_R1E[..., half:]], dim=-1)
    for layer in layers:
        hidden_RD = layer(hidden_RD, turn, cascade)
    return body.norm(hidden_RD)


class _Layer:
    """A decoder layer for one token a row."""

    def __init__(self, module: Any, joined: Mapping[nn.Module, Forward]) -> None:
        self._module, self._joined = module, joined
        attention = module.self_attn
        self._keys = attention.config.num_key_value_heads
        self._heads = attention.config.num_attention_heads + self._keys
        self._weight_NE: Tensor | None = None
        if hasattr(attention, "q_norm"):
            queries, keys = attention.q_norm.weight, attention.k_norm.weight
            counts = self._heads - self._keys, self._keys
            self._weight_NE = torch.cat([w.expand(n, -1) for w, n in zip((queries, keys), counts, strict=True)])

    def __call__(self, hidden_RD: Tensor, turn: tuple[Tensor, Tensor], cascade: Cascade) -> Tensor:
        """The layer's output, `[R, D]`."""
        layer = self._module
        hidden_RD = hidden_RD + self._attention(_normed(hidden_RD, layer.input_layernorm), turn, cascade)
        return hidden_RD + self._network(_normed(hidden_RD, layer.post_attention_layernorm))

    def _attention(self, x_RD: Tensor, turn: tuple[Tensor, Tensor], cascade: Cascade) -> Tensor:
        attention = self._module.self_attn
        projected = self._together((attention.q_proj, attention.k_proj, attention.v_proj), x_RD)
        projected = projected.view(len(x_RD), -1, attention.head_dim)
        both_RNE, value_RHE = projected[:, : self._heads], projected[:, self._heads :]
        if self._weight_NE is not None:
            epsilon = attention.q_norm.variance_epsilon
            both_RNE = rms_norm(both_RNE, both_RNE.shape[-1:], None, epsilon) * self._weight_NE
        cos_R1E, signed_sin_R1E = turn
        half = both_RNE.shape[-1] // 2
        both_RNE = torch.addcmul(both_RNE * cos_R1E, both_RNE.roll(half, -1), signed_sin_R1E)
        query_RNE, key_RHE = both_RNE[:, : -self._keys], both_RNE[:, -self._keys :]
        attended = cascade.attend(
            attention, query_RNE[:, :, None], key_RHE[:, :, None], value_RHE[:, :, None], attention.scaling
        )
        return attention.o_proj(attended.flatten(1))

    def _network(self, x_RD: Tensor) -> Tensor:
        network = self._module.mlp
        gate, up = self._together((network.gate_proj, network.up_proj), x_RD).chunk(2, dim=-1)
        return network.down_proj(network.act_fn(gate).mul_(up))

    def _together(self, linears: Sequence[nn.Module], x_RD: Tensor) -> Tensor:
        """What several linear layers make of one input, side by side."""
        product = self._joined.get(linears[0])
        return product(x_RD) if product else torch.cat([linear(x_RD) for linear in linears], dim=-1)


def _normed(hidden_RD: Tensor, norm: Any) -> Tensor:
    return rms_norm(hidden_RD, hidden_RD.shape[-1:], norm.weight, norm.variance_epsilon)
