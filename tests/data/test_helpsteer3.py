"""From rows to prompt groups: polarity, selection, every reason for a loss, merging, and the split by prompt."""

import gzip
import json
import math
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpsteer_rloo.data.helpsteer3 import (
    Counts,
    Row,
    hash_share,
    load_corpus,
    prompt_key,
    split_and_group,
)
from helpsteer_rloo.groups import Message
from helpsteer_rloo.settings.knobs import DataKnobs
from tests.data.rows import make_row, turns, write_jsonl, write_parquet


@pytest.fixture
def load(tmp_path):
    """Loads rows by way of a file."""

    def load_rows(rows, **knobs):
        return load_corpus(DataKnobs(dataset_name=str(write_jsonl(tmp_path / "rows.jsonl", rows)), **knobs))

    return load_rows


def all_groups(corpus):
    return corpus.groups["train"] + corpus.groups["validation"]


def pairs(corpus):
    """Every pair as prompt, chosen, rejected, strength and row, in the order of the rows."""
    found = [
        (
            g.prompt[-1].content,
            g.continuations[p.chosen].text,
            g.continuations[p.rejected].text,
            p.strength,
            p.row,
        )
        for g in all_groups(corpus)
        for p in g.preferences
    ]
    return sorted(found, key=lambda pair: pair[-1])


# ---- polarity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preference", "chosen", "rejected", "strength"),
    [
        (-3, "first", "second", 3),
        (-2, "first", "second", 2),
        (-1, "first", "second", 1),
        (1, "second", "first", 1),
        (2, "second", "first", 2),
        (3, "second", "first", 3),
        (-2.0, "first", "second", 2),
    ],
)
def test_a_negative_preference_means_response_1_is_better(preference, chosen, rejected, strength, load):
    corpus = load([make_row("p", "first", "second", overall_preference=preference)])
    assert pairs(corpus) == [("p", chosen, rejected, strength, 0)]
    assert [p.chosen_response for g in all_groups(corpus) for p in g.preferences] == [1 if chosen == "first" else 2]


def test_polarity_does_not_depend_on_the_annotators_or_on_extra_fields(load):
    against = [{"score": 3, "reasoning": "", "feedback": {"x": 1}}]
    rows = [make_row("p", "first", "second", individual_preference=against, overall_preference=-1, note="extra")]
    del rows[0]["individual_preference"][0]["score"]
    assert pairs(load(rows)) == [("p", "first", "second", 1, 0)]


def test_individual_preferences_are_not_needed(load):
    row = make_row("p", "first", "second")
    del row["individual_preference"]
    assert pairs(load([row])) == [("p", "first", "second", 2, 0)]


# ---- selection and losses --------------------------------------------------------------------------------------------


