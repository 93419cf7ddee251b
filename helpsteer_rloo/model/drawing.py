"""Drawing of tokens: temperature, top-k and top-p, then the inverse of the distribution function at one number a row.

Tensor axes as in `helpsteer_rloo.groups`; R stands for the rows that are decoded together.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from helpsteer_rloo.model.exponentials import exp

BLOCK = 512
"""Tokens of the vocabulary whose weights are summed before anything is accumulated."""
NUCLEUS = 1024
"""Candidates that top-p sorts at first; a row that needs more of them makes it sort more."""


class Drawn(NamedTuple):
    """One token a row.

    `log_probs_R` are under the distribution that the tokens were drawn from, `untruncated_R` under the one before top-k
    and top-p; in nats, both after temperature.
    """

    ids_R: Tensor
    log_probs_R: Tensor
    untruncated_R: Tensor


def draw(logits_RV: Tensor, uniform_R: Tensor, *, temperature: float, top_k: int, top_p: float) -> Drawn:
    """Draw one token a row.

    Truncation is that of transformers' warpers: temperature first, then top-k (0: none), then top-p (1: none). Tokens
    that tie with the last one kept are kept as well.

    Args:
        logits_RV: Scores of the next token.
        uniform_R: A number in [0, 1) for each row, which alone decides the draw.
        temperature: Divides the logits.
        top_k: How many tokens are kept.
        top_p: Share of the probability that is kept.
    """
    scores_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32)) / temperature
    whole_RV = scores_RV
    if 0 < top_k < scores_RV.shape[1]:
        scores_RV = _cut(scores_RV, scores_RV.topk(top_k).values[:, -1:])
    if top_p < 1:
        scores_RV = _cut(scores_RV, _nucleus_threshold(scores_RV, top_p))
    peak_R1 = scores_RV.amax(-1, keepdim=True)
    weights_RV = scores_RV - peak_R1
    exp(weights_RV, out=weights_RV)
    ids_R1, total_R1 = _invert(weights_RV, uniform_R[:, None])
    log_probs_R1 = scores_RV.gather(-1, ids_R1) - peak_R1 - total_R1.log().to(scores_RV.dtype)
    untruncated_R1 = log_probs_R1
    if scores_RV is not whole_RV:
        untruncated_R1 = whole_RV.gather(-1, ids_R1) - whole_RV.logsumexp(-1, keepdim=True)
    return Drawn(ids_R1[:, 0], log_probs_R1[:, 0], untruncated_R1[:, 0])


def _cut(scores_RV: Tensor, threshold_R1: Tensor) -> Tensor:
    return scores_RV.masked_fill(scores_RV < threshold_R1, -torch.inf)


def _nucleus_threshold(scores_RV: Tensor, top_p: float) -> Tensor:
    """The lowest score among the fewest tokens that have `top_p` of the probability.

    A token is kept if those above it have less. The whole vocabulary is sorted only where its head is not enough.
    """
    size = scores_RV.shape[1]
    normalizer_R1 = scores_RV.logsumexp(-1, keepdim=True)
    count = min(NUCLEUS, size)
    while True:
        candidates_RC = scores_RV.topk(count).values
        probabilities_RC = (candidates_RC - normalizer_R1).to(widest_float(scores_RV.device)).exp()
        kept_RC = probabilities_RC.cumsum(-1) - probabilities_RC < top_p
        kept_RC[:, 0] = True
        if count == size or not bool(kept_RC[:, -1].any()):
            return candidates_RC.masked_fill(~kept_RC, torch.inf).amin(-1, keepdim=True)
        count = min(8 * count, size)


def _invert(weights_RV: Tensor, uniform_R1: Tensor) -> tuple[Tensor, Tensor]:
    """Where the accumulated weights pass `uniform` times their sum, and that sum.

    In two levels, sums of blocks and then one block, each accumulated in the widest type of the device: one running
    sum over a large vocabulary would be slow, and in float32 would never reach its rare tokens.
    """
    rows, size = weights_RV.shape
    whole = size // BLOCK * BLOCK
    sums = [weights_RV[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1)] if whole else []
    sums += [weights_RV[:, whole:].sum(-1, keepdim=True)] if whole < size else []
    block_R1, share_R1, total_R1 = _pass(torch.cat(sums, dim=1), uniform_R1)
    within = torch.arange(min(BLOCK, size), device=weights_RV.device).expand(rows, -1)
    indices = block_R1 * BLOCK + within
    chosen = weights_RV.gather(-1, indices.clamp_max(size - 1)).masked_fill_(indices >= size, 0)
    place_R1, _, _ = _pass(chosen, share_R1)
    return (block_R1 * BLOCK + place_R1).clamp_max_(size - 1), total_R1


def _pass(weights: Tensor, share_R1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first place where the running sum exceeds `share` of the total, which of that place's weight, and the total.

    A running sum exceeds anything for the first time at a weight above zero, so nothing impossible is ever drawn.
    """
    running = weights.to(widest_float(weights.device)).cumsum(-1)
    total_R1 = running[:, -1:]
    below_total_R1 = torch.nextafter(total_R1, torch.zeros_like(total_R1))
    target_R1 = torch.minimum(share_R1.to(running.dtype) * total_R1, below_total_R1)
    place_R1 = torch.searchsorted(running, target_R1, right=True).clamp_max_(weights.shape[1] - 1)
    high_R1 = running.gather(-1, place_R1)
    low_R1 = running.gather(-1, (place_R1 - 1).clamp_min(0)).masked_fill_(place_R1 == 0, 0)
    return place_R1, (target_R1 - low_R1) / (high_R1 - low_R1), total_R1


def widest_float(device: torch.device) -> torch.dtype:
    """The widest floating-point type of a device: Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
