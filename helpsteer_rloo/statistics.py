"""Intervals for the numbers that are reported: shares, means, and any statistic of clustered observations."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES, _AT_ONCE = 2000, 100
Weights = np.ndarray[Any, np.dtype[np.float64]]
"""Arrays of floats: how often observations count, in each of some resamples `[R, n]`, and what follows from that."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % interval and the count behind it."""

    value: float
    low: float
    high: float
    count: int

    def to_json(self) -> dict[str, Any]:
        """The estimate as it is written to result files."""
        return {"value": self.value, "interval": self.interval(), "count": self.count}

    def interval(self) -> list[float | None]:
        """Both ends of the interval, `None` where it is undefined."""
        return [None if math.isnan(end) else end for end in (self.low, self.high)]

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0

    def brackets(self, shape: str = "z.3f") -> str:
        """The interval as it is printed: `[0.832, 0.886]`; empty where it is undefined; zero has no sign (`z`)."""
        return "" if None in self.interval() else f"[{self.low:{shape}}, {self.high:{shape}}]"

    def __str__(self) -> str:
        """The estimate as it is printed: `0.861 [0.832, 0.886], n = 640`."""
        return f"{self.value:z.3f} {self.brackets()}".rstrip() + f", n = {self.count}"


def proportion(hits: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """A share, with a Wilson interval for the effective number of observations.

    Observations in one cluster (pairs on one prompt) are not independent. The variance of the share is estimated from
    the clusters' totals (linearization; Cochran 1977, eq. 9.30 ff.), the design effect is its ratio to the variance of
    independent observations, and Wilson's interval is taken at n / max(1, design effect) (Dean & Pagano 2015). Unlike
    a bootstrap it keeps a width when all observations agree.

    Args:
        hits: 1 for a hit, 0 for a miss, 0.5 for half a hit (a tie).
        clusters: The cluster of each observation; `None` for independent ones.

    Raises:
        ValueError: there is no observation.

    >>> print(proportion([1, 1, 1, 0]))
    0.750 [0.301, 0.954], n = 4
    """
    values = np.asarray(hits, dtype=float)
    if not len(values):
        raise ValueError("A share of nothing is undefined: there is no observation.")
    share = float(values.mean())
    low, high = _wilson(share, len(values) / _design_effect(values, share, clusters))
    return Estimate(share, low, high, len(values))


def _design_effect(values: np.ndarray[Any, Any], share: float, clusters: Sequence[Hashable] | None) -> float:
    if clusters is None:
        return 1.0
    totals: dict[Hashable, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        totals[cluster] = totals.get(cluster, 0.0) + value - share
    count, number = len(values), len(totals)
    independent = share * (1 - share) / max(count - 1, 1)
    if number < 2 or independent == 0:
        return count / number
    variance = number / (number - 1) * sum(total**2 for total in totals.values()) / count**2
    return max(1.0, float(variance / independent))


def _wilson(share: float, count: float) -> tuple[float, float]:
    z = float(stats.norm.ppf(0.5 + CONFIDENCE / 2))
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * float(np.sqrt(share * (1 - share) / count + z * z / (4 * count * count)))
    return max(0.0, centre - half), min(1.0, centre + half)


def binned(values: Sequence[int], most: int = 30) -> dict[str, Any]:
    """Counts of whole numbers, 0 or more, in at most so many bins from 0 on, of a round width: 1, 2 or 5 times 10^k.

    >>> binned([0, 3, 9, 30], most=8)
    {'width': 5, 'counts': [2, 1, 0, 0, 0, 0, 1]}
    """
    largest = max(values, default=0)
    width = next(w for k in range(20) for w in (10**k, 2 * 10**k, 5 * 10**k) if largest // w < most)
    return {"width": width, "counts": np.bincount(np.asarray(values, dtype=int) // width).tolist()}


def mean(values: Sequence[float]) -> Estimate:
    """A mean with Student's t interval; of differences, for paired comparisons. One value has no interval: it is NaN.

    Raises:
        ValueError: there is no value.
    """
    if not len(values):
        raise ValueError("A mean of nothing is undefined: there is no value.")
    array = np.asarray(values, dtype=float)
    centre = float(array.mean())
    if len(array) == 1:
        return Estimate(centre, math.nan, math.nan, 1)
    error = float(array.std(ddof=1) / np.sqrt(len(array)))
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(array) - 1)) * error
    return Estimate(centre, centre - half, centre + half, len(array))


def mean_of_means(strata: Sequence[Sequence[float]]) -> Estimate:
    """The mean of the means of several strata, each with the same weight, with a normal interval.

    Its variance is that of independent samples: the sum of the strata's s² / n, over the square of their number
    (Cochran 1977, eq. 5.7). A stratum with one value has no variance, and so there is no interval: it is NaN.

    Raises:
        ValueError: there is no stratum, or one is empty.

    >>> print(mean_of_means([[0.0, 1.0], [1.0, 1.0]]))
    0.750 [0.260, 1.240], n = 4
    """
    if not strata or not all(map(len, strata)):
        raise ValueError("A mean of nothing is undefined: there is no value in a stratum.")
    arrays = [np.asarray(values, dtype=float) for values in strata]
    centre = float(np.mean([array.mean() for array in arrays]))
    count = sum(map(len, arrays))
    if min(map(len, arrays)) == 1:
        return Estimate(centre, math.nan, math.nan, count)
    error = math.sqrt(sum(float(array.var(ddof=1)) / len(array) for array in arrays)) / len(arrays)
    half = float(stats.norm.ppf(0.5 + CONFIDENCE / 2)) * error
    return Estimate(centre, centre - half, centre + half, count)


def bootstrap(statistic: Callable[[Weights], Weights], clusters: Sequence[Hashable], seed: int = 0) -> Estimate:
    """A statistic of clustered observations, with the percentile interval of the cluster bootstrap.

    Whole clusters (the pairs on one prompt) are drawn with replacement, as many as there are (Davison & Hinkley 1997,
    section 3.8; `scipy.stats.bootstrap` draws single observations). Resamples for which the statistic is undefined are
    left out; with fewer than two clusters there is no interval: it is NaN.

    Args:
        statistic: From the weights of the observations in each of some resamples, `[R, n]`, to its values, `[R]`, NaN
            where it is undefined. A weight is how often an observation was drawn, 1 for the data themselves.
        clusters: The cluster of each observation, `[n]`.
        seed: Of the draws.

    Raises:
        ValueError: there is no observation.
    """
    if not len(clusters):
        raise ValueError("A statistic of nothing is undefined: there is no observation.")
    value = float(statistic(np.ones((1, len(clusters))))[0])
    numbers: dict[Hashable, int] = {}
    place_n = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])
    count = len(numbers)
    if count < 2 or math.isnan(value):
        return Estimate(value, math.nan, math.nan, len(clusters))
    rng, shares = np.random.default_rng(seed), np.full(count, 1 / count)
    values = np.concatenate(
        [
            statistic(rng.multinomial(count, shares, size=_AT_ONCE).astype(float)[:, place_n])
            for _ in range(RESAMPLES // _AT_ONCE)
        ]
    )
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.nanpercentile(values, [tail, 100 - tail])
    return Estimate(value, float(low), float(high), len(clusters))


def weighted_mean(values: Sequence[float] | Weights, weights: Weights) -> Weights:
    """The mean of values `[n]` by each of some rows of weights `[R, n]`; NaN where a row has none."""
    totals = weights.sum(axis=1)
    with np.errstate(invalid="ignore"):
        return np.where(totals > 0, weights @ np.asarray(values, dtype=float) / np.maximum(totals, 1e-300), np.nan)


def clustered_mean(values: Sequence[float] | Weights, clusters: Sequence[Hashable]) -> Estimate:
    """A mean of clustered observations, with the interval of the cluster bootstrap.

    >>> clustered_mean([1.0, 1.0, 1.0], ["a", "a", "b"]).value
    1.0
    """
    array = np.asarray(values, dtype=float)
    return bootstrap(lambda weights: weighted_mean(array, weights), clusters)
