"""Shared-prefix attention on the CPU: no work on masked blocks, merged by their log-sum-exps.

A continuation attends to its prompt and to itself. The two softmaxes are computed apart, so that no prompt is copied
for its continuations, and merged exactly: with outputs `o` and log-sum-exps `l` of the scores,

    lse = logaddexp(l_own, l_other),    out = o_own + sigmoid(l_other - l_own) · (o_other - o_own)

(how FlashAttention merges blocks, Dao et al. 2022, arXiv 2205.14135). The gradients of a block follow from the merged
`out` and `lse` alone, so each block has a backward of its own.

The kernels are those behind `scaled_dot_product_attention` on the CPU, and for large blocks matrix products, where
these are faster (`helpsteer_rloo.model.large_blocks`). The kernels compute the masked half of causal attention up to
512 keys as well, so that longer ranges are cut for them. Half precision is computed in float32: where the processor has
no matrix unit for it, the kernels gain nothing by it in long ranges, lose much in short ones, and sum the gradients of
keys in it.

Further axes, beside those of `helpsteer_rloo.groups`: n ranges of a batch, L tokens of the longest of them, H heads of
the query or, in keys and values, their fewer heads, E head size.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from helpsteer_rloo.model import large_blocks
from helpsteer_rloo.model.kept_attention import kept
from helpsteer_rloo.model.products import onednn_leads
from helpsteer_rloo.packing import Span, cheapest_runs, check_cover

CALL_COST = 8192
"""What one more kernel call costs, in pairs of a query and a key; padding below it is the cheaper choice."""

PIECE = 256
"""Longest range that attends to itself in one piece in a kernel."""
WHOLE = 1024
"""Longest range that does where large blocks are matrix products."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def supported() -> bool:
    """Whether the kernels of this torch group query heads; older ones would read beyond the keys."""
    return tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)


def attend(query: Tensor, key: Tensor, value: Tensor, spans: Sequence[Span], scaling: float | None) -> Tensor:
    """Attention over one packed row: each prompt causal, each continuation to its prompt and causally to itself.

    Args:
        query: `[1, heads, T, E]`, in any memory layout.
        key: `[1, key heads, T, E]`, of the same dtype; neighbouring query heads share a key head.
        value: As `key`.
        spans: Where the groups lie; side by side, over the whole row.
        scaling: Factor of the scores; without it, `E ** -0.5`.

    Returns:
        `[1, heads, T, E]`, a view of a contiguous `[T, heads, E]`.

    Raises:
        ValueError: the spans do not cover the row.
    """
    check_cover(spans, query.shape[2])
    by_products = onednn_leads(query.new_empty(0, dtype=_type_to_compute_in(query)))
    plan = plan_row(tuple(spans), WHOLE if by_products else PIECE)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast("cpu", enabled=False):  # under which products are computed in half precision
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            return _Attend.apply(query, key, value, plan, scale)
        return _forward(query, key, value, plan, scale)[0]


