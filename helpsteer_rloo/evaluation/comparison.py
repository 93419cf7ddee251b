"""Two or more reward models on the same pairs: who is better, how sure that is, and where they disagree."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, cast

import numpy as np
from scipy.stats import binomtest, spearmanr

from helpsteer_rloo.evaluation.preference import Judgement
from helpsteer_rloo.statistics import clustered_mean, proportion

MOST_DISAGREEMENTS = 20


def compare(judged: Mapping[str, Sequence[Judgement]]) -> dict[str, Any]:
    """Every two of several models, by name, on the pairs that all of them judged.

    - difference: accuracy of the second minus that of the first, pair by pair; `sentence` says what that means.
    - mcnemar_p: two-sided exact p-value of McNemar's test, which takes pairs on one prompt for independent.
    - agreement: share of the pairs in which both prefer the same response.
    - rank_correlation: Spearman's, of the margins.
    - disagreements: the pairs on which the two are furthest apart, the one that is right named.

    Raises:
        ValueError: no pair was judged by all, or rows of one number are of different data.
    """
    rows = set.intersection(*({j.preference.row for j in judgements} for judgements in judged.values()))
    if not rows:
        raise ValueError("No pair was judged by all of the reward models; compare them on a data set that fits all.")
    by_row = {name: {j.preference.row: j for j in judgements} for name, judgements in judged.items()}
    if any(len({found[row].prompt for found in by_row.values()}) > 1 for row in rows):
        raise ValueError("The reward models were judged on different pairs; give --dataset_name.")
    common = {name: [found[row] for row in sorted(rows)] for name, found in by_row.items()}
    owners = [j.group for j in next(iter(common.values()))]
    return {
        "pairs": len(rows),
        "left_out": {name: len(judgements) - len(rows) for name, judgements in judged.items()},
        "accuracy": {name: proportion([j.right for j in found], owners).to_json() for name, found in common.items()},
        "agreement": {one: {other: _agreement(common[one], common[other]) for other in common} for one in common},
        "compared": [
            {"first": one, "second": other, "sentence": _sentence(one, other, found["difference"]), **found}
            for one, other in combinations(common, 2)
            for found in [_compared(common[one], common[other], owners)]
        ],
    }


def _sentence(first: str, second: str, difference: Mapping[str, Any]) -> str:
    low, high = difference["interval"]
    shown = f"by {difference['value']:+.1%} of the pairs" + ("" if low is None else f" [{low:+.1%}, {high:+.1%}]")
    if low is None or low <= 0 <= high:
        return f"{second} is not significantly better or worse than {first}: right more often {shown}."
    return f"{second} is {'better' if low > 0 else 'worse'} than {first}: right more often {shown}."


def _compared(one: Sequence[Judgement], other: Sequence[Judgement], owners: Sequence[int]) -> dict[str, Any]:
    changes = [float(b.right) - float(a.right) for a, b in zip(one, other, strict=True)]
    won, lost = changes.count(1.0), changes.count(-1.0)
    return {
        "difference": clustered_mean(changes, owners).to_json(),
        "only_first_right": lost,
        "only_second_right": won,
        "mcnemar_p": float(binomtest(won, won + lost).pvalue) if won + lost else 1.0,
        "agreement": _agreement(one, other),
        "rank_correlation": _rank_correlation([j.margin for j in one], [j.margin for j in other]),
        "disagreements": _disagreements(one, other),
    }


def _agreement(one: Sequence[Judgement], other: Sequence[Judgement]) -> float:
    alike = [np.sign(a.margin) == np.sign(b.margin) for a, b in zip(one, other, strict=True)]
    return float(np.mean(alike))


def _rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    if min(len(set(first)), len(set(second))) < 2:
        return None
    return float(cast(Any, spearmanr(first, second)).statistic)


def _disagreements(one: Sequence[Judgement], other: Sequence[Judgement]) -> list[dict[str, Any]]:
    """The widest first, margins in units of each model's own mean absolute margin."""
    scale_a, scale_b = (sum(abs(j.margin) for j in side) / len(side) or 1.0 for side in (one, other))
    found: list[dict[str, Any]] = [
        {
            "row": a.preference.row,
            "domain": a.preference.domain,
            "prompt": a.prompt,
            "margins": [a.margin, b.margin],
            "right": "first" if a.right else "second",
            "apart": abs(a.margin / scale_a - b.margin / scale_b),
        }
        for a, b in zip(one, other, strict=True)
        if a.right != b.right
    ]
    return sorted(found, key=lambda row: -row["apart"])[:MOST_DISAGREEMENTS]
