import os
import signal
from dataclasses import asdict, replace

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from helpsteer_rloo.evaluation import reload, stock_scores
from helpsteer_rloo.evaluation.preference import Judgement, ScoredResponse, judge, spread_sample, summarize
from helpsteer_rloo.evaluation.reload import check_reload, fresh_process
from helpsteer_rloo.groups import Message, Preference, TokenGroup
from helpsteer_rloo.model.forward import score_sequences
from helpsteer_rloo.model.loading import Base


def preference(chosen, rejected, row=0, domain="general", strength=1):
    return Preference(chosen, rejected, strength, row, domain, "english")


def judgement(group, margin, domain="general", strength=1):
    return Judgement(
        group, preference(0, 1, domain=domain, strength=strength), ScoredResponse(margin), ScoredResponse(0.0)
    )


@pytest.fixture(scope="module")
def reward_model(tiny_base):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1).eval()


def test_each_pair_gets_the_scores_of_its_own_sequences(reward_model):
    prompt = (Message("user", "p"),)
    groups = [
        TokenGroup(prompt, (5, 6), ((7,), (8, 9), (10, 11)), (preference(0, 1, 3), preference(2, 0, 4))),
        TokenGroup(prompt, (12,), ((13, 14), (15,)), (preference(1, 0, 5),)),
    ]
    expected = score_sequences(reward_model, [(5, 6, 7), (5, 6, 8, 9), (5, 6, 10, 11), (12, 13, 14), (12, 15)], 1)
    got = [(j.group, j.preference.row, j.chosen.score, j.rejected.score) for j in judge(reward_model, groups, 2)]
    pairs = [(0, 3, 0, 1), (0, 4, 2, 0), (1, 5, 4, 3)]
    assert [row[:2] for row in got] == [pair[:2] for pair in pairs]
    for row, pair in zip(got, pairs, strict=True):
        assert row[2:] == pytest.approx((expected[pair[2]], expected[pair[3]]), abs=1e-6)


def test_a_tie_is_not_right_and_counts_are_by_domain_and_strength():
    result = summarize(
        [judgement(0, 1.0), judgement(0, 0.0), judgement(1, 2.0, "stem", 3), judgement(2, -1.0, "stem", 3)]
    )
    assert result["heldout_accuracy"] == 0.5
    assert (result["heldout_pairs"], result["heldout_prompts"]) == (4, 3)
    assert result["mean_margin"] == pytest.approx(0.5)
    assert {name: part["count"] for name, part in result["by_domain"].items()} == {"general": 2, "stem": 2}
    assert result["by_strength"]["3"]["value"] == 0.5
    assert not result["better_than_chance"]


def test_better_than_chance_needs_the_whole_interval_above_a_half():
    right, wrong = judgement(0, 1.0), judgement(0, -1.0)
    independent = [replace(j, group=i) for i, j in enumerate([right] * 70 + [wrong] * 30)]
    assert summarize(independent)["better_than_chance"]
    few_prompts = [replace(j, group=i // 50) for i, j in enumerate([right] * 70 + [wrong] * 30)]
    assert not summarize(few_prompts)["better_than_chance"]


def test_sample_predictions_are_spread_and_chosen_by_place():
    judgements = [judgement(i, 1.0) for i in range(10)]
    assert [j.group for j in spread_sample(judgements, 3)] == [0, 3, 6]
    assert len(spread_sample(judgements, 50)) == 10
    assert spread_sample(judgements, 0) == []


def test_a_reward_model_that_reloads_with_another_head_is_refused(reward_model, tmp_path):
    sequences = [[5, 6, 7], [8, 9]]
    reward_model.save_pretrained(tmp_path)
    expected = score_sequences(reward_model, sequences, 1)
    assert check_reload(tmp_path, sequences, expected, asdict(Base("x"))) <= 1e-5
    with torch.no_grad():
        reward_model.score.weight.mul_(1.5)
    changed = score_sequences(reward_model, sequences, 1)
    with pytest.raises(ValueError, match="does not give the scores of the one in memory"):
        check_reload(tmp_path, sequences, changed, asdict(Base("x")))


@pytest.mark.parametrize(
    ("dtype", "expected", "off", "agrees"),
    [
        ("bfloat16", [-12.0, 3.0], 0.25, True),  # four times the spacing of bfloat16 at 12
        ("bfloat16", [-12.0, 3.0], 0.7, False),
        ("bfloat16", [0.5, 0.2], 0.06, False),
        ("float32", [-12.0, 3.0], 1e-4, True),
        ("float32", [0.5, 0.2], 1e-4, False),
    ],
)
def test_rounding_grows_with_the_scores(monkeypatch, dtype, expected, off, agrees):
    monkeypatch.setattr(reload, "_in_a_fresh_process", lambda *_: [expected[0] + off, *expected[1:]])
    if agrees:
        assert check_reload("x", [], expected, {"dtype": dtype}) == pytest.approx(off)
        return
    with pytest.raises(ValueError, match="can be explained"):
        check_reload("x", [], expected, {"dtype": dtype})


def test_a_process_that_was_started_ahead_gives_the_same_answer(reward_model, tmp_path):
    sequences = [[5, 6, 7], [8, 9]]
    with fresh_process(stock_scores) as process:
        reward_model.save_pretrained(tmp_path)
        expected = score_sequences(reward_model, sequences, 1)
        assert check_reload(tmp_path, sequences, expected, asdict(Base("x")), process=process) <= 1e-5


def test_a_process_that_is_not_asked_ends_with_its_context():
    with fresh_process(stock_scores) as process:
        pid = process.pid
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_process_that_died_before_it_was_asked_is_no_proof(tmp_path):
    with fresh_process(stock_scores) as process:
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(ValueError, match="does not load in a fresh process"):
            check_reload(tmp_path, [[5]], [0.0], asdict(Base("x")), process=process)


def test_a_directory_that_does_not_load_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not load in a fresh process"):
        check_reload(tmp_path, [[5]], [0.0], asdict(Base("x")))


@pytest.mark.parametrize(("rows", "kept"), [(950, 500), (501, 500), (7, 3), (3, 7)])
def test_a_sample_reaches_to_the_end_with_distances_that_differ_by_one_at_the_most(rows, kept):
    places = [j.group for j in spread_sample([judgement(i, 1.0) for i in range(rows)], kept)]
    assert len(places) == min(rows, kept)
    distances = [b - a for a, b in zip(places, [*places[1:], rows], strict=True)]
    assert min(distances) >= 1
    assert max(distances) - min(distances) <= 1
