"""Groups that fit the length limit: cuts, drops, regrouping, and a report in which every number can be checked."""

import math
from collections import Counter

import numpy as np
import pytest

from helpsteer_rloo.data.helpsteer3 import hash_share, prompt_key
from helpsteer_rloo.data.preparation import FitCounts, prepare, rollout_prompts, tokenize_groups
from helpsteer_rloo.groups import Continuation, Message, Preference, PromptGroup
from helpsteer_rloo.rendering import Renderer
from helpsteer_rloo.settings.knobs import DataKnobs
from tests.data.rows import make_row, turns, write_jsonl

LONG = tuple(
    Message(t["role"], t["content"]) for t in turns("one two three", "four five", "six seven", "eight", "nine?")
)


@pytest.fixture(scope="module")
def renderer(tokenizer):
    return Renderer(tokenizer)


@pytest.fixture
def source(tmp_path):
    """A data set with three training prompts, one of them with two pairs, and two held-out ones."""
    train = [
        make_row("p", "oak, elm", "oak", overall_preference=-3),
        make_row("q", "ash", "ash, pine", overall_preference=1, domain="stem"),
        make_row("p", "oak", "birch", overall_preference=2),
        make_row("r", "tie", "tied", overall_preference=0),
        make_row("s", "willow", "maple"),
        make_row("t", language="german"),
        make_row("v", "leak", "leaks"),
    ]
    write_jsonl(tmp_path / "source" / "train.jsonl", train)
    write_jsonl(tmp_path / "source" / "validation.jsonl", [make_row("v", "a b", "c d"), make_row("w", "e", "f g h")])
    return tmp_path / "source"


def group_of(prompt, *responses, labels=((0, 1),)):
    """A group in which every label `(chosen, rejected)` is one pair of strength 2."""
    preferences = tuple(
        Preference(c, r, 2, row, "general", "english", chosen_response=1) for row, (c, r) in enumerate(labels)
    )
    return PromptGroup(tuple(prompt), tuple(Continuation(text) for text in responses), preferences)


def tokenize(group, renderer, max_length, overlong="cut"):
    counts = FitCounts()
    knobs = DataKnobs(max_length=max_length, overlong=overlong)
    return tokenize_groups([group], renderer, knobs, counts), counts


def ended(renderer, text):
    return renderer.continuation_ids(text, ended=True)


# ---- the length limit ------------------------------------------------------------------------------------------------


def test_a_pair_that_fits_is_rendered_whole(renderer):
    group = group_of(LONG, "oak, elm", "oak")
    prompt, responses = renderer.prompt_ids(LONG), (ended(renderer, "oak, elm"), ended(renderer, "oak"))
    exact = len(prompt) + max(map(len, responses))
    (made,), counts = tokenize(group, renderer, exact)
    assert (made.prompt, made.prompt_ids, made.continuation_ids) == (LONG, prompt, responses)
    assert made.preferences == group.preferences
    assert (counts.over_max_length, counts.context_cut, counts.response_cut, dict(counts.dropped)) == (0, 0, 0, {})


def test_one_token_too_many_cuts_the_oldest_exchange_and_no_response(renderer):
    group = group_of(LONG, "oak, elm", "oak")
    exact = len(renderer.prompt_ids(LONG)) + len(ended(renderer, "oak, elm"))
    (made,), counts = tokenize(group, renderer, exact - 1)
    assert made.prompt == LONG[2:]
    assert made.prompt_ids == renderer.prompt_ids(LONG[2:])
    assert made.continuation_ids == (ended(renderer, "oak, elm"), ended(renderer, "oak"))
    assert (counts.over_max_length, counts.context_cut, counts.response_cut) == (1, 1, 0)


def test_a_response_longer_than_what_is_left_is_cut_and_has_no_end_of_turn(renderer):
    long, short = "oak elm ash pine " * 20, "oak"
    prompt, limit = renderer.prompt_ids(LONG[-1:]), 64
    room = limit - len(prompt)
    (made,), counts = tokenize(group_of(LONG, short, long), renderer, limit)
    assert made.prompt == LONG[-1:]
    kept_short, kept_long = made.continuation_ids
    assert kept_short == ended(renderer, short)
    assert kept_long == ended(renderer, long)[:room]
    assert len(made.sequence(1)) == limit
    assert renderer.end_of_turn_id not in kept_long
    assert (counts.over_max_length, counts.context_cut, counts.response_cut) == (1, 1, 1)