def unusable_rows():
    return [
        make_row("kept"),
        make_row("tie", overall_preference=0),
        make_row("empty", first=""),
        make_row("blank", second=" \n\t"),
        make_row("same", first="oak", second="oak"),
        make_row(context=turns("a", "b")),
        make_row(context=[{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]),
        make_row("tie and empty", first="", overall_preference=0),
        make_row("empty and same", first=" ", second=" "),
    ]


def test_every_row_that_makes_no_pair_is_dropped_under_one_named_reason(load):
    corpus = load(unusable_rows())
    counts = corpus.counts
    assert dict(counts.dropped) == {
        "tie": 2,
        "empty_response": 3,
        "identical_responses": 1,
        "context_ends_with_assistant": 1,
        "context_ends_with_system": 1,
    }
    assert (counts.rows, counts.selected, counts.pairs) == (9, 9, 1)
    assert counts.selected == counts.pairs + sum(counts.dropped.values())
    assert [g.prompt[-1].content for g in all_groups(corpus)] == ["kept"]


def test_ties_and_rows_with_an_empty_response_are_counted_also_where_another_reason_drops_them(load):
    counts = load(unusable_rows()).counts
    assert counts.ties == 2
    assert counts.empty_responses == 4
    assert counts.prompts == 9


@pytest.mark.parametrize("blank", ["\u200b", "\u200c", "\u200d", "\u2060", "\ufeff", " \u200b\n\ufeff\u00a0\u2060\t"])
def test_a_response_of_characters_of_no_width_is_empty(blank, load):
    counts = load([make_row("kept"), make_row("a", first=blank), make_row("b", second=blank)]).counts
    assert dict(counts.dropped) == {"empty_response": 2}
    assert (counts.empty_responses, counts.pairs) == (2, 1)


def test_characters_of_no_width_inside_a_response_stay(load):
    corpus = load([make_row("p", "\u200b\U0001f469\u200d\U0001f33e\n", "\ufeff.")])
    assert pairs(corpus) == [("p", "\u200b\U0001f469\u200d\U0001f33e\n", "\ufeff.", 2, 0)]
    assert corpus.counts.empty_responses == 0


def languages():
    return [
        make_row("general"),
        make_row("stem", domain="stem"),
        make_row("python", domain="code", language="python"),
        make_row("web", domain="code", language="javascript_html_css"),
        make_row("german", domain="multilingual", language="german"),
    ]


@pytest.mark.parametrize(
    ("knobs", "kept", "not_selected"),
    [
        ({}, ["general", "stem"], {"language": 3}),
        ({"language": "all"}, ["general", "stem", "python", "web", "german"], {}),
        ({"language": "German, PYTHON"}, ["python", "german"], {"language": 3}),
        ({"domains": "stem"}, ["stem"], {"language": 3, "domain": 1}),
        ({"language": "all", "domains": "code,Multilingual"}, ["python", "web", "german"], {"domain": 2}),
        ({"language": "python,javascript_html_css", "domains": "code"}, ["python", "web"], {"language": 3}),
    ],
)
def test_languages_and_domains_select_rows_and_the_rest_is_counted_by_reason(knobs, kept, not_selected, load):
    corpus = load(languages(), **knobs)
    assert [prompt for prompt, *_ in pairs(corpus)] == kept
    assert dict(corpus.counts.not_selected) == not_selected
    assert corpus.counts.selected == len(kept)
    assert corpus.counts.rows == 5


def test_domain_and_language_names_are_compared_without_regard_to_case(load):
    corpus = load([make_row(domain="STEM", language="English")], domains="stem")
    assert [(p.domain, p.language) for g in all_groups(corpus) for p in g.preferences] == [("stem", "english")]


def test_rows_not_selected_are_not_looked_at_for_other_reasons(load):
    corpus = load([make_row(), make_row(language="german", overall_preference=0, first="")])
    assert (corpus.counts.ties, corpus.counts.empty_responses, dict(corpus.counts.dropped)) == (0, 0, {})


def test_an_empty_selection_says_what_became_of_the_rows_and_what_to_look_at(load, tmp_path):
    rows = [make_row(language="german"), make_row(language="german"), make_row(overall_preference=0)]
    with pytest.raises(ValueError, match="no usable preference pair") as caught:
        load(rows, domains="stem,general")
    assert str(caught.value) == (
        f"{tmp_path / 'rows.jsonl'}: no usable preference pair among 3 rows (2 language, 1 tie). "
        "Look at --language (now english) and --domains (now stem,general)."
    )


def test_empty_files_are_said_to_be_empty(load):
    with pytest.raises(ValueError, match=r"among 0 rows \(the files are empty\)"):
        load([])


# ---- rows that cannot be read ----------------------------------------------------------------------------------------


def without(name):
    row = make_row()
    del row[name]
    return row


BAD_ROWS = {
    "missing_domain": (without("domain"), "domain", "missing"),
    "missing_language": (without("language"), "language", "missing"),
    "missing_context": (without("context"), "context", "missing"),
    "missing_response": (without("response2"), "response2", "missing"),
    "missing_preference": (without("overall_preference"), "overall_preference", "missing"),
    "domain_type": (make_row(domain=3), "domain", "expected a string, got int"),
    "language_type": (make_row(language=None), "language", "expected a string, got NoneType"),
    "response_type": (make_row(first=["oak"]), "response1", "expected a string, got list"),
    "response_null": (make_row(second=None), "response2", "expected a string, got NoneType"),
    "context_type": (make_row(context="Hello"), "context", "expected a list of turns with at least one in it"),
    "context_empty": (make_row(context=[]), "context", "expected a list of turns with at least one in it"),
    "turn_type": (make_row(context=["Hello"]), "context[0]", "expected an object, got str"),
    "turn_without_role": (make_row(context=[*turns("a", "b"), {"content": "c"}]), "context[2].role", "missing"),
    "turn_without_content": (make_row(context=[{"role": "user"}]), "context[0].content", "missing"),
    "role_unknown": (
        make_row(context=[*turns("a"), {"role": "tool", "content": "b"}]),
        "context[1].role",
        "expected one of system, user, assistant, got 'tool'",
    ),
    "content_type": (
        make_row(context=[{"role": "user", "content": [{"type": "text"}]}]),
        "context[0].content",
        "expected a string, got list",
    ),
    "nul": (make_row(first="oak\x00elm"), "response1", "holds a NUL or an unpaired surrogate, which is not text"),
    "surrogate": (make_row("\ud83d"), "context[0].content", "holds a NUL or an unpaired surrogate, which is not text"),
} | {
    f"preference_{value}": (
        make_row(overall_preference=value),
        "overall_preference",
        f"expected a whole number from -3 to 3, got {value!r}",
    )
    for value in (4, -4, 1.5, True, False, "-2", None, math.nan, math.inf)
}
BAD_LINES = {
    "not_json": (b'{"domain": ', "(row)", "not JSON: Expecting value at column 12"),
    "not_utf8": (b'{"domain": "\xff"}', "(row)", "not UTF-8: invalid start byte at byte 12"),
    "not_an_object": (b"[1, 2]", "(row)", "expected an object, got list"),
    "nested_too_deeply": (b"[" * 200_000, "(row)", "not JSON: nested too deeply"),
    "number_too_long": (b'{"overall_preference": ' + b"1" * 5000 + b"}", "(row)", "not JSON: "),
}
BAD = {name: (json.dumps(row).encode(), *rest) for name, (row, *rest) in BAD_ROWS.items()} | BAD_LINES


def write_around(path, bad_line):
    """A good row, a blank line, the bad one in line 3, and a good row."""
    good = [json.dumps(make_row(prompt)).encode() for prompt in ("before", "after")]
    path.write_bytes(b"\n".join([good[0], b"", bad_line, good[1], b""]))
    return str(path)


@pytest.mark.parametrize(("line", "field", "reason"), BAD.values(), ids=BAD)
def test_a_bad_row_stops_with_file_line_field_and_reason(line, field, reason, tmp_path):
    file = write_around(tmp_path / "rows.jsonl", line)
    with pytest.raises(ValueError, match="line 3") as caught:
        load_corpus(DataKnobs(dataset_name=file))
    first, hint = str(caught.value).splitlines()
    assert first.startswith(f"{file}, line 3, field {field!r}: {reason}")
    assert hint == "Mend or remove the row, or pass --skip_bad_rows to count and skip such rows."


@pytest.mark.parametrize(("line", "field", "reason"), BAD.values(), ids=BAD)
def test_a_bad_row_is_counted_under_its_reason_and_skipped_if_asked(line, field, reason, tmp_path):
    file = write_around(tmp_path / "rows.jsonl", line)
    corpus = load_corpus(DataKnobs(dataset_name=file, skip_bad_rows=True))
    assert [(prompt, row) for prompt, _, _, _, row in pairs(corpus)] == [("before", 0), ("after", 2)]
    assert corpus.counts.rows == 3
    assert list(corpus.counts.bad_rows.values()) == [1]
    assert next(iter(corpus.counts.bad_rows)).startswith(f"{field}: {reason}")


@pytest.mark.parametrize(
    ("value", "start"),
    [
        ("x" * 100_000, "'xxxxxxxx"),
        (10**4000, "1000000"),
        (["y" * 1000] * 1000, "['yyyy"),
        ({"key" * 100: {"a": [1] * 9999}}, "{'keykey"),
    ],
    ids=["string", "number", "list", "object"],
)
def test_a_huge_preference_is_shortened_in_the_message(value, start, load):
    with pytest.raises(ValueError, match="line 1, field 'overall_preference'") as caught:
        load([make_row(overall_preference=value)])
    shown = str(caught.value).splitlines()[0].partition("expected a whole number from -3 to 3, got ")[2]
    assert shown.startswith(start)
    assert len(shown) <= 40


def test_bad_rows_of_one_kind_are_counted_together(load):
    rows = [make_row("a"), make_row("b", first=None), make_row("c", first=None), make_row("d", domain=1)]
    counts = load(rows, skip_bad_rows=True).counts
    assert counts.bad_rows == {"response1: expected a string, got NoneType": 2, "domain: expected a string, got int": 1}
    assert counts.rows == 4


def test_a_bad_row_in_another_language_stops_as_well(load):
    with pytest.raises(ValueError, match="line 2, field 'response1'"):
        load([make_row(), make_row(language="german", first=None)])


def test_a_bad_row_of_a_parquet_file_is_named_by_its_number(tmp_path):
    file = write_parquet(tmp_path / "rows.parquet", [make_row("a"), make_row("b", second=None)])
    with pytest.raises(ValueError, match="line 2, field 'response2': expected a string, got NoneType") as caught:
        load_corpus(DataKnobs(dataset_name=str(file)))
    assert str(caught.value).startswith(f"{file}, ")


def test_a_truncated_archive_stops_even_when_bad_rows_are_skipped(tmp_path):
    whole = gzip.compress(b"".join(json.dumps(make_row(f"p{i}")).encode() + b"\n" for i in range(50)))
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="Is the file complete") as caught:
        load_corpus(DataKnobs(dataset_name=str(path), skip_bad_rows=True))
    assert str(caught.value).startswith(f"{path}: cannot be read: ")


