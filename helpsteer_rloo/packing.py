"""Packed rows: groups side by side without padding, each prompt once in front of its continuations.

A row is `[prompt 1][c11]…[c1N][prompt 2][c21]…`; positions restart after the prompt, so that every continuation stands
where it would stand alone. `helpsteer_rloo.model.attention` confines attention to match.
"""

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
        """Refuse groups that a causal model cannot continue."""
        for group in self.groups:
            if not group.prompt_ids or not all(group.continuation_ids):
                raise ValueError("A packed group needs at least one token in its prompt and in every continuation.")

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
        """Index in the row of the hidden state that predicts each continuation token; the prompt's last first."""
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


def pack_continuations(groups: Sequence[TokenGroup], budget: int) -> list[list[int]]:
    """Cut a sequence of groups into rows of at most `budget` continuations, in order; a larger group stands alone.

    Returns:
        Indices of the groups in each row.

    >>> groups = [TokenGroup((), (1,), ((2,),) * n) for n in (1, 2, 5, 1, 3)]
    >>> pack_continuations(groups, budget=4)
    [[0, 1], [2], [3, 4]]
    """
    rows: list[list[int]] = []
    used = 0
    for index, group in enumerate(groups):
        size = len(group.continuation_ids)
        if not rows or used + size > budget:
            rows.append([])
            used = 0
        rows[-1].append(index)
        used += size
    return rows
