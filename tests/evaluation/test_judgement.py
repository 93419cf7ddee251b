"""What is said of a reward model, against faults that are planted in scores and labels, and cases computed by hand."""

import json
from dataclasses import replace
from math import exp, log

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import expit
from transformers import AutoModelForSequenceClassification

from helpsteer_rloo.data.demo import gold, preference_rows
from helpsteer_rloo.evaluation.biases import PROBES, feature_bias, probe_effects
from helpsteer_rloo.evaluation.calibration import calibration, fitted_temperature, reliability
from helpsteer_rloo.evaluation.ceiling import label_ceiling, most_certain
from helpsteer_rloo.evaluation.comparison import compare
from helpsteer_rloo.evaluation.findings import findings
from helpsteer_rloo.evaluation.preference import Judgement, ScoredResponse, judge, summarize
from helpsteer_rloo.evaluation.reward_model import judge_reward_model
from helpsteer_rloo.evaluation.text_features import markdown_marks, with_markdown
from helpsteer_rloo.groups import Message, Preference, TokenGroup
from helpsteer_rloo.model.forward import score_groups
from helpsteer_rloo.rendering import Renderer

PAIRS = 1200


def preference(row=0, domain="general", annotators=(), strength=1):
    return Preference(0, 1, strength, row, domain, "english", annotators=annotators)


def judged(chosen, rejected, row=0, group=None, domain="general", turns=1, length=0, annotators=()):
    sides = [side if isinstance(side, ScoredResponse) else ScoredResponse(side) for side in (chosen, rejected)]
    return Judgement(
        row if group is None else group,
        preference(row, domain, annotators),
        *sides,
        prompt="p",
        turns=turns,
        length=length,
    )


def whole(judgements):
    """The judgement of scores alone, without the probes, which need a model."""
    margins, owners = [j.margin for j in judgements], [j.group for j in judgements]
    result = {
        **summarize(judgements),
        "ceiling": label_ceiling([j.preference for j in judgements], owners),
        "most_certain": most_certain(margins, owners),
        "calibration": calibration(margins, owners),
        "biases": {
            name: feature_bias(judgements, what) for name, what in (("length", "tokens"), ("markdown", "markdown"))
        },
        "probes": {"position": 0.0},
    }
    return result, {finding.name: finding for finding in findings(result)}


# ---- accuracy in parts -----------------------------------------------------------------------------------------------


def test_accuracy_is_also_by_turns_and_length():
    judgements = [judged(1.0 if i % 2 else -1.0, 0.0, i, turns=1 + i % 6, length=10 * i) for i in range(40)]
    result = summarize(judgements)
    assert {name: part["count"] for name, part in result["by_turns"].items()} == {"1": 7, "2": 7, "3": 7, "4+": 19}
    assert result["by_turns"]["1"]["value"] == 0.0
    assert {name: part["count"] for name, part in result["by_length"].items()} == {
        "0 to 99": 10, "100 to 199": 10, "200 to 299": 10, "300 to 390": 10
    }  # fmt: skip


def test_pairs_of_one_length_are_one_class():
    result = summarize([judged(1.0, 0.0, i, length=7) for i in range(9)])
    assert list(result["by_length"]) == ["7 to 7"]


# ---- calibration -----------------------------------------------------------------------------------------------------


def test_reliability_and_ece_by_hand():
    margins = [log(0.95 / 0.05)] * 3 + [-log(0.95 / 0.05)] + [log(0.58 / 0.42), -log(0.58 / 0.42)]
    low, high = reliability(margins)
    assert (low["count"], low["right"], low["confidence"]) == (2, 0.5, pytest.approx(0.58))
    assert (high["count"], high["right"], high["confidence"]) == (4, 0.75, pytest.approx(0.95))
    found = calibration(margins, range(6))
    assert found["ece"]["value"] == pytest.approx((4 * 0.20 + 2 * 0.08) / 6)
    assert found["brier"]["value"] == pytest.approx((3 * 0.05**2 + 0.95**2 + 0.42**2 + 0.58**2) / 6)
    assert found["log_loss"]["value"] == pytest.approx(-(3 * log(0.95) + log(0.05) + log(0.58) + log(0.42)) / 6)


@pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
def test_the_temperature_of_drawn_labels_is_found(true):
    rng = np.random.default_rng(3)
    margins = rng.normal(0, 2 * true, 3000)
    labels = np.where(rng.random(3000) < expit(margins / true), 1, -1)
    assert fitted_temperature(margins * labels) == pytest.approx(true, rel=0.1)
    found = calibration((margins * labels).tolist(), range(3000))
    assert found["log_loss_with_temperature"]["value"] <= found["log_loss"]["value"] + 1e-3
    assert found["ece_with_temperature"]["value"] < 0.03
    if true == 1.0:
        assert found["ece"]["value"] < 0.03
        assert found["ece"]["value"] == pytest.approx(found["ece_if_calibrated"], abs=0.02)
    else:
        assert found["ece"]["interval"][0] > found["ece_if_calibrated"]


@pytest.mark.parametrize("margins", [[1.0, 2.0], [-1.0, -2.0], [2.0] * 5, [50.0] * 5, [0.0, 0.0], [1.0, -3.0]])
def test_there_is_no_temperature_where_none_is_wrong_or_the_mean_is_not_positive(margins):
    assert fitted_temperature(margins) is None


def test_a_cross_fitted_temperature_does_not_see_its_own_half():
    margins = [1.0, -1.0, 3.0, 3.0] * 20
    halves = [i % 2 for i in range(80)]  # two prompts
    found = calibration(margins, halves)
    even, odd = margins[::2], margins[1::2]
    t_even, t_odd = fitted_temperature(even), fitted_temperature(odd)
    assert t_even is None
    assert t_odd is not None
    expected = [log(1 + exp(-m / t_odd)) for m in even] + [log(1 + exp(-m)) for m in odd]
    assert found["log_loss_with_temperature"]["value"] == pytest.approx(np.mean(expected))


# ---- the ceiling of the labels ---------------------------------------------------------------------------------------


def test_the_ceiling_is_that_of_the_truth_in_the_demo_world():
    """The demo knows the true difference: how often its labels are right can be counted, and compared."""
    preferences, right = [], []
    for row in preference_rows(5, 6000):
        overall = row["overall_preference"]
        if row["domain"] not in ("general", "stem") or overall == 0 or not (row["response1"] and row["response2"]):
            continue
        ask = row["context"][-1]["content"]
        true = gold(ask, row["response2"], True) - gold(ask, row["response1"], True)
        side = 1 if overall > 0 else -1
        preferences.append(preference(annotators=tuple(side * a["score"] for a in row["individual_preference"])))
        right.append(0.5 if true == 0 else float(side * true > 0))
    found = label_ceiling(preferences, range(len(preferences)))
    assert found["accuracy"]["value"] == pytest.approx(np.mean(right), abs=0.02)
    assert found["contradicted"]["value"] == 0.0
    assert found["annotator_agreement"]["value"] > 0.9


def test_labels_damaged_after_they_were_given_are_contradicted_by_their_annotators():
    rng = np.random.default_rng(0)
    preferences = []
    for i in range(1000):
        true = rng.normal(0, 1.5)
        seen = [int(np.clip(round(true + rng.normal(0, 0.5)), -3, 3)) for _ in range(3)]
        side = 1 if sum(seen) > 0 else -1
        side = -side if rng.random() < 0.3 else side
        preferences.append(preference(i, annotators=tuple(side * score for score in seen)))
    found = label_ceiling(preferences, range(1000))
    assert found["contradicted"]["interval"][0] > 0.2
    assert found["accuracy"]["value"] < 0.75


def test_the_ceiling_by_hand():
    preferences = [preference(annotators=(2, 2)), preference(annotators=(1, -1)), preference(annotators=(3, 1))]
    found = label_ceiling([*preferences, preference()], range(4))
    noise = (0 + 2 + 2) / 3  # variances of the three, with n - 1
    spread = (4 + 0 + 4) / 3 - noise / 2
    shrink = spread / (spread + noise / 2)
    sure = stats.norm.cdf(shrink * 2 / (spread * (1 - shrink)) ** 0.5)
    assert found["accuracy"]["value"] == pytest.approx((2 * sure + 0.5) / 3)
    assert found["annotator_agreement"]["value"] == pytest.approx(5 / 6)
    assert found["pairs_without_annotators"] == 1


def test_there_is_no_ceiling_without_annotators():
    assert label_ceiling([preference(), preference(annotators=(1,))], [0, 1]) is None