@dataclass(frozen=True, eq=False, slots=True)
class Ranges:
    """Ranges of tokens that go through a kernel as one batch, the shorter ones padded on the right.

    Padding of ranges that attend to themselves needs no mask: no real query sees it, and as a query it is left unread.
    Ranges of one length at even distances are strided views of the row (`gathered` is none); others are gathered.

    Attributes:
        start: First token of the first range.
        stop: One past the last token of the last range.
        step: From the start of one range to that of the next.
        length: Tokens of the longest range, L.
        gathered: `[n·L]`, token of each slot; padding repeats its range's last token.
        real: Slots that are not padding; none if all are real.
        written: Token of each real slot.
        padding: Slots that are padding.
    """

    start: int
    stop: int
    step: int
    length: int
    gathered: Tensor | None = None
    written: Tensor | None = None
    real: Tensor | None = None
    padding: Tensor | None = None

    def take(self, row_THE: Tensor) -> Tensor:
        """The ranges' part of a row, `[n, H, L, E]`; a view where it can be one."""
        if self.gathered is None:
            return row_THE[self.start : self.stop].unfold(0, self.length, self.step).transpose(-1, -2)
        return row_THE.index_select(0, self.gathered).unflatten(0, (-1, self.length)).transpose(1, 2)

    def take_gradient(self, row_THE: Tensor) -> Tensor:
        """As `take`, with zeros in the padding, which then adds nothing to the gradients of real keys."""
        taken = self.take(row_THE)
        if self.padding is not None:
            taken.transpose(1, 2).flatten(0, 1).index_fill_(0, self.padding, 0)
        return taken

    def put(self, row_THE: Tensor, values_nHLE: Tensor) -> None:
        """Write the ranges' part of a row."""
        if self.written is None:
            self.take(row_THE).copy_(values_nHLE)
        else:
            row_THE.index_copy_(0, self.written, self._real(values_nHLE))

    def add(self, row_THE: Tensor, values_nHLE: Tensor) -> None:
        """Add to the ranges' part of a row."""
        if self.written is None:
            self.take(row_THE).add_(values_nHLE)
        else:
            row_THE.index_add_(0, self.written, self._real(values_nHLE))

    def _real(self, values_nHLE: Tensor) -> Tensor:
        slots = values_nHLE.transpose(1, 2).flatten(0, 1)
        return slots if self.real is None else slots.index_select(0, self.real)


class Across(NamedTuple):
    """Queries that see other tokens than their own, and the keys that they see, as one batch.

    `bias`, `[n, 1, 1, L]`, is -inf at the padding of the keys, which would be seen otherwise; none if there is none.
    """

    queries: Ranges
    keys: Ranges
    bias: Tensor | None


@dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """The kernel calls of a row; they depend on its spans only, so that all layers and passes share them.

    Attributes:
        causal: Ranges that attend to themselves; together, all tokens.
        across: Queries, and the keys before them that they all see.
    """

    causal: tuple[Ranges, ...]
    across: tuple[Across, ...]


class Block(NamedTuple):
    """Consecutive queries and consecutive keys: the first of each, and how many."""

    query: int
    queries: int
    key: int
    keys: int


@lru_cache(maxsize=64)
def plan_row(spans: tuple[Span, ...], piece: int) -> Plan:
    """Which calls a row takes; its spans lie side by side, and ranges of up to `piece` tokens are not cut."""
    causal: list[Block] = []
    # A batch writes each token once, so that prompts and pieces stay apart, and pieces with more or fewer keys, which
    # may meet the same queries.
    prompts: list[Block] = []
    pieces: defaultdict[int, list[Block]] = defaultdict(list)
    for span in spans:
        first = span.start + span.prompt
        if span.prompt and span.end > first:
            prompts.append(Block(first, span.end - first, span.start, span.prompt))
        continuations = zip(span.continuation_starts(), span.continuations, strict=True)
        for start, length in [(span.start, span.prompt), *continuations]:
            own, between = split_causal(start, length, piece)
            causal += [Block(*piece, *piece) for piece in own]
            for block in between:
                pieces[block.keys].append(block)
    across = [_across(batch) for blocks in (prompts, *pieces.values()) for batch in batch_blocks(blocks)]
    return Plan(tuple(_ranges([block[:2] for block in batch]) for batch in batch_blocks(causal)), tuple(across))


