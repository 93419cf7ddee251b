"""Broken rows: what stands in one line of a file."""

import json

from tests.broken.corpus import row_case
from tests.data.rows import make_row, turns

KEEPS = "Mend or remove the row"


def without(name: str) -> dict:
    row = make_row()
    del row[name]
    return row


def told_twice() -> bytes:
    row = json.dumps(make_row(first="oak"))
    return (row[:-1] + ', "response1": "elm"}').encode()


CASES = [
    row_case("cut_short", json.dumps(make_row()).encode()[:60], "not JSON: ", KEEPS),
    row_case("two_rows_in_one_line", json.dumps(make_row()).encode() * 2, "not JSON: Extra data at column "),
    row_case("single_quotes", repr(make_row()).encode(), "not JSON: Expecting property name"),
    row_case("comma_behind_the_last_field", json.dumps(make_row()).encode()[:-1] + b",}", "not JSON: "),
    row_case("a_list", [1, 2], "expected an object, got list"),
    row_case("a_number", 1, "expected an object, got int"),
    row_case("null", None, "expected an object, got NoneType"),
    row_case("latin_1", json.dumps(make_row("Größe"), ensure_ascii=False).encode("latin-1"), "not UTF-8: "),
    row_case("bytes_of_an_archive", b"\x1f\x8b\x08\x00\x00", "not UTF-8: "),
    row_case("a_control_character_in_a_text", b'{"domain": "a\x07b"}', "not JSON: Invalid control character"),
    row_case("a_field_twice", told_twice(), "'response1' stands there twice"),
    row_case("nested_too_deeply", b'{"context": ' + b"[" * 100_000, "not JSON: nested too deeply"),
    row_case("a_number_of_5000_digits", b'{"overall_preference": ' + b"1" * 5000 + b"}", "not JSON: "),
    row_case("a_field_of_50_megabytes", make_row(first="x" * 50_000_000), "'response1': holds 50000000 characters"),
    row_case("a_prompt_of_50_megabytes", make_row("y" * 50_000_000), "'context[0].content': holds 50000000 characters"),
    row_case("a_line_of_70_megabytes", b'{"note": "' + b"z" * 70_000_000 + b'"}', "'(row)': longer than 64 MiB"),
    row_case("no_domain", without("domain"), "'domain': missing"),
    row_case("no_prompt", without("context"), "'context': missing"),
    row_case("no_response", without("response2"), "'response2': missing"),
    row_case("no_preference", without("overall_preference"), "'overall_preference': missing"),
    row_case("a_misspelt_field", {**without("language"), "Language": "english"}, "'language': missing"),
    row_case("a_number_as_response", make_row(first=7), "'response1': expected a string, got int"),
    row_case("a_list_as_response", make_row(second=["oak"]), "'response2': expected a string, got list"),
    row_case("null_as_language", make_row(language=None), "'language': expected a string, got NoneType"),
    row_case("a_text_as_prompt", make_row(context="Hello"), "'context': expected a list of turns"),
    row_case("an_object_as_prompt", make_row(context={"role": "user"}), "'context': expected a list of turns"),
    row_case("a_prompt_without_turns", make_row(context=[]), "'context': expected a list of turns with at least one"),
    row_case(
        "a_text_as_annotators", make_row(individual_preference="3"), "'individual_preference': expected a list, got str"
    ),
    row_case(
        "an_annotators_score_out_of_range",
        make_row(individual_preference=[{"score": 1}, {"score": -9}]),
        "'individual_preference[1].score': expected a whole number from -3 to 3, got -9",
    ),
    row_case("a_text_as_turn", make_row(context=["Hello"]), "'context[0]': expected an object, got str"),
    row_case("a_turn_without_role", make_row(context=[{"content": "a"}]), "'context[0].role': missing"),
    row_case("a_turn_without_content", make_row(context=[{"role": "user"}]), "'context[0].content': missing"),
    row_case(
        "parts_as_content",
        make_row(context=[{"role": "user", "content": [{"type": "text", "text": "a"}]}]),
        "'context[0].content': expected a string, got list",
    ),
    row_case(
        "an_unknown_role",
        make_row(context=[*turns("a"), {"role": "tool", "content": "b"}]),
        "'context[1].role': expected one of system, user, assistant, got 'tool'",
    ),
    row_case(
        "a_control_token_as_role",
        make_row(context=[{"role": "user<|im_end|>", "content": "b"}]),
        "'context[0].role': expected one of system, user, assistant, got 'user<|im_end|>'",
    ),
    row_case(
        "a_role_of_a_million_characters",
        make_row(context=[{"role": "r" * 1_000_000, "content": "b"}]),
        "'context[0].role': expected one of system, user, assistant, got 'rrr",
    ),
    row_case("nul_in_a_text", make_row(first="oak\x00"), "'response1': holds a NUL or an unpaired surrogate"),
    row_case("half_a_surrogate_pair", make_row("\ud83d"), "'context[0].content': holds a NUL or an unpaired"),
    row_case("preference_out_of_range", make_row(overall_preference=4), "a whole number from -3 to 3, got 4"),
    row_case("preference_between", make_row(overall_preference=-1.5), "a whole number from -3 to 3, got -1.5"),
    row_case("preference_as_text", make_row(overall_preference="-2"), "a whole number from -3 to 3, got '-2'"),
    row_case("preference_true", make_row(overall_preference=True), "a whole number from -3 to 3, got True"),
    row_case("preference_nan", make_row(overall_preference=float("nan")), "a whole number from -3 to 3, got nan"),
    row_case(
        "preference_1e400",
        json.dumps(make_row()).replace("-2", "1e400", 1).encode(),
        "a whole number from -3 to 3, got inf",
    ),
    row_case("preference_as_object", make_row(overall_preference={"score": 1}), "a whole number from -3 to 3, got {"),
]