def test_annotators_that_agree_no_more_than_by_chance_leave_a_coin():
    found = label_ceiling([preference(annotators=(3, -3)), preference(annotators=(-3, 3))], [0, 1])
    assert found["accuracy"]["value"] == 0.5


def test_equal_scores_are_said_and_accuse_no_label():
    _, found = whole([judged(0.0, 0.0, i, domain=("general", "stem")[i % 2]) for i in range(100)])
    assert found["ties"].value == 1.0
    assert found["ties"].concern
    assert "accuracy/general" not in found
    assert found["most_certain"].value == 0.5


def test_a_weak_model_that_knows_it_is_not_said_to_be_sure_of_the_wrong_thing():
    rng = np.random.default_rng(4)
    margins = rng.normal(0, 0.4, 1000)
    labels = np.where(rng.random(1000) < expit(margins), 1, -1)
    _, found = whole([judged(m, 0.0, i) for i, m in enumerate((margins * labels).tolist())])
    assert "it has learned little" in found["most_certain"].sentence
    assert "confident" not in found["calibration"].sentence


def test_pairs_of_which_the_chosen_is_always_longer_have_no_gap():
    pairs = [judged(ScoredResponse(1.0, 9), ScoredResponse(0.0, 3), i) for i in range(5)]
    found = feature_bias(pairs, "tokens")
    assert found["accuracy_gap"] is None
    assert found["accuracy_chosen_less"] is None
    json.dumps(found, allow_nan=False)


def test_a_score_that_is_no_number_names_its_row(reward_model, monkeypatch):
    group = TokenGroup((Message("user", "p"),), (5,), ((6,), (7,)), (preference(31),))
    monkeypatch.setattr("helpsteer_rloo.evaluation.preference.score_groups", lambda *_: [[float("nan"), 1.0]])
    with pytest.raises(ValueError, match=r"A score of row 31 .* is not finite"):
        judge(reward_model, [group], 2)


def test_pieces_of_a_prompt_that_was_cut_are_one_prompt(reward_model):
    pieces = [
        TokenGroup((Message("user", "p"),), (5, n), ((6,), (7,)), (replace(preference(n), first_row=3),))
        for n in (3, 4)
    ]
    assert [j.group for j in judge(reward_model, pieces, 2)] == [3, 3]


def test_most_certain_takes_the_widest_margins():
    margins = [5.0, -4.0, 3.0, 0.1, -0.1, 0.1, -0.1, 0.1, -0.1, 0.1]
    assert most_certain(margins, range(10))["value"] == 0.5
    assert most_certain(margins, range(10))["count"] == 2


# ---- faults that are planted in scores -------------------------------------------------------------------------------


