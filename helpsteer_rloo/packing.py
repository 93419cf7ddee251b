"""Packed rows: groups side by side without padding, each prompt once in front of its continuations.

A row is `[prompt 1][c11]…[c1N][prompt 2][c21]…`; positions restart after the prompt, so that every continuation stands
where it would stand alone. `helpsteer_rloo.model.attention` confines attention to match.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from helpsteer_rloo.groups import TokenGroup


@dataclass(frozen=True, slots=True)
class Span:
    """Where one group lies in a packed row: its first token, and the lengths of its prompt and continuations.

    >>> Span(start=0, prompt=3, continuations=(2, 1)).end
    6
    """

    start: int
    prompt: int
    continuations: tuple[int, ...]

    @property
    def end(self) -> int:
        """One past the group's last token."""
        return self.start + self.prompt + sum(self.continuations)

    def continuation_starts(self) -> list[int]:
        """First position of each continuation in the row."""
        starts, position = [], self.start + self.prompt
        for length in self.continuations:
            starts.append(position)
            position += length
        return starts


def check_cover(spans: Sequence[Span], tokens: int) -> None:
    """Check that groups lie side by side over a whole row.

    Raises:
        ValueError: they leave tokens of it out, or go beyond it.
    """
    ends = [0, *(span.end for span in spans)]
    if ends[-1] != tokens or any(span.start != end for span, end in zip(spans, ends, strict=False)):
        raise ValueError(f"Spans that lie side by side cover a row of {tokens} tokens; these do not: {spans}.")


@dataclass(frozen=True)
class PackedRow:
    """Groups in one row of T tokens, with the indices that heads need.

    >>> row = PackedRow((TokenGroup((), (7, 8), ((1, 2), (3,))),))
    >>> row.input_ids, row.position_ids
    ([7, 8, 1, 2, 3], [0, 1, 2, 3, 2])
    >>> row.last_positions, row.predicting_positions, row.predicted_ids
    ([3, 4], [1, 2, 1], [1, 2, 3])
    """

    groups: tuple[TokenGroup, ...]

    def __post_init__(self) -> None:
        """Refuse continuations without a token, which have neither a score nor a probability."""
        if not all(ids for group in self.groups for ids in group.continuation_ids):
            raise ValueError("Every continuation of a packed group needs at least one token.")

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """Where each group lies."""
        spans: list[Span] = []
        for group in self.groups:
            start = spans[-1].end if spans else 0
            spans.append(Span(start, len(group.prompt_ids), tuple(map(len, group.continuation_ids))))
        return tuple(spans)

    @cached_property
    def input_ids(self) -> list[int]:
        """The T ids of the row."""
        parts = [part for group in self.groups for part in (group.prompt_ids, *group.continuation_ids)]
        return [token for part in parts for token in part]

    @cached_property
    def position_ids(self) -> list[int]:
        """The T positions: a continuation goes on where its prompt ended."""
        positions: list[int] = []
        for span in self.spans:
            positions += range(span.prompt)
            for length in span.continuations:
                positions += range(span.prompt, span.prompt + length)
        return positions

    @cached_property
    def last_positions(self) -> list[int]:
        """Index in the row of the last token of each continuation, group by group."""
        return [
            start + length - 1
            for span in self.spans
            for start, length in zip(span.continuation_starts(), span.continuations, strict=True)
        ]

    @cached_property
    def predicting_positions(self) -> list[int]:
        """Index in the row of the hidden state that predicts each continuation token; the prompt's last first.

        Raises:
            ValueError: a group has no prompt, so nothing predicts the first token of its continuations.
        """
        if not all(span.prompt for span in self.spans):
            raise ValueError("A group without a prompt has nothing that predicts its continuations' first tokens.")
        indices: list[int] = []
        for span in self.spans:
            for start, length in zip(span.continuation_starts(), span.continuations, strict=True):
                indices += [span.start + span.prompt - 1, *range(start, start + length - 1)]
        return indices

    @cached_property
    def predicted_ids(self) -> list[int]:
        """The continuation tokens, in the order of `predicting_positions`."""
        return [token for group in self.groups for ids in group.continuation_ids for token in ids]


