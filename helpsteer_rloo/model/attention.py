"""Shared-prefix attention: in a packed row, a prompt is computed once for all of its continuations.

Registered with transformers under the name `SHARED_PREFIX`. With the keyword `spans` (of a
`helpsteer_rloo.packing.PackedRow`) each continuation attends to its prompt and to itself, and to nothing else; with the
keyword `cascade`, what a token attends to is the caller's; without either, the function is transformers' own SDPA
attention with its own masks, so padded batches stay right.

`dense_mask` defines what `spans` mean. `helpsteer_rloo.model.shared_prefix_cpu`, `…short_prefix_cpu` (rows of short
sequences) and `…shared_prefix_flex` (CUDA) are the fast ways there, and `attend_by_blocks` the plain one, for any other
device.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from helpsteer_rloo.model import shared_prefix_cpu, shared_prefix_flex, short_prefix_cpu
from helpsteer_rloo.model.support import supports_shared_prefix
from helpsteer_rloo.packing import Span

SHARED_PREFIX = "shared_prefix"


class Cascade(Protocol):
    """Attention with keys of the caller's own, such as those of a decoder that shares prompts."""

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Attend from new tokens.

        Args:
            module: The attention layer that calls.
            query: `[rows, heads, tokens, head size]`.
            key: `[rows, key heads, tokens, head size]`, of the new tokens.
            value: As `key`.
            scaling: Factor of the scores; without it, `head size ** -0.5`.

        Returns:
            `[rows, tokens, heads, head size]`.
        """
        ...


def shared_prefix_attention(  # noqa: PLR0913 - transformers' signature
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    spans: Sequence[Span] | None = None,
    scaling: float | None = None,
    cascade: Cascade | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over one packed row, or as `cascade` does it, or over a padded batch.

    Args:
        module: The attention layer that calls.
        query: `[rows, heads, T, head size]`; one row with `spans`.
        key: `[rows, key heads, T, head size]`; heads are grouped, not copied.
        value: As `key`.
        attention_mask: Used without `spans` and `cascade` only.
        spans: Where the groups lie in the row.
        scaling: Factor of the scores; without it, `head size ** -0.5`.
        cascade: What attends instead, if given.
        **kwargs: As transformers passes them.

    Returns:
        `[rows, T, heads, head size]`, and no weights.

    Raises:
        ValueError: the model asks for a sliding window or another kind of attention that is not known here.
    """
    if spans is None and cascade is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    unknown = [name for name in ("dropout", "softcap", "sliding_window", "position_bias", "s_aux") if kwargs.get(name)]
    if unknown:
        raise ValueError(f"Shared-prefix attention does not know {', '.join(unknown)}, which this model asks for.")
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast the norms of q and k return float32
    if cascade is not None:
        return cascade.attend(module, query, key, value, scaling), None
    assert spans is not None
    return _attend(query, key, value, spans, scaling).transpose(1, 2).contiguous(), None


def _attend(query: Tensor, key: Tensor, value: Tensor, spans: Sequence[Span], scaling: float | None) -> Tensor:
    device = query.device.type
    if device == "cpu" and short_prefix_cpu.is_short(spans):
        return short_prefix_cpu.attend(query, key, value, spans, scaling)
    if device == "cpu" and shared_prefix_cpu.supported():
        return shared_prefix_cpu.attend(query, key, value, spans, scaling)
    if device == "cuda":
        return shared_prefix_flex.attend(query, key, value, spans, scaling)
    return attend_by_blocks(query, key, value, spans, scaling)


def attend_by_blocks(query: Tensor, key: Tensor, value: Tensor, spans: Sequence[Span], scaling: float | None) -> Tensor:
    """Attention over one packed row on any device, a call for each prompt and each continuation.

    Returns:
        `[1, heads, T, head size]`.
    """
    outputs = [part for span in spans for part in _attend_group(query, key, value, span, scaling)]
    return torch.cat(outputs, dim=2)


def _attend_group(query: Tensor, key: Tensor, value: Tensor, span: Span, scaling: float | None) -> list[Tensor]:
    grouped = query.shape[1] != key.shape[1]

    def attend(start: int, length: int, keys: Tensor, values: Tensor, **mask: Any) -> Tensor:
        queries = query[:, :, start : start + length]
        return scaled_dot_product_attention(queries, keys, values, scale=scaling, enable_gqa=grouped, **mask)

    prompt = slice(span.start, span.start + span.prompt)
    prompt_keys, prompt_values = key[:, :, prompt], value[:, :, prompt]
    outputs: list[Tensor] = []
    if span.prompt:
        outputs.append(attend(span.start, span.prompt, prompt_keys, prompt_values, is_causal=True))
    for start, length in zip(span.continuation_starts(), span.continuations, strict=True):
        own = slice(start, start + length)
        keys = torch.cat([prompt_keys, key[:, :, own]], dim=2)
        values = torch.cat([prompt_values, value[:, :, own]], dim=2)
        visible = torch.ones(length, span.prompt + length, dtype=torch.bool, device=query.device).tril(span.prompt)
        outputs.append(attend(start, length, keys, values, attn_mask=visible))
    return outputs


def dense_mask(spans: Sequence[Span]) -> Tensor:
    """Which position may attend to which, `[T, T]`, true where allowed: the definition that fast paths must meet."""
    total = spans[-1].end
    allowed = torch.zeros(total, total, dtype=torch.bool)
    for span in spans:
        prompt = slice(span.start, span.start + span.prompt)
        allowed[prompt, prompt] = torch.ones(span.prompt, span.prompt, dtype=torch.bool).tril()
        for start, length in zip(span.continuation_starts(), span.continuations, strict=True):
            own = slice(start, start + length)
            allowed[own, prompt] = True
            allowed[own, own] = torch.ones(length, length, dtype=torch.bool).tril()
    return allowed


def use_shared_prefix(model: PreTrainedModel) -> None:
    """Let a model attend with shared prefixes where it is given `spans`, and as with SDPA where it is not.

    Raises:
        ValueError: the model is of another architecture, or has layers without full attention.
    """
    if not supports_shared_prefix(model):
        raise ValueError(f"Shared-prefix attention was not made for {type(model).__name__} as it is configured.")
    model.set_attn_implementation(SHARED_PREFIX)


@contextmanager
def packed_pass() -> Generator[None]:
    """Calls within are given `spans` or `cascade`, so that no mask is made of positions that restart."""
    token = _PACKED_PASS.set(True)
    try:
        yield
    finally:
        _PACKED_PASS.reset(token)


_PACKED_PASS = ContextVar("packed_pass", default=False)


def _mask(**kwargs: Any) -> Tensor | None:
    """SDPA's mask, for whoever calls the model as any other."""
    return None if _PACKED_PASS.get() else sdpa_mask(**kwargs)


AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(SHARED_PREFIX, _mask)
