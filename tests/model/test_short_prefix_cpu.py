import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpsteer_rloo.model import short_prefix_cpu
from helpsteer_rloo.model.attention import shared_prefix_attention
from helpsteer_rloo.model.short_prefix_cpu import attend, is_short, plan_row
from tests.model.test_shared_prefix_cpu import ROWS, draw, shapes, softmax_attention, spans_of, with_gradients


def assert_exact(spans, inputs, scaling=None):
    ours = with_gradients(attend, inputs, spans, scaling)
    exact = with_gradients(softmax_attention, inputs, spans, scaling)
    for name, x, y in zip(("output", "query", "key", "value"), ours, exact, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("heads", [(4, 2, 8), (3, 3, 16), (6, 1, 12)])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_output_and_gradients_are_those_of_one_softmax(row, heads):
    assert_exact(spans_of(row), draw(spans_of(row), *heads))


@pytest.mark.parametrize("scaling", [0.5, 1.0])
def test_scores_are_scaled(scaling):
    spans = spans_of(ROWS["ragged"])
    assert_exact(spans, draw(spans, 4, 2, 8), scaling)


@given(st.lists(shapes, min_size=1, max_size=6), st.sampled_from([(4, 2), (2, 2), (3, 1)]), st.sampled_from([1, 10**9]))
@settings(max_examples=60, deadline=None)
def test_any_row_is_right_in_few_batches_and_in_many(row, heads, batch_cost):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(short_prefix_cpu, "BATCH_COST", batch_cost)
        plan_row.cache_clear()
        spans = spans_of(row)
        assert_exact(spans, draw(spans, *heads, size=8))
    plan_row.cache_clear()


@given(st.lists(shapes, min_size=1, max_size=6), st.integers(1, 3), st.integers(1, 2))
@settings(deadline=None)
def test_every_query_has_one_slot_that_is_not_padding(row, grouped, key_heads):
    plan = plan_row(spans_of(row), grouped * key_heads, key_heads)
    vectors = spans_of(row)[-1].end * grouped * key_heads
    assert plan.queries[plan.places].tolist() == list(range(vectors))
    assert sorted([*plan.places.tolist(), *plan.padding.tolist()]) == list(range(len(plan.queries)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precision_stays_close(dtype):
    spans = spans_of(ROWS["ragged"])
    inputs = draw(spans, 4, 2, 16, dtype)
    ours = with_gradients(attend, inputs, spans, None)
    exact = with_gradients(softmax_attention, [x.double() for x in inputs], spans, None)
    tolerance = 2e-6 if dtype == torch.float32 else 2**-8  # half a step of bfloat16 is 2**-9 of the value
    for x, y in zip(ours, exact, strict=True):
        assert x.dtype == dtype
        assert (x.double() - y).abs().max() <= tolerance * max(1, y.abs().max().item())


def test_autocast_changes_nothing():
    spans = spans_of(ROWS["ragged"])
    inputs = draw(spans, 4, 2, 16, torch.bfloat16)
    expected = with_gradients(attend, inputs, spans, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(*inputs[:3], spans, None)
    assert torch.equal(out, expected[0])


def test_any_memory_layout_is_read_and_the_bits_are_the_same_every_time():
    spans = spans_of(ROWS["ragged"])
    inputs = draw(spans, 4, 2, 8, torch.float32)
    expected = with_gradients(attend, inputs, spans, None)
    dense = with_gradients(attend, [x.contiguous() for x in inputs], spans, None)
    strided = with_gradients(attend, [torch.stack([x, x], dim=-1)[..., 0] for x in inputs], spans, None)
    for x, y, z in zip(expected, dense, strided, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)


def test_a_plan_made_in_inference_mode_serves_training():
    spans = spans_of(ROWS["ragged"])
    plan_row.cache_clear()
    query, key, value, grad = draw(spans, 4, 2, 8)
    with torch.inference_mode():
        attend(query, key, value, spans, None)
    assert_exact(spans, [query, key, value, grad])


def test_without_gradients_nothing_is_recorded():
    spans = spans_of(ROWS["ragged"])
    query, key, value, _ = draw(spans, 4, 2, 8)
    with torch.no_grad():
        assert attend(query.requires_grad_(), key, value, spans, None).grad_fn is None


@pytest.mark.parametrize(("longest", "short"), [(short_prefix_cpu.SHORT, True), (short_prefix_cpu.SHORT + 1, False)])
def test_rows_whose_sequences_are_all_short_come_here(monkeypatch, longest, short):
    calls = []
    monkeypatch.setattr(short_prefix_cpu, "attend", lambda *given: calls.append(1) or attend(*given))
    spans = spans_of([(5, (3, 2)), (longest - 20, (20, 1))])
    query, key, value, _ = draw(spans, 4, 2, 8)
    assert is_short(spans) == short
    out, _ = shared_prefix_attention(torch.nn.Module(), query, key, value, None, spans=spans)
    assert len(calls) == short
    exact = softmax_attention(query, key, value, spans, None)
    torch.testing.assert_close(out.transpose(1, 2), exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("row", [[(2, (2,))], [(2, ()), (2, (2,))]], ids=["too few", "too many"])
def test_spans_that_do_not_cover_the_row_are_refused(row):
    query, key, value = (torch.zeros(1, heads, 5, 8) for heads in (2, 1, 1))
    with pytest.raises(ValueError, match="cover a row of 5 tokens"):
        attend(query, key, value, spans_of(row), None)
