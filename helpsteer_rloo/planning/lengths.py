"""How long preferences are: HelpSteer3's published profile, or what a run has counted in its `data.json`.

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
  8.

Draws are stratified: a small sample covers the quantiles of every distribution evenly.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from helpsteer_rloo.planning.shapes import Work

LIMITS = {1024: 0.408, 2048: 0.165, 3072: 0.058, 4096: 0.010}
"""Share of the pairs whose longer sequence is over so many tokens."""
CHOSEN_MEDIAN, CHOSEN_95 = 768, 3080
ROWS, PROMPTS = 38_459, 24_018
ENGLISH_ROWS, VALIDATION_ROWS, ENGLISH_VALIDATION_ROWS = 22_380, 2_017, 1_176
TIES = 0.057
"""Share of rows without a preference, which are skipped."""

_MEDIAN_LONGER = 812
_LOG_TOKENS = np.log([_MEDIAN_LONGER, *LIMITS])
_SCORES: NDArray[np.float64] = stats.norm.isf([0.5, *LIMITS.values()])
_SLOPES = np.diff(_LOG_TOKENS) / np.diff(_SCORES)
_MOST_ROWS = 8
_SAMPLE = 2000
"""Prompts that means are taken over."""
LONGEST = 2**31
"""Tokens of a text that a report can have."""


@dataclass(frozen=True, slots=True)
class Profile:
    """The assumptions that can be varied, and a factor on all lengths for tiny trial runs."""

    prompt_share: float = 0.45
    concentration: float = 4.0
    shorter_sigma: float = 0.35
    chosen_is_longer: float = 0.6
    scale: float = 1.0


def longer_quantile(probability: NDArray[np.float64]) -> NDArray[np.float64]:
    """Tokens of the longer sequence below which a share of the pairs lies."""
    score = stats.norm.ppf(probability)
    inside = np.interp(score, _SCORES, _LOG_TOKENS)
    below = np.minimum(score - _SCORES[0], 0) * _SLOPES[0]
    above = np.maximum(score - _SCORES[-1], 0) * _SLOPES[-1]
    return np.exp(inside + below + above)


def stratified(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """One uniform number from each of `count` equal parts of (0, 1), in random order."""
    return rng.permutation((np.arange(count) + rng.random(count)) / count)


def prompt_share(rng: np.random.Generator, count: int, profile: Profile) -> NDArray[np.float64]:
    """Share of the longer sequence that is prompt."""
    first = profile.prompt_share * profile.concentration
    return stats.beta.ppf(stratified(rng, count), first, profile.concentration - first)


def shorter_ratio(rng: np.random.Generator, count: int, profile: Profile) -> NDArray[np.float64]:
    """Tokens of the shorter response over those of the longer one."""
    return np.exp(-profile.shorter_sigma * np.abs(stats.norm.ppf(stratified(rng, count))))


def rows_per_prompt(prompts: int, rng: np.random.Generator) -> list[int]:
    """How often each prompt occurs: geometric with HelpSteer3's mean of 1.6."""
    rows = stats.geom.ppf(stratified(rng, prompts), PROMPTS / ROWS)
    return np.clip(rows, 1, _MOST_ROWS).astype(int).tolist()


@dataclass(frozen=True, slots=True)
class Corpus:
    """Preferences as a plan counts them: pairs, what all of them are in packed rows, and the mean prompt of RLOO.

    `prompts` is how many the pairs of training have, `prompt` the tokens of the mean one; `source` says where the
    lengths come from.
    """

    pairs: float
    heldout_pairs: float
    work_a_pair: Work
    prompts: float
    prompt: float
    source: str


def helpsteer3(max_length: int, room: int, *, english: bool) -> Corpus:
    """HelpSteer3 by its profile, cut to a limit as the data stage cuts: first the prompt, then the responses.

    Args:
        max_length: Longest prompt and response together.
        room: Longest prompt that RLOO samples for.
        english: Whether only the English rows are kept.
    """
    rng, profile = np.random.default_rng(0), Profile()
    longer = longer_quantile(stratified(rng, _SAMPLE))
    prompts = longer * prompt_share(rng, _SAMPLE, profile)
    lengths = (prompts, longer - prompts, (longer - prompts) * shorter_ratio(rng, _SAMPLE, profile))
    rows, held = (ENGLISH_ROWS, ENGLISH_VALIDATION_ROWS) if english else (ROWS, VALIDATION_ROWS)
    counts = np.array(rows_per_prompt(_SAMPLE, rng))
    source = f"HelpSteer3's published lengths, {'English' if english else 'all'} rows"
    return _corpus(lengths, counts, ((1 - TIES) * rows, (1 - TIES) * held), (max_length, room), source)


def counted(report: Mapping[str, Any], max_length: int, room: int, source: str) -> Corpus:
    """A data set by the percentiles in the `data.json` of a run.

    It does not say how lengths go together: taken are responses to one prompt of like lengths, whatever the prompt's.

    Raises:
        ValueError: it holds no such counts.
    """
    try:
        splits = report["splits"]
        train, held = splits["train"], splits["validation"]
        rng = np.random.default_rng(0)
        of_prompts, of_responses = stratified(rng, _SAMPLE), stratified(rng, _SAMPLE)
        drawn = {"prompt": of_prompts, "chosen": of_responses, "rejected": of_responses}
        prompt, *both = (_by_percentiles(train["tokens"][part], order) for part, order in drawn.items())
        pairs = float(train["pairs"]), float(held["pairs"])
        rows = _rows_of_mean(max(1.0, train["pairs"] / max(1, train["prompts"])), rng)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{source} holds no counts of tokens ({error!r}); give the data.json of a run.") from None
    return _corpus((prompt, both[0], both[1]), rows, pairs, (max_length, room), source)


def _rows_of_mean(mean: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """Rows of each prompt of the sample: whole numbers beside a mean, so many of each that it comes out."""
    return (mean + stratified(rng, _SAMPLE)).astype(np.int64)


def _by_percentiles(found: Mapping[str, float], probability: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lengths between the percentiles that a report has, and below the median as far below it as above."""
    points = sorted((float(name[1:]) / 100, float(value)) for name, value in found.items())
    if not all(0 <= length <= LONGEST for _, length in points):
        raise ValueError(f"a length is not from 0 to {LONGEST:,} tokens")
    low = max(1.0, 2 * points[0][1] - points[min(1, len(points) - 1)][1])
    return np.interp(probability, [0.0, *(x for x, _ in points)], [low, *(y for _, y in points)])


Lengths = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def _corpus(
    lengths: Lengths, rows: NDArray[np.int64], pairs: tuple[float, float], limits: tuple[int, int], source: str
) -> Corpus:
    prompt, first, second = lengths
    max_length, room = limits
    kept = np.clip(np.minimum(prompt, max_length - np.maximum(first, second)), np.minimum(prompt, 1), None)
    first, second = (np.minimum(part, max_length - kept) for part in (first, second))
    groups = [
        Work.of_group(round(p), [round(length) for length in (a, b)] * int(count))
        for p, a, b, count in zip(kept.tolist(), first.tolist(), second.tolist(), rows.tolist(), strict=True)
    ]
    everything = sum(groups, Work()) * (1 / float(rows.sum()))
    prompts, mean_prompt = pairs[0] / float(rows.mean()), float(np.minimum(prompt, room).mean())
    return Corpus(*pairs, work_a_pair=everything, prompts=prompts, prompt=mean_prompt, source=source)
