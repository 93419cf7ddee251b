"""The mathematics of training against numbers worked out by hand and against plain loops, in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpsteer_rloo.objectives import (
    KL_ESTIMATORS,
    adapted_kl_coef,
    bradley_terry_loss,
    has_baseline,
    kl_terms,
    leave_one_out,
    penalized_rewards,
    preference_margins,
    truncated_weights,
    with_weighted_gradient,
)

NAN = math.nan
rewards = st.floats(-100, 100) | st.just(NAN)
batches = st.integers(2, 6).flatmap(
    lambda n: st.lists(st.lists(rewards, min_size=n, max_size=n), min_size=1, max_size=5)
)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def reference(row):
    """Each reward minus the mean of the other ones that are there, one at a time."""
    advantages = []
    for i, own in enumerate(row):
        others = [r for j, r in enumerate(row) if j != i and not math.isnan(r)]
        advantages.append(own - sum(others) / len(others) if others and not math.isnan(own) else 0.0)
    return advantages


# ---- leave one out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([1.0, 2.0, 6.0], [1 - 4, 2 - 3.5, 6 - 1.5]),
        ([3.0, 1.0], [2.0, -2.0]),
        ([5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 0.0, 0.0]),
        ([0.0, 0.0, 0.0, 1.0], [-1 / 3, -1 / 3, -1 / 3, 1.0]),
        ([-1.0, NAN, 3.0], [-4.0, 0.0, 4.0]),
        ([NAN, 2.0, NAN], [0.0, 0.0, 0.0]),
        ([NAN, NAN], [0.0, 0.0]),
        ([4.0], [0.0]),
    ],
)
def test_advantages_by_hand(row, expected):
    assert leave_one_out(tensor([row]))[0].tolist() == pytest.approx(expected, abs=1e-15)


@given(batches)
def test_advantages_are_each_reward_minus_the_mean_of_the_others(rows):
    got = leave_one_out(tensor(rows))
    assert got.dtype == torch.float64
    assert got.shape == (len(rows), len(rows[0]))
    for row, advantages in zip(rows, got.tolist(), strict=True):
        assert advantages == pytest.approx(reference(row), abs=1e-9)


@given(batches)
def test_advantages_of_a_group_add_up_to_zero_and_are_never_missing(rows):
    advantages = leave_one_out(tensor(rows))
    assert not advantages.isnan().any()
    assert advantages.sum(dim=1).tolist() == pytest.approx([0.0] * len(rows), abs=1e-9)


@given(batches, st.floats(-50, 50), st.floats(0.1, 10))
def test_advantages_ignore_a_constant_and_follow_a_scale(rows, shift, scale):
    moved = leave_one_out(tensor(rows) * scale + shift)
    assert moved.flatten().tolist() == pytest.approx((leave_one_out(tensor(rows)) * scale).flatten().tolist(), abs=1e-7)


def test_groups_do_not_influence_each_other():
    alone, together = leave_one_out(tensor([[1.0, 2.0]])), leave_one_out(tensor([[1.0, 2.0], [100.0, NAN]]))
    assert together[0].tolist() == alone[0].tolist() == [-1.0, 1.0]


def test_a_missing_reward_counts_as_missing_and_not_as_zero():
    assert leave_one_out(tensor([[10.0, 12.0, NAN]])).tolist() == [[-2.0, 2.0, 0.0]]
    assert leave_one_out(tensor([[10.0, 12.0, 0.0]])).tolist() == [[4.0, 7.0, -11.0]]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([1.0, 2.0], [True, True]),
        ([1.0, NAN], [False, False]),
        ([1.0, NAN, 3.0], [True, False, True]),
        ([NAN, NAN, NAN], [False, False, False]),
        ([1.0], [False]),
    ],
)
def test_a_sample_has_a_baseline_if_it_and_a_sibling_have_a_reward(row, expected):
    assert has_baseline(tensor([row])).tolist() == [expected]


# ---- Bradley-Terry ---------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(-50, 50), st.floats(-50, 50)), min_size=1, max_size=8))
def test_at_two_samples_the_advantage_is_the_bradley_terry_margin(pairs):
    margins = [chosen - rejected for chosen, rejected in pairs]
    assert preference_margins(tensor(pairs)).tolist() == pytest.approx(margins, abs=1e-12)
    assert leave_one_out(tensor(pairs))[:, 1].tolist() == pytest.approx([-m for m in margins], abs=1e-12)


@pytest.mark.parametrize(
    ("margins", "loss"),
    [
        ([0.0], math.log(2)),
        ([math.log(3)], math.log(4 / 3)),
        ([-math.log(3)], math.log(4)),
        ([0.0, math.log(3), -math.log(3)], (math.log(2) + math.log(4 / 3) + math.log(4)) / 3),
        ([1000.0], 0.0),
        ([-1000.0], 1000.0),
    ],
)
def test_the_loss_by_hand(margins, loss):
    assert bradley_terry_loss(tensor(margins)).item() == pytest.approx(loss, rel=1e-12, abs=1e-300)


def test_the_gradient_of_the_loss_is_the_probability_of_the_wrong_order():
    scores = tensor([[1.5, 0.5], [-2.0, 1.0]]).requires_grad_()
    bradley_terry_loss(preference_margins(scores)).backward()
    wrong = [1 / (1 + math.exp(1.0)), 1 / (1 + math.exp(-3.0))]
    assert scores.grad.flatten().tolist() == pytest.approx([s * p / 2 for p in wrong for s in (-1, 1)], rel=1e-12)


def test_swapping_chosen_and_rejected_turns_the_loss_around():
    right, wrong = tensor([[2.0, -1.0]]), tensor([[-1.0, 2.0]])
    difference = bradley_terry_loss(preference_margins(wrong)) - bradley_terry_loss(preference_margins(right))
    assert difference.item() == pytest.approx(3.0, rel=1e-12)


# ---- KL and rewards --------------------------------------------------------------------------------------------------


def test_k1_is_the_log_ratio_and_zero_for_equal_models():
    policy, ref = tensor([[-1.0, -2.0, -0.5]]), tensor([[-1.5, -1.0, -0.25]])
    assert kl_terms(policy, ref, "k1").tolist() == [pytest.approx([0.5, -1.0, -0.25], rel=1e-12)]
    for estimator in KL_ESTIMATORS:
        assert kl_terms(policy, policy, estimator).tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_estimators_average_to_the_kl_divergence_over_all_outcomes(estimator):
    policy, ref = tensor([0.5, 0.25, 0.25]), tensor([0.25, 0.5, 0.25])
    terms = kl_terms(policy.log(), ref.log(), estimator)
    assert (policy * terms).sum().item() == pytest.approx(0.25 * math.log(2), rel=1e-12)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_k2_and_k3_are_never_negative(estimator):
    torch.manual_seed(0)
    policy, ref = torch.randn(2, 1000, dtype=torch.float64)
    assert (kl_terms(policy, ref, estimator) >= 0).all()


def expected_gradient(logits, weigh):
    """Gradient of the policy's expectation of a loss a token, samples held fixed, over all outcomes."""
    logits = logits.clone().requires_grad_()
    log_probs = logits.log_softmax(-1)
    (log_probs.detach().exp() * weigh(log_probs)).sum().backward()
    return logits.grad


