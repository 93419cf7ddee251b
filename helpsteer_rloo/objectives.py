"""The mathematics of training: leave-one-out advantages, the Bradley-Terry loss, KL estimates. Pure functions."""

import torch
from torch import Tensor


def leave_one_out(rewards_PN: Tensor) -> Tensor:
    """Advantage of each sample over the mean of the other samples on the same prompt.

    A_i = r_i - (sum_{j != i} r_j) / (N - 1)   (Ahmadian et al. 2024, arXiv 2402.14740, eq. 9; Kool et al. 2019)

    A reward of NaN is missing: it is left out of the others' baselines and its own advantage is 0, as is that of a
    sample whose siblings are all missing. At N = 2 the advantage of the first sample is r_1 - r_2, the margin of the
    Bradley-Terry model.

    Args:
        rewards_PN: Rewards `[P, N]`, N >= 2, in reward units.

    Returns:
        Advantages `[P, N]`, in reward units.

    >>> leave_one_out(torch.tensor([[1.0, 2.0, 6.0]]))
    tensor([[-3.0000, -1.5000,  4.5000]])
    """
    total_P1 = rewards_PN.nansum(dim=1, keepdim=True)
    others_P1 = (~rewards_PN.isnan()).sum(dim=1, keepdim=True) - 1
    baseline_PN = (total_P1 - rewards_PN) / others_P1
    return (rewards_PN - baseline_PN).where(has_baseline(rewards_PN), 0.0)


def rloo_advantages(rewards_PN: Tensor, *, normalize: bool = False) -> Tensor:
    """Leave-one-out advantages `[P, N]`; a single sample a prompt has no baseline and gets 0.

    Args:
        rewards_PN: Rewards `[P, N]`, NaN where one is missing.
        normalize: Subtract the batch's mean advantage and divide by its standard deviation plus 1e-4, over the samples
            that have an advantage, as TRL's `normalize_advantages` does.
    """
    if rewards_PN.shape[1] == 1:
        return torch.zeros_like(rewards_PN)
    advantages_PN = leave_one_out(rewards_PN)
    if not normalize:
        return advantages_PN
    counted_PN = has_baseline(rewards_PN)
    values = advantages_PN[counted_PN]
    deviation = values.std() if len(values) > 1 else values.new_zeros(())
    return ((advantages_PN - values.mean()) / (deviation + 1e-4)).where(counted_PN, 0.0)


def has_baseline(rewards_PN: Tensor) -> Tensor:
    """Which samples have a reward and at least one sibling with one, and so an advantage; booleans `[P, N]`."""
    present_PN = ~rewards_PN.isnan()
    return present_PN & (present_PN.sum(dim=1, keepdim=True) > 1)


def preference_margins(scores_PN: Tensor) -> Tensor:
    """Margin of chosen over rejected, `[P]`, from scores `[P, 2]` in that order: the leave-one-out advantage at N = 2.

    >>> preference_margins(torch.tensor([[1.5, 1.0]]))
    tensor([0.5000])
    """
    return leave_one_out(scores_PN)[:, 0]


def bradley_terry_loss(margins_P: Tensor) -> Tensor:
    """Mean negative log-likelihood of the preferences, -log sigma(margin), in nats (Bradley & Terry 1952).

    >>> bradley_terry_loss(torch.tensor([0.0]))
    tensor(0.6931)
    """
    return -torch.nn.functional.logsigmoid(margins_P).mean()


def preference_losses(
    chosen_P: Tensor,
    rejected_P: Tensor,
    *,
    margins_P: Tensor | None = None,
    weights_P: Tensor | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """Loss of each preference, `[P]`, in nats.

    With d = chosen - rejected - margin:

        loss = weight * (-(1 - e) log sigma(d) - e log sigma(-d))

    Without margin, weight and e it is that of Bradley & Terry (1952). A margin m(strength) is that of Touvron et al.
    2023 (arXiv 2307.09288, eq. 2); a weight that is the strength gives the scaled Bradley-Terry loss of Wang et al.
    2024 (arXiv 2410.01257, section 3); e is the probability that a label is wrong (Mitchell 2023, "A note on DPO with
    noisy preferences", eq. 3, for rewards).

    Args:
        chosen_P: Scores of the chosen responses.
        rejected_P: Scores of the rejected ones.
        margins_P: By how much the chosen one ought to score higher.
        weights_P: How much each preference counts.
        smoothing: e, from 0 up to, not including, 0.5.

    >>> preference_losses(torch.tensor([1.0]), torch.tensor([0.0]), weights_P=torch.tensor([2.0]))
    tensor([0.6265])
    """
    margin_P = chosen_P - rejected_P if margins_P is None else chosen_P - rejected_P - margins_P
    losses_P = -torch.nn.functional.logsigmoid(margin_P)
    if smoothing:
        losses_P = losses_P + smoothing * margin_P  # log sigma(d) - log sigma(-d) = d
    return losses_P if weights_P is None else weights_P * losses_P


KL_ESTIMATORS = ("k1", "k2", "k3")
LARGEST_GAP = 0.1
"""Nats by which sampler and trainer may differ on a token before it is counted as one that differs."""


def kl_terms(log_probs: Tensor, reference: Tensor, estimator: str = "k1") -> Tensor:
    """Estimate of KL(policy | reference) at every sampled token, in nats; any shape.

    With d = log pi(y_t) - log pi_ref(y_t) (Schulman 2020, "Approximating KL divergence"):

    - k1 = d: unbiased for samples of pi, negative for some of them.
    - k2 = d² / 2: biased by the third order of d, never negative. As a loss its gradient is that of k1 in the reward.
    - k3 = exp(-d) - 1 + d: unbiased, never negative, of less variance while d is small.

    A term is that of one token given what stands before it; their sum over a completion is the estimate for the
    whole, as in Ahmadian et al. 2024 (arXiv 2402.14740).

    Args:
        log_probs: Log-probabilities of the sampled tokens under the policy.
        reference: The same under the reference.
        estimator: One of `KL_ESTIMATORS`.

    Raises:
        ValueError: there is no such estimator.

    >>> d = torch.tensor([0.5, -0.5])
    >>> kl_terms(d, torch.zeros(2), "k2")
    tensor([0.1250, 0.1250])
    >>> kl_terms(d, torch.zeros(2), "k3")
    tensor([0.1065, 0.1487])
    """
    difference = log_probs - reference
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"{estimator!r} is no estimator of KL; there are {', '.join(KL_ESTIMATORS)}.")


