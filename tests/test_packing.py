import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.packing import PackedRow, cheapest_runs, group_sequences, pack, split_group, token_count

ids = st.lists(st.integers(0, 99), min_size=1, max_size=6).map(tuple)
token_groups = st.builds(TokenGroup, st.just(()), ids, st.lists(ids, min_size=1, max_size=5).map(tuple))


@given(st.lists(token_groups, min_size=1, max_size=8), st.integers(1, 12))
def test_every_group_is_packed_once_in_order_and_within_the_budget(groups, budget):
    rows = pack(groups, continuations=budget)
    assert [index for row in rows for index in row] == list(range(len(groups)))
    sizes = [sum(len(groups[i].continuation_ids) for i in row) for row in rows]
    assert all(size <= budget or len(row) == 1 for size, row in zip(sizes, rows, strict=True))
    for size, following in zip(sizes, rows[1:], strict=False):  # no row ends early
        assert size + len(groups[following[0]].continuation_ids) > budget


@given(token_groups, st.integers(1, 6))
def test_a_split_group_keeps_its_prompt_and_its_continuations(group, most):
    pieces = split_group(group, most)
    assert all(len(piece.continuation_ids) <= most for piece in pieces)
    assert tuple(ids for piece in pieces for ids in piece.continuation_ids) == group.continuation_ids
    assert {piece.prompt_ids for piece in pieces} == {group.prompt_ids}


@given(st.lists(token_groups, min_size=1, max_size=4))
def test_a_continuation_stands_where_it_would_stand_alone(groups):
    row = PackedRow(tuple(groups))
    assert (
        len(row.input_ids)
        == len(row.position_ids)
        == sum(len(g.prompt_ids) + sum(map(len, g.continuation_ids)) for g in groups)
    )
    lasts, predicting = iter(row.last_positions), iter(row.predicting_positions)
    for group, span in zip(groups, row.spans, strict=True):
        prompt = tuple(row.input_ids[span.start : span.start + span.prompt])
        assert prompt == group.prompt_ids
        starts = zip(span.continuation_starts(), group.continuation_ids, strict=True)
        for index, (start, continuation) in enumerate(starts):
            assert tuple(row.input_ids[start : start + len(continuation)]) == continuation
            alone = list(range(len(group.sequence(index))))
            assert row.position_ids[start : start + len(continuation)] == alone[span.prompt :]
            assert next(lasts) == start + len(continuation) - 1
            sources = [next(predicting) for _ in continuation]
            assert [row.position_ids[source] + 1 for source in sources] == alone[span.prompt :]


def test_a_continuation_without_a_token_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        PackedRow((TokenGroup((), (1,), ((2,), ())),))


def test_without_a_prompt_nothing_predicts_the_first_token():
    row = PackedRow((TokenGroup((), (), ((1, 2), (3,))),))
    assert (row.position_ids, row.last_positions) == ([0, 1, 0], [1, 2])
    with pytest.raises(ValueError, match="without a prompt"):
        _ = row.predicting_positions


@given(st.lists(token_groups, min_size=1, max_size=8), st.integers(1, 40))
def test_rows_keep_to_a_budget_of_tokens(groups, budget):
    rows = pack(groups, tokens=budget)
    assert [index for row in rows for index in row] == list(range(len(groups)))
    for row in rows:
        size = len(PackedRow(tuple(groups[i] for i in row)).input_ids)
        assert size == sum(token_count(groups[i]) for i in row)
        assert size <= budget or len(row) == 1


@given(st.lists(ids, min_size=1, max_size=4))
def test_a_group_of_sequences_holds_them_all(sequences):
    group = group_sequences(sequences)
    assert [group.sequence(i) for i in range(len(sequences))] == sequences
    assert all(group.continuation_ids)


@given(st.lists(st.tuples(*[st.integers(1, 6)] * 3), max_size=9), st.integers(0, 30))
def test_runs_cover_a_sequence_at_the_least_cost(sizes, run_cost):
    def cost(runs):
        members = (sum(sizes[i][0] for i in run) for run in runs)
        lengths = (max(sizes[i][1] for i in run) * max(sizes[i][2] for i in run) for run in runs)
        return len(runs) * run_cost + sum(count * area for count, area in zip(members, lengths, strict=True))

    def all_cuts(first=0):
        if first == len(sizes):
            yield []
        for stop in range(first + 1, len(sizes) + 1):
            yield from ([range(first, stop), *rest] for rest in all_cuts(stop))

    runs = cheapest_runs(sizes, run_cost)
    assert [i for run in runs for i in run] == list(range(len(sizes)))
    assert cost(runs) == min(map(cost, all_cuts()))
