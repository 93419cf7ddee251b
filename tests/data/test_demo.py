"""The demo world: its gold reward by hand, the polarity and noise of its labels, and its determinism."""

import json
import random
from itertools import islice
from pathlib import Path

import pytest

from helpsteer_rloo.data.demo import (
    CATEGORIES,
    PreferenceRow,
    Spec,
    all_specs,
    answer,
    conversation,
    gold,
    parse_prompt,
    preference_rows,
    prompt,
    sft_conversations,
    write_rows,
)

TREES = Spec(4, "trees", "slashes", "lower case", "a full stop")


@pytest.fixture(scope="module")
def rows() -> list[PreferenceRow]:
    return list(preference_rows(seed=7, rows=4000))


@pytest.fixture(scope="module")
def english(rows: list[PreferenceRow]) -> list[PreferenceRow]:
    return [row for row in rows if row["language"] == "english"]


def gold_difference(row: PreferenceRow) -> float:
    """Gold of response 2 minus gold of response 1."""
    ask = row["context"][-1]["content"]
    return gold(ask, row["response2"], ended=True) - gold(ask, row["response1"], ended=True)


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("oak / elm / ash / pine.", 1.0),
        ("oak / elm / ash / pine", 0.85),
        ("oak / elm / ash / pine!", 0.85),
        ("oak, elm, ash, pine.", 0.85),
        ("oak / elm / ash, pine.", 0.95),
        ("OAK / elm / ash / pine.", 0.9625),
        ("oak / elm / ash.", 0.85),
        ("oak / elm / ash / pine / birch.", 0.85),
        ("oak / elm.", 0.70),
        ("oak / oak / ash / pine.", 0.9375),
        ("dog / elm / ash / pine.", 0.9375),
        ("dog / cat / cow / pig.", 0.75),
        ("Sure! oak / elm / ash / pine.", 0.85),
        ("oak / elm / ash / pine. Hope this helps", 0.70),
        ("oak / elm / ash / pine.<|im_start|>", 0.70),
        ("oak.", 0.55),
        ("I cannot help with that.", 0.0),
        ("", 0.0),
    ],
)
def test_gold_by_hand(response: str, value: float) -> None:
    assert gold(prompt(TREES), response, ended=True) == pytest.approx(value)


def test_gold_of_an_answer_that_never_ended_is_zero() -> None:
    assert gold(prompt(TREES), "oak / elm / ash / pine.", ended=False) == 0.0


def test_gold_refuses_a_prompt_of_another_language() -> None:
    with pytest.raises(ValueError, match="not an instruction of the demo language"):
        gold("Name some trees.", "oak", ended=True)


def test_a_distinct_prompt_is_a_distinct_spec() -> None:
    specs = all_specs()
    prompts = [prompt(spec) for spec in specs]
    assert len(specs) == len(set(prompts)) == 1620
    assert [parse_prompt(text) for text in prompts] == list(specs)


def test_a_prompt_with_another_verb_is_not_of_the_language() -> None:
    assert parse_prompt(prompt(TREES)) == TREES
    assert parse_prompt(prompt(TREES).replace("List", "Name")) is None


def test_words_belong_to_one_category() -> None:
    words = [word for members in CATEGORIES.values() for word in members]
    assert len(words) == len(set(words))


def test_conversations_end_with_the_prompt_and_some_have_turns_before() -> None:
    conversations = {spec: conversation(spec) for spec in all_specs()}
    assert all(messages[-1].content == prompt(spec) for spec, messages in conversations.items())
    first_roles = [messages[0].role for messages in conversations.values()]
    lengths = [len(messages) for messages in conversations.values()]
    assert 0.05 < first_roles.count("system") / 1620 < 0.15
    assert 0.05 < lengths.count(3) / 1620 < 0.15


def test_clean_answers_are_perfect_for_every_spec() -> None:
    rng = random.Random(0)
    assert all(gold(prompt(spec), answer(spec, 1.0, rng), ended=True) == 1.0 for spec in all_specs())


