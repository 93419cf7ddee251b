"""Intervals against scipy's, and what clusters do to them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from helpsteer_rloo.statistics import Estimate, bootstrap, clustered_mean, mean, proportion, weighted_mean


def wilson(hits, count):
    """scipy's Wilson interval."""
    interval = stats.binomtest(hits, count).proportion_ci(0.95, method="wilson")
    return interval.low, interval.high


def interval(estimate):
    return estimate.low, estimate.high


def observations(hits, count):
    return [1.0] * hits + [0.0] * (count - hits)


# ---- shares ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_of_independent_observations_is_wilsons(counts):
    hits, count = counts
    estimate = proportion(observations(hits, count))
    assert (estimate.value, estimate.count) == (pytest.approx(hits / count), count)
    assert interval(estimate) == pytest.approx(wilson(hits, count), abs=1e-12)


def test_an_interval_by_hand():
    # p = 0.5, n = 100, z = 1.959964: centre 0.5, half width z / (1 + z²/n) · √(p(1−p)/n + z²/4n²) = 0.0961685
    assert interval(proportion(observations(50, 100))) == pytest.approx((0.4038315, 0.5961685), abs=1e-7)


def test_a_share_of_all_or_none_still_has_a_width():
    assert interval(proportion([1.0] * 10)) == pytest.approx((0.7224672, 1.0), abs=1e-7)
    assert interval(proportion([0.0] * 10)) == pytest.approx((0.0, 0.2775328), abs=1e-7)


def test_half_a_hit_counts_half():
    assert interval(proportion([1.0, 0.5, 0.5, 0.0])) == interval(proportion([1.0, 1.0, 0.0, 0.0]))


def test_a_share_of_nothing_is_refused():
    with pytest.raises(ValueError, match="there is no observation"):
        proportion([])


def test_a_cluster_for_each_observation_is_needed():
    with pytest.raises(ValueError, match=r"zip\(\)"):
        proportion([1.0, 0.0, 1.0], ["a", "b"])


# ---- clusters --------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=60))
def test_clusters_of_one_observation_are_independent_observations(hits):
    assert interval(proportion(hits, range(len(hits)))) == pytest.approx(interval(proportion(hits)), abs=1e-12)


@given(st.integers(2, 40).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.integers(2, 10))
def test_perfectly_correlated_clusters_are_worth_one_observation_each(counts, size):
    hits, number = counts
    clusters = [c for c in range(number) for _ in range(size)]
    estimate = proportion([float(c < hits) for c in clusters], clusters)
    assert (estimate.value, estimate.count) == (pytest.approx(hits / number), number * size)
    # The variance of clusters is estimated with number - 1 degrees of freedom, so one observation less is right too.
    exact, one_less = (proportion_at(hits / number, n) for n in (number, max(1, number - 1)))
    assert one_less[0] - 1e-12 <= estimate.low <= exact[0] + 1e-12
    assert exact[1] - 1e-12 <= estimate.high <= one_less[1] + 1e-12


def proportion_at(share, count):
    """Wilson's interval for a share that need not be a whole number of hits."""
    z = stats.norm.ppf(0.975)
    centre, spread = share + z**2 / (2 * count), z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return (centre - spread) / (1 + z**2 / count), (centre + spread) / (1 + z**2 / count)


def test_one_cluster_is_worth_one_observation():
    assert interval(proportion([1.0] * 8, ["a"] * 8)) == pytest.approx(wilson(1, 1), abs=1e-12)
    assert interval(proportion([1.0] * 4 + [0.0] * 4, ["a"] * 8)) == pytest.approx(proportion_at(0.5, 1), abs=1e-12)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 6)), min_size=1, max_size=60))
def test_clusters_never_narrow_an_interval_and_never_leave_the_unit_interval(observed):
    hits, clusters = [hit for hit, _ in observed], [cluster for _, cluster in observed]
    plain, clustered = proportion(hits), proportion(hits, clusters)
    assert clustered.value == plain.value
    assert 0 <= clustered.low <= plain.low + 1e-12
    assert plain.high - 1e-12 <= clustered.high <= 1
    assert clustered.low - 1e-12 <= clustered.value <= clustered.high + 1e-12


