"""Decoding with shared prompts: a prompt's keys and values are computed once and never copied to its samples.

Both passes run transformers' own modules. They reach the caches as the keyword `cascade`, which the attention function
of `helpsteer_rloo.model.attention` turns to: `Prefill` while prompts are read, `Decode` while tokens are added.

Tensor axes as in `helpsteer_rloo.groups`. Besides, R are the rows that are decoded together, G their prompts, H the key
heads, Q the query heads of a key head, E the head size, and T in a cache its tokens.
"""

from collections import Counter
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.model.attention import shared_prefix_attention
from helpsteer_rloo.packing import PackedRow, Span, cheapest_runs, pack

ROW_TOKENS = 2048
"""Tokens of prompts that are read in one pass (a longer prompt alone); larger buffers only cost page faults."""
BLOCK_COST = 2048
"""What computing some prompts apart from others costs in each step, in tokens of padding."""
PLACES = 8
"""Most rows of a prompt that are computed together; more of them hold the prompt's keys and values again."""
FIRST_TOKENS = 128
"""New tokens that caches have room for at first; it is doubled when it is full."""

_Caches = dict[int, tuple[Tensor, Tensor]]
"""Keys and values of every layer."""


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
        self.caches: list[_Caches] = [{} for _ in self.runs]
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
    """Attention of one new token a row to the row's prompt and to the tokens drawn since.

    The rows of a prompt stand next to each other and form parties of at most `PLACES`. A party's queries meet the
    prompt's keys and the new keys of all of its rows in one product, in which those of other rows are masked: computing
    them costs less than the operations that would keep them apart. Parties with prompts of about one length are
    computed together, as a `_Block`.

    Args:
        prefill: The prompts' keys and values, which are taken over: they leave with the last row that needs them.
        groups: Index of the prompt of each row, ascending; every prompt has one.
        most: Most tokens that a row will add.
    """

    def __init__(self, prefill: Prefill, groups: Sequence[int], most: int) -> None:
        self._most = most
        self._step = -1
        counts = Counter(groups)
        self._blocks = [
            _block_of([prefill.lengths[group] for group in run], [counts[group] for group in run], caches)
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
        first = 0
        left: list[_Block] = []
        for block in self._blocks:
            inside = [row - first for row in rows if first <= row < first + block.rows]
            first += block.rows
            if inside:
                left.append(block.keeping(inside, self._step + 1))
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
        queries_RHQE = query.reshape(rows, key.shape[1], -1, size)
        counts = [block.rows for block in self._blocks]
        outputs: list[Tensor] = []
        for block, *parts in zip(self._blocks, *(x.split(counts) for x in (queries_RHQE, key, value)), strict=True):
            block.make_room(index, self._step, self._most)
            block.append(index, self._step, *parts[1:])
            outputs.append(block.attend(index, self._step, parts[0], scale))
        return torch.cat(outputs).view(rows, 1, heads, size)


def _block_of(lengths: Sequence[int], counts: Sequence[int], caches: _Caches) -> "_Block":
    """The block of some prompts with so many rows each, cut into parties as equal as can be."""
    parties = [
        (group, share)
        for group, count in enumerate(counts)
        for number in [-(-count // PLACES)]
        for share in [count // number + (place < count % number) for place in range(number)]
    ]
    groups, shares = zip(*parties, strict=True)
    if len(groups) > len(counts):
        for index, (keys, values) in caches.items():
            chosen = torch.tensor(groups, device=keys.device)
            caches[index] = keys.index_select(0, chosen), values.index_select(0, chosen)
    return _Block([lengths[group] for group in groups], shares, caches)


class _Block:
    """Parties of rows side by side, their prompts padded to the longest of them.

    Axes: P parties, S places of a party, L positions: T of the prompt, and then S for every new token.

    Args:
        lengths: Tokens of each party's prompt.
        counts: Rows of each party, at least one.
        caches: For every layer the keys `[P, H, E, L]` and the values `[P, H, L, E]`; taken over.
    """

    def __init__(self, lengths: Sequence[int], counts: Sequence[int], caches: _Caches) -> None:
        self._caches, self._lengths, self._counts = caches, lengths, counts
        self._longest, self._places, self.rows = max(lengths), max(counts), sum(counts)
        self._bias_X_S_L: Tensor | None = None
        device = next(iter(caches.values()))[0].device
        starts = [sum(counts[:party]) for party in range(len(counts))]
        # Parties with fewer rows than others are filled with a row of theirs that stands in again.
        fill = [start + min(p, n - 1) for start, n in zip(starts, counts, strict=True) for p in range(self._places)]
        slots = [party * self._places + place for party, n in enumerate(counts) for place in range(n)]
        rectangular = len(slots) == len(fill)
        self._fill = None if rectangular else torch.tensor(fill, device=device)
        self._slots = None if rectangular else torch.tensor(slots, device=device)
        self.lengths_R1 = torch.tensor(lengths, device=device).repeat_interleave(torch.tensor(counts, device=device))
        self.lengths_R1 = self.lengths_R1[:, None]

    def _end(self, tokens: int) -> int:
        """One past the last position after so many new tokens."""
        return self._longest + self._places * tokens

    def make_room(self, index: int, step: int, most: int) -> None:
        """Let a layer's caches have room for the token of this step."""
        keys, values = self._caches[index]
        if self._end(step + 1) > keys.shape[3]:
            end = self._end(min(most, max(FIRST_TOKENS, 2 * step)))
            longer_keys = keys.new_empty(*keys.shape[:3], end)
            longer_values = values.new_empty(*values.shape[:2], end, values.shape[3])
            longer_keys[..., : keys.shape[3]], longer_values[:, :, : values.shape[2]] = keys, values
            self._caches[index] = longer_keys, longer_values

    def append(self, index: int, step: int, key: Tensor, value: Tensor) -> None:
        """Add the keys and values of this step's tokens, `[R, H, 1, E]`, to a layer's caches."""
        keys_PHEL, values_PHLE = self._caches[index]
        new = slice(self._end(step), self._end(step + 1))
        keys_PHEL[..., new] = self._by_party(key)[:, :, :, 0].transpose(2, 3)
        values_PHLE[:, :, new] = self._by_party(value)[:, :, :, 0]

    def attend(self, index: int, step: int, query: Tensor, scale: float) -> Tensor:
        """Attend in a layer from queries `[R, H, Q, E]`: the same shape."""
        (keys_PHEL, values_PHLE), end = self._caches[index], self._end(step + 1)
        queries_PHSQE = self._by_party(query)
        bias = self._bias(queries_PHSQE, keys_PHEL.shape[3])[..., :end]
        keys, values = keys_PHEL[..., :end].flatten(0, 1), values_PHLE[:, :, :end].flatten(0, 1)
        scores = torch.baddbmm(bias, queries_PHSQE.reshape(len(keys), -1, query.shape[3]), keys, alpha=scale)
        attended = scores.softmax(-1) @ values
        slots = attended.view(queries_PHSQE.shape).transpose(1, 2).flatten(0, 1)
        return slots if self._slots is None else slots.index_select(0, self._slots)

    def _by_party(self, x_RHXE: Tensor) -> Tensor:
        """What belongs to rows, side by side for each party: `[P, H, S, X, E]`."""
        if self._fill is not None:
            x_RHXE = x_RHXE.index_select(0, self._fill)
        return x_RHXE.unflatten(0, (-1, self._places)).transpose(1, 2)

    def _bias(self, queries_PHSQE: Tensor, end: int) -> Tensor:
        """What is added to scores up to a position, `[P·H or 1, S·Q, end]`: -inf at other rows and padding."""
        if self._bias_X_S_L is None or self._bias_X_S_L.shape[2] != end:
            device, heads, each = queries_PHSQE.device, queries_PHSQE.shape[1], queries_PHSQE.shape[3]
            place_S1 = torch.arange(self._places, device=device).repeat_interleave(each)[:, None]
            position_L = torch.arange(end, device=device)
            seen_PSL = (position_L - self._longest).remainder(self._places) == place_S1
            padded = min(self._lengths) < self._longest
            lengths_P11 = torch.tensor(self._lengths if padded else [self._longest], device=device)[:, None, None]
            seen_PSL = torch.where(position_L < self._longest, position_L < lengths_P11, seen_PSL)
            bias_PSL = queries_PHSQE.new_zeros(seen_PSL.shape).masked_fill_(~seen_PSL, -torch.inf)
            self._bias_X_S_L = bias_PSL.repeat_interleave(heads, dim=0) if padded else bias_PSL
        return self._bias_X_S_L

    def keeping(self, rows: Sequence[int], tokens: int) -> "_Block":
        """The same with only these rows and the prompts that they stand on, after so many new tokens."""
        if len(rows) == self.rows:
            return self
        kept: dict[int, list[int]] = {}
        spots = [(party, place) for party, count in enumerate(self._counts) for place in range(count)]
        for party, place in (spots[row] for row in rows):
            kept.setdefault(party, []).append(place)
        lengths, counts = [self._lengths[party] for party in kept], [len(places) for places in kept.values()]
        filled = [[*places, *[places[-1]] * (max(counts) - len(places))] for places in kept.values()]
        for index, (keys, values) in self._caches.items():  # in place, so that no two layers are held twice
            chosen = values.new_tensor(list(kept), dtype=torch.long), values.new_tensor(filled, dtype=torch.long)
            keys_PHEL = self._cut(keys.transpose(2, 3), *chosen, max(lengths), tokens).transpose(2, 3)
            self._caches[index] = keys_PHEL, self._cut(values, *chosen, max(lengths), tokens)
        return _Block(lengths, counts, self._caches)

    def _cut(self, cache_PHLE: Tensor, parties: Tensor, places_PS: Tensor, longest: int, tokens: int) -> Tensor:
        """Some places of some parties, their prompts no longer than the longest."""
        cache_PHLE = cache_PHLE.index_select(0, parties)
        own_PHNSE = cache_PHLE[:, :, self._longest : self._end(tokens)].unflatten(2, (tokens, self._places))
        own_PHNSE = own_PHNSE.take_along_dim(places_PS[:, None, None, :, None], dim=3)
        return torch.cat([cache_PHLE[:, :, :longest], own_PHNSE.flatten(2, 3)], dim=2)
