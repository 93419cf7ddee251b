"""Decoding with shared prompts: a prompt's keys and values are computed once and never copied to its samples.

Both passes run transformers' own modules. They reach the caches as the keyword `cascade`, which the attention function
of `helpsteer_rloo.model.attention` turns to: `Prefill` while prompts are read, `Decode` while tokens are added.

Tensor axes as in `helpsteer_rloo.groups`. Besides, R are the rows that are decoded together, G their prompts, S a
prompt's places among rows (the most rows that a prompt has), H the key heads, Q the query heads of a key head, E the
head size, and T in a cache its tokens.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.model.attention import shared_prefix_attention
from helpsteer_rloo.packing import PackedRow, Span, cheapest_runs, pack
from helpsteer_rloo.sizes import ROW_TOKENS

BLOCK_COST = 2048
"""What computing some prompts apart from others costs in each step, in tokens of padding."""
OWN_MULTIPLE = 32
"""Keys of a row's own are seen in multiples of this, those behind the last token hidden: oneDNN, which computes half
precision on CPUs, makes a program for every new shape of a product, which takes it longer than some layers."""
FIRST_TOKENS = 128
"""Tokens that a row's own cache has room for at first; it is doubled when it is full."""


class Prefill:
    """Attention over packed prompts, which keeps their keys and values, padded among those of about one length.

    `caches` has for every run of such prompts and every layer the keys `[G, H, E, T]`, lying as the product with
    queries reads them, and the values `[G, H, T, E]`.

    Args:
        lengths: Tokens of every prompt of the batch; `spans` says which of them are in the row at hand.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = lengths
        self.runs = cheapest_runs([(1, length, 1) for length in lengths], BLOCK_COST)
        self.caches: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in self.runs]
        self._places = [(number, place) for number, run in enumerate(self.runs) for place in range(len(run))]
        self._first, self._spans = 0, tuple[Span, ...]()

    def read(self, first: int, spans: tuple[Span, ...]) -> None:
        """Take the next row: prompts `first` and following, lying at `spans`."""
        self._first, self._spans = first, spans

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Attention of every prompt to itself, `[1, T, heads, head size]`."""
        index = cast(int, module.layer_idx)
        for (number, place), span in zip(self._places[self._first :], self._spans, strict=False):
            run, caches = self.runs[number], self.caches[number]
            if index not in caches:
                outer, longest, size = (len(run), key.shape[1]), max(self.lengths[i] for i in run), key.shape[3]
                caches[index] = key.new_zeros(*outer, size, longest), value.new_zeros(*outer, longest, size)
            keys_GHET, values_GHTE = caches[index]
            keys_GHET[place, :, :, : span.prompt] = key[0, :, span.start : span.end].transpose(1, 2)
            values_GHTE[place, :, : span.prompt] = value[0, :, span.start : span.end]
        return shared_prefix_attention(module, query, key, value, None, spans=self._spans, scaling=scaling)[0]


def read_prompts(body: nn.Module, prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Prefill, Tensor]:
    """Compute prompts, side by side and without padding.

    Returns:
        Their keys and values, and the hidden state of every prompt's last token, `[G, D]`.
    """
    groups = [TokenGroup((), tuple(prompt), ()) for prompt in prompts]
    prefill = Prefill([len(prompt) for prompt in prompts])
    hidden: list[Tensor] = []
    for indices in pack(groups, tokens=ROW_TOKENS):
        row = PackedRow(tuple(groups[i] for i in indices))
        prefill.read(indices[0], row.spans)
        ids, positions = torch.tensor([[row.input_ids], [row.position_ids]], device=device)
        last = torch.tensor([span.end - 1 for span in row.spans], device=device)
        output = body(input_ids=ids, position_ids=positions, use_cache=False, cascade=prefill, read=last)
        hidden.append(output.last_hidden_state[0, last])
    return prefill, torch.cat(hidden)


