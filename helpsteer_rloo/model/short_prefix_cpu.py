"""Shared-prefix attention for rows of short sequences on the CPU: a few batched products instead of many small calls.

`shared_prefix_cpu` calls a kernel for each part of a softmax, which computes head by head and range by range. Where
ranges are of a dozen tokens, most of its time goes into that, and into cutting a row up and putting it together. Here
each prompt and each continuation is one range with all of its keys, a continuation's those of its prompt as well: the
gather that pads ranges to one length copies them. The query heads of a key head are stacked, so that a range is one
matrix for each key head, and ranges of about one size are one batch of plain products with a softmax between them.

Further axes, beside those of `helpsteer_rloo.groups`: n ranges of a batch, H heads of the query, K of the keys, L and M
tokens of the longest range and its keys, E head size; R a row's vectors, one a token and head; S slots for them, those
of all batches one after the other.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from helpsteer_rloo.packing import Span, cheapest_runs, check_cover
from helpsteer_rloo.sizes import SHORT

BATCH_COST = 4096
"""What one more batch costs, in pairs of a query and a key."""

ROUNDING = 8
"""Ranges whose lengths are equal when rounded up to a multiple of this stay together."""


def is_short(spans: Sequence[Span]) -> bool:
    """Whether all sequences of a row are short enough for this."""
    return all(span.prompt + max(span.continuations, default=0) <= SHORT for span in spans)


def attend(query: Tensor, key: Tensor, value: Tensor, spans: Sequence[Span], scaling: float | None) -> Tensor:
    """Attention over one packed row, as `shared_prefix_cpu.attend`.

    Args:
        query: `[1, H, T, E]`, in any memory layout.
        key: `[1, K, T, E]`, of the same dtype; neighbouring query heads share a key head.
        value: As `key`.
        spans: Where the groups lie; side by side, over the whole row.
        scaling: Factor of the scores; without it, `E ** -0.5`.

    Returns:
        `[1, H, T, E]`, a view of a contiguous `[T, H, E]`.

    Raises:
        ValueError: the spans do not cover the row.
    """
    check_cover(spans, query.shape[2])
    plan = plan_row(tuple(spans), query.shape[1], key.shape[1])
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast("cpu", enabled=False):  # under which products are computed in half precision
        return _Attend.apply(query, key, value, plan, scaling)


class Batch(NamedTuple):
    """Ranges that are computed at once: their slots among all, and what their queries see.

    `bias`, `[n, 1, L, M]`, is 0 at the keys that a query sees, and -inf at the others.
    """

    queries: slice
    keys: slice
    bias: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """How a row is computed; it depends on its spans and the numbers of heads, so that layers and passes share it.

    Attributes:
        batches: In the order of their slots.
        key_heads: K.
        queries: `[S]`, the vector of each query slot, by range, head and token; padding repeats a range's last token.
        keys: `[S]`, the same of the key slots.
        padding: Query slots that are padding.
        places: `[R]`, the slot of each of the row's queries.
    """

    batches: tuple[Batch, ...]
    key_heads: int
    queries: Tensor
    keys: Tensor
    padding: Tensor
    places: Tensor

    def matrices(self, slots_SE: Tensor, part: slice, batch: Batch) -> Tensor:
        """A batch's part of the slots, `[n·K, …, E]`: of queries those of all heads of a key head, or keys."""
        return slots_SE[part].view(len(batch.bias) * self.key_heads, -1, slots_SE.shape[-1])


class Range(NamedTuple):
    """Tokens that attend to themselves and to a prompt: the first of each, and how many."""

    start: int
    length: int
    prompt_start: int
    prompt: int


@lru_cache(maxsize=8)
def plan_row(spans: tuple[Span, ...], heads: int, key_heads: int) -> Plan:
    """The batches of a row."""
    batches: list[Batch] = []
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    real: list[Tensor] = []
    for ranges in _batches(spans):
        start_n1, length_n1, prompt_start_n1, prompt_n1 = torch.tensor(ranges)[:, :, None].unbind(1)
        own_L = torch.arange(int(length_n1.max()))
        seen_M = torch.arange(int((prompt_n1 + length_n1).max()))
        tokens_nL = start_n1 + torch.minimum(own_L, length_n1 - 1)
        own_nM = start_n1 + torch.minimum(seen_M - prompt_n1, length_n1 - 1)
        keys_nM = torch.where(seen_M < prompt_n1, prompt_start_n1 + seen_M, own_nM)
        last_nL = prompt_n1 + torch.minimum(own_L, length_n1 - 1)
        hidden_nLM = seen_M > last_nL[..., None]
        queries.append(_of_heads(tokens_nL, heads))
        keys.append(_of_heads(keys_nM, key_heads))
        real.append((own_L < length_n1)[:, None].expand(-1, heads, -1).flatten())
        ends = [sum(map(len, parts)) for parts in (queries[:-1], queries, keys[:-1], keys)]
        bias_n1LM = torch.zeros(hidden_nLM.shape).masked_fill_(hidden_nLM, -torch.inf)[:, None]
        batches.append(Batch(slice(*ends[:2]), slice(*ends[2:]), bias_n1LM))
    queries_S, real_S = torch.cat(queries), torch.cat(real)
    slots_R = real_S.nonzero()[:, 0]
    places_R = torch.empty_like(slots_R)
    places_R[queries_S[slots_R]] = slots_R
    padding = (~real_S).nonzero()[:, 0]
    return Plan(tuple(batches), key_heads, queries_S, torch.cat(keys), padding, places_R)


