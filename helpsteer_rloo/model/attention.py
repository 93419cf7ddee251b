"""Shared-prefix attention: in a packed row, a prompt is computed once for all of its continuations.

Registered with transformers under the name `SHARED_PREFIX`. With the keyword `spans` (of a
`helpsteer_rloo.packing.PackedRow`) each continuation attends to its prompt and to itself, and to nothing else; without
it, the function is transformers' own SDPA attention with its own masks, so padded batches stay right.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from helpsteer_rloo.packing import Span

SHARED_PREFIX = "shared_prefix"
ARCHITECTURES = ("qwen3", "llama")
"""Model types whose packed passes are tested against plain ones."""


def shared_prefix_attention(  # noqa: PLR0913 - transformers' signature
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    spans: Sequence[Span] | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over one packed row, by scaled dot products of the blocks that are not masked.

    Args:
        module: The attention layer that calls.
        query: `[1, heads, T, head size]`.
        key: `[1, key heads, T, head size]`; heads are grouped, not copied.
        value: As `key`.
        attention_mask: Used without `spans` only.
        spans: Where the groups lie in the row.
        scaling: Factor of the scores.
        **kwargs: As transformers passes them.

    Returns:
        `[1, T, heads, head size]`, and no weights.
    """
    if spans is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    unknown = [name for name in ("dropout", "softcap", "sliding_window", "position_bias", "s_aux") if kwargs.get(name)]
    if unknown:
        raise ValueError(f"Shared-prefix attention does not know {', '.join(unknown)}, which this model asks for.")
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast the norms of q and k return float32
    outputs = [part for span in spans for part in _attend_group(query, key, value, span, scaling)]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _attend_group(query: Tensor, key: Tensor, value: Tensor, span: Span, scaling: float | None) -> list[Tensor]:
    grouped = query.shape[1] != key.shape[1]

    def attend(start: int, length: int, keys: Tensor, values: Tensor, **mask: Any) -> Tensor:
        queries = query[:, :, start : start + length]
        return scaled_dot_product_attention(queries, keys, values, scale=scaling, enable_gqa=grouped, **mask)

    prompt = slice(span.start, span.start + span.prompt)
    prompt_keys, prompt_values = key[:, :, prompt], value[:, :, prompt]
    outputs = [attend(span.start, span.prompt, prompt_keys, prompt_values, is_causal=True)]
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


def supports_shared_prefix(model: PreTrainedModel) -> bool:
    """Whether a model is of an architecture that this attention was held to, with full attention in every layer."""
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None) or ()
    full = all(layer == "full_attention" for layer in layers) and getattr(config, "sliding_window", None) is None
    return config.model_type in ARCHITECTURES and full and bool(getattr(model, "_supports_attention_backend", False))


def use_shared_prefix(model: PreTrainedModel) -> None:
    """Let a model attend with shared prefixes where it is given `spans`, and as with SDPA where it is not.

    Raises:
        ValueError: the model is of another architecture, or has layers without full attention.
    """
    if not supports_shared_prefix(model):
        raise ValueError(f"Shared-prefix attention was not made for {type(model).__name__} as it is configured.")
    model.set_attn_implementation(SHARED_PREFIX)


def _mask(*, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """SDPA's mask for padded batches; none for a row without padding, where positions that restart mean `spans`."""
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **kwargs)


AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(SHARED_PREFIX, _mask)
