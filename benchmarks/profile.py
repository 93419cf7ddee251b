"""Synthetic preference pairs with the lengths of HelpSteer3, deterministic by seed.

What is published and what is assumed stands in `helpsteer_rloo.planning.lengths`. Besides, the responses of further
rows of a prompt vary around those of the first by a log-normal factor of sigma 0.3.

Draws are stratified: a sample of 48 pairs covers the quantiles of every distribution evenly, so that a short benchmark
has the lengths of a long run.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from helpsteer_rloo.planning.lengths import (
    CHOSEN_95,
    CHOSEN_MEDIAN,
    LIMITS,
    Profile,
    longer_quantile,
    prompt_share,
    rows_per_prompt,
    shorter_ratio,
    stratified,
)

__all__ = ["CHOSEN_95", "CHOSEN_MEDIAN", "LIMITS", "Profile"]

_FIRST_WORD = 2
"""Ids 0 and 1 stand for padding and unknown words."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Lengths of one pair in tokens; pairs with the same prompt share a group.

    >>> Pair(group=0, prompt=300, chosen=420, rejected=350).longer
    720
    """

    group: int
    prompt: int
    chosen: int
    rejected: int

    @property
    def longer(self) -> int:
        """Tokens of the longer of the two sequences."""
        return self.prompt + max(self.chosen, self.rejected)


def share_within(tokens: float) -> float:
    """Share of the pairs whose longer sequence has at most so many tokens."""
    low, high = 1e-9, 1 - 1e-9
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if longer_quantile(np.array(middle)) <= tokens else (low, middle)
    return low


def distinct_pairs(count: int, seed: int, max_length: int | None = None, profile: Profile | None = None) -> list[Pair]:
    """Pairs on distinct prompts, in random order.

    Args:
        count: Pairs.
        seed: Of the random numbers.
        max_length: Pairs over it are dropped, as TRL drops them: lengths are drawn from the profile below it.
        profile: What is assumed.
    """
    profile = profile or Profile()
    rng = np.random.default_rng(seed)
    within = share_within(max_length / profile.scale) if max_length else 1.0
    longer = longer_quantile(stratified(rng, count) * within) * profile.scale
    share = prompt_share(rng, count, profile)
    ratio = shorter_ratio(rng, count, profile)
    chosen_first = stratified(rng, count) < profile.chosen_is_longer
    pairs = []
    for index in range(count):
        total = max(int(longer[index]), 3)
        prompt = min(max(int(total * share[index]), 1), total - 1)
        pairs.append(_pair(index, prompt, total - prompt, ratio[index], bool(chosen_first[index])))
    return pairs


def repeated_pairs(count: int, seed: int, max_length: int, profile: Profile | None = None) -> list[Pair]:
    """Pairs whose prompts repeat as in HelpSteer3, 1.6 rows a prompt; the rows of a prompt stand next to each other.

    A further row of a prompt that would be over `max_length` is dropped, as TRL drops it.
    """
    profile = profile or Profile()
    rng = np.random.default_rng(seed)
    firsts = distinct_pairs(count, seed + 1, max_length, profile)
    pairs: list[Pair] = []
    for first, rows in zip(firsts, rows_per_prompt(count, rng), strict=True):
        pairs.append(first)
        for factor in np.exp(rng.normal(0, 0.3, rows - 1)):
            response = max(int(max(first.chosen, first.rejected) * factor), 1)
            ratio = float(np.exp(-abs(rng.normal(0, profile.shorter_sigma))))
            row = _pair(first.group, first.prompt, response, ratio, bool(rng.random() < profile.chosen_is_longer))
            if row.longer <= max_length:
                pairs.append(row)
        if len(pairs) >= count:
            break
    return pairs[:count]


def whole_groups(pairs: Sequence[Pair], size: int) -> list[list[Pair]]:
    """Cut pairs into steps of `size`, every prompt's rows within one step and next to each other.

    Raises:
        ValueError: groups do not fill the steps exactly.
    """
    groups: dict[int, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair.group, []).append(pair)
    steps: list[list[Pair]] = [[] for _ in range(len(pairs) // size)]
    for group in sorted(groups.values(), key=len, reverse=True):
        emptiest = min(steps, key=len)
        emptiest += group
    if any(len(step) != size for step in steps):
        raise ValueError(f"{len(groups)} groups cannot be cut into steps of {size} pairs; use another seed.")
    return steps


def fill(pairs: Iterable[Pair], vocabulary: int, seed: int) -> list[dict[str, Any]]:
    """Rows of token ids, uniform over the words of a vocabulary: `chosen_ids`, `rejected_ids` and `group`."""
    rng = np.random.default_rng(seed)
    prompts: dict[int, list[int]] = {}

    def draw(length: int) -> list[int]:
        return rng.integers(_FIRST_WORD, vocabulary, length).tolist()

    rows = []
    for pair in pairs:
        prompt = prompts.setdefault(pair.group, draw(pair.prompt))
        chosen, rejected = prompt + draw(pair.chosen), prompt + draw(pair.rejected)
        rows.append({"chosen_ids": chosen, "rejected_ids": rejected, "group": pair.group})
    return rows


def prompt_lengths(count: int, mean: int, seed: int) -> list[int]:
    """Lengths of RLOO prompts: log-normal with sigma 0.6, stratified, scaled to the given mean."""
    rng = np.random.default_rng(seed)
    lengths = np.exp(0.6 * stats.norm.ppf(stratified(rng, count)))
    return np.maximum(np.round(lengths * mean / lengths.mean()), 1).astype(int).tolist()


def shifted(pairs: Iterable[Pair], offset: int) -> list[Pair]:
    """The same pairs with other group numbers, to put two samples into one data set."""
    return [replace(pair, group=pair.group + offset) for pair in pairs]


def _pair(group: int, prompt: int, response: int, ratio: float, chosen_is_longer: bool) -> Pair:
    shorter = max(int(response * ratio), 1)
    chosen, rejected = (response, shorter) if chosen_is_longer else (shorter, response)
    return Pair(group, prompt, chosen, rejected)