def _batches(spans: Sequence[Span]) -> list[list[Range]]:
    """All ranges of a row in batches, so that calls and padding together cost little."""
    by_size: defaultdict[tuple[int, int], list[Range]] = defaultdict(list)
    for span in spans:
        bounds = [(span.start, span.prompt, 0), *((s, c, span.prompt) for s, c in _continuations(span))]
        for start, length, prompt in bounds:
            if length:
                size = -(-(prompt + length) // ROUNDING), -(-length // ROUNDING)
                by_size[size].append(Range(start, length, span.start, prompt))
    sizes = sorted(by_size, key=lambda size: size[::-1])
    scale = ROUNDING**2
    runs = cheapest_runs([(len(by_size[size]) * scale, *size) for size in sizes], BATCH_COST)
    return [[one for index in run for one in by_size[sizes[index]]] for run in runs]


def _continuations(span: Span) -> list[tuple[int, int]]:
    return list(zip(span.continuation_starts(), span.continuations, strict=True))


def _of_heads(tokens_nL: Tensor, heads: int) -> Tensor:
    """The vectors of some tokens for all heads, by range, head and token."""
    return (tokens_nL[:, None] * heads + torch.arange(heads)[:, None]).flatten()


class _Attend(torch.autograd.Function):
    """out = p v with p = softmax(s q kᵀ + bias).

    With g the gradient for out:  dv = pᵀ g;  z = p · (g vᵀ - Σ p · (g vᵀ));  dq = s z k;  dk = s zᵀ q.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Plan, scaling: float) -> Tensor:
        query_SE = _vectors(query).index_select(0, plan.queries).mul_(scaling)
        key_SE, value_SE = (_vectors(x).index_select(0, plan.keys) for x in (key, value))
        out_SE = torch.empty_like(query_SE)
        weights: list[Tensor] = []
        for batch in plan.batches:
            q, out = (plan.matrices(x, batch.queries, batch) for x in (query_SE, out_SE))
            k, v = (plan.matrices(x, batch.keys, batch) for x in (key_SE, value_SE))
            scores = torch.bmm(q, k.mT)
            scores.view(len(batch.bias), -1, *batch.bias.shape[2:]).add_(batch.bias)
            weights.append(scores.softmax(-1))
            torch.bmm(weights[-1], v, out=out)
        ctx.save_for_backward(query_SE, key_SE, value_SE, *weights)
        ctx.plan, ctx.scaling, ctx.dtype = plan, scaling, query.dtype
        return _heads(out_SE.index_select(0, plan.places), query.shape[1], query.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's decorator hides the names
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        query_SE, key_SE, value_SE, *weights = ctx.saved_tensors
        plan, (grad,) = ctx.plan, grad_outputs
        grad_SE = _vectors(grad).index_select(0, plan.queries).index_fill_(0, plan.padding, 0)
        d_query_SE, d_key_SE, d_value_SE = map(torch.empty_like, (query_SE, key_SE, value_SE))
        for batch, p in zip(plan.batches, weights, strict=True):
            q, g, d_q = (plan.matrices(x, batch.queries, batch) for x in (query_SE, grad_SE, d_query_SE))
            k, v, d_k, d_v = (plan.matrices(x, batch.keys, batch) for x in (key_SE, value_SE, d_key_SE, d_value_SE))
            torch.bmm(p.mT, g, out=d_v)
            z = torch.ops.aten._softmax_backward_data(torch.bmm(g, v.mT), p, -1, p.dtype)
            torch.bmm(z, k, out=d_q)
            torch.bmm(z.mT, q, out=d_k)
        d_query_RE = d_query_SE.index_select(0, plan.places).mul_(ctx.scaling)
        d_key_RE, d_value_RE = (
            x.new_zeros(grad.shape[2] * plan.key_heads, x.shape[-1]).index_add_(0, plan.keys, x)
            for x in (d_key_SE, d_value_SE)
        )
        heads = grad.shape[1], plan.key_heads, plan.key_heads
        gradients = zip((d_query_RE, d_key_RE, d_value_RE), heads, strict=True)
        return *(_heads(x_RE, count, ctx.dtype) for x_RE, count in gradients), None, None


def _vectors(x: Tensor) -> Tensor:
    """`[1, H, T, E]` as `[R, E]`, in the dtype to compute in: float32 at least."""
    return x[0].transpose(0, 1).reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))


def _heads(x_RE: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """`[R, E]` as `[1, heads, T, E]`."""
    return x_RE.to(dtype).view(-1, heads, x_RE.shape[-1]).transpose(0, 1)[None]
