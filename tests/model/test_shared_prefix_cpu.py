import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpsteer_rloo.model import shared_prefix_cpu
from helpsteer_rloo.model.attention import dense_mask
from helpsteer_rloo.model.shared_prefix_cpu import Block, attend, batch_blocks, plan_row, split_causal
from helpsteer_rloo.packing import Span

ROWS = {
    "one group": [(5, (3, 2))],
    "no prompt": [(0, (4, 1, 3))],
    "prompt of one token": [(1, (4, 1)), (1, (2,))],
    "prompts only": [(7, ()), (3, ()), (0, ()), (7, ())],
    "one-token continuations": [(6, (1, 1, 1, 1)), (4, (1,))],
    "equal groups": [(6, (4, 4, 4))] * 5,
    "ragged": [(9, (3, 7, 1)), (0, (5,)), (9, (2,)), (4, ()), (1, (11, 2))],
    "sixteen continuations": [(13, tuple(range(1, 17)))],
    "a prompt as long as a block of pieces": [(256, (300, 257)), (256, (1,))],
    "long and short": [(600, (40, 290)), (8, (3, 3)), (511, (1,))],
}


def spans_of(shapes):
    spans, start = [], 0
    for prompt, continuations in shapes:
        spans.append(Span(start, prompt, tuple(continuations)))
        start = spans[-1].end
    return tuple(spans)


def draw(spans, heads, key_heads, size, dtype=torch.float64):
    """Query, key, value and the output's gradient, laid out as by a model: views of [1, T, heads, size]."""
    generator = torch.Generator().manual_seed(spans[-1].end)
    return [
        torch.randn(1, spans[-1].end, count, size, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)
        for count in (heads, key_heads, key_heads, heads)
    ]


def softmax_attention(query, key, value, spans, scaling):
    """The definition: one softmax over all that `dense_mask` allows."""
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    return scores.masked_fill(~dense_mask(spans), -torch.inf).softmax(-1) @ value


def with_gradients(function, inputs, spans, scaling):
    *inputs, grad = inputs
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs, spans, scaling)
    return out.detach(), *torch.autograd.grad(out, inputs, grad)


def assert_exact(spans, inputs, scaling=None):
    ours = with_gradients(attend, inputs, spans, scaling)
    exact = with_gradients(softmax_attention, inputs, spans, scaling)
    for name, x, y in zip(("output", "query", "key", "value"), ours, exact, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("heads", "key_heads", "size"), [(4, 2, 8), (3, 3, 16), (6, 1, 12)])
@pytest.mark.parametrize("shapes", ROWS.values(), ids=ROWS.keys())
def test_output_and_gradients_are_those_of_one_softmax(shapes, heads, key_heads, size):
    spans = spans_of(shapes)
    assert_exact(spans, draw(spans, heads, key_heads, size))


@pytest.mark.parametrize("scaling", [0.5, 1.0])
def test_scores_are_scaled(scaling):
    spans = spans_of(ROWS["ragged"])
    assert_exact(spans, draw(spans, 4, 2, 8), scaling)


shapes = st.tuples(st.integers(0, 12), st.lists(st.integers(1, 9), max_size=16).map(tuple)).filter(
    lambda x: sum(x[1]) + x[0]
)