# ---- HTML entities ---------------------------------------------------------------------------------------------------

ESCAPED = "if a &lt; b &amp;&amp; c &gt; d: &quot;x&#39;s&quot;&nbsp;&#x41;"
DECODED = 'if a < b && c > d: "x\'s"\xa0A'


@pytest.mark.parametrize(
    ("mode", "prompt", "response", "decoded"),
    [("prompt", DECODED, ESCAPED, 1), ("all", DECODED, DECODED, 1), ("none", ESCAPED, ESCAPED, 0)],
)
def test_entities_are_decoded_where_asked_and_counted(mode, prompt, response, decoded, load):
    corpus = load([make_row(ESCAPED, ESCAPED, "plain"), make_row("plain")], html_entities=mode)
    assert pairs(corpus)[0] == (prompt, response, "plain", 2, 0)
    assert corpus.counts.entities_decoded == decoded


@pytest.mark.parametrize("text", ["?a=1&copy=2", "AT&T", "&lt", "& lt;", "&unknown;", "&#99999999;"])
def test_what_only_resembles_an_entity_stays(text, load):
    corpus = load([make_row(text, text, "plain")], html_entities="all")
    assert pairs(corpus)[0][:2] == (text, text)
    assert corpus.counts.entities_decoded == 0


def test_entities_are_decoded_once_only(load):
    assert pairs(load([make_row("&amp;lt;")]))[0][0] == "&lt;"