def test_a_response_that_fills_the_room_exactly_keeps_its_end_of_turn(renderer):
    text = "oak elm ash pine " * 3
    limit = len(renderer.prompt_ids(LONG[-1:])) + len(ended(renderer, text))
    (made,), counts = tokenize(group_of(LONG, text, "oak"), renderer, limit)
    assert made.continuation_ids[0] == ended(renderer, text)
    assert (counts.context_cut, counts.response_cut) == (1, 0)


def test_one_token_less_takes_the_end_of_turn_first(renderer):
    text = "oak elm ash pine " * 3
    limit = len(renderer.prompt_ids(LONG[-1:])) + len(ended(renderer, text)) - 1
    (made,), counts = tokenize(group_of(LONG, text, "oak"), renderer, limit)
    assert made.continuation_ids[0] == renderer.continuation_ids(text, ended=False)
    assert counts.response_cut == 1


def test_a_continuation_that_was_cut_off_at_its_source_gains_no_end_of_turn(renderer):
    group = PromptGroup(LONG, (Continuation("oak", ended=False), Continuation("elm")), group_of(LONG).preferences)
    (made,), _ = tokenize(group, renderer, 512)
    assert made.continuation_ids == (renderer.continuation_ids("oak", ended=False), ended(renderer, "elm"))


def test_overlong_pairs_are_dropped_and_counted_if_asked(renderer):
    group = group_of(LONG, "oak", "elm", "oak elm ash pine " * 5, labels=((0, 1), (2, 0)))
    limit = len(renderer.prompt_ids(LONG)) + len(ended(renderer, "oak")) + 2
    (made,), counts = tokenize(group, renderer, limit, overlong="drop")
    assert made.prompt == LONG
    assert [p.row for p in made.preferences] == [0]
    assert len(made.continuation_ids) == 2
    assert (counts.over_max_length, counts.context_cut, counts.response_cut) == (1, 0, 0)
    assert dict(counts.dropped) == {"over_max_length": 1}


def test_a_pair_that_the_cut_makes_identical_is_dropped_and_counted(renderer):
    same = "oak elm ash pine " * 20
    made, counts = tokenize(group_of(LONG, same + "birch", same + "maple"), renderer, 64)
    assert made == []
    assert dict(counts.dropped) == {"identical_after_cut": 1}
    assert (counts.over_max_length, counts.context_cut, counts.response_cut) == (1, 0, 0)


def test_a_prompt_that_leaves_no_room_is_dropped_and_counted(renderer):
    prompt = [Message("user", "one two three four five " * 20)]
    made, counts = tokenize(group_of(prompt, "oak", "elm"), renderer, 64)
    assert made == []
    assert dict(counts.dropped) == {"prompt_over_max_length": 1}


def test_no_sequence_is_ever_longer_than_the_limit(renderer):
    texts, labels = ("oak " * 5, "elm " * 10, "ash " * 30, "pine"), ((0, 1), (1, 2), (3, 0), (2, 3))
    group, prompt = group_of(LONG, *texts, labels=labels), len(renderer.prompt_ids(LONG))
    pairs = [max(len(ended(renderer, texts[i])) for i in label) for label in labels]
    for limit in range(16, prompt + max(pairs) + 2):
        made, counts = tokenize(group, renderer, limit)
        kept = [p for g in made for p in g.preferences]
        lengths = [len(g.sequence(i)) for g in made for i in range(len(g.continuation_ids))]
        assert all(length <= limit for length in lengths)
        assert len(kept) + sum(counts.dropped.values()) == 4
        assert all(p.chosen != p.rejected for p in kept)
        assert counts.over_max_length == sum(prompt + longest > limit for longest in pairs)


# ---- groups ----------------------------------------------------------------------------------------------------------


