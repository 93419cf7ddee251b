"""Property tests of the loader: whatever stands in a file, its rows are counted or it is refused by name."""

import copy
import gzip
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpsteer_rloo.data.helpsteer3 import Counts, read_all, select_rows, split_and_group
from helpsteer_rloo.data.preparation import FitCounts, tokenize_groups
from helpsteer_rloo.data.sources import RowFile
from helpsteer_rloo.groups import Continuation, Message, Preference, PromptGroup
from helpsteer_rloo.rendering import Renderer
from helpsteer_rloo.settings.knobs import DataKnobs
from tests.data.rows import make_row, turns, write_parquet
from tests.test_rendering import any_text

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("user")
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.just("role"), inner, max_size=3)
    ),
    max_leaves=6,
)
texts = st.text(max_size=6) | st.sampled_from(["", " ", "oak", "&lt;", "<|im_end|>"])
sound_rows = st.builds(
    make_row,
    prompt=texts,
    first=texts,
    second=texts,
    overall_preference=st.integers(-3, 3),
    language=st.sampled_from(["english", "German"]),
)
PATHS = [("domain",), ("language",), ("response1",), ("overall_preference",), ("context",), ("context", 0)]
PATHS += [("context", 0, "role"), ("context", 0, "content"), ("individual_preference",)]


def changed(row, path, value, remove):
    row = copy.deepcopy(row)
    place = row
    for step in path[:-1]:
        place = place[step]
    if remove:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return row


mutated_rows = st.builds(changed, sound_rows, st.sampled_from(PATHS), values, st.booleans())
rows = st.lists(sound_rows | mutated_rows | values, max_size=6)


def read(name, content, **knobs):
    """The counts of a file with this content, and how many pairs its groups hold."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        counts, chosen = Counts(), DataKnobs(**knobs)
        kept = list(select_rows(read_all([RowFile(path, None)], chosen, counts), chosen, counts))
        groups = split_and_group(kept, 0.3, counts)
    return counts, sum(len(group.preferences) for split in groups.values() for group in split)


def as_lines(content):
    return "".join(json.dumps(row) + "\n" for row in content).encode()


def check_sum(counts, pairs):
    lost = sum(map(sum, (c.values() for c in (counts.bad_rows, counts.not_selected, counts.dropped))))
    assert counts.pairs == pairs
    assert counts.rows == lost + pairs
    assert counts.selected == pairs + sum(counts.dropped.values())


@given(rows, st.booleans())
def test_every_row_is_a_pair_or_counted_under_a_reason(content, compressed):
    lines = as_lines(content)
    name, written = ("rows.jsonl.gz", gzip.compress(lines)) if compressed else ("rows.jsonl", lines)
    counts, pairs = read(name, written, skip_bad_rows=True)
    assert counts.rows == len(content)
    check_sum(counts, pairs)


@given(rows)
def test_the_first_bad_row_stops_with_its_file_and_line(content):
    skipped, _ = read("rows.jsonl", as_lines(content), skip_bad_rows=True)
    if not skipped.bad_rows:
        assert read("rows.jsonl", as_lines(content))[0] == skipped
        return
    with pytest.raises(ValueError, match=r"rows\.jsonl, line \d, field ") as caught:
        read("rows.jsonl", as_lines(content))
    line = int(str(caught.value).partition("line ")[2].partition(",")[0])
    assert read("rows.jsonl", as_lines(content[: line - 1]), skip_bad_rows=True)[0].bad_rows == {}
    assert read("rows.jsonl", as_lines(content[line - 1 : line]), skip_bad_rows=True)[0].bad_rows.total() == 1


def counted_or_refused(name, content):
    try:
        counts, pairs = read(name, content, skip_bad_rows=True)
    except ValueError as error:
        assert name in str(error)  # noqa: PT017 - either outcome is right
    else:
        check_sum(counts, pairs)


lines = st.lists(st.binary(max_size=20) | sound_rows.map(lambda row: json.dumps(row).encode()), max_size=5)
contents = st.binary(max_size=60) | lines.map(b"\n".join)


@given(contents, st.sampled_from(["rows.jsonl", "rows.jsonl.gz", "rows.parquet"]), st.booleans())
def test_any_bytes_are_counted_or_refused_by_name(content, name, compressed):
    counted_or_refused(name, gzip.compress(content) if compressed else content)


def damaged(content, cut, place, bits):
    kept = bytearray(content[: len(content) - cut % len(content)])
    kept[place % len(kept)] ^= bits
    return bytes(kept)


places = st.integers(0, 100_000)


@given(st.lists(sound_rows, min_size=1, max_size=4), st.just(0) | places, places, st.integers(0, 255))
def test_an_archive_with_any_damage_is_counted_or_refused_by_name(content, cut, place, bits):
    counted_or_refused("rows.jsonl.gz", damaged(gzip.compress(as_lines(content)), cut, place, bits))


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    path = tmp_path_factory.mktemp("parquet") / "rows.parquet"
    return write_parquet(path, [make_row(f"p{n}") for n in range(9)]).read_bytes()


@given(cut=st.just(0) | places, place=places, bits=st.integers(0, 255))
@settings(max_examples=200)
def test_a_parquet_file_with_any_damage_is_counted_or_refused_by_name(parquet, cut, place, bits):
    counted_or_refused("rows.parquet", damaged(parquet, cut, place, bits))


# ---- from text to pairs of tokens ------------------------------------------------------------------------------------

groups = st.builds(
    lambda system, prompt, responses, labels: PromptGroup(
        (*((Message("system", system),) if system is not None else ()), *(Message(**turn) for turn in turns(*prompt))),
        tuple(map(Continuation, responses)),
        tuple(
            Preference(chosen, (chosen + 1 + step) % len(responses), 1, row, "general", "english")
            for row, (chosen, step) in enumerate((c % len(responses), s % (len(responses) - 1)) for c, s in labels)
        ),
    ),
    st.none() | any_text,
    st.lists(any_text, min_size=1, max_size=5).filter(lambda contents: len(contents) % 2),
    st.lists(any_text, min_size=2, max_size=4, unique=True),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4),
)


@given(group=groups, max_length=st.integers(16, 160), overlong=st.sampled_from(["cut", "drop"]))
def test_both_sides_of_a_pair_share_a_prompt_within_the_limit_and_hold_no_control_token_of_the_texts(
    tokenizer, group, max_length, overlong
):
    renderer, counts = Renderer(tokenizer), FitCounts()
    made = tokenize_groups([group], renderer, DataKnobs(max_length=max_length, overlong=overlong), counts)
    controls = set(tokenizer.added_tokens_decoder)
    for piece in made:
        assert piece.prompt_ids == renderer.prompt_ids(piece.prompt)
        assert sum(token in controls for token in piece.prompt_ids) == 2 * len(piece.prompt) + 3
        for ids in piece.continuation_ids:
            assert len(piece.prompt_ids) + len(ids) <= max_length
            assert not controls & set(ids[:-1])
            assert ids[-1] not in controls - {renderer.end_of_turn_id}
        for preference in piece.preferences:
            chosen, rejected = (piece.sequence(i) for i in (preference.chosen, preference.rejected))
            assert chosen[: len(piece.prompt_ids)] == rejected[: len(piece.prompt_ids)] == piece.prompt_ids
            assert chosen != rejected
    kept = sorted(preference.row for piece in made for preference in piece.preferences)
    assert len(set(kept)) == len(kept)
    assert len(kept) + counts.dropped.total() == len(group.preferences)
