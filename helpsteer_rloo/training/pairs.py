"""Preference pairs in packed rows: pairs on the same prompt share it, and responses that they share."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Sampler

from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.packing import PackedRow, group_sequences, pack, token_count


@dataclass(frozen=True, slots=True)
class Pair:
    """A preference as token ids, prompt and response together; pairs with the same `group` share their prompt.

    `margin` is by how much the chosen one ought to score higher, `weight` how much the pair counts.
    """

    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    margin: float | None = None
    group: int | None = None
    weight: float | None = None


@dataclass(frozen=True)
class PairRow:
    """A packed row with its pairs: their `places` in the batch, and those of their two among the row's continuations.

    `bundles` are what it was made of, one a group; `pair_tokens` counts the tokens of the pairs' sequences one by one,
    what is shared as often as it stands in one.
    """

    row: PackedRow
    bundles: tuple["_Bundle", ...]
    places: list[int]
    chosen: list[int]
    rejected: list[int]
    margins: list[float] | None
    weights: list[float] | None
    pair_tokens: int

    def halves(self) -> list["PairRow"]:
        """Two rows with half of its groups each; none if it has one group."""
        groups, middle = self.row.groups, len(self.row.groups) // 2
        cuts = (slice(middle), slice(middle, None)) if middle else ()
        return [_pair_row(self.bundles[cut], groups[cut]) for cut in cuts]


@dataclass(frozen=True)
class PairBatch:
    """The rows of one micro-batch; each pair counts `weight` in its loss."""

    rows: list[PairRow]
    weight: float


def collate_pairs(examples: Sequence[Mapping[str, Any]]) -> dict[str, list[Pair]]:
    """A batch of rows with `chosen_ids`, `rejected_ids` and, if there are any, `margin`, `group` and `weight`."""
    return {
        "pairs": [
            Pair(tuple(row["chosen_ids"]), tuple(row["rejected_ids"]), *map(row.get, ("margin", "group", "weight")))
            for row in examples
        ]
    }


@dataclass(frozen=True)
class _Bundle:
    """Pairs on one prompt, as their distinct sequences and the places of each pair's two."""

    sequences: dict[tuple[int, ...], int]
    pairs: list[Pair]
    places: list[int]

    def joined_by(self, pair: Pair, place: int) -> "_Bundle":
        sequences = dict.fromkeys([*self.sequences, pair.chosen, pair.rejected])
        numbered = {sequence: number for number, sequence in enumerate(sequences)}
        return _Bundle(numbered, [*self.pairs, pair], [*self.places, place])

    def group(self) -> TokenGroup:
        return group_sequences(list(self.sequences))


def pack_pairs(pairs: Sequence[Pair], tokens: int | None) -> list[PairRow]:
    """Pack pairs into rows of at most `tokens` tokens; pairs on one prompt that are more go into several rows.

    Raises:
        ValueError: some of the pairs have a margin, or a weight, and others none.
    """
    for name in ("margin", "weight"):
        if len({getattr(pair, name) is None for pair in pairs}) > 1:
            raise ValueError(f"Some pairs of a batch have a `{name}` and others none; give every pair one, or no pair.")
    by_prompt: dict[object, list[tuple[int, Pair]]] = {}
    for place, pair in enumerate(pairs):
        by_prompt.setdefault(("alone", place) if pair.group is None else pair.group, []).append((place, pair))
    bundles = [bundle for same in by_prompt.values() for bundle in _bundles(same, tokens)]
    groups = [bundle.group() for bundle in bundles]
    rows = pack(groups, tokens=tokens)
    return [_pair_row([bundles[i] for i in row], [groups[i] for i in row]) for row in rows]


def _bundles(pairs: Sequence[tuple[int, Pair]], tokens: int | None) -> Iterator[_Bundle]:
    """The pairs of one prompt together; once they are over the budget, a new bundle begins."""
    bundle = _Bundle({}, [], [])
    for place, pair in pairs:
        larger = bundle.joined_by(pair, place)
        if bundle.pairs and tokens is not None and token_count(larger.group()) > tokens:
            yield bundle
            larger = _Bundle({}, [], []).joined_by(pair, place)
        bundle = larger
    yield bundle


