"""Records of a batch of rollouts, and how its completions become packed rows for training."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.model.rollout import Completion, sequence_seed
from helpsteer_rloo.objectives import penalized_rewards, rloo_advantages
from helpsteer_rloo.packing import PackedRow, pack
from helpsteer_rloo.training.packed import deal


@dataclass(frozen=True)
class Rollout:
    """One local batch of sampled completions, B = P·N of them, those of a prompt next to each other.

    `drawn` is what the sampler says of them, with its log-probabilities; `generate` says nothing.
    """

    prompts: list[Any]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    completions: list[Any]
    ended: list[bool]
    drawn: list[Completion] | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion."""
        return [len(ids) for ids in self.completion_ids]

    def token_places(self, places: Sequence[int]) -> list[int]:
        """Where the tokens of some completions stand among all tokens of the batch, side by side in its order."""
        bounds = [0, *itertools.accumulate(self.lengths)]
        return [token for place in places for token in range(bounds[place], bounds[place + 1])]


@dataclass(frozen=True)
class Scores:
    """What reward sources said of all processes' completions, `[B]`; NaN marks one that nothing could score.

    `unfinished_B` is 1 for a completion that did not end by itself, else 0; `length_B` is its number of tokens.
    """

    by_source_BF: Tensor
    unclipped_B: Tensor
    score_B: Tensor
    unfinished_B: Tensor
    length_B: Tensor

    def of(self, places: Tensor) -> "Scores":
        """Those of some completions."""
        return Scores(**{column.name: getattr(self, column.name)[places] for column in fields(self)})


@dataclass(frozen=True)
class Rewards:
    """Rewards and advantages of all processes' completions, `[B]`, with what they were computed from."""

    scores: Scores
    kl_B: Tensor | None
    reward_B: Tensor
    advantage_B: Tensor


@dataclass(frozen=True)
class AdvantageRule:
    """How rewards and advantages follow from scores: weights of penalties and of KL, group size, normalization."""

    beta: float
    missing_eos_penalty: float
    length_penalty: float
    group_size: int
    normalize: bool

    def rewards(self, scores: Scores, kl_B: Tensor | None) -> Rewards:
        """Reward = score - penalties - beta * KL, then leave-one-out within each prompt."""
        reward_B = penalized_rewards(scores.score_B, self.penalties(scores), kl_B, self.beta)
        advantage_PN = rloo_advantages(reward_B.view(-1, self.group_size), normalize=self.normalize)
        return Rewards(scores, kl_B, reward_B, advantage_PN.flatten())

    def penalties(self, scores: Scores) -> Tensor:
        """What is subtracted from each completion's score, `[B]`."""
        return self.missing_eos_penalty * scores.unfinished_B + self.length_penalty * scores.length_B


@dataclass(frozen=True)
class Unit:
    """Completions of one prompt that are computed together, with their places in the local batch."""

    group: TokenGroup
    places: tuple[int, ...]


@dataclass(frozen=True)
class RolloutRow:
    """A packed row with the places of its completions in the local batch."""

    row: PackedRow
    places: list[int]

    def halves(self) -> list["RolloutRow"]:
        """Two rows with half of its groups each; none if it has one group."""
        groups = self.row.groups
        middle = len(groups) // 2
        cut = sum(len(group.continuation_ids) for group in groups[:middle])
        parts = ((groups[:middle], self.places[:cut]), (groups[middle:], self.places[cut:]))
        return [RolloutRow(PackedRow(own), places) for own, places in parts] if middle else []


@dataclass
class TrainingBatch:
    """A local batch of rollouts on its way through training.

    Log-probabilities, in nats, are those of all completions' tokens side by side, `[T]`: `reference_T` under the
    reference; `old_T` under the policy that sampled, as the trainer computes it; `sampler_T` the same as the sampler
    computed it; `drawn_T` under the distribution that was drawn from, after truncation. The sampler's are None where it
    does not tell. `old_T` is None where the training pass itself yields it, which it does if every completion is
    trained on once; KL, and with it rewards and advantages, are then filled in as the rows pass, and `awaited` counts
    the completions whose micro-batch has not. `kl_coef` is the weight of KL for this batch.
    """

    rollout: Rollout
    scores: Scores
    counted_B: Tensor
    reference_T: Tensor | None
    old_T: Tensor | None
    sampler_T: Tensor | None
    drawn_T: Tensor | None
    advantage_B: Tensor
    kl_B: Tensor | None
    kl_coef: float
    awaited: int

    def known_of(self, row: RolloutRow, log_probs_T: Tensor) -> "KnownTokens":
        """What is known of the tokens of a row, whose log-probabilities are those given if there are no older ones."""
        tokens = torch.tensor(self.rollout.token_places(row.places), device=self.counted_B.device)
        known = (self.reference_T, self.sampler_T, self.drawn_T)
        old_T = log_probs_T if self.old_T is None else self.old_T[tokens]
        return KnownTokens(old_T, *(None if values is None else values[tokens] for values in known))


