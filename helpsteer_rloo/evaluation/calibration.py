"""Calibration of a reward model: does P(chosen) = sigma(margin) mean what it says?"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit

from helpsteer_rloo.statistics import Estimate, Weights, bootstrap, clustered_mean

BINS = 10
TEMPERATURES = (1e-3, 1e3)
"""Between which a temperature is looked for."""
_SIMULATIONS = 200


def calibration(margins: Sequence[float], clusters: Sequence[Hashable]) -> dict[str, Any]:
    """How the model's probabilities agree with the labels, as they are and divided by a fitted temperature.

    A margin m says which response is better with confidence sigma(|m|), and is right if m > 0 (half right at 0).

    - reliability: mean confidence and share right, in `BINS` bins of equal width from 0.5 to 1.
    - ece: expected calibration error, the mean distance of the two by pairs (Guo et al. 2017, arXiv 1706.04599, eq. 3).
      It is positive even for a calibrated model, by chance: `ece_if_calibrated` is its mean if every label were drawn
      with the model's own probabilities.
    - brier: mean of (1 - sigma(m))²; log_loss: mean of -log sigma(m), in nats.
    - temperature: T that minimizes the log loss of m / T; null where no finite one does. `log_loss_with_temperature`
      and `ece_with_temperature` are cross-fitted: T from one half of the prompts, the numbers from the other.

    Args:
        margins: Score of chosen minus score of rejected, `[n]`.
        clusters: The prompt of each.
    """
    margins_n = np.asarray(margins, dtype=float)
    confidence_n, right_n = expit(np.abs(margins_n)), _right(margins_n)
    scaled_n = _cross_fitted(margins_n, clusters)
    return {
        "reliability": reliability(margins_n),
        "ece": _ece(confidence_n, right_n, clusters).to_json(),
        "ece_if_calibrated": _ece_by_chance(confidence_n),
        "brier": clustered_mean((1 - expit(margins_n)) ** 2, clusters).to_json(),
        "log_loss": clustered_mean(-log_expit(margins_n), clusters).to_json(),
        "temperature": fitted_temperature(margins_n),
        "log_loss_with_temperature": clustered_mean(-log_expit(scaled_n), clusters).to_json(),
        "ece_with_temperature": _ece(expit(np.abs(scaled_n)), right_n, clusters).to_json(),
    }


def reliability(margins: Sequence[float] | Weights) -> list[dict[str, float]]:
    """The bins of the reliability curve that hold a pair: mean confidence, share right, and count.

    >>> reliability([0.0, 4.0])[-1]["count"]
    1
    """
    margins_n = np.asarray(margins, dtype=float)
    confidence_n, right_n = expit(np.abs(margins_n)), _right(margins_n)
    bins_n = _bins(confidence_n)
    return [
        {
            "confidence": float(confidence_n[bins_n == i].mean()),
            "right": float(right_n[bins_n == i].mean()),
            "count": int((bins_n == i).sum()),
        }
        for i in range(BINS)
        if (bins_n == i).any()
    ]


def fitted_temperature(margins: Sequence[float] | Weights) -> float | None:
    """The T > 0 that minimizes the mean of -log sigma(margin / T); none if the log loss has no minimum inside.

    That is so where no pair is wrong (T would be 0), or the mean margin is not positive (T would be without bound).
    """
    margins_n = np.asarray(margins, dtype=float)
    if not (margins_n < 0).any() or margins_n.mean() <= 0:
        return None
    low, high = (math.log(end) for end in TEMPERATURES)
    found = minimize_scalar(
        lambda log_t: float(-log_expit(margins_n / math.exp(log_t)).mean()), bounds=(low, high), method="bounded"
    )
    inside = low + 0.1 < found.x < high - 0.1
    return math.exp(found.x) if inside else None


def _right(margins_n: Weights) -> Weights:
    return np.where(margins_n == 0, 0.5, margins_n > 0).astype(float)


def _bins(confidence_n: Weights) -> np.ndarray[Any, Any]:
    return np.minimum(((confidence_n - 0.5) * 2 * BINS).astype(int), BINS - 1)


def _ece(confidence_n: Weights, right_n: Weights, clusters: Sequence[Hashable]) -> Estimate:
    """The error, with the basic interval of the bootstrap: resampling adds the bias of chance a second time."""
    in_bin_nb = np.eye(BINS)[_bins(confidence_n)]
    found = bootstrap(lambda w: _errors(confidence_n, right_n, in_bin_nb, w), clusters)
    if math.isnan(found.low):
        return found
    low, high = 2 * found.value - found.high, 2 * found.value - found.low
    return replace(found, low=max(0.0, min(low, found.value)), high=max(high, found.value))


def _errors(confidence_n: Weights, right_n: Weights, in_bin_nb: Weights, weights_rn: Weights) -> Weights:
    """The calibration error by each row of weights."""
    excess_rb = (weights_rn * (right_n - confidence_n)) @ in_bin_nb
    return np.abs(excess_rb).sum(axis=1) / weights_rn.sum(axis=1)


def _ece_by_chance(confidence_n: Weights) -> float:
    drawn_sn = np.random.default_rng(0).random((_SIMULATIONS, len(confidence_n))) < confidence_n
    excess_sb = (drawn_sn - confidence_n) @ np.eye(BINS)[_bins(confidence_n)]
    return float(np.abs(excess_sb).sum(axis=1).mean() / len(confidence_n))


def _cross_fitted(margins_n: Weights, clusters: Sequence[Hashable]) -> Weights:
    """Margins over the temperature of the other half of the prompts; as they are where that has none."""
    numbers: dict[Hashable, int] = {}
    half_n = np.array([numbers.setdefault(cluster, len(numbers)) % 2 for cluster in clusters])
    scaled_n = margins_n.copy()
    for half in (0, 1):
        others = margins_n[half_n != half]
        temperature = fitted_temperature(others) if len(others) else None
        scaled_n[half_n == half] /= temperature or 1.0
    return scaled_n
