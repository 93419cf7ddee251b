"""When a run is said to go wrong, on histories made by hand."""

import math

import pytest

from helpsteer_rloo.alarms import Watched, alarms, average, best_of, verdict

PROMPTS = 40


def at(step, reward, guard, *, kl=1.0, surprise=10.0, length=10, spread=0.1):
    """A measurement with some spread over the prompts, the same at every step."""
    noise = [spread * math.sin(7 * place) for place in range(PROMPTS)]
    other = [spread * math.sin(3 * place + step) for place in range(PROMPTS)]
    return Watched(
        step,
        reward=tuple(reward + n + o for n, o in zip(noise, other, strict=True)),
        guard=None if guard is None else tuple(guard + n - o for n, o in zip(noise, other, strict=True)),
        kl=tuple(kl + n for n in noise),
        surprise=(surprise,) * PROMPTS,
        length=(length,) * PROMPTS,
        ended=(True,) * PROMPTS,
    )


def names(history, **limits):
    return [alarm.name for alarm in alarms(history, **limits)]


def test_a_run_that_goes_well_raises_no_alarm():
    history = [at(step, step, step) for step in range(5)]
    assert all(names(history[: n + 1]) == [] for n in range(5))
    assert verdict(history) is None
    assert best_of(history).step == 4


def test_a_guard_that_falls_while_the_reward_rises_is_an_alarm_and_twice_in_a_row_a_verdict():
    history = [at(0, 0, 0), at(1, 1, 2), at(2, 2, 1), at(3, 3, 0.5)]
    assert names(history[:2]) == []
    assert names(history[:3]) == ["overoptimization"]
    assert verdict(history[:3]) is None
    found = verdict(history)
    assert (found.name, found.step, found.acts) == ("overoptimization", 3, True)
    assert "Since step 1 the guard's score changed by -1.5" in found.sentence
    assert best_of(history).step == 1


def test_an_alarm_that_passes_is_no_verdict():
    assert verdict([at(0, 0, 0), at(1, 1, 2), at(2, 2, 1), at(3, 3, 2.5), at(4, 4, 1.5)]) is None


def test_a_fall_of_both_is_no_over_optimization():
    assert names([at(0, 0, 0), at(1, 2, 2), at(2, 1, 1)]) == []


def test_a_fall_that_may_be_chance_is_no_alarm():
    assert names([at(0, 0, 0, spread=5), at(1, 1, 2, spread=5), at(2, 2, 1.9, spread=5)]) == []


def test_without_a_guard_the_best_is_by_reward_and_nothing_is_over_optimized():
    history = [at(0, 0, None), at(1, 2, None), at(2, 1, None)]
    assert names(history) == []
    assert best_of(history).step == 1


def test_kl_over_its_limit_is_an_alarm_that_acts():
    history = [at(step, step, step, kl=3.0 * step) for step in range(4)]
    assert names(history, max_kl=5.0) == ["kl"]
    assert verdict(history, max_kl=5.0).name == "kl"
    assert verdict(history, max_kl=7.0) is None  # over it only once
    assert names(history, max_kl=9.0) == []


def test_a_step_over_the_limit_of_kl_is_not_the_best_unless_all_are():
    history = [at(step, step, step, kl=3.0 * step) for step in range(1, 4)]
    assert best_of(history).step == 3
    assert best_of(history, max_kl=7.0).step == 2
    assert best_of(history, max_kl=1.0).step == 3


def test_another_alarm_does_not_make_a_verdict_of_one():
    history = [at(0, 0, 0), at(1, 1, 2, kl=9.0), at(2, 2, 1, kl=1.0), at(3, 3, 3, kl=9.0)]
    assert verdict(history, max_kl=5.0) is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"length": 25}, ["length"]),
        ({"length": 4}, ["length"]),
        ({"length": 19}, []),
        ({"surprise": 0.9}, ["entropy"]),
        ({"surprise": 1.1}, []),
    ],
)
def test_length_and_entropy_are_said_and_do_not_act(change, expected):
    history = [at(0, 0, 0), at(1, 1, 1, **change), at(2, 2, 2, **change)]
    assert names(history) == expected
    assert verdict(history) is None


def test_prompts_without_a_reward_are_left_out():
    history = [at(0, 0, 0), at(1, 1, 2), at(2, 2, 1)]
    holes = [Watched(w.step, (None, *w.reward[1:]), w.guard, w.kl, w.surprise, w.length, w.ended) for w in history]
    assert names(holes) == ["overoptimization"]
    assert math.isnan(average([None, None]))
    assert average([1.0, None, 2.0]) == 1.5


def test_a_point_of_the_curve_by_hand():
    seen = Watched(7, (1.0, 3.0), (2.0, 4.0), (1.0, 7.0), (2.0, 6.0), (1, 3), (True, False))
    assert seen.to_json() == {
        "step": 7, "reward": 2.0, "guard": 3.0, "kl": 4.0, "sqrt_kl": 2.0, "entropy": 2.0, "length": 2.0, "ended": 0.5
    }  # fmt: skip