def test_the_gradient_of_k2_as_a_loss_is_that_of_the_divergence_and_of_k1_there_is_none():
    torch.manual_seed(0)
    logits, ref = torch.randn(2, 5, dtype=torch.float64)
    ref = ref.log_softmax(-1)
    exact = logits.clone().requires_grad_()
    log_probs = exact.log_softmax(-1)
    (log_probs.exp() * (log_probs - ref)).sum().backward()
    torch.testing.assert_close(expected_gradient(logits, lambda x: kl_terms(x, ref, "k2")), exact.grad)
    torch.testing.assert_close(expected_gradient(logits, lambda x: kl_terms(x, ref, "k1")), torch.zeros_like(logits))
    k3 = expected_gradient(logits, lambda x: kl_terms(x, ref, "k3"))
    assert (k3 - exact.grad).abs().max() > 0.01  # it is the gradient of the reverse divergence, near it only
    reverse = logits.clone().requires_grad_()
    (ref.exp() * (ref - reverse.log_softmax(-1))).sum().backward()
    torch.testing.assert_close(k3, reverse.grad)


def test_another_estimator_is_refused():
    with pytest.raises(ValueError, match="'k4' is no estimator of KL; there are k1, k2, k3"):
        kl_terms(torch.zeros(1), torch.zeros(1), "k4")