@pytest.mark.parametrize("entity", ["&#0;", "&#xD800;", "&#55357;"])
def test_an_entity_for_what_is_not_text_brings_none_in(entity, load):
    prompt = pairs(load([make_row(f"a{entity}b", "x", "y")], html_entities="all"))[0][0]
    assert "\x00" not in prompt
    assert not any("\ud800" <= character <= "\udfff" for character in prompt)


def test_prompts_that_differ_only_in_entities_are_one_prompt(load):
    rows = [make_row("a &lt; b", "1", "2"), make_row("a < b", "3", "4")]
    assert len(all_groups(load(rows))) == 1
    assert len(all_groups(load(rows, html_entities="none"))) == 2


# ---- groups ----------------------------------------------------------------------------------------------------------


def test_rows_on_one_prompt_become_one_group_that_shares_equal_continuations(load):
    rows = [
        make_row("p", "A", "B", overall_preference=-3),
        make_row("q", "X", "Y"),
        make_row("p", "C", "A", overall_preference=1),
        make_row("p", "B", "D", overall_preference=2, domain="stem"),
    ]
    corpus = load(rows)
    group = next(g for g in all_groups(corpus) if g.prompt == (Message("user", "p"),))
    assert [c.text for c in group.continuations] == ["A", "B", "C", "D"]
    assert all(c.ended for c in group.continuations)
    assert [(p.chosen, p.rejected, p.strength, p.row, p.domain, p.chosen_response) for p in group.preferences] == [
        (0, 1, 3, 0, "general", 1),
        (0, 2, 1, 2, "general", 2),
        (3, 1, 2, 3, "stem", 2),
    ]
    assert (corpus.counts.prompts, corpus.counts.pairs, len(all_groups(corpus))) == (2, 4, 2)


def test_prompts_are_the_same_only_if_every_turn_and_role_is(load):
    system = {"role": "system", "content": "a"}
    contexts = [turns("a", "b", "c"), turns("a", "B", "c"), turns("c"), [system, *turns("c")]]
    assert len(all_groups(load([make_row(context=context) for context in contexts]))) == 4