def world(rng, *, length_weight=0.0, markdown_weight=0.0, noise=0.0, inverted=()):
    """Pairs whose quality is known, scored by a model with the faults given."""
    judgements = []
    for i in range(PAIRS):
        quality, domain = rng.normal(0, 1, 2), ("general", "stem")[i % 2]
        tokens, marks = rng.integers(5, 50, 2), rng.integers(0, 4, 2)
        scores = (-1 if domain in inverted else 1) * quality + length_weight * tokens / 20 + markdown_weight * marks
        sides = [ScoredResponse(float(scores[k]), int(tokens[k]), int(marks[k])) for k in (0, 1)]
        first = (quality[0] > quality[1]) != (rng.random() < noise)
        judgements.append(judged(*(sides if first else sides[::-1]), row=i, group=i // 2, domain=domain))
    return judgements


def test_a_model_without_a_fault_raises_no_concern():
    _, found = whole(world(np.random.default_rng(0)))
    assert [name for name, finding in found.items() if finding.concern and name != "calibration"] == []
    assert found["bias/length"].interval[0] <= 0 <= found["bias/length"].interval[1]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("what", ["length", "markdown"])
def test_a_planted_bias_is_found_with_its_sign(what, sign):
    weights = {f"{what}_weight": 0.7 * sign}
    result, found = whole(world(np.random.default_rng(1), **weights))
    bias = found[f"bias/{what}"]
    assert bias.concern
    assert min(sign * end for end in bias.interval) > 0
    gap = result["biases"][what]["accuracy_gap"]
    assert min(sign * end for end in gap["interval"]) > 0
    assert f"likes {what} {'more' if sign > 0 else 'less'}" in bias.sentence
    other = found["bias/markdown" if what == "length" else "bias/length"]
    assert not other.concern


def test_inverted_labels_in_one_domain_are_found():
    _, found = whole(world(np.random.default_rng(2), inverted=("stem",)))
    assert found["accuracy/stem"].interval[1] < 0.5
    assert "accuracy/general" not in found
    assert found["accuracy"].concern  # half right, half wrong


def test_noise_in_labels_is_found_where_the_model_is_most_certain():
    _, found = whole(world(np.random.default_rng(3), noise=0.3))
    certain = found["most_certain"]
    assert certain.concern
    assert certain.interval[0] <= 0.7 <= certain.interval[1]


def test_a_feature_in_which_no_pair_differs_has_no_bias():
    judgements = [judged(ScoredResponse(1.0, 5), ScoredResponse(0.0, 5), i) for i in range(3)]
    assert feature_bias(judgements, "tokens") is None


def test_a_bias_by_hand():
    long, short = (lambda score: ScoredResponse(score, 9)), (lambda score: ScoredResponse(score, 3))
    judgements = [
        judged(long(2), short(1), 0),
        judged(short(1), long(2), 1),
        judged(short(2), long(1), 2),
        judged(1, 0, 3),
    ]
    found = feature_bias(judgements, "tokens")
    assert found["model_prefers_more"]["value"] == pytest.approx(2 / 3)
    assert found["labels_prefer_more"]["value"] == pytest.approx(1 / 3)
    assert found["bias"]["value"] == pytest.approx(1 / 3)
    assert found["accuracy_chosen_more"]["value"] == 1.0
    assert found["accuracy_chosen_less"]["value"] == 0.5
    assert found["accuracy_gap"]["value"] == 0.5
    assert found["rank_correlation"]["value"] == pytest.approx(1 / 3)


# ---- probes, with a model --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_model(tiny_base):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1).eval()


def test_probes_are_scores_of_the_changed_text(reward_model, tokenizer):
    renderer = Renderer(tokenizer)
    prompt = (Message("user", "List 2 trees."),)
    texts = ("oak, elm, ash.", "elm")
    ids = tuple(renderer.continuation_ids(text, ended=True) for text in texts)
    group = TokenGroup(prompt, renderer.prompt_ids(prompt), ids, (preference(),))
    found = probe_effects(reward_model, renderer, [group] * 2, 8, 96)
    changed = {
        "markdown": renderer.continuation_ids("## Answer\n\n- **oak,** elm, ash.", ended=True),
        "repetition": renderer.continuation_ids("oak, elm, ash. oak, elm, ash.", ended=True),
        "truncation": renderer.continuation_ids("oak, el", ended=False),
    }
    assert found.keys() == {*changed, "position", "over_max_length"}
    own = TokenGroup(prompt, group.prompt_ids, (ids[0], *changed.values()))
    (scores,) = score_groups(reward_model, [own], 8)
    for name, score in zip(changed, scores[1:], strict=True):
        assert found[name]["change"]["value"] == pytest.approx(score - scores[0], abs=1e-6)
        assert found[name]["raised"]["value"] == float(score > scores[0])
    assert found["position"] < 1e-5


def test_answers_that_a_change_makes_too_long_are_counted(reward_model, tokenizer):
    renderer = Renderer(tokenizer)
    prompt = (Message("user", "p"),)
    ids = tuple(renderer.continuation_ids(text, ended=True) for text in ("oak " * 20, "elm"))
    group = TokenGroup(prompt, renderer.prompt_ids(prompt), ids, (preference(),))
    found = probe_effects(reward_model, renderer, [group], 8, len(group.prompt_ids) + len(ids[0]))
    assert found == {"over_max_length": 1, "position": found["position"]}
    assert not PROBES.keys() & found.keys()


def test_a_whole_judgement_has_all_its_parts(reward_model, tokenizer):
    renderer = Renderer(tokenizer)
    groups = []
    for i in range(6):
        prompt = (Message("user", f"List {i} trees."),)
        ids = tuple(renderer.continuation_ids(text, ended=True) for text in ("oak, elm", "# a\n- b", "ash"))
        pairs = (preference(2 * i, annotators=(1, 2)), Preference(2, 1, 1, 2 * i + 1, "stem", "english"))
        groups.append(TokenGroup(prompt, renderer.prompt_ids(prompt), ids, pairs))
    judgements, result = judge_reward_model(reward_model, renderer, groups, 8, 96)
    assert len(judgements) == 12
    assert judgements[0].rejected.markdown == 2
    assert judgements[0].length == len(groups[0].prompt_ids) + max(map(len, groups[0].continuation_ids[:2]))
    names = {finding["name"] for finding in result["findings"]}
    assert {"accuracy", "calibration", "most_certain", "bias/length", "bias/markdown", "position"} <= names
    assert {f"probe/{name}" for name in PROBES} <= names


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ("plain text", 0),
        ("# a\n## b", 2),
        ("- a\n* b\n1. c\n2) d", 4),
        ("**a** and **b**", 2),
        ("```\nx\n```", 2),
        ("2*3", 0),
    ],
)
def test_marks_of_markdown_are_counted(text, marks):
    assert markdown_marks(text) == marks