def _pair_row(bundles: Sequence[_Bundle], groups: Sequence[TokenGroup]) -> PairRow:
    chosen: list[int] = []
    rejected: list[int] = []
    start = 0
    for bundle in bundles:
        chosen += [start + bundle.sequences[pair.chosen] for pair in bundle.pairs]
        rejected += [start + bundle.sequences[pair.rejected] for pair in bundle.pairs]
        start += len(bundle.sequences)
    pairs = [pair for bundle in bundles for pair in bundle.pairs]
    places = [place for bundle in bundles for place in bundle.places]
    margins = [pair.margin for pair in pairs if pair.margin is not None]
    weights = [pair.weight for pair in pairs if pair.weight is not None]
    tokens = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    row = PackedRow(tuple(groups))
    return PairRow(row, tuple(bundles), places, chosen, rejected, margins or None, weights or None, tokens)


@dataclass(frozen=True)
class StepShape:
    """How an optimizer step takes pairs: `processes` in turn are handed a batch of `batch_size`, `batches` times."""

    batch_size: int
    batches: int = 1
    processes: int = 1

    @property
    def pairs(self) -> int:
        """In a whole step, on all processes."""
        return self.batch_size * self.batches * self.processes

    def new_in_turn(self, batches: Sequence[Sequence[Pair]], process: int, left: int) -> list[Pair]:
        """A process's pairs of a step that begins when `left` pairs of the epoch have not been handed out yet.

        At the end of an epoch accelerate fills up the last batches of all processes with pairs from its beginning.

        >>> StepShape(2, 1, processes=2).new_in_turn([["third", "again"]], process=1, left=3)
        ['third']
        """
        starts = [(number * self.processes + process) * self.batch_size for number in range(len(batches))]
        return [pair for start, batch in zip(starts, batches, strict=True) for pair in batch[: max(0, left - start)]]


class GroupSampler(Sampler[int]):
    """Random order of pairs in which those on one prompt stay together, as whole prompts in every batch if possible.

    Which pairs are in a step depends on their number alone, not on how many processes share them out.
    """

    def __init__(self, groups: Sequence[int], step: StepShape, seed: int) -> None:
        """`groups[i]` is the prompt of pair i; every epoch has an order of its own."""
        members: dict[int, list[int]] = {}
        for index, group in enumerate(groups):
            members.setdefault(group, []).append(index)
        self._groups, self._members = groups, list(members.values())
        self._step, self._seed, self._epoch = step, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is iterated."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        order = torch.randperm(len(self._members), generator=generator).tolist()
        coming = fill_batches([self._members[i] for i in order], self._step.pairs)
        while step := list(itertools.islice(coming, self._step.pairs)):
            yield from self._in_turn(step) if len(step) == self._step.pairs else step

    def _in_turn(self, step: Sequence[int]) -> Iterator[int]:
        """The pairs of a whole step, so that each process is handed whole prompts."""
        shape = self._step
        prompts = [list(same) for _, same in itertools.groupby(step, key=lambda index: self._groups[index])]
        dealt = list(fill_batches(prompts, shape.batch_size * shape.batches))
        for number, process in itertools.product(range(shape.batches), range(shape.processes)):
            start = (process * shape.batches + number) * shape.batch_size
            yield from dealt[start : start + shape.batch_size]


def fill_batches(groups: Sequence[Sequence[int]], batch_size: int) -> Iterator[int]:
    """Order the members of groups so that consecutive batches hold whole groups, as far as their sizes allow.

    A group that does not fit into what is left of a batch waits for the next; when none of the waiting ones fits and
    nothing else is left, one is cut.

    >>> list(fill_batches([[1, 2, 3], [4, 5], [6], [7, 8]], batch_size=4))
    [1, 2, 3, 6, 4, 5, 7, 8]
    """
    coming = iter([list(group[i : i + batch_size]) for group in groups for i in range(0, len(group), batch_size)])
    waiting: list[list[int]] = []
    room = batch_size
    while True:
        group = next((group for group in waiting if len(group) <= room), None)
        if group is not None:
            waiting.remove(group)
        else:
            group = next(coming, None)
        if group is None:
            if not waiting:
                return
            first = waiting.pop(0)
            group, rest = first[:room], first[room:]
            waiting.insert(0, rest)
        elif len(group) > room:
            waiting.append(group)
            continue
        yield from group
        room = room - len(group) or batch_size