class KnownTokens(NamedTuple):
    """The log-probabilities of `TrainingBatch` for the tokens of one row, in its order."""

    old_T: Tensor
    reference_T: Tensor | None
    sampler_T: Tensor | None
    drawn_T: Tensor | None


@dataclass(frozen=True)
class TrainingSlice:
    """The rows of one micro-batch; each completion counts `weight` in its loss."""

    batch: TrainingBatch
    rows: list[RolloutRow]
    weight: float


def units_of(rollout: Rollout, group_size: int) -> list[Unit]:
    """Neighbouring completions of the same prompt, at most `group_size` of them together."""
    units: list[Unit] = []
    numbered = zip(itertools.count(), map(tuple, rollout.prompt_ids), map(tuple, rollout.completion_ids), strict=False)
    for prompt_ids, same in itertools.groupby(numbered, key=lambda entry: entry[1]):
        entries = list(same)
        for start in range(0, len(entries), group_size):
            part = entries[start : start + group_size]
            group = TokenGroup((), prompt_ids, tuple(ids for _, _, ids in part))
            units.append(Unit(group, tuple(place for place, _, _ in part)))
    return units


def rows_of(units: Sequence[Unit], tokens: int | None) -> list[RolloutRow]:
    """Pack units, in order, into rows of at most `tokens` tokens; a larger unit stands alone."""
    packed = pack([unit.group for unit in units], tokens=tokens)
    return [
        RolloutRow(PackedRow(tuple(units[i].group for i in row)), [place for i in row for place in units[i].places])
        for row in packed
    ]


def mini_batch_order(count: int, steps: int, seed: int, process: int) -> list[int]:
    """An order for a process's prompts in which each of `steps` equal parts is a random mini-batch.

    Of every `steps` neighbours one goes to each mini-batch, drawn with a seed of their own. So the mini-batches are the
    same however many processes share them; where `count` is no multiple of `steps`, a process shuffles its own prompts.

    Args:
        count: Prompts of the process.
        steps: Mini-batches.
        seed: Of this batch of rollouts, in 63 bits.
        process: Number of the process among those that have as many prompts each.
    """
    size = steps if count % steps == 0 else count
    blocks = range(process * count // size, (process + 1) * count // size)
    drawn = [torch.randperm(size, generator=torch.Generator().manual_seed(sequence_seed(seed, b))) for b in blocks]
    return [number * size + int(block[part]) for part in range(size) for number, block in enumerate(drawn)]


def slices_of(units: Sequence[Unit], steps: int, slices: int, tokens: int | None) -> list[list[list[RolloutRow]]]:
    """Deal units, in order, to optimizer steps, completions evenly, and to the micro-batches of each.

    A unit on the border of two optimizer steps is cut, its prompt computed in both.

    Returns:
        `steps` lists of `slices` lists of rows.
    """
    total = sum(len(unit.places) for unit in units)
    share = total // steps
    hands: list[list[Unit]] = [[] for _ in range(steps)]
    dealt = 0
    for unit in units:
        start = 0
        while start < len(unit.places):
            step = min(dealt // share, steps - 1)
            room = len(unit.places) if step == steps - 1 else (step + 1) * share - dealt
            end = min(len(unit.places), start + room)
            part = TokenGroup((), unit.group.prompt_ids, unit.group.continuation_ids[start:end])
            hands[step].append(Unit(part, unit.places[start:end]))
            dealt += end - start
            start = end
    return [deal(rows_of(hand, tokens), slices) for hand in hands]


def lengths_of(row: PackedRow) -> list[int]:
    """Tokens of each continuation of a row."""
    return [length for span in row.spans for length in span.continuations]


def sums_by_completion(values_T: Tensor, lengths: Sequence[int]) -> Tensor:
    """Sum values `[T]` of completions that stand side by side over each of them; `[B]`.

    >>> sums_by_completion(torch.tensor([1.0, 2.0, 3.0]), [2, 1])
    tensor([3., 3.])
    """
    return torch.stack([part.sum() for part in values_T.split(list(lengths))])