def adapted_kl_coef(kl_coef: float, kl: float, target: float) -> float:
    """The weight of KL for the next batch, raised where the last one was over its target, lowered where it was under.

    beta' = beta (1 + 0.1 clip(kl / target - 1, -0.2, 0.2))   (Ziegler et al. 2019, arXiv 1909.08593, section 2.2)

    Args:
        kl_coef: beta, above 0.
        kl: Mean KL of a completion in the last batch, in nats.
        target: What it should be, in nats, above 0.

    >>> round(adapted_kl_coef(0.05, kl=20.0, target=10.0), 6), round(adapted_kl_coef(0.05, kl=9.0, target=10.0), 6)
    (0.051, 0.0495)
    """
    return kl_coef * (1 + 0.1 * min(max(kl / target - 1, -0.2), 0.2))


def truncated_weights(log_weights: Tensor, cap: float) -> Tensor:
    """Importance weights exp(log weight), at most `cap`; any shape, no gradient.

    With log weight = log pi(y) - log q(y), of a policy pi and the distribution q that was sampled from, they turn an
    expectation under q into one under pi; the cap bounds their variance at the price of a bias (Ionides 2008,
    "Truncated importance sampling"). In training against another engine's samples: Yao et al. 2025, "Your efficient RL
    framework secretly brings you off-policy RL training".

    >>> truncated_weights(torch.tensor([0.0, 1.0, -1.0]), cap=2.0)
    tensor([1.0000, 2.0000, 0.3679])
    """
    return log_weights.detach().exp().clamp(max=cap)


def with_weighted_gradient(values: Tensor, weights: Tensor) -> Tensor:
    """`values` as they are, whose gradient is multiplied by `weights`, element by element."""
    return values.detach() + weights * (values - values.detach())


def penalized_rewards(scores_B: Tensor, penalties_B: Tensor, kl_B: Tensor | None, kl_coef: float) -> Tensor:
    """The reward that RLOO maximizes, `[B]`: score - penalty - kl_coef * KL.

    Penalties are subtracted, never multiplied: a factor below 1 would *raise* a negative score.

    >>> penalized_rewards(torch.tensor([-2.0]), torch.tensor([1.0]), torch.tensor([10.0]), 0.05)
    tensor([-3.5000])
    """
    rewards_B = scores_B - penalties_B
    return rewards_B if kl_B is None else rewards_B - kl_coef * kl_B


def clipped_policy_losses(log_ratio_B: Tensor, advantages_B: Tensor, low: float, high: float) -> Tensor:
    """Loss of each completion, -min(r A, clip(r, 1 - low, 1 + high) A) with r = exp(log ratio); `[B]`.

    The probability ratio is that of the whole completion (Ahmadian et al. 2024, arXiv 2402.14740, with the clipping of
    Schulman et al. 2017, arXiv 1707.06347, eq. 7). Where the ratio is 1 its gradient is that of REINFORCE.

    Args:
        log_ratio_B: Log-probability under the policy minus that under the policy which sampled, `[B]`, in nats.
        advantages_B: Advantages, `[B]`.
        low: How far the ratio may fall below 1 where the advantage is negative.
        high: How far it may rise above 1 where the advantage is positive.

    >>> clipped_policy_losses(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 2.0]), 0.2, 0.2)
    tensor([-2.0000, -2.4000])
    """
    ratio_B = log_ratio_B.exp()
    return -torch.minimum(ratio_B * advantages_B, ratio_B.clamp(1 - low, 1 + high) * advantages_B)
