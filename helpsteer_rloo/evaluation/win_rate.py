"""How often the trained policy's answer beats the untrained one's, as it is and at equal length."""

from collections.abc import Sequence

import numpy as np
from scipy.special import expit

from helpsteer_rloo.statistics import Estimate, Weights, bootstrap, proportion

_RIDGE = 0.01
"""Penalty on the coefficients, in pairs, without which a perfectly separated sample has no fit."""
_STEPS = 12


def win_rate(changes: Sequence[float]) -> Estimate:
    """Share of the prompts whose score rose; half a win where it stayed."""
    return proportion(_wins(changes).tolist())


def length_controlled_win_rate(changes: Sequence[float], longer: Sequence[int]) -> Estimate | None:
    """The win rate that answers of equal length would have had.

    P(win) = sigma(a + b tanh(longer / s)), s the standard deviation of `longer`, is fitted by logistic regression, and
    sigma(a) is given: the length term of Dubois et al. 2024 (arXiv 2404.04475, eq. 2), whose terms for models and
    instructions one pair of policies has no use for. The interval is the bootstrap's over prompts.

    None where all answers became longer, or all shorter: what equal lengths would give cannot be told from them.

    Args:
        changes: Score of the new answer minus that of the old one, a prompt each.
        longer: Tokens of the new answer minus those of the old one.
    """
    wins_n, longer_n = _wins(changes), np.asarray(longer, dtype=float)
    if longer_n.min() > 0 or longer_n.max() < 0:
        return None
    if not longer_n.any() or len(set(wins_n.tolist())) == 1:
        return win_rate(changes)
    deviation = float(longer_n.std())
    design_n2 = np.stack([np.ones(len(wins_n)), np.tanh(longer_n / deviation)], axis=1)

    def controlled(weights_rn: Weights) -> Weights:
        return expit(np.array([_fitted(design_n2, wins_n, weights_n)[0] for weights_n in weights_rn]))

    return bootstrap(controlled, range(len(wins_n)))


def _wins(changes: Sequence[float]) -> Weights:
    return np.array([1.0 if change > 0 else 0.5 if change == 0 else 0.0 for change in changes])


def _fitted(design_n2: Weights, wins_n: Weights, weights_n: Weights) -> Weights:
    """Coefficients of a weighted logistic regression, by Newton's method."""
    coefficients = np.zeros(2)
    for _ in range(_STEPS):
        share_n = expit(design_n2 @ coefficients)
        gradient = design_n2.T @ (weights_n * (wins_n - share_n)) - _RIDGE * coefficients
        curvature = (design_n2.T * (weights_n * share_n * (1 - share_n))) @ design_n2 + _RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        coefficients = coefficients + np.clip(step, -2, 2)
    return coefficients
