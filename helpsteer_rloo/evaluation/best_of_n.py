"""Best-of-n: what the reward model gains by choosing among samples of the starting policy, and at which KL.

It is the baseline that training has to beat: no weight is changed, and its KL from the start is known.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from helpsteer_rloo.statistics import Weights, mean


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n from the policy it samples, in nats: log n - (n - 1) / n.

    (Stiennon et al. 2020, arXiv 2009.01325, appendix G.3; an upper bound where samples can be equal, Beirami et al.
    2024, arXiv 2401.01879.)

    >>> best_of_n_kl(1), round(best_of_n_kl(64), 3)
    (0.0, 3.175)
    """
    return math.log(n) - (n - 1) / n


def expected_best(rewards: ArrayLike, values: ArrayLike, n: int) -> Weights:
    """The expected value of the best of n samples by reward, without bias from N >= n of them; one a prompt, `[P]`.

    Of all subsets of n, the i-th sample by reward (from 1) is the best in C(i - 1, n - 1) of C(N, n) (the estimator of
    Nakano et al. 2021, arXiv 2112.09332, appendix I, for any value). Equal rewards share their weights.

    Args:
        rewards: What samples are chosen by, `[P, N]`.
        values: What is reported of the chosen one, `[P, N]`.
        n: Samples to choose among.

    >>> expected_best([[3.0, 1.0, 2.0]], [[30.0, 10.0, 20.0]], 2).round(6).tolist()  # 30, 30, 20
    [26.666667]
    """
    rewards_PN, values_PN = np.asarray(rewards, dtype=float), np.asarray(values, dtype=float)
    count = rewards_PN.shape[1]
    subsets = math.comb(count, n)  # of exact integers, which may be larger than any float
    weights_N = np.array([math.comb(i, n - 1) / subsets for i in range(count)])
    best: list[float] = []
    for rewards_N, values_N in zip(rewards_PN, values_PN, strict=True):
        _, place_N, sizes = np.unique(rewards_N, return_inverse=True, return_counts=True)
        ends = np.cumsum(sizes)
        of_level = [weights_N[end - size : end].sum() / size for end, size in zip(ends, sizes, strict=True)]
        best.append(float(np.asarray(of_level)[place_N] @ values_N))
    return np.asarray(best)


def curve(rewards: ArrayLike, columns: Mapping[str, ArrayLike]) -> list[dict[str, float]]:
    """KL and mean expected values of best-of-n for n = 1, 2, 4, … and all samples; every column is `[P, N]`."""
    count = np.asarray(rewards).shape[1]
    sizes = sorted({*(2**power for power in range(count.bit_length()) if 2**power <= count), count})
    return [
        {
            "n": n,
            "kl": best_of_n_kl(n),
            **{name: float(expected_best(rewards, values, n).mean()) for name, values in columns.items()},
        }
        for n in sizes
    ]


def at_kl(rewards: ArrayLike, values: ArrayLike, kl: float) -> tuple[float, Weights]:
    """The n, between whole ones, at which best-of-n has a KL, and the expected values there, `[P]`.

    Where even all samples have less, it is all of them.
    """
    count = np.asarray(rewards).shape[1]
    above = next((n for n in range(1, count + 1) if best_of_n_kl(n) >= kl), count)
    if above == 1 or best_of_n_kl(count) < kl:
        return float(above), expected_best(rewards, values, above)
    low, high = best_of_n_kl(above - 1), best_of_n_kl(above)
    share = (kl - low) / (high - low)
    values_P = (1 - share) * expected_best(rewards, values, above - 1) + share * expected_best(rewards, values, above)
    return above - 1 + share, values_P


def against_policy(
    rewards: ArrayLike, columns: Mapping[str, ArrayLike], policy: Mapping[str, Sequence[float]], kl: float
) -> dict[str, Any]:
    """The policy against best-of-n at the policy's KL: for every column, the mean difference, paired by prompt.

    Args:
        rewards: What best-of-n chooses by, `[P, N]`.
        columns: What is compared, `[P, N]` each.
        policy: The same of the policy's answers, `[P]` each.
        kl: Of the policy from the start, in nats.
    """
    n, reaches = 0.0, best_of_n_kl(np.asarray(rewards).shape[1]) >= kl
    compared: dict[str, Any] = {}
    for name, values in columns.items():
        n, best_P = at_kl(rewards, values, kl)
        difference = mean((np.asarray(policy[name]) - best_P).tolist())
        compared[name] = {"best_of_n": float(best_P.mean()), "policy_minus_best_of_n": difference.to_json()}
    return {"kl": kl, "n": n, "reaches_the_kl": reaches, **compared}