def split_causal(start: int, length: int, piece: int) -> tuple[list[tuple[int, int]], list[Block]]:
    """Cut a range that attends to itself into pieces that do, and unmasked blocks between them.

    The numbers of keys of the blocks are `piece` times a power of two, so that blocks of several ranges match.

    Returns:
        First token and length of each piece, and the blocks, whose keys end where their queries begin.

    >>> split_causal(0, 9, piece=256)
    ([(0, 9)], [])
    >>> pieces, blocks = split_causal(0, 600, piece=256)
    >>> pieces, [tuple(block) for block in blocks]
    ([(0, 256), (256, 256), (512, 88)], [(512, 88, 0, 512), (256, 256, 0, 256)])
    """
    if length <= piece:
        return ([(start, length)] if length else []), []
    keys = piece
    while 2 * keys < length:
        keys *= 2
    middle, queries = start + keys, length - keys
    left, left_blocks = split_causal(start, keys, piece)
    right, right_blocks = split_causal(middle, queries, piece)
    return left + right, [Block(middle, queries, start, keys), *left_blocks, *right_blocks]


def batch_blocks(blocks: Sequence[Block]) -> list[list[Block]]:
    """Split blocks into batches so that calls and padding together cost least among those in order of size.

    Returns:
        The batches, each in order of position.

    >>> batches = batch_blocks([Block(start, length, start, length) for start, length in ((0, 30), (30, 8), (38, 300))])
    >>> [[block.queries for block in batch] for batch in batches]
    [[30, 8], [300]]
    """
    by_size: defaultdict[tuple[int, int], list[Block]] = defaultdict(list)
    for block in blocks:
        by_size[block.keys, block.queries].append(block)
    sizes = sorted(by_size)
    runs = cheapest_runs([(len(by_size[size]), *size) for size in sizes], CALL_COST)
    return [sorted(block for index in run for block in by_size[sizes[index]]) for run in runs]


def _across(batch: Sequence[Block]) -> Across:
    queries, keys = _ranges([block[:2] for block in batch]), _ranges([block[2:] for block in batch])
    counts_n1 = torch.tensor([[block.keys] for block in batch])
    hidden_nL = torch.arange(keys.length) >= counts_n1
    bias = torch.zeros(hidden_nL.shape).masked_fill_(hidden_nL, -torch.inf)[:, None, None]
    return Across(queries, keys, bias if hidden_nL.any() else None)


def _ranges(batch: Sequence[tuple[int, int]]) -> Ranges:
    starts, lengths = zip(*batch, strict=True)
    longest = max(lengths)
    bounds = starts[0], starts[-1] + lengths[-1]
    steps = {after - before for before, after in pairwise(starts)} or {longest}
    if min(lengths) == longest and len(steps) == 1:
        return Ranges(*bounds, steps.pop(), longest)
    slots_L = torch.arange(longest)
    starts_n1, lengths_n1 = torch.tensor(starts)[:, None], torch.tensor(lengths)[:, None]
    gathered = (starts_n1 + torch.minimum(slots_L, lengths_n1 - 1)).flatten()
    if min(lengths) == longest:
        return Ranges(*bounds, longest, longest, gathered, gathered)
    real_nL = slots_L < lengths_n1
    real, padding = (mask.flatten().nonzero()[:, 0] for mask in (real_nL, ~real_nL))
    return Ranges(*bounds, longest, longest, gathered, gathered[real], real, padding)