def test_pairs_whose_prompt_was_cut_differently_part_and_the_others_stay_together(renderer):
    long = "oak elm ash pine " * 4
    group = group_of(LONG, "oak", "elm", long, "ash", labels=((0, 1), (2, 0), (1, 3), (3, 2)))
    limit = len(renderer.prompt_ids(LONG)) + len(ended(renderer, "oak")) + 3
    whole, cut = tokenize(group, renderer, limit)[0]
    assert (whole.prompt, [p.row for p in whole.preferences]) == (LONG, [0, 2])
    assert whole.continuation_ids == tuple(ended(renderer, text) for text in ("oak", "elm", "ash"))
    assert [(p.chosen, p.rejected) for p in whole.preferences] == [(0, 1), (1, 2)]
    assert (cut.prompt[0].role, [p.row for p in cut.preferences]) == ("user", [1, 3])
    assert len(cut.prompt) < len(LONG)
    assert cut.continuation_ids[1:] == (ended(renderer, "oak"), ended(renderer, "ash"))
    assert [(p.chosen, p.rejected) for p in cut.preferences] == [(0, 1), (2, 0)]


def test_labels_keep_pointing_at_their_own_responses(renderer):
    texts = ("oak", "elm", "ash", "pine")
    labels = ((3, 0), (1, 2), (0, 2), (2, 3))
    (made,), _ = tokenize(group_of(LONG, *texts, labels=labels), renderer, 512)
    pairs = [(made.continuation_ids[p.chosen], made.continuation_ids[p.rejected]) for p in made.preferences]
    assert pairs == [(ended(renderer, texts[c]), ended(renderer, texts[r])) for c, r in labels]


def test_a_group_without_any_pair_left_is_left_out(renderer):
    assert tokenize(group_of(LONG, "oak", "elm", labels=()), renderer, 512)[0] == []


# ---- a whole data set ------------------------------------------------------------------------------------------------


def test_the_report_counts_every_row_by_what_became_of_it(source, renderer):
    report = prepare(DataKnobs(dataset_name=str(source)), renderer).report
    assert report["rows"] == 9
    assert report["not_selected"] == {"language": 1}
    assert report["selected"] == 8
    assert report["ties"] == 1
    assert report["empty_responses"] == 0
    assert report["dropped"] == {"tie": 1, "prompt_in_validation": 1}
    assert report["pairs"] == 6
    assert report["rows"] == report["pairs"] + sum(report["dropped"].values()) + sum(report["not_selected"].values())
    assert report["prompts"] == 6
    assert report["prompts_in_two_splits"] == 0
    assert report["files"] == ["train.jsonl", "validation.jsonl"]
    assert report["source"] == str(source)


def test_the_report_describes_each_split(source, renderer):
    splits = prepare(DataKnobs(dataset_name=str(source)), renderer).report["splits"]
    train, validation = splits["train"], splits["validation"]
    assert (train["pairs"], train["prompts"]) == (4, 3)
    assert train["domains"] == {"general": 3, "stem": 1}
    assert train["languages"] == {"english": 4}
    assert train["strengths"] == {"1": 1, "2": 2, "3": 1}
    assert (validation["pairs"], validation["prompts"], validation["strengths"]) == (2, 2, {"2": 2})


def test_the_percentiles_are_those_of_the_pairs_before_any_cut(source, renderer):
    tokens = prepare(DataKnobs(dataset_name=str(source)), renderer).report["splits"]["train"]["tokens"]
    pairs = [("p", "oak, elm", "oak"), ("p", "birch", "oak"), ("q", "ash, pine", "ash"), ("s", "willow", "maple")]
    lengths = {
        "prompt": [len(renderer.prompt_ids([Message("user", prompt)])) for prompt, _, _ in pairs],
        "chosen": [len(ended(renderer, chosen)) for _, chosen, _ in pairs],
        "rejected": [len(ended(renderer, rejected)) for _, _, rejected in pairs],
    }
    for name, values in lengths.items():
        assert tokens[name]["p50"] == pytest.approx(np.median(values))
        assert tokens[name]["p100"] == max(values)
        assert list(tokens[name]) == ["p50", "p90", "p95", "p99", "p100"]
        assert list(tokens[name].values()) == sorted(tokens[name].values())