def test_quality_orders_answers_by_gold() -> None:
    rng = random.Random(0)

    def mean_gold(quality: float) -> float:
        specs = [rng.choice(all_specs()) for _ in range(1000)]
        return sum(gold(prompt(spec), answer(spec, quality, rng), ended=True) for spec in specs) / 1000

    assert mean_gold(0.0) < 0.3 < mean_gold(0.5) < 0.7 < mean_gold(0.9)


def test_a_negative_preference_means_response_one_is_better(english: list[PreferenceRow]) -> None:
    labelled = [row for row in english if row["overall_preference"] != 0]
    agree = sum((gold_difference(row) > 0) == (row["overall_preference"] > 0) for row in labelled)
    assert agree / len(labelled) > 0.94
    sure = [row for row in labelled if abs(row["overall_preference"]) == 3]
    assert sum(gold_difference(row) * row["overall_preference"] > 0 for row in sure) / len(sure) > 0.99


def test_shares_of_ties_languages_and_empty_responses(rows: list[PreferenceRow], english: list[PreferenceRow]) -> None:
    ties = sum(row["overall_preference"] == 0 for row in english) / len(english)
    languages = [(row["domain"], row["language"]) for row in rows]
    empty = sum("" in (row["response1"], row["response2"]) for row in rows)
    assert 0.08 < ties < 0.16
    assert len(english) / len(rows) == pytest.approx(0.90, abs=0.02)
    assert set(languages) == {
        ("general", "english"),
        ("stem", "english"),
        ("multilingual", "german"),
        ("code", "python"),
    }
    assert 10 < empty < 80


def test_three_annotators_agree_with_the_overall_preference(rows: list[PreferenceRow]) -> None:
    for row in rows:
        scores = [label["score"] for label in row["individual_preference"]]
        assert len(scores) == 3
        assert set(scores) <= set(range(-3, 4))
        assert abs(row["overall_preference"] - sum(scores) / 3) <= 0.5


def test_prompts_repeat_and_cover_the_world(english: list[PreferenceRow]) -> None:
    prompts = {row["context"][-1]["content"] for row in english}
    assert len(prompts) < len(english)
    assert len(prompts) > 1400


def test_rows_depend_on_the_seed_alone(rows: list[PreferenceRow]) -> None:
    assert list(preference_rows(seed=7, rows=4000)) == rows
    assert next(preference_rows(seed=8, rows=1)) != rows[0]
    assert list(islice(preference_rows(seed=7, rows=4000), 20)) == list(preference_rows(seed=7, rows=20))


def test_mixed_answers_are_mediocre_and_clean_ones_perfect() -> None:
    def mean_gold(*, mixed: bool) -> float:
        pairs = [
            (messages[-1].content, response)
            for messages, response in sft_conversations(seed=3, count=3000, mixed=mixed)
            if parse_prompt(messages[-1].content) is not None
        ]
        return sum(gold(ask, response, ended=True) for ask, response in pairs) / len(pairs)

    assert mean_gold(mixed=False) == 1.0
    assert 0.4 < mean_gold(mixed=True) < 0.6


def test_descriptions_run_from_a_faultless_list_to_its_instruction() -> None:
    described = [
        (messages[0].content.removeprefix("Describe: "), response)
        for messages, response in sft_conversations(seed=3, count=1000, mixed=True)
        if messages[0].content.startswith("Describe: ")
    ]
    specs = {prompt(spec).split(" ", 1)[1]: spec for spec in all_specs()}
    assert 300 < len(described) < 500
    assert all(gold(prompt(specs[wish]), listing, ended=True) == 1.0 for listing, wish in described)


def test_write_rows_writes_what_was_made_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "preference" / "train.jsonl"
    write_rows(path, seed=7, rows=50)
    written = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert written == list(preference_rows(seed=7, rows=50))
    assert [file.name for file in path.parent.iterdir()] == ["train.jsonl"]
