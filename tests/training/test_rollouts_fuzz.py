"""Property tests of packing rollouts: nothing lost, nothing doubled, budgets kept, the same order again."""

import itertools
from collections import Counter

from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from helpsteer_rloo.packing import token_count
from helpsteer_rloo.training.pairs import GroupSampler, Pair, StepShape, pack_pairs
from helpsteer_rloo.training.rollouts import Rollout, mini_batch_order, rows_of, slices_of, units_of
from tests.training.test_pairs import batched

ids = st.lists(st.integers(0, 99), min_size=1, max_size=5)
prompts = st.lists(st.tuples(st.integers(0, 3), ids), min_size=1, max_size=16)
budgets = st.none() | st.integers(1, 40)


def rollout_of(entries):
    """Completions of a few prompts; `entries` are a prompt's number and a completion."""
    count = len(entries)
    prompt_ids = [[number, 50] for number, _ in entries]
    return Rollout([None] * count, prompt_ids, [own for _, own in entries], [None] * count, [True] * count, None)


def completions(row):
    return [tuple(own) for group in row.row.groups for own in group.continuation_ids]


def check_rows(rows, rollout, budget):
    for row in rows:
        assert completions(row) == [tuple(rollout.completion_ids[place]) for place in row.places]
        owners = [group.prompt_ids for group in row.row.groups for _ in group.continuation_ids]
        assert owners == [tuple(rollout.prompt_ids[place]) for place in row.places]
        tokens = sum(map(token_count, row.row.groups))
        assert tokens == len(row.row.input_ids)
        assert budget is None or tokens <= budget or len(row.row.groups) == 1


@given(prompts, st.integers(1, 5), budgets)
def test_rows_hold_every_completion_once_in_order_behind_its_own_prompt(entries, group_size, budget):
    rollout = rollout_of(entries)
    units = units_of(rollout, group_size)
    assert all(len(unit.places) <= group_size for unit in units)
    rows = rows_of(units, budget)
    assert [place for row in rows for place in row.places] == list(range(len(entries)))
    check_rows(rows, rollout, budget)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 9))
def test_mini_batches_are_the_same_prompts_however_many_processes_share_them(blocks, steps, processes, seed):
    count = blocks * steps

    def mini_batches(parts):
        """By mini-batch, the prompts of all processes with `count * processes // parts` of them each."""
        each = count * processes // parts
        orders = [[p * each + i for i in mini_batch_order(each, steps, seed, p)] for p in range(parts)]
        share = each // steps
        return [sorted(i for order in orders for i in order[m * share :][:share]) for m in range(steps)]

    assert sorted(itertools.chain.from_iterable(mini_batches(processes))) == list(range(count * processes))
    assert mini_batches(processes) == mini_batches(1)


@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 9))
def test_an_order_of_mini_batches_has_every_prompt_once_and_differs_by_seed(count, steps, seed):
    assert sorted(mini_batch_order(count, steps, seed, 0)) == list(range(count))
    assert mini_batch_order(24, 4, seed, 0) != mini_batch_order(24, 4, seed + 1, 0)


@given(prompts, st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), budgets)
def test_slices_hold_every_completion_once_as_evenly_as_they_can(entries, group_size, steps, slices, budget):
    steps = min(steps, len(entries))
    rollout = rollout_of(entries)
    units = units_of(rollout, group_size)

    hands = slices_of(units, steps, slices, budget)
    assert len(hands) == steps
    assert all(len(hand) == slices for hand in hands)
    rows = [row for hand in hands for micro_batch in hand for row in micro_batch]
    assert Counter(place for row in rows for place in row.places) == Counter(range(len(entries)))
    check_rows(rows, rollout, budget)
    counts = [sum(len(row.places) for rows in hand for row in rows) for hand in hands]
    share, rest = divmod(len(entries), steps)
    assert counts == [share] * (steps - 1) + [share + rest]
    again = slices_of(units, steps, slices, budget)
    assert [[[row.places for row in rows] for rows in hand] for hand in again] == [
        [[row.places for row in rows] for rows in hand] for hand in hands
    ]


sequences = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)
pairs = st.builds(Pair, sequences, sequences, st.none(), st.none() | st.integers(0, 2))


@given(st.lists(pairs, min_size=1, max_size=9), budgets)
def test_rows_of_pairs_keep_to_their_budget_and_are_the_same_again(batch, budget):
    rows = pack_pairs(batch, budget)
    assert sorted(place for row in rows for place in row.places) == list(range(len(batch)))
    for row in rows:
        assert budget is None or len(row.row.input_ids) <= budget or len(row.row.groups) == 1
    assert [row.places for row in pack_pairs(batch, budget)] == [row.places for row in rows]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.integers(1, 6), st.integers(0, 99), st.integers(0, 3))
def test_an_epoch_has_every_pair_once_in_an_order_of_seed_and_epoch_alone(groups, batch_size, seed, epoch):
    def order():
        sampler = GroupSampler(groups, StepShape(batch_size), seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert sorted(order()) == list(range(len(groups)))
    assert order() == order()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_steps_take_the_same_pairs_however_many_processes_share_them_out(groups, batch_size, batches, processes):
    """As accelerate deals batches to processes, and repeats the first ones where the last step is not whole."""
    shape = StepShape(batch_size, batches, processes)
    alone = GroupSampler(groups, StepShape(shape.pairs), seed=3)
    expected = [sorted(step) for step in batched(alone, shape.pairs)]
    dealt = BatchSampler(GroupSampler(groups, shape, seed=3), batch_size, drop_last=False)
    streams = [list(batched(BatchSamplerShard(dealt, processes, process), batches)) for process in range(processes)]
    assert {len(stream) for stream in streams} == {len(expected)}
    for number, step in enumerate(expected):
        left = len(groups) - number * shape.pairs
        shares = [shape.new_in_turn(stream[number], process, left) for process, stream in enumerate(streams)]
        assert sorted(itertools.chain(*shares)) == step
        if len(step) == shape.pairs and max(Counter(groups).values()) == 1:
            assert {len(share) for share in shares} == {batch_size * batches}