def test_text_in_markdown_has_marks():
    assert markdown_marks(with_markdown("one line\nanother")) == 5


# ---- comparison ------------------------------------------------------------------------------------------------------


def test_models_are_compared_on_the_pairs_that_both_judged():
    first = [judged(m, 0.0, row, group=row // 2) for row, m in enumerate([1.0, -1.0, -1.0, 2.0, 1.0])]
    second = [judged(m, 0.0, row, group=row // 2) for row, m in enumerate([1.0, 1.0, 3.0, -1.0])]
    found = compare({"a": first, "b": second})
    assert found["pairs"] == 4
    assert found["left_out"] == {"a": 1, "b": 0}
    assert found["accuracy"]["a"]["value"] == 0.5
    (pair,) = found["compared"]
    assert (pair["only_first_right"], pair["only_second_right"]) == (1, 2)
    assert pair["difference"]["value"] == 0.25
    assert pair["mcnemar_p"] == pytest.approx(stats.binomtest(2, 3).pvalue)
    assert pair["agreement"] == 0.25
    assert found["agreement"]["a"] == {"a": 1.0, "b": 0.25}
    assert [row["row"] for row in pair["disagreements"]] == [2, 3, 1]
    assert pair["disagreements"][0]["right"] == "second"
    expected = stats.spearmanr([1, -1, -1, 2], [1, 1, 3, -1]).statistic
    assert pair["rank_correlation"] == pytest.approx(expected)


def test_a_better_model_is_better_with_an_interval_that_excludes_zero():
    rng = np.random.default_rng(0)
    quality = rng.normal(1, 1, 800)
    sides = {name: quality + rng.normal(0, noise, 800) for name, noise in (("noisy", 3.0), ("good", 0.5))}
    found = compare({name: [judged(m, 0.0, i) for i, m in enumerate(values)] for name, values in sides.items()})
    assert found["compared"][0]["difference"]["interval"][0] > 0
    assert found["compared"][0]["mcnemar_p"] < 1e-3


def test_rows_of_other_data_are_not_compared():
    other = replace(judged(1.0, 0.0, 0), prompt="another")
    with pytest.raises(ValueError, match="judged on different pairs"):
        compare({"a": [judged(1.0, 0.0, 0)], "b": [other]})


def test_models_that_share_no_pair_cannot_be_compared():
    with pytest.raises(ValueError, match="No pair was judged by all"):
        compare({"a": [judged(1.0, 0.0, 0)], "b": [judged(1.0, 0.0, 1)]})


def test_the_interval_of_the_calibration_error_holds_it():
    rng = np.random.default_rng(0)
    for _ in range(20):
        margins = rng.normal(0.8, 1.5, 200).tolist()
        ece = calibration(margins, range(200))["ece"]
        assert ece["interval"][0] <= ece["value"] <= ece["interval"][1]
    assert calibration([0.3, -0.2], ["one", "one"])["ece"]["interval"] == [None, None]


def test_a_comparison_says_what_its_difference_means():
    first = [judged(1.0 if row % 4 else -1.0, 0.0, row=row) for row in range(200)]
    second = [judged(1.0, 0.0, row=row) for row in range(200)]
    better = compare({"a": first, "b": second})["compared"][0]["sentence"]
    assert better.startswith("b is better than a: right more often by +25.0% of the pairs [")
    assert compare({"a": first, "b": first})["compared"][0]["sentence"].startswith("b is not significantly better")
