"""What is counted in the passes of an RLOO step, and TRL's metrics from it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from helpsteer_rloo.model.drawing import widest_float
from helpsteer_rloo.objectives import LARGEST_GAP
from helpsteer_rloo.training.rollouts import KnownTokens

NAMES = ("entropy", "tokens", "low", "high", "completions", "gap", "gaps", "wide", "weight", "weights", "capped")
"""Of the sums: entropies and tokens that count; completions clipped below and above, and all; the differences between
the sampler's log-probabilities and the trainer's, their number, and the number of large ones; importance weights, their
number, and the number of those at the cap."""


class RowStats(NamedTuple):
    """Sums over the completions of a row, in the order of `NAMES`, and the largest difference to the sampler."""

    sums: Tensor
    widest_gap: Tensor


@torch.no_grad()
def row_stats(
    ratio_B: Tensor, advantage_B: Tensor, entropy_B: Tensor, tokens_B: Tensor, clip: tuple[float, float]
) -> RowStats:
    """Count the completions of a row: how many are clipped, and with entropies of how many tokens.

    Args:
        ratio_B: Of each completion's probability to the one under the policy that sampled it.
        advantage_B: Of each completion.
        entropy_B: Sums over their tokens, in nats.
        tokens_B: Their tokens; 0 for one that does not count.
        clip: How far a ratio may fall below 1 and rise above it.
    """
    low_B = (ratio_B < 1 - clip[0]) & (advantage_B < 0)
    high_B = (ratio_B > 1 + clip[1]) & (advantage_B > 0)
    counted = (entropy_B.sum(), tokens_B.sum(), low_B.sum(), high_B.sum())
    sums = torch.zeros(len(NAMES), dtype=widest_float(ratio_B.device), device=ratio_B.device)
    sums[: len(counted)] = torch.stack([value.to(sums.dtype) for value in counted])
    sums[NAMES.index("completions")] = len(ratio_B)
    return RowStats(sums, torch.zeros((), device=ratio_B.device))


@torch.no_grad()
def with_gaps(stats: RowStats, known: KnownTokens) -> RowStats:
    """Count also how far the sampler's log-probabilities of a row's tokens are from the trainer's, same policy."""
    if known.sampler_T is None:
        return stats
    gaps_T = (known.old_T - known.sampler_T).abs().to(stats.sums.dtype)
    counted = {"gap": gaps_T.sum(), "gaps": len(gaps_T), "wide": (gaps_T > LARGEST_GAP).sum()}
    for name, value in counted.items():
        stats.sums[NAMES.index(name)] = value
    return RowStats(stats.sums, gaps_T.max().float())


@torch.no_grad()
def with_weights(stats: RowStats, weights: Tensor | None, cap: float) -> RowStats:
    """Count also the importance weights of a row, at most `cap`."""
    if weights is None:
        return stats
    counted = {"weight": weights.sum(), "weights": weights.numel(), "capped": (weights >= cap).sum()}
    for name, value in counted.items():
        stats.sums[NAMES.index(name)] = value
    return stats


def summed(rows: Sequence[RowStats], device: torch.device) -> RowStats:
    """The counts of several rows, or of none."""
    nothing = RowStats(
        torch.zeros(len(NAMES), dtype=widest_float(device), device=device), torch.zeros((), device=device)
    )
    sums, gaps = zip(nothing, *rows, strict=True)
    return RowStats(torch.stack(sums).sum(0), torch.stack(gaps).max())


def metrics_of(sums: Sequence[float], widest_gap: float) -> dict[str, float]:
    """TRL's metrics of one optimizer step, every completion with the same weight, and those of the sampler's gap."""
    totals = dict(zip(NAMES, sums, strict=True))
    metrics = {"entropy": totals["entropy"] / max(totals["tokens"], 1.0)}
    for side in ("low", "high"):
        metrics[f"clip_ratio/{side}_mean"] = totals[side] / totals["completions"]
    metrics["clip_ratio/region_mean"] = (totals["low"] + totals["high"]) / totals["completions"]
    if totals["gaps"]:
        metrics["sampler_gap/mean"] = totals["gap"] / totals["gaps"]
        metrics["sampler_gap/max"] = widest_gap
        metrics[f"sampler_gap/over_{LARGEST_GAP}"] = totals["wide"] / totals["gaps"]
    if totals["weights"]:
        metrics["importance/mean"] = totals["weight"] / totals["weights"]
        metrics["importance/at_cap"] = totals["capped"] / totals["weights"]
    return metrics
