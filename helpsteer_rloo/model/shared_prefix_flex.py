"""Shared-prefix attention on CUDA: PyTorch's flex attention, which skips the blocks of a row that are masked.

The mask is a function of two tokens' segments, so that nothing of size T·T is kept; flex attention compiles it into its
kernel (Dong et al. 2024, arXiv 2412.05496).
"""

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from helpsteer_rloo.packing import Span

BLOCK = 128
"""Tokens of a block of the mask, in queries and in keys: what flex attention takes by default."""

KERNELS = 64
"""Kinds of calls that may be compiled for, such as with and without gradients, in each dtype, for rows of one block and
of several. Beyond its own limit of 8, PyTorch would go on uncompiled, with the scores of all pairs of tokens in memory.
"""

OPTIONS: Any = {"FORCE_USE_FLEX_ATTENTION": True}
"""Rows under 128 tokens would go to PyTorch's kernel for decoding, which has blocks of at most 128 queries, counting
those of all heads that share a key head, and ends with `NoValidChoicesError` where a row has more."""


def attend(query: Tensor, key: Tensor, value: Tensor, spans: Sequence[Span], scaling: float | None) -> Tensor:
    """Attention over one packed row: each prompt causal, each continuation to its prompt and causally to itself.

    Args:
        query: `[1, heads, T, head size]`.
        key: `[1, key heads, T, head size]`, of the same dtype; neighbouring query heads share a key head.
        value: As `key`.
        spans: Where the groups lie; side by side, over the whole row.
        scaling: Factor of the scores; without it, `head size ** -0.5`.

    Returns:
        `[1, heads, T, head size]`.
    """
    attention = compiled() if query.is_cuda else flex_attention
    mask = row_mask(tuple(spans), query.device)
    grouped = query.shape[1] != key.shape[1]
    with torch.autocast(query.device.type, enabled=False):  # of one dtype in any case, and one kind of call less
        return attention(query, key, value, block_mask=mask, scale=scaling, enable_gqa=grouped, kernel_options=OPTIONS)


@lru_cache(maxsize=16)
def row_mask(spans: tuple[Span, ...], device: torch.device) -> BlockMask:
    """Which blocks of a row are masked, for all of its layers; the same in every head."""
    with torch.inference_mode(False):  # a pass with gradients may find what one without them has built
        total, visible = spans[-1].end, mask_function(spans, device)
        seen = _seen_in_blocks(visible, total, device)
        partial, full = ((seen > 0) & (seen < BLOCK * BLOCK))[None, None], (seen == BLOCK * BLOCK)[None, None]
        return BlockMask.from_kv_blocks(
            *_in_order(partial), *_in_order(full), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(total, total)
        )


def _seen_in_blocks(visible: Any, total: int, device: torch.device) -> Tensor:
    """How many pairs of a query and a key are visible in each block, `[blocks of queries, blocks of keys]`.

    PyTorch's own function does that for all queries at a time, for which it needs ten bytes a pair.
    """
    blocks = -(-total // BLOCK)
    key_T = torch.arange(blocks * BLOCK, device=device)
    real_T, token_T = key_T < total, key_T.clamp(max=total - 1)
    none = torch.zeros((), dtype=torch.long, device=device)
    counts: list[Tensor] = []
    for queries in range(0, blocks * BLOCK, BLOCK):
        own = slice(queries, queries + BLOCK)
        pairs = visible(none, none, token_T[own, None], token_T) & real_T[own, None] & real_T
        counts.append(pairs.view(BLOCK, blocks, BLOCK).sum((0, 2)))
    return torch.stack(counts)


def _in_order(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys are chosen for each block of queries, and all blocks of keys, the chosen ones first."""
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1).int(), order.int().contiguous()


def mask_function(spans: Sequence[Span], device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """`dense_mask` as a function of batch, head, query and key, in the form that flex attention takes."""
    group_T, continuation_T = segments(spans).to(device)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = continuation_T[query] == continuation_T[key]
        return (query >= key) & (group_T[query] == group_T[key]) & (own | (continuation_T[key] == 0))

    return visible


def segments(spans: Sequence[Span]) -> Tensor:
    """Group of each token, and its continuation in the group, from 1, with 0 for the prompt; `[2, T]`.

    >>> segments([Span(0, 2, (1, 2)), Span(5, 1, ())]).tolist()
    [[0, 0, 0, 0, 0, 1], [0, 0, 1, 2, 2, 0]]
    """
    lengths = [length for span in spans for length in (span.prompt, *span.continuations)]
    groups = [group for group, span in enumerate(spans) for _ in range(1 + len(span.continuations))]
    continuations = [index for span in spans for index in range(1 + len(span.continuations))]
    return torch.tensor([groups, continuations]).repeat_interleave(torch.tensor(lengths), dim=1)


def compiled(backend: str = "inductor") -> Any:
    """Flex attention as a kernel, compiled anew for every kind of call, and a second and third time as lengths vary.

    How often is a setting of each thread's own, and a backward pass that computes a layer again is in another one.
    """
    torch.compiler.config.recompile_limit = max(KERNELS, torch.compiler.config.recompile_limit)
    return _compiled(backend)


@cache
def _compiled(backend: str) -> Any:
    return torch.compile(flex_attention, backend=backend)
