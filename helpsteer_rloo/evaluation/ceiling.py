"""The highest accuracy that labels allow: what is wrong in them, no reward model can get right."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from scipy.special import expit, ndtr

from helpsteer_rloo.groups import Preference
from helpsteer_rloo.statistics import Weights, bootstrap, proportion, weighted_mean

MOST_CERTAIN = 0.2
"""Share of the pairs, those with the widest margins, on which a reward model ought to be right."""


def label_ceiling(preferences: Sequence[Preference], clusters: Sequence[Hashable]) -> dict[str, Any] | None:
    """What the agreement of a data set's annotators says about its labels; none if too few rows have two of them.

    - annotator_agreement: share of single annotators on the side of the label, those without a side left out. It
      flatters the labels, which were made from these very annotators.
    - contradicted: share of labels against the mean of their annotators. It should be 0: more is damage to the labels.
    - accuracy: of a judge that always names the truly better response, by a random-effects model (Searle, Casella &
      McCulloch 1992, chapter 3): the annotators of pair i report d_i + noise, d_i ~ N(0, tau²), noise ~ N(0, sigma²).
      With the mean x of m annotators, d_i given x is normal with mean k x and variance tau² (1 - k), k = tau² / (tau² +
      sigma² / m), which gives the probability that the label's side is that of d_i. It is too high where annotators
      share a mistake, or where those who disagreed were left out of the data, as in HelpSteer3.
    """
    kept = [(p, c) for p, c in zip(preferences, clusters, strict=True) if len(p.annotators) > 1]
    if len(kept) < 2:
        return None
    owners = [cluster for _, cluster in kept]
    sides = [(float(score > 0), c) for p, c in kept for score in p.annotators if score != 0]
    means_n = np.array([float(np.mean(p.annotators)) for p, _ in kept])
    counts_n = np.array([len(p.annotators) for p, _ in kept], dtype=float)
    noise_n = np.array([float(np.var(p.annotators, ddof=1)) for p, _ in kept])
    return {
        "annotator_agreement": proportion([right for right, _ in sides], [c for _, c in sides]).to_json()
        if sides
        else None,
        "contradicted": proportion((means_n < 0).tolist(), owners).to_json(),
        "accuracy": bootstrap(lambda w: _accuracy(means_n, counts_n, noise_n, w), owners).to_json(),
        "pairs_without_annotators": len(preferences) - len(kept),
    }


def _accuracy(means_n: Weights, counts_n: Weights, noise_n: Weights, weights_rn: Weights) -> Weights:
    """The mean probability that a label's side, the positive one, is the true one, by each row of weights."""
    error_rn = weighted_mean(noise_n, weights_rn)[:, None] / counts_n
    totals_r = weights_rn.sum(axis=1)
    spread_r1 = ((weights_rn * (means_n**2 - error_rn)).sum(axis=1) / totals_r)[:, None]
    sure_n = np.where(means_n > 0, 1.0, np.where(means_n < 0, 0.0, 0.5))
    with np.errstate(divide="ignore", invalid="ignore"):
        shrink_rn = spread_r1 / (spread_r1 + error_rn)
        deviation_rn = np.sqrt(spread_r1 * (1 - shrink_rn))
        right_rn = np.where(deviation_rn > 0, ndtr(shrink_rn * means_n / deviation_rn), sure_n)
    right_rn = np.where(spread_r1 > 0, right_rn, 0.5)  # else annotators agree no more than chance would have it
    return (weights_rn * right_rn).sum(axis=1) / totals_r


def most_certain(margins: Sequence[float], clusters: Sequence[Hashable]) -> dict[str, Any]:
    """Accuracy on the `MOST_CERTAIN` share of the pairs, those with the widest margins, and the confidence in them.

    Where a share q of labels is wrong whatever the responses, no model is right there in more than 1 - q of the pairs.
    """
    margins_n = np.asarray(margins, dtype=float)
    widest = np.argsort(-np.abs(margins_n), kind="stable")[: max(1, round(MOST_CERTAIN * len(margins_n)))]
    right = [1.0 if margins_n[i] > 0 else 0.5 if margins_n[i] == 0 else 0.0 for i in widest]
    confidence = float(expit(np.abs(margins_n[widest])).mean())
    return {**proportion(right, [clusters[i] for i in widest]).to_json(), "confidence": confidence}