@given(st.lists(shapes, min_size=1, max_size=6), st.sampled_from([(4, 2), (2, 2), (3, 1)]), st.integers(2, 6))
@settings(max_examples=60, deadline=None)
def test_any_row_is_right_however_it_is_cut(row, heads, piece):
    """Pieces and calls as cheap as these make short rows take the paths of long ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_prefix_cpu, "PIECE", piece)
        patch.setattr(shared_prefix_cpu, "WHOLE", piece)
        patch.setattr(shared_prefix_cpu, "CALL_COST", 10 * piece)
        plan_row.cache_clear()
        spans = spans_of(row)
        assert_exact(spans, draw(spans, *heads, size=8))
    plan_row.cache_clear()


sizes = st.tuples(st.integers(1, 300), st.integers(1, 300))


@given(st.lists(sizes, min_size=1, max_size=40) | st.lists(sizes.map(lambda x: (x[0], x[0])), min_size=1, max_size=40))
@settings(deadline=None)
def test_batches_hold_every_block_once_and_cost_no_more_than_simple_ones(sizes):
    blocks, start = [], 0
    for queries, keys in sizes:
        blocks.append(Block(start + keys, queries, start, keys))
        start += keys + queries

    def cost(batches):
        most = [(max(b.queries for b in batch), max(b.keys for b in batch)) for batch in batches]
        pairs = (len(batch) * queries * keys for batch, (queries, keys) in zip(batches, most, strict=True))
        return len(batches) * shared_prefix_cpu.CALL_COST + sum(pairs)

    batches = batch_blocks(blocks)
    assert sorted(block for batch in batches for block in batch) == blocks
    alone = [[block for block in blocks if (block.queries, block.keys) == size] for size in set(sizes)]
    assert cost(batches) <= min(cost([blocks]), cost(alone))


@given(st.integers(0, 50), st.integers(0, 5000), st.sampled_from([shared_prefix_cpu.PIECE, shared_prefix_cpu.WHOLE]))
def test_pieces_and_blocks_cover_causal_attention_once(start, length, piece):
    pieces, blocks = split_causal(start, length, piece)
    assert (
        sum(size * (size + 1) // 2 for _, size in pieces)
        + sum(queries * (query - key) for query, queries, key, keys in blocks)
        == length * (length + 1) // 2
    )
    assert all(block.key + block.keys == block.query for block in blocks)
    assert all(0 < size <= piece for _, size in pieces)
    assert [begin for begin, _ in pieces] == [start + sum(size for _, size in pieces[:i]) for i in range(len(pieces))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["ragged", "long and short"])
def test_lower_precision_stays_close(name, dtype):
    spans = spans_of(ROWS[name])
    inputs = draw(spans, 4, 2, 16, dtype)
    ours = with_gradients(attend, inputs, spans, None)
    exact = with_gradients(softmax_attention, [x.double() for x in inputs], spans, None)
    tolerance = 2e-6 if dtype == torch.float32 else 2**-8  # half a step of bfloat16 is 2**-9 of the value
    for x, y in zip(ours, exact, strict=True):
        assert x.dtype == dtype
        assert (x.double() - y).abs().max() <= tolerance * max(1, y.abs().max().item())


def test_any_memory_layout_is_read():
    spans = spans_of(ROWS["ragged"])
    inputs = draw(spans, 4, 2, 8)
    expected = with_gradients(attend, inputs, spans, None)
    dense = with_gradients(attend, [x.contiguous() for x in inputs], spans, None)
    strided = [torch.stack([x, x], dim=-1)[..., 0] for x in inputs]
    for x, y, z in zip(expected, dense, with_gradients(attend, strided, spans, None), strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)


def test_scores_far_beyond_exp_are_merged():
    spans = spans_of([(4, (3,))])
    inputs = draw(spans, 2, 2, 8)
    assert_exact(spans, [inputs[0] * 300, *inputs[1:]])


def test_without_gradients_nothing_is_recorded():
    spans = spans_of(ROWS["ragged"])
    query, key, value, _ = draw(spans, 4, 2, 8)
    recorded = attend(query.detach().requires_grad_(), key, value, spans, None)
    assert recorded.grad_fn is not None
    with torch.no_grad():
        assert attend(query.detach().requires_grad_(), key, value, spans, None).grad_fn is None
    plain = attend(query, key, value, spans, None)
    assert plain.grad_fn is None
    assert torch.equal(plain, recorded)


def test_a_plan_made_in_inference_mode_serves_training():
    spans = spans_of(ROWS["ragged"])
    plan_row.cache_clear()
    query, key, value, grad = draw(spans, 4, 2, 8)
    with torch.inference_mode():
        attend(query, key, value, spans, None)
    assert_exact(spans, [query, key, value, grad])


def test_prompts_of_several_lengths_are_one_call():
    plan = plan_row(spans_of([(31, (11, 11)), (28, (10, 9, 12)), (40, (8,))]), shared_prefix_cpu.PIECE)
    ((continuations, prompts, bias),) = plan.across
    assert (continuations.length, prompts.length) == (31, 40)
    assert (bias == 0).sum(-1).flatten().tolist() == [31, 28, 40]


def test_equal_groups_are_read_in_place():
    spans = spans_of([(31, (11, 11))] * 3)
    plan = plan_row(spans, shared_prefix_cpu.PIECE)
    ((continuations, prompts, bias),) = plan.across
    assert bias is None
    row = torch.arange(spans[-1].end * 16).view(-1, 2, 8)
    for ranges, length, first in ((prompts, 31, 0), (continuations, 22, 31)):
        taken = ranges.take(row)
        assert taken.shape == (3, 2, length, 8)
        assert taken.data_ptr() == row[first].data_ptr()
        assert torch.equal(taken[2, 1], row[first + 106 : first + 106 + length, 1])


@pytest.mark.parametrize("spans", [(Span(0, 2, (2,)),), (Span(0, 2, ()), Span(3, 2, ())), (Span(0, 2, (4,)),)])
def test_spans_that_do_not_cover_the_row_are_refused(spans):
    query, key, value = (torch.zeros(1, heads, 5, 8) for heads in (2, 1, 1))
    with pytest.raises(ValueError, match="cover a row of 5 tokens"):
        attend(query, key, value, spans, None)
