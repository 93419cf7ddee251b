"""The mathematics of training against numbers worked out by hand and against plain loops, in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpsteer_rloo.objectives import (
    bradley_terry_loss,
    has_baseline,
    kl_k1,
    leave_one_out,
    penalized_rewards,
    preference_margins,
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


def test_k1_sums_the_log_ratios_of_the_completions_tokens():
    policy, ref = tensor([[-1.0, -2.0, -0.5], [-0.1, -3.0, -9.0]]), tensor([[-1.5, -1.0, -0.25], [-0.4, -1.0, 7.0]])
    mask = tensor([[1, 1, 1], [1, 1, 0]])
    assert kl_k1(policy, ref, mask).tolist() == pytest.approx([0.5 - 1.0 - 0.25, 0.3 - 2.0], rel=1e-12)


def test_k1_is_zero_for_equal_models_and_for_no_tokens():
    logps = tensor([[-1.0, -2.0], [-3.0, -4.0]])
    assert kl_k1(logps, logps, torch.ones(2, 2)).tolist() == [0.0, 0.0]
    assert kl_k1(logps, logps * 2, torch.zeros(2, 2)).tolist() == [0.0, 0.0]


def test_k1_averages_to_the_kl_divergence_over_all_outcomes():
    policy, ref = tensor([0.5, 0.25, 0.25]), tensor([0.25, 0.5, 0.25])
    k1 = kl_k1(policy.log()[:, None], ref.log()[:, None], torch.ones(3, 1))
    assert (policy * k1).sum().item() == pytest.approx(0.25 * math.log(2), rel=1e-12)


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
