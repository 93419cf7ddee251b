"""Synthetic preference pairs with the lengths of HelpSteer3, deterministic by seed.

Published about HelpSteer3 (`nvidia/HelpSteer3`, Qwen2.5 tokenizer): the chosen conversation has a median of 768 tokens
and a 95th percentile of about 3,080; the longer sequence of a pair is over 1,024 / 2,048 / 3,072 / 4,096 tokens in
40.8 / 16.5 / 5.8 / 1.0 % of the pairs; 38,459 rows have 24,018 distinct prompts.

Assumed, since nothing is published about it:

- The longer sequence of a pair is log-linear in the normal score between those four quantiles and a median of 812.
- The prompt (system, earlier turns, last question) takes a share of the longer sequence that is Beta-distributed with a
  mean of 45 %, from short questions to long multi-turn contexts; responses then have a median of about 350 tokens.
- The shorter response has exp(-|N(0, 0.35)|) of the tokens of the longer one (median 79 %), and the chosen response
  is the longer one in 60 % of the pairs.
- Rows a prompt are geometric with a mean of 1.6 (62 % of the prompts occur once, 23 % twice, 9 % three times), at most
  8; the responses of further rows vary around those of the first by a log-normal factor of sigma 0.3.

Draws are stratified: a sample of 48 pairs covers the quantiles of every distribution evenly, so that a short benchmark
has the lengths of a long run.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LIMITS = {1024: 0.408, 2048: 0.165, 3072: 0.058, 4096: 0.010}
"""Share of the pairs whose longer sequence is over so many tokens."""
CHOSEN_MEDIAN, CHOSEN_95 = 768, 3080
ROWS, PROMPTS = 38_459, 24_018

_MEDIAN_LONGER = 812
_LOG_TOKENS = np.log([_MEDIAN_LONGER, *LIMITS])
_SCORES = stats.norm.isf([0.5, *LIMITS.values()])
_SLOPES = np.diff(_LOG_TOKENS) / np.diff(_SCORES)
_MOST_ROWS = 8
_FIRST_WORD = 2
"""Ids 0 and 1 stand for padding and unknown words."""


@dataclass(frozen=True, slots=True)
class Profile:
    """The assumptions that can be varied, and a factor on all lengths for tiny trial runs."""

    prompt_share: float = 0.45
    concentration: float = 4.0
    shorter_sigma: float = 0.35
    chosen_is_longer: float = 0.6
    scale: float = 1.0


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


def longer_quantile(probability: NDArray[np.float64]) -> NDArray[np.float64]:
    """Tokens of the longer sequence below which a share of the pairs lies."""
    score = stats.norm.ppf(probability)
    inside = np.interp(score, _SCORES, _LOG_TOKENS)
    below = np.minimum(score - _SCORES[0], 0) * _SLOPES[0]
    above = np.maximum(score - _SCORES[-1], 0) * _SLOPES[-1]
    return np.exp(inside + below + above)


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
    longer = longer_quantile(_stratified(rng, count) * within) * profile.scale
    share = _prompt_share(rng, count, profile)
    ratio = _shorter_ratio(rng, count, profile)
    chosen_first = _stratified(rng, count) < profile.chosen_is_longer
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


def rows_per_prompt(prompts: int, rng: np.random.Generator) -> list[int]:
    """How often each prompt occurs: geometric with HelpSteer3's mean of 1.6."""
    rows = stats.geom.ppf(_stratified(rng, prompts), PROMPTS / ROWS)
    return np.clip(rows, 1, _MOST_ROWS).astype(int).tolist()


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
    lengths = np.exp(0.6 * stats.norm.ppf(_stratified(rng, count)))
    return np.maximum(np.round(lengths * mean / lengths.mean()), 1).astype(int).tolist()


def shifted(pairs: Iterable[Pair], offset: int) -> list[Pair]:
    """The same pairs with other group numbers, to put two samples into one data set."""
    return [replace(pair, group=pair.group + offset) for pair in pairs]


def _stratified(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """One uniform number from each of `count` equal parts of (0, 1), in random order."""
    return rng.permutation((np.arange(count) + rng.random(count)) / count)


def _prompt_share(rng: np.random.Generator, count: int, profile: Profile) -> NDArray[np.float64]:
    first = profile.prompt_share * profile.concentration
    return stats.beta.ppf(_stratified(rng, count), first, profile.concentration - first)


def _shorter_ratio(rng: np.random.Generator, count: int, profile: Profile) -> NDArray[np.float64]:
    return np.exp(-profile.shorter_sigma * np.abs(stats.norm.ppf(_stratified(rng, count))))


def _pair(group: int, prompt: int, response: int, ratio: float, chosen_is_longer: bool) -> Pair:
    shorter = max(int(response * ratio), 1)
    chosen, rejected = (response, shorter) if chosen_is_longer else (shorter, response)
    return Pair(group, prompt, chosen, rejected)