def test_agreement_within_clusters_widens_an_interval_and_balance_within_does_not():
    agree = proportion([1, 1, 0, 0] * 10, [i // 2 for i in range(40)])
    balanced = proportion([1, 0, 1, 0] * 10, [i // 2 for i in range(40)])
    assert agree.high - agree.low > 1.3 * (balanced.high - balanced.low)
    assert interval(balanced) == interval(proportion([1, 0] * 20))


def test_the_interval_covers_the_truth_for_correlated_pairs():
    """1000 data sets of 60 prompts with 1 to 4 pairs each, which agree within a prompt most of the time."""
    rng, covered, naive = np.random.default_rng(0), 0, 0
    for _ in range(1000):
        sizes = rng.integers(1, 5, 60)
        own = rng.random(60) < 0.7
        clusters = np.repeat(np.arange(60), sizes)
        hits = np.where(rng.random(len(clusters)) < 0.8, own[clusters], rng.random(len(clusters)) < 0.7)
        estimate, plain = proportion(hits.tolist(), clusters.tolist()), proportion(hits.tolist())
        covered += estimate.low <= 0.7 <= estimate.high
        naive += plain.low <= 0.7 <= plain.high
    assert 0.925 <= covered / 1000 <= 0.98
    assert naive / 1000 < 0.90


# ---- means -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=50).filter(lambda values: np.std(values) > 1e-3))
def test_the_interval_of_a_mean_is_students(values):
    estimate = mean(values)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert interval(estimate) == pytest.approx((expected.low, expected.high), rel=1e-9, abs=1e-9)
    assert (estimate.value, estimate.count) == (pytest.approx(np.mean(values)), len(values))


def test_a_mean_by_hand():
    # 1, 2, 3: mean 2, standard error 1/√3, t(0.975; 2) = 4.302653
    assert interval(mean([1.0, 2.0, 3.0])) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-6)


def test_equal_values_have_no_width():
    assert interval(mean([0.25] * 5)) == (0.25, 0.25)


def test_a_mean_of_nothing_is_refused_and_that_of_one_value_has_no_interval():
    with pytest.raises(ValueError, match="A mean of nothing"):
        mean([])
    assert mean([1.5]).to_json() == {"value": 1.5, "interval": [None, None], "count": 1}


# ---- the record ------------------------------------------------------------------------------------------------------


def test_an_estimate_is_written_and_printed_with_interval_and_count():
    estimate = Estimate(0.8612, 0.8321, 0.8857, 640)
    assert estimate.to_json() == {"value": 0.8612, "interval": [0.8321, 0.8857], "count": 640}
    assert str(estimate) == "0.861 [0.832, 0.886], n = 640"


# ---- the cluster bootstrap -------------------------------------------------------------------------------------------


def test_the_bootstrap_of_independent_observations_is_about_students_interval():
    values = np.random.default_rng(0).normal(2, 1, 400).tolist()
    assert clustered_mean(values, range(400)).value == pytest.approx(np.mean(values))
    assert interval(clustered_mean(values, range(400))) == pytest.approx(interval(mean(values)), abs=0.02)


def test_the_bootstrap_of_shares_agrees_with_the_design_effect():
    rng = np.random.default_rng(1)
    owners = [i // 4 for i in range(800)]
    hits = [float(rng.random() < (0.9 if owner % 2 else 0.5)) for owner in owners]
    assert interval(clustered_mean(hits, owners)) == pytest.approx(interval(proportion(hits, owners)), abs=0.01)


def test_copies_of_an_observation_tell_no_more_than_it_does():
    values = np.random.default_rng(2).normal(0, 1, 50).tolist()
    once = clustered_mean(values, range(50))
    copied = clustered_mean([v for v in values for _ in range(9)], [i for i in range(50) for _ in range(9)])
    assert interval(copied) == pytest.approx(interval(once), abs=1e-9)
    assert copied.count == 450


def test_the_bootstrap_covers_the_truth():
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(100):
        centres = rng.normal(0, 1, 60)
        estimate = clustered_mean(
            (centres[:, None] + rng.normal(0, 1, (60, 3))).ravel().tolist(), np.repeat(range(60), 3)
        )
        covered += estimate.low <= 0 <= estimate.high
    assert 88 <= covered <= 99


def test_one_cluster_has_no_interval_and_no_observation_is_refused():
    assert clustered_mean([1.0, 2.0], ["a", "a"]).interval() == [None, None]
    with pytest.raises(ValueError, match="no observation"):
        clustered_mean([], [])


def test_resamples_without_the_statistic_are_left_out():
    values, here = np.array([1.0, 3.0, 5.0]), np.array([1.0, 0.0, 0.0])
    estimate = bootstrap(lambda weights: weighted_mean(values, weights * here), [0, 1, 2])
    assert (estimate.value, estimate.low, estimate.high) == (1.0, 1.0, 1.0)


def test_a_zero_outside_of_the_interval_is_seen():
    assert Estimate(0.2, 0.1, 0.3, 5).excludes_zero
    assert Estimate(-0.2, -0.3, -0.1, 5).excludes_zero
    assert not Estimate(0.2, -0.1, 0.3, 5).excludes_zero
    assert not Estimate(0.2, float("nan"), float("nan"), 1).excludes_zero