def test_the_row_of_a_pair_counts_all_rows_before_it(load):
    rows = [make_row(language="german"), make_row(overall_preference=0), make_row("third")]
    assert [row for *_, row in pairs(load(rows))] == [2]


# ---- the split -------------------------------------------------------------------------------------------------------


def plain_row(index, prompt, split=None, preference=-1):
    return Row(index, split, "general", "english", (Message("user", prompt),), (f"a{index}", f"b{index}"), preference)


def prompts_of(groups):
    return [group.prompt[0].content for group in groups]


prompts = st.lists(st.text(max_size=3), min_size=1, max_size=40)
fractions = st.floats(0.05, 0.95)


@given(prompts, fractions)
def test_no_prompt_is_in_two_splits_and_no_pair_is_lost(texts, fraction):
    counts = Counts()
    groups = split_and_group([plain_row(i, text) for i, text in enumerate(texts)], fraction, counts)
    train, validation = prompts_of(groups["train"]), prompts_of(groups["validation"])
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(set(texts))
    sizes = {g.prompt[0].content: len(g.preferences) for split in groups.values() for g in split}
    assert sizes == Counter(texts)
    assert counts.pairs == len(texts)


@given(prompts, prompts, fractions)
def test_more_rows_move_no_prompt_to_the_other_split(texts, more, fraction):
    def splits(names):
        groups = split_and_group([plain_row(i, name) for i, name in enumerate(names)], fraction, Counts())
        return {name: split for split in groups for name in prompts_of(groups[split])}

    before, after = splits(texts), splits(more + texts)
    assert before.items() <= after.items()


@given(prompts)
def test_a_larger_fraction_only_adds_to_the_validation_split(texts):
    rows = [plain_row(i, text) for i, text in enumerate(texts)]
    held_out = [set(prompts_of(split_and_group(rows, f, Counts())["validation"])) for f in (0.1, 0.3, 0.9)]
    assert all(smaller <= larger for smaller, larger in pairwise(held_out))


def test_the_share_held_out_is_about_the_fraction_asked_for():
    shares = [hash_share(prompt_key((Message("user", f"prompt {i}"),))) for i in range(4000)]
    assert all(0 <= share < 1 for share in shares)
    assert sum(share < 0.1 for share in shares) / 4000 == pytest.approx(0.1, abs=0.02)


def test_a_prompt_is_held_out_by_its_text_alone_from_version_to_version():
    assert prompt_key((Message("user", "Name two trees."),)) == "b470367d4eb4927a2542f3dfd30c5084"
    assert prompt_key((Message("system", "x"), Message("user", "y"))) != prompt_key((Message("user", "xy"),))


@given(st.lists(st.tuples(st.text(max_size=2), st.sampled_from(["train", "validation"])), min_size=1, max_size=30))
def test_a_validation_split_of_the_data_sets_own_is_used_and_leaks_into_training_are_dropped(labelled):
    counts = Counts()
    rows = [plain_row(i, text, split) for i, (text, split) in enumerate(labelled)]
    groups = split_and_group(rows, 0.5, counts)
    held_out = {text for text, split in labelled if split == "validation"}
    if held_out:
        leaks = sum(split == "train" and text in held_out for text, split in labelled)
        assert set(prompts_of(groups["validation"])) == held_out
        assert counts.dropped["prompt_in_validation"] == leaks
        assert counts.pairs == len(labelled) - leaks
    assert not set(prompts_of(groups["train"])) & set(prompts_of(groups["validation"]))


def test_a_data_sets_own_validation_file_is_the_validation_split(tmp_path):
    write_jsonl(tmp_path / "preference" / "train.jsonl.gz", [make_row(f"t{i}") for i in range(8)] + [make_row("v1")])
    write_jsonl(tmp_path / "preference" / "validation.jsonl.gz", [make_row("v1"), make_row("v2", first="C")])
    corpus = load_corpus(DataKnobs(dataset_name=str(tmp_path), validation_fraction=0.9))
    assert prompts_of(corpus.groups["train"]) == [f"t{i}" for i in range(8)]
    assert prompts_of(corpus.groups["validation"]) == ["v1", "v2"]
    assert dict(corpus.counts.dropped) == {"prompt_in_validation": 1}
    assert [p.row for g in corpus.groups["validation"] for p in g.preferences] == [9, 10]
