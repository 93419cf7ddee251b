"""Best-of-n against enumeration, against plain drawing, and against its own KL."""

from itertools import combinations

import numpy as np
import pytest

from helpsteer_rloo.evaluation.best_of_n import against_policy, at_kl, best_of_n_kl, curve, expected_best


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_the_expected_best_is_the_mean_over_all_subsets(n):
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(4, 6)), rng.normal(size=(4, 6))
    expected = [
        np.mean([own_values[max(subset, key=lambda i, own=own: own[i])] for subset in combinations(range(6), n)])
        for own, own_values in zip(rewards, values, strict=True)
    ]
    assert expected_best(rewards, values, n) == pytest.approx(expected)


def test_equal_rewards_share_their_weights():
    assert expected_best([[1.0, 1.0, 0.0]], [[10.0, 20.0, 0.0]], 3).tolist() == [15.0]
    assert expected_best([[1.0, 1.0]], [[10.0, 20.0]], 1).tolist() == [15.0]


def test_it_is_the_expectation_of_drawing_n_samples():
    rng = np.random.default_rng(1)
    rewards = rng.normal(size=(1, 400))
    drawn = [rng.choice(rewards[0], 8, replace=False).max() for _ in range(6000)]
    assert expected_best(rewards, rewards, 8)[0] == pytest.approx(np.mean(drawn), abs=0.03)


def test_the_kl_of_best_of_n_is_that_of_its_distribution():
    """Over m outcomes of equal probability, all of other reward, the i-th is chosen with ((i+1)^n - i^n) / m^n."""
    n, m = 4, 20_000
    i = np.arange(m)
    p = ((i + 1) / m) ** n - (i / m) ** n
    assert best_of_n_kl(n) == pytest.approx(float(np.sum(p * np.log(p * m))), abs=1e-3)


def test_more_samples_than_floats_can_count_the_subsets_of():
    rewards = np.arange(1100.0)[None]
    assert 1096 < expected_best(rewards, rewards, 512)[0] < 1099


def test_the_curve_ends_with_all_samples():
    rewards = np.random.default_rng(2).normal(size=(3, 6))
    points = curve(rewards, {"reward": rewards})
    assert [point["n"] for point in points] == [1, 2, 4, 6]
    assert points[0]["reward"] == pytest.approx(rewards.mean())
    assert points[-1]["reward"] == pytest.approx(rewards.max(1).mean())


def test_a_kl_between_two_n_is_interpolated():
    rewards = np.random.default_rng(3).normal(size=(5, 8))
    half = (best_of_n_kl(3) + best_of_n_kl(4)) / 2
    n, values = at_kl(rewards, rewards, half)
    assert n == pytest.approx(3.5)
    assert values == pytest.approx((expected_best(rewards, rewards, 3) + expected_best(rewards, rewards, 4)) / 2)
    assert at_kl(rewards, rewards, 0.0)[0] == 1.0
    assert at_kl(rewards, rewards, 99.0)[0] == 8.0


def test_a_policy_is_compared_prompt_by_prompt_at_its_kl():
    rewards = np.array([[0.0, 1.0], [2.0, 4.0]])
    kl = best_of_n_kl(2)
    found = against_policy(
        rewards, {"reward": rewards, "gold": -rewards}, {"reward": [2.0, 4.0], "gold": [0.0, 0.0]}, kl
    )
    assert found["reaches_the_kl"]
    assert found["n"] == pytest.approx(2.0)
    assert found["reward"]["best_of_n"] == 2.5
    assert found["reward"]["policy_minus_best_of_n"]["value"] == 0.5
    assert found["gold"]["policy_minus_best_of_n"]["value"] == 2.5
    assert not against_policy(rewards, {"reward": rewards}, {"reward": [2.0, 4.0]}, 5.0)["reaches_the_kl"]