class _Attend(torch.autograd.Function):
    """`_forward` with a gradient; the row's output and log-sum-exps are all that it keeps beside its inputs."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Plan, scaling: float) -> Tensor:
        out, lse_TH1 = kept(lambda: _forward(query, key, value, plan, scaling))
        ctx.save_for_backward(query, key, value, out, lse_TH1)
        ctx.plan, ctx.scaling = plan, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's decorator hides the names
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse_TH1 = ctx.saved_tensors
        saved = _Saved(_row(query), _row(key), _row(value), _row(out), lse_TH1)
        with torch.autocast("cpu", enabled=False):
            gradients = _backward(_row(grad_outputs[0]), saved, ctx.plan, ctx.scaling)
        return *(x.transpose(0, 1)[None].to(query.dtype) for x in gradients), None, None


class _Saved(NamedTuple):
    """What the backward of a block needs; `out` and `lse` are those of the whole softmax."""

    query_THE: Tensor
    key_THE: Tensor
    value_THE: Tensor
    out_THE: Tensor
    lse_TH1: Tensor


def _type_to_compute_in(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _row(x: Tensor) -> Tensor:
    """`[1, H, T, E]` as `[T, H, E]`, in the dtype to compute in; the kernels want the last axis dense."""
    row_THE = x[0].transpose(0, 1)
    row_THE = row_THE.to(_type_to_compute_in(x))
    return row_THE if row_THE.stride(-1) == 1 else row_THE.contiguous()


def _forward(query: Tensor, key: Tensor, value: Tensor, plan: Plan, scaling: float) -> tuple[Tensor, Tensor]:
    """The output of `attend`, and the log-sum-exps, `[T, H, 1]`, in float32 or better."""
    query_THE, key_THE, value_THE = _row(query), _row(key), _row(value)
    out_THE = query_THE.new_empty(query_THE.shape)
    lse_TH1 = query_THE.new_empty(*query_THE.shape[:2], 1)
    for own in plan.causal:
        out, lse = _attend_block(_states(own, own, None, (query_THE, key_THE, value_THE), scaling))
        own.put(out_THE, out)
        own.put(lse_TH1, lse[..., None])
    for queries, keys, bias in plan.across:
        out, lse = _attend_block(_states(queries, keys, bias, (query_THE, key_THE, value_THE), scaling))
        so_far, lse_so_far = queries.take(out_THE), queries.take(lse_TH1)
        lse = lse[..., None]
        queries.put(out_THE, torch.lerp(so_far, out, torch.sigmoid(lse - lse_so_far)))
        queries.put(lse_TH1, torch.logaddexp(lse_so_far, lse))
    return out_THE.to(query.dtype).transpose(0, 1)[None], lse_TH1


def _backward(grad_THE: Tensor, saved: _Saved, plan: Plan, scaling: float) -> list[Tensor]:
    """Gradients of query, key and value, each `[T, H, E]`."""
    totals = [torch.empty_like(x) for x in saved[:3]]
    for own in plan.causal:
        out, lse = own.take(saved.out_THE), own.take(saved.lse_TH1)[..., 0]
        states = _states(own, own, None, saved[:3], scaling)
        parts = _block_gradients(states, own.take_gradient(grad_THE), out, lse)
        for total, part in zip(totals, parts, strict=True):
            own.put(total, part)
    for queries, keys, bias in plan.across:
        out, lse = queries.take(saved.out_THE), queries.take(saved.lse_TH1)[..., 0]
        states = _states(queries, keys, bias, saved[:3], scaling)
        parts = _block_gradients(states, queries.take_gradient(grad_THE), out, lse)
        for where, total, part in zip((queries, keys, keys), totals, parts, strict=True):
            where.add(total, part)
    return totals


def _states(
    queries: Ranges, keys: Ranges, bias: Tensor | None, row: tuple[Tensor, Tensor, Tensor], scaling: float
) -> large_blocks.States:
    """A batch of blocks of a row's queries, keys and values; causal if the keys are those of the queries."""
    query_THE, key_THE, value_THE = row
    bias = None if bias is None else bias.to(query_THE.dtype)
    taken = queries.take(query_THE), keys.take(key_THE), keys.take(value_THE)
    return large_blocks.States(*taken, bias, scaling, causal=keys is queries)


def _attend_block(states: large_blocks.States) -> tuple[Tensor, Tensor]:
    """The output `[n, H, L, E]` and the log-sum-exps `[n, H, L]`, by whichever is faster."""
    if large_blocks.gains(states):
        return large_blocks.attend(states)
    return _flash(*states[:3], 0.0, states.causal, attn_mask=states.bias, scale=states.scaling)


def _block_gradients(states: large_blocks.States, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    if large_blocks.gains(states):
        return large_blocks.gradients(states, grad, out, lse)
    return _flash_backward(grad, *states[:3], out, lse, 0.0, states.causal, attn_mask=states.bias, scale=states.scaling)
