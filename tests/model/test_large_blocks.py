"""Blocks of attention as matrix products: against the softmax as it is written, and within a row."""

import math

import pytest
import torch

from helpsteer_rloo.model import large_blocks, products, shared_prefix_cpu
from helpsteer_rloo.model.large_blocks import LEAST_SCORES, States
from helpsteer_rloo.packing import Span
from tests.model.test_attention import EDGES, draw, under_dense_mask

SHAPES = {  # ranges, query heads, key heads, queries, keys
    "several": (3, 6, 2, 5, 7),
    "one head": (1, 1, 1, 4, 9),
    "one key": (2, 4, 4, 3, 1),
    "one query": (1, 4, 2, 1, 6),
}
CAUSAL = {"causal": (3, 6, 2, 7, 7), "causal, of one token": (1, 4, 2, 1, 1), "causal, one head": (2, 1, 1, 11, 11)}


def states_of(shape, dtype=torch.float64, *, hidden=0, scaling=0.4):
    ranges, heads, key_heads, queries, keys = shape
    causal = shape in CAUSAL.values()
    generator = torch.Generator().manual_seed(0)

    def states(count, length):  # laid out as in a row: heads of a token side by side
        return torch.randn(ranges, length, count, 8, generator=generator, dtype=dtype).transpose(1, 2)

    bias = None
    if hidden:
        bias = torch.zeros(ranges, 1, 1, keys, dtype=dtype)
        bias[0, ..., -hidden:] = -torch.inf
    return States(states(heads, queries), states(key_heads, keys), states(key_heads, keys), bias, scaling, causal)


def plain(states):
    """Output and log-sum-exps by autograd's own operations."""
    repeats = states.query.shape[1] // states.key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (states.key, states.value))
    scores = states.query @ key.mT * states.scaling + (0 if states.bias is None else states.bias)
    if states.causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


TILES = {"one tile": (large_blocks.MOST_SCORES, 384), "a query each": (12, 384), "large tiles": (100_000, 100)}


@pytest.fixture(params=TILES.values(), ids=TILES.keys())
def tiles(request, monkeypatch):
    scores, tokens = request.param
    monkeypatch.setattr(large_blocks, "MOST_SCORES", scores)
    monkeypatch.setattr(large_blocks, "CAUSAL_TILE", tokens)


@pytest.mark.parametrize("hidden", [0, 2])
@pytest.mark.parametrize("shape", [*SHAPES.values(), *CAUSAL.values()], ids=[*SHAPES, *CAUSAL])
@pytest.mark.usefixtures("tiles")
def test_outputs_and_gradients_are_those_of_the_softmax(shape, hidden):
    states = states_of(shape, hidden=hidden if shape in SHAPES.values() and shape[-1] > hidden else 0)
    leaves = [x.requires_grad_() for x in states[:3]]
    expected, expected_lse = plain(states)
    grad = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out, lse = large_blocks.attend(states)
        found = large_blocks.gradients(states, grad, out, lse)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)
    for one, other in zip(found, torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("spans", [*EDGES.values(), (Span(0, 300, (40, 300)),)], ids=[*EDGES, "long"])
@pytest.mark.usefixtures("tiles")
def test_a_row_whose_blocks_go_this_way_meets_the_dense_mask(spans, monkeypatch):
    taken = []
    monkeypatch.setattr(large_blocks, "gains", lambda states: taken.append(states) or True)
    monkeypatch.setattr(shared_prefix_cpu, "PIECE", shared_prefix_cpu.WHOLE)
    inputs = draw(spans)
    ours, exact = shared_prefix_cpu.attend(*inputs, spans, None), under_dense_mask(*inputs, spans, None)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)
    kinds = {states.causal for states in taken}
    assert kinds == ({True, False} if any(span.prompt and span.continuations for span in spans) else {True})
    weights = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(1))
    gradients = (torch.autograd.grad(out, inputs, weights) for out in (ours, exact))
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.fixture
def elsewhere(monkeypatch):
    """A processor on which oneDNN's products are the faster ones."""
    monkeypatch.setattr(products, "is_intel", lambda: False)
    if not products.onednn_leads(torch.ones(1)):
        pytest.skip("this build or processor has no products of oneDNN's in float32")


@pytest.mark.usefixtures("elsewhere", "tiles")
@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("causal", [False, True])
def test_in_float32_it_is_as_exact_as_the_kernels(spread, causal):
    shape = (2, 8, 4, 600 if causal else 256, 600)
    states = states_of(shape, torch.float32, hidden=0 if causal else 9, scaling=spread / math.sqrt(8))
    states = states._replace(causal=causal)
    assert large_blocks.gains(states)
    wide = states._replace(**{name: getattr(states, name).double() for name in ("query", "key", "value")})
    exact, exact_lse = plain(wide)
    grad = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    exact_gradients = large_blocks.gradients(wide, grad.double(), exact, exact_lse)
    kernel = shared_prefix_cpu._flash(*states[:3], 0.0, causal, attn_mask=states.bias, scale=states.scaling)
    kernel_gradients = shared_prefix_cpu._flash_backward(
        grad, *states[:3], *kernel, 0.0, causal, attn_mask=states.bias, scale=states.scaling
    )
    ours = large_blocks.attend(states)
    our_gradients = large_blocks.gradients(states, grad, *ours)
    for found, theirs, true in zip(
        (*ours, *our_gradients), (*kernel, *kernel_gradients), (exact, exact_lse, *exact_gradients), strict=True
    ):
        errors = [(x.double() - true).abs().max() / true.abs().max() for x in (found, theirs)]
        assert errors[0] <= 3 * errors[1] + 1e-6


@pytest.mark.usefixtures("elsewhere")
def test_it_is_taken_for_large_blocks_in_float32_where_onednn_leads(monkeypatch):
    large, small = (1, 8, 4, 128, LEAST_SCORES // 256), (1, 8, 4, 127, LEAST_SCORES // 256)
    assert large_blocks.gains(states_of(large, torch.float32))
    assert not large_blocks.gains(states_of(small, torch.float32))
    assert not large_blocks.gains(states_of(large, torch.float64))
    monkeypatch.setattr(products, "is_intel", lambda: True)
    assert not large_blocks.gains(states_of(large, torch.float32))


@pytest.mark.usefixtures("elsewhere")
def test_ranges_that_products_take_are_cut_into_longer_pieces(monkeypatch):
    spans, pieces = (Span(0, 2000, (300,)),), []
    plan_row = shared_prefix_cpu.plan_row
    monkeypatch.setattr(
        shared_prefix_cpu, "plan_row", lambda spans, piece: pieces.append(piece) or plan_row(spans, piece)
    )
    for dtype in (torch.bfloat16, torch.float64):
        query, key = (torch.zeros(1, heads, 2300, 8, dtype=dtype) for heads in (4, 2))
        shared_prefix_cpu.attend(query, key, key, spans, None)
    assert pieces == [shared_prefix_cpu.WHOLE, shared_prefix_cpu.PIECE]


@pytest.mark.usefixtures("elsewhere")
def test_autocast_changes_nothing():
    spans = (Span(0, 300, (20, 250)),)
    inputs = draw(spans, torch.float32)
    weights = torch.randn(1, 4, spans[-1].end, 8, generator=torch.Generator().manual_seed(1))
    plain = shared_prefix_cpu.attend(*inputs, spans, None)
    expected = torch.autograd.grad(plain, inputs, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = shared_prefix_cpu.attend(*inputs, spans, None)
        gradients = torch.autograd.grad(found, inputs, weights)
    assert all(torch.equal(x, y) for x, y in zip((plain, *expected), (found, *gradients), strict=True))
