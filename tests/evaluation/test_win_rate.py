"""Win rates, as they are and at equal length, and what is counted in the texts of answers."""

import numpy as np
import pytest
from scipy.special import expit

from helpsteer_rloo.evaluation.text_features import distinct, is_refusal, repetition
from helpsteer_rloo.evaluation.win_rate import length_controlled_win_rate, win_rate


def test_a_tie_is_half_a_win():
    assert win_rate([1.0, 0.0, -1.0, 2.0]).value == 0.625


def drawn(rng, advantage, by_length, shift, count=2000):
    longer = rng.normal(shift, 10, count).round()
    won = rng.random(count) < expit(advantage + by_length * np.tanh(longer / longer.std()))
    return np.where(won, 1.0, -1.0).tolist(), longer.astype(int).tolist()


@pytest.mark.parametrize("advantage", [0.0, 0.8])
def test_what_length_earns_is_taken_off(advantage):
    changes, longer = drawn(np.random.default_rng(0), advantage, by_length=2.0, shift=15)
    controlled = length_controlled_win_rate(changes, longer)
    assert controlled.low <= expit(advantage) <= controlled.high
    assert win_rate(changes).value > controlled.value + 0.1


def test_a_length_that_earns_nothing_changes_nothing():
    changes, longer = drawn(np.random.default_rng(1), 0.5, by_length=0.0, shift=5)
    assert length_controlled_win_rate(changes, longer).value == pytest.approx(win_rate(changes).value, abs=0.03)


def test_nothing_is_said_of_equal_lengths_where_all_answers_became_longer_or_shorter():
    assert length_controlled_win_rate([1.0, -1.0, 1.0], [3, 3, 3]) is None
    assert length_controlled_win_rate([1.0, -1.0, 1.0], [-3, -5, -3]) is None
    assert length_controlled_win_rate([1.0] * 100, range(50, 150)) is None
    assert length_controlled_win_rate([1.0, -1.0, 1.0], [0, 0, 0]) == win_rate([1.0, -1.0, 1.0])


def test_wins_everywhere_are_wins_at_equal_length():
    assert length_controlled_win_rate([1.0] * 50, list(range(50))) == win_rate([1.0] * 50)


def test_repetition_and_distinct_by_hand():
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition("a b c") == 0.0
    assert distinct(["a a a", "b"]) == 0.5
    assert distinct(["", "a"]) == 0.0


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m sorry, but no.", True),
        ("Sorry, that is not possible.", True),
        ("I cannot do this.", True),
        ("As an AI language model, I have no opinion.", True),
        ("Unfortunately, I do not know.", True),
        ("I can help: oak, elm.", False),
        ("The king was sorry.", False),
        ("I am not sure, but elm.", False),
        ("", False),
    ],
)
def test_refusals_are_known_by_how_they_begin(text, refuses):
    assert is_refusal(text) is refuses