def test_the_tokens_of_the_splits_are_those_of_the_rows(source, renderer):
    prepared = prepare(DataKnobs(dataset_name=str(source)), renderer)
    first = prepared.groups["train"][0]
    assert first.prompt_ids == renderer.prompt_ids([Message("user", "p")])
    chosen = [first.continuation_ids[p.chosen] for p in first.preferences]
    assert chosen == [ended(renderer, "oak, elm"), ended(renderer, "birch")]
    assert prepared.heldout_prompts == sorted(prompt_key([Message("user", name)]) for name in "vw")


def test_what_the_limit_did_is_summed_over_the_splits(source, renderer):
    long = [make_row("x", "oak elm ash pine " * 40, "oak"), make_row("y", "oak " * 99, "oak " * 99 + "elm")]
    write_jsonl(source / "train-2.jsonl", long)
    cut = prepare(DataKnobs(dataset_name=str(source), max_length=64), renderer).report
    assert cut["overlong"] == {"policy": "cut", "over_max_length": 2, "context_cut": 0, "response_cut": 1}
    assert cut["dropped"]["identical_after_cut"] == 1
    assert cut["pairs"] == 7
    dropped = prepare(DataKnobs(dataset_name=str(source), max_length=64, overlong="drop"), renderer).report
    assert dropped["overlong"] == {"policy": "drop", "over_max_length": 2, "context_cut": 0, "response_cut": 0}
    assert dropped["dropped"]["over_max_length"] == 2
    assert dropped["pairs"] == 6


def test_two_runs_on_the_same_data_have_the_same_fingerprint_and_report(source, renderer):
    knobs = DataKnobs(dataset_name=str(source))
    assert prepare(knobs, renderer).report == prepare(knobs, renderer).report


@pytest.mark.parametrize(
    "change",
    [
        make_row("p", "oak, elm", "oak", overall_preference=3),
        make_row("p", "oak, elm", "oak", overall_preference=-2),
        make_row("p", "oak, elm.", "oak", overall_preference=-3),
        make_row("P", "oak, elm", "oak", overall_preference=-3),
    ],
    ids=["label", "strength", "response", "prompt"],
)
def test_a_change_of_any_row_that_is_used_changes_the_fingerprint(change, source, tmp_path, renderer):
    base = [make_row("p", "oak, elm", "oak", overall_preference=-3), make_row("q", "x", "y")]
    fingerprints = []
    for name, rows in (("before", base), ("after", [change, base[1]])):
        write_jsonl(tmp_path / name / "train.jsonl", rows)
        write_jsonl(tmp_path / name / "validation.jsonl", [make_row("v", "a", "b")])
        fingerprints.append(prepare(DataKnobs(dataset_name=str(tmp_path / name)), renderer).report["fingerprint"])
    assert fingerprints[0] != fingerprints[1]


def test_no_prompt_is_in_two_splits_after_the_cut_either(tmp_path, renderer):
    def long(first, second):
        return turns("one two three four five " * 6 + first, second, "continue")

    train = [make_row(context=long("a", "b")), make_row("other")]
    write_jsonl(tmp_path / "train.jsonl", train)
    write_jsonl(tmp_path / "validation.jsonl", [make_row(context=long("x", "y"))])
    groups = prepare(DataKnobs(dataset_name=str(tmp_path), max_length=64), renderer).groups
    assert [g.prompt[-1].content for g in groups["validation"]] == ["continue"]
    assert not {g.prompt_ids for g in groups["train"]} & {g.prompt_ids for g in groups["validation"]}


def test_limits_and_rendering_that_change_the_tokens_change_the_fingerprint(source, tokenizer, renderer):
    knobs = {"dataset_name": str(source)}
    write_jsonl(source / "train-2.jsonl", [make_row("x", "oak elm ash pine " * 40, "oak")])
    prints = [
        prepare(DataKnobs(**knobs), renderer).report["fingerprint"],
        prepare(DataKnobs(**knobs, max_length=64), renderer).report["fingerprint"],
        prepare(DataKnobs(**knobs, max_length=64, overlong="drop"), renderer).report["fingerprint"],
        prepare(DataKnobs(**knobs), Renderer(tokenizer, thinking=True)).report["fingerprint"],
    ]
    assert len(set(prints)) == 4