def split_group(group: TokenGroup, most: int) -> list[TokenGroup]:
    """Cut a group into groups on the same prompt with at most `most` continuations each, without preferences."""
    starts = range(0, len(group.continuation_ids), most)
    return [TokenGroup(group.prompt, group.prompt_ids, group.continuation_ids[i : i + most]) for i in starts]


def token_count(group: TokenGroup) -> int:
    """Tokens of a group in a packed row: its prompt once, and its continuations."""
    return len(group.prompt_ids) + sum(map(len, group.continuation_ids))


def pack(
    groups: Sequence[TokenGroup], *, continuations: int | None = None, tokens: int | None = None
) -> list[list[int]]:
    """Cut a sequence of groups into rows, in order; a group that is over a budget by itself stands alone.

    Args:
        groups: To be packed; none is split.
        continuations: Most continuations in a row; no limit if None.
        tokens: Most tokens in a row, counted by `token_count`; no limit if None.

    Returns:
        Indices of the groups in each row.

    >>> groups = [TokenGroup((), (1,), ((2,),) * n) for n in (1, 2, 5, 1, 3)]
    >>> pack(groups, continuations=4)
    [[0, 1], [2], [3, 4]]
    >>> pack(groups, tokens=5)
    [[0, 1], [2], [3], [4]]
    """
    rows: list[list[int]] = []
    used = (0, 0)
    limits = (continuations or math.inf, tokens or math.inf)
    for index, group in enumerate(groups):
        size = (len(group.continuation_ids), token_count(group))
        if not rows or any(have + more > limit for have, more, limit in zip(used, size, limits, strict=True)):
            rows.append([])
            used = (0, 0)
        rows[-1].append(index)
        used = (used[0] + size[0], used[1] + size[1])
    return rows


def cheapest_runs(sizes: Sequence[tuple[int, int, int]], run_cost: int) -> list[range]:
    """Cut a sequence into runs whose members are padded to the largest of their run, where that costs least.

    Args:
        sizes: Of each element the number of members, and two lengths; a run costs its members times its two greatest
            lengths.
        run_cost: What a run costs besides.

    Returns:
        Indices of the elements of each run, in order.

    >>> cheapest_runs([(1, 900, 1), (1, 850, 1), (3, 100, 1)], run_cost=50)
    [range(0, 2), range(2, 3)]
    """
    best = [(0, 0)]  # of the first elements: their least cost, and where their last run begins
    for stop in range(1, len(sizes) + 1):
        members = width = height = 0
        options: list[tuple[int, int]] = []
        for first in reversed(range(stop)):
            more, *lengths = sizes[first]
            members, width, height = members + more, max(width, lengths[0]), max(height, lengths[1])
            options.append((best[first][0] + run_cost + members * width * height, first))
        best.append(min(options))
    runs: list[range] = []
    stop = len(sizes)
    while stop:
        runs.append(range(best[stop][1], stop))
        stop = best[stop][1]
    return runs[::-1]


def group_sequences(sequences: Sequence[tuple[int, ...]]) -> TokenGroup:
    """Sequences that begin alike as one group: their longest common prefix is the prompt.

    In a causal model a shared prefix has the same hidden states whatever follows, so nothing depends on where the text
    of the prompt ended. Every continuation keeps at least one token.

    >>> group = group_sequences([(7, 8, 1, 2), (7, 8, 1, 3), (7, 8)])
    >>> group.prompt_ids, group.continuation_ids
    ((7,), ((8, 1, 2), (8, 1, 3), (8,)))
    """
    first, last = min(sequences), max(sequences)  # in lexical order: those between begin as both do
    differ = (place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
    shared = min(next(differ, len(first)), min(map(len, sequences)) - 1)
    return TokenGroup((), sequences[0][:shared], tuple(sequence[shared:] for sequence in sequences))
