import sys

import pytest

from helpsteer_rloo.reward_functions import (
    check_reward_weights,
    load_reward_functions,
    reward_functions_digest,
)
from helpsteer_rloo.settings.checks import check_rloo
from helpsteer_rloo.settings.config import RLOO
from helpsteer_rloo.settings.parsing import parse_command

SOURCE = """
def brevity(completion_ids, **_):
    return [-float(len(ids)) for ids in completion_ids]

def politeness(completions, **_):
    return [None for _ in completions]

reward_model = brevity
number = 3
"""


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(SOURCE)
    (tmp_path / "broken_rewards.py").write_text("import nothing_of_this_name\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_functions_are_found_in_the_current_directory(rewards):
    brevity, politeness = load_reward_functions("own_rewards:brevity, own_rewards:politeness")
    assert brevity(completion_ids=[[1, 2]]) == [-2.0]
    assert politeness(completions=["a"]) == [None]
    assert load_reward_functions(None) == load_reward_functions(" , ") == []


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("brevity", "'brevity' is not of the form package.module:function"),
        ("own_rewards:", "'own_rewards:' is not of the form"),
        ("own_rewards:kindness", "own_rewards has no function 'kindness'"),
        ("own_rewards:number", "own_rewards has no function 'number'"),
        ("no_such_module_here:f", "cannot be imported .ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("broken_rewards:f", "No module named 'nothing_of_this_name'"),
        ("own_rewards:brevity,own_rewards:brevity", "two rewards are called 'brevity'"),
        ("own_rewards:brevity,own_rewards:reward_model", "two rewards are called 'brevity'"),
    ],
)
def test_what_cannot_be_called_is_refused_before_any_work(rewards, names, message):
    with pytest.raises(ValueError, match=message):
        check_rloo(parse_command(RLOO, ["--reward_functions", names]))


def test_weights_are_one_a_source():
    check_reward_weights("a:b", None)
    check_reward_weights("a:b", [1.0, 0.5])
    with pytest.raises(ValueError, match=r"has 1 weights for 2 rewards: reward_model, a:b, in this order"):
        check_reward_weights("a:b", [1.0])


def test_the_digest_follows_the_source(rewards):
    before = reward_functions_digest("own_rewards:brevity")
    assert before == reward_functions_digest(" own_rewards:brevity ")
    assert before != reward_functions_digest("own_rewards:politeness")
    (rewards / "own_rewards.py").write_text(SOURCE + "\n")
    assert before != reward_functions_digest("own_rewards:brevity")
    assert reward_functions_digest(None) is None