class Decode:
    """Attention of one new token a row to the row's prompt and to the tokens drawn since, in one softmax.

    The rows of a prompt stand next to each other. Their queries meet the prompt's keys in one product, so that these
    are read once a step and not once a row. Prompts of about one length are computed together, as a `_Block`.

    Args:
        prefill: The prompts' keys and values, which are taken over: they leave with the last row that needs them.
        groups: Index of the prompt of each row, ascending; every prompt has one.
        most: Most tokens that a row will add.
    """

    def __init__(self, prefill: Prefill, groups: Sequence[int], most: int) -> None:
        self._own: dict[int, tuple[Tensor, Tensor]] = {}
        self._most = most
        self._step = -1
        counts = Counter(groups)
        self._blocks = [
            _Block(caches, [prefill.lengths[group] for group in run], [counts[group] for group in run])
            for run, caches in zip(prefill.runs, prefill.caches, strict=True)
        ]
        self._lengths_R1 = self._positions()

    def _positions(self) -> Tensor:
        return torch.cat([block.lengths_R1 for block in self._blocks])

    def advance(self) -> Tensor:
        """Go on to the next token; returns its positions `[R, 1]`."""
        self._step += 1
        return self._lengths_R1 + self._step

    def keep(self, rows: Sequence[int]) -> None:
        """Let all rows but these leave, and with them the prompts that have none left."""
        chosen = torch.tensor(rows, device=self._lengths_R1.device)
        for index, caches in self._own.items():
            self._own[index] = cast(Any, tuple(cache.index_select(0, chosen) for cache in caches))
        first = 0
        left: list[_Block] = []
        for block in self._blocks:
            inside = [row - first for row in rows if first <= row < first + block.rows]
            first += block.rows
            if inside:
                left.append(block.keeping(inside))
        self._blocks = left
        self._lengths_R1 = self._positions()

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Add the new token's key and value to the caches, and attend.

        Args:
            module: The attention layer that calls.
            query: `[R, heads, 1, head size]`.
            key: `[R, key heads, 1, head size]`.
            value: As `key`.
            scaling: Factor of the scores; without it, `head size ** -0.5`.

        Returns:
            `[R, 1, heads, head size]`.
        """
        index = cast(int, module.layer_idx)
        rows, heads, _, size = query.shape
        scale = size**-0.5 if scaling is None else scaling
        queries_RHQE = query.reshape(rows, key.shape[1], -1, size) * scale
        counts = [block.rows for block in self._blocks]
        parts = zip(*(x.split(counts) for x in (queries_RHQE, *self._append(index, key, value))), strict=True)
        outputs = [block.attend(index, self._step + 1, *part) for block, part in zip(self._blocks, parts, strict=True)]
        return torch.cat(outputs).reshape(rows, 1, heads, size)

    def _append(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        rows, heads, _, size = key.shape
        if index not in self._own:
            room = min(self._most, FIRST_TOKENS)
            self._own[index] = key.new_zeros(rows, heads, size, room), value.new_zeros(rows, heads, room, size)
        elif self._step == self._own[index][0].shape[3]:
            more = min(self._most, 2 * self._step) - self._step
            keys, values = self._own[index]
            self._own[index] = pad(keys, (0, more)), pad(values, (0, 0, 0, more))
        keys, values = self._own[index]
        keys[..., self._step], values[:, :, self._step] = key[:, :, 0], value[:, :, 0]
        seen = min(-(-(self._step + 1) // OWN_MULTIPLE) * OWN_MULTIPLE, keys.shape[3])
        return keys[..., :seen], values[:, :, :seen]


class _Block:
    """Neighbouring prompts, their keys and values padded to the longest of them, and the rows that stand on them.

    Args:
        caches: For every layer the keys `[G, H, E, T]` and the values `[G, H, T, E]`; taken over.
        lengths: Tokens of each prompt.
        counts: Rows of each prompt, at least one.
    """

    def __init__(self, caches: dict[int, tuple[Tensor, Tensor]], lengths: list[int], counts: list[int]) -> None:
        self._caches, self._lengths, self._counts = caches, lengths, counts
        self.rows = sum(counts)
        device = next(iter(caches.values()))[0].device
        self._shape = groups, places = len(counts), max(counts)
        starts = [sum(counts[:group]) for group in range(groups)]
        # Prompts with fewer rows than others are filled with a row of theirs that stands in again.
        fill = [start + min(place, n - 1) for start, n in zip(starts, counts, strict=True) for place in range(places)]
        slots = [group * places + place for group, n in enumerate(counts) for place in range(n)]
        rectangular = len(slots) == len(fill)
        self._fill = None if rectangular else torch.tensor(fill, device=device)
        self._slots = None if rectangular else torch.tensor(slots, device=device)
        lengths_G = torch.tensor(lengths, device=device)
        self.lengths_R1 = lengths_G.repeat_interleave(torch.tensor(counts, device=device))[:, None]
        self._bias_X1T = self._bias(lengths_G)

    def _bias(self, lengths_G: Tensor) -> Tensor | None:
        """What is added to scores of prompts, `[G·H, 1, T]`: -inf behind a prompt's end; None where all end alike."""
        longest = max(self._lengths)
        if min(self._lengths) == longest:
            return None
        _, values_GHTE = next(iter(self._caches.values()))
        behind_GT = torch.arange(longest, device=lengths_G.device) >= lengths_G[:, None]
        bias_GT = torch.zeros(behind_GT.shape, dtype=values_GHTE.dtype, device=lengths_G.device)
        return bias_GT.masked_fill_(behind_GT, -torch.inf).repeat_interleave(values_GHTE.shape[1], dim=0)[:, None]

    def keeping(self, rows: Sequence[int]) -> "_Block":
        """The same with only these rows and the prompts that they stand on."""
        if len(rows) == self.rows:
            return self
        groups = [group for group, count in enumerate(self._counts) for _ in range(count)]
        counts = Counter(groups[row] for row in rows)
        left = sorted(counts)
        lengths, caches = [self._lengths[group] for group in left], self._caches
        if len(left) < len(self._lengths):
            longest, kept = max(lengths), self.lengths_R1.new_tensor(left)
            for index, (keys, values) in caches.items():  # in place, so that no two layers are held twice
                caches[index] = (
                    keys[..., :longest].index_select(0, kept),
                    values[:, :, :longest].index_select(0, kept),
                )
        return _Block(caches, lengths, [counts[group] for group in left])

    def attend(self, index: int, own: int, queries_RHQE: Tensor, keys_RHET: Tensor, values_RHTE: Tensor) -> Tensor:
        """Attention of scaled queries to prompts and to the first `own` of the rows' own keys, `[R, H, Q, E]`.

        Scores are put together in the order of the prompts, whose are most of them.
        """
        prompt_keys, prompt_values = (cache.flatten(0, 1) for cache in self._caches[index])
        shared = self._by_prompt(queries_RHQE) @ prompt_keys
        if self._bias_X1T is not None:
            shared += self._bias_X1T
        scores_RHQT = queries_RHQE @ keys_RHET
        scores_RHQT[..., own:] = -torch.inf
        weights = torch.cat([shared, self._by_prompt(scores_RHQT)], dim=-1).softmax(-1)
        on_prompt, on_own = weights.split([shared.shape[-1], scores_RHQT.shape[-1]], dim=-1)
        return self._by_row(on_prompt @ prompt_values) + self._by_row(on_own) @ values_RHTE

    def _by_prompt(self, x_RHQX: Tensor) -> Tensor:
        """What belongs to rows, side by side for each prompt, `[G·H, S·Q, X]`."""
        x = x_RHQX if self._fill is None else x_RHQX.index_select(0, self._fill)
        return x.unflatten(0, self._shape).transpose(1, 2).flatten(0, 1).flatten(1, 2)

    def _by_row(self, x: Tensor) -> Tensor:
        """The way back from `_by_prompt`."""
        groups, places = self._shape
        x_RHQX = x.unflatten(0, (groups, -1)).unflatten(2, (places, -1)).transpose(1, 2).flatten(0, 1)
        return x_RHQX if self._slots is None else x_RHQX.index_select(0, self._slots)