@pytest.mark.parametrize(
    ("kl", "factor"), [(10.0, 1.0), (11.0, 1.01), (9.0, 0.99), (1000.0, 1.02), (0.0, 0.98), (-5.0, 0.98)]
)
def test_the_weight_of_kl_follows_its_target_by_two_percent_at_most(kl, factor):
    assert adapted_kl_coef(0.5, kl, 10.0) == pytest.approx(0.5 * factor, rel=1e-12)


# ---- samples of another distribution ---------------------------------------------------------------------------------


def gradient_under(sampler, logits, rewards, cap, kind):
    """Expected policy gradient over all completions of two tokens that a sampler draws, by its importance weights."""
    logits = logits.clone().requires_grad_()
    first, second = logits[0].log_softmax(-1), logits[1:].log_softmax(-1)
    sampler_first, sampler_second = sampler[0].log_softmax(-1), sampler[1:].log_softmax(-1)
    loss = tensor(0.0)
    for i in range(3):
        for j in range(3):
            log_probs = torch.stack([first[i], second[i, j]])
            drawn = torch.stack([sampler_first[i], sampler_second[i, j]])
            gaps = log_probs.detach() - drawn
            values = log_probs
            if kind == "token":
                values = with_weighted_gradient(log_probs, truncated_weights(gaps, cap))
            weight = truncated_weights(gaps.sum(), cap) if kind == "sequence" else 1.0
            loss = loss - drawn.sum().exp() * weight * rewards[i, j] * values.sum()
    loss.backward()
    return logits.grad


def test_importance_weights_remove_the_bias_of_a_mismatched_sampler():
    torch.manual_seed(0)
    logits, noise = torch.randn(2, 4, 3, dtype=torch.float64)
    rewards = torch.randn(3, 3, dtype=torch.float64)
    exact = gradient_under(logits, logits, rewards, 1.0, "none")

    def bias(kind, cap=1e9):
        return (gradient_under(logits + noise / 2, logits, rewards, cap, kind) - exact).norm().item()

    assert bias("sequence") < 1e-12  # unbiased without a cap
    assert bias("none") > 0.1
    assert bias("token") < 0.6 * bias("none")  # each token's own mismatch only, not that of the others
    assert bias("sequence") < bias("sequence", cap=2.0) < bias("none")


def test_weighting_the_gradient_leaves_the_value():
    values = tensor([1.0, -2.0]).requires_grad_()
    weighted = with_weighted_gradient(values, tensor([3.0, 0.5]))
    weighted.sum().backward()
    assert weighted.tolist() == [1.0, -2.0]
    assert values.grad.tolist() == [3.0, 0.5]


@pytest.mark.parametrize(
    ("score", "penalty", "kl", "coefficient", "reward"),
    [
        (-2.0, 1.0, 10.0, 0.05, -3.5),
        (2.0, 1.0, 10.0, 0.05, 0.5),
        (2.0, 0.0, -4.0, 0.5, 4.0),
        (-2.0, 0.0, 3.0, 0.0, -2.0),
    ],
)
def test_penalty_and_kl_are_subtracted_from_the_score_whatever_its_sign(score, penalty, kl, coefficient, reward):
    got = penalized_rewards(tensor([score]), tensor([penalty]), tensor([kl]), coefficient)
    assert got.tolist() == pytest.approx([reward], rel=1e-12)


def test_without_a_reference_only_the_penalty_is_subtracted():
    assert penalized_rewards(tensor([2.0, -2.0]), tensor([1.0, 0.5]), None, 0.05).tolist() == [1.0, -2.5]


def test_a_missing_score_stays_missing():
    got = penalized_rewards(tensor([NAN, 1.0]), tensor([1.0, 1.0]), tensor([0.0, 0.0]), 0.05)
    assert got.isnan().tolist() == [True, False]


@given(st.floats(-100, 100), st.floats(0, 10), st.floats(0, 10))
def test_a_completion_that_did_not_end_is_never_worth_more_than_one_that_did(score, penalty, kl):
    ended, cut = penalized_rewards(tensor([score] * 2), tensor([0.0, penalty]), tensor([kl] * 2), 0.05).tolist()
    assert cut <= ended