def test_a_row_that_is_not_used_changes_the_source_but_not_the_fingerprint(source, renderer):
    knobs = DataKnobs(dataset_name=str(source))
    before = prepare(knobs, renderer).report
    write_jsonl(source / "train-2.jsonl", [make_row("t", language="german")])
    after = prepare(knobs, renderer).report
    assert after["fingerprint"] == before["fingerprint"]
    assert after["source_digest"] != before["source_digest"]


def test_an_empty_split_is_refused_with_the_counts_and_the_knobs_to_turn(tmp_path, renderer):
    rows = [make_row("p"), make_row("q", overall_preference=0)]
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert hash_share(prompt_key([Message("user", "p")])) > 0.05
    knobs = DataKnobs(dataset_name=path, validation_fraction=0.05)
    with pytest.raises(ValueError, match="no pair is left in the validation split") as caught:
        prepare(knobs, renderer)
    assert str(caught.value) == (
        f"{path}: no pair is left in the validation split (1 pairs on 2 prompts in all, dropped: {{'tie': 1}}); "
        f"--max_length is 1024 and --validation_fraction 0.05; hold out more, or use more rows."
    )
    prepared = prepare(knobs, renderer, allow_empty_split=True)
    assert [len(prepared.groups[split]) for split in ("train", "validation")] == [1, 0]
    assert prepared.report["splits"]["validation"]["tokens"] == {}


def test_a_split_that_the_limit_empties_is_refused_with_the_limit(source, renderer):
    long = "one two three four five " * 50
    write_jsonl(source / "train.jsonl", [make_row(long)])
    with pytest.raises(ValueError, match="no pair is left in the train split") as caught:
        prepare(DataKnobs(dataset_name=str(source), max_length=64), renderer)
    assert "'prompt_over_max_length': 1" in str(caught.value)
    assert "--max_length is 64" in str(caught.value)


def test_a_report_holds_no_number_that_json_cannot(source, renderer):
    def numbers(value):
        if isinstance(value, dict):
            return [n for item in value.values() for n in numbers(item)]
        return [value] if isinstance(value, (int, float)) else []

    report = prepare(DataKnobs(dataset_name=str(source)), renderer).report
    found = numbers(report)
    assert len(found) > 40
    assert all(type(n) in (int, float) and math.isfinite(n) for n in found)


# ---- prompts for sampling --------------------------------------------------------------------------------------------


def test_rollout_prompts_are_cut_at_turn_boundaries_counted_and_left_out_if_too_long(renderer):
    short, too_long = (Message("user", "a"),), (Message("user", "one two three four five " * 30),)
    limit = len(renderer.prompt_ids(LONG)) - 1
    counts = Counter()
    made = rollout_prompts([group_of(p, "x", "y") for p in (short, LONG, too_long)], renderer, limit, counts)
    assert [group.prompt for group in made] == [short, LONG[2:]]
    assert [group.prompt_ids for group in made] == [renderer.prompt_ids(short), renderer.prompt_ids(LONG[2:])]
    assert all(group.continuation_ids == () and group.preferences == () for group in made)
    assert counts == {"prompts": 2, "context_cut": 1, "prompt_too_long": 1}


def test_a_rollout_prompt_may_fill_its_limit_exactly(renderer):
    exact, counts = len(renderer.prompt_ids(LONG)), Counter()
    (made,) = rollout_prompts([group_of(LONG, "x", "y")], renderer, exact, counts)
    assert made.prompt == LONG
    assert counts["context_cut"] == 0


def test_prompts_that_a_cut_makes_equal_are_sampled_for_once(renderer):
    long = "word " * 60
    groups = [
        PromptGroup((Message("user", long + name), Message("assistant", "yes"), Message("user", "go on")), ())
        for name in ("a", "b")
    ]
    counts = Counter()
    kept = rollout_prompts(groups, renderer, 40, counts)
    assert len(kept) == 1
    assert dict(counts) == {"prompts": 1, "context_cut": 1, "equal_after_cut": 1}
