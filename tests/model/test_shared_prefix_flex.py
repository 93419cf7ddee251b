import shutil
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import scaled_dot_product_attention

from helpsteer_rloo.model import shared_prefix_flex
from helpsteer_rloo.model.attention import dense_mask
from helpsteer_rloo.model.shared_prefix_flex import attend, compiled, mask_function, row_mask
from helpsteer_rloo.packing import Span

CPU = torch.device("cpu")
ROWS = {
    "long": [(150, (40, 200)), (0, (3, 7)), (130, ())],
    "tiny": [(1, (1, 1)), (0, ()), (2, (5,))],
    "aligned": [(128, (128, 128)), (256, (128,))],
}


def spans_of(shapes):
    spans, start = [], 0
    for prompt, continuations in shapes:
        spans.append(Span(start, prompt, tuple(continuations)))
        start = spans[-1].end
    return tuple(spans)


shapes = st.tuples(st.integers(0, 12), st.lists(st.integers(1, 9), max_size=8).map(tuple)).filter(
    lambda x: sum(x[1]) + x[0]
)


@given(st.lists(shapes, min_size=1, max_size=6))
@settings(deadline=None)
def test_the_mask_function_is_the_dense_mask(row):
    spans = spans_of(row)
    index = torch.arange(spans[-1].end)
    zero = torch.tensor(0)
    visible = mask_function(spans, CPU)(zero, zero, index[:, None], index[None, :])
    assert torch.equal(visible, dense_mask(spans))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_blocks_are_skipped_where_all_is_masked_and_whole_where_nothing_is(row):
    spans = spans_of(row)
    mask = row_mask(spans, CPU)
    rows, columns = mask.BLOCK_SIZE
    count = -(-spans[-1].end // rows)
    padded = torch.zeros(count * rows, count * columns, dtype=torch.bool)
    padded[: spans[-1].end, : spans[-1].end] = dense_mask(spans)
    blocks = padded.unflatten(0, (count, rows)).unflatten(2, (count, columns))
    assert torch.equal(mask.to_dense()[0, 0].bool(), blocks.any(3).any(1))
    whole = torch.zeros(count, count, dtype=torch.bool)
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    for query in range(count):
        whole[query, mask.full_kv_indices[0, 0, query, : mask.full_kv_num_blocks[0, 0, query]].long()] = True
    assert torch.equal(whole, blocks.all(3).all(1))


# Flex attention has no backward on the CPU, so that its gradients are torch's own tests' to hold.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (2, 2)])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_attention_is_that_under_the_dense_mask(row, heads, key_heads):
    spans = spans_of(row)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, spans[-1].end, count, 16, generator=generator).transpose(1, 2)
        for count in (heads, key_heads, key_heads)
    )
    exact = scaled_dot_product_attention(query, key, value, attn_mask=dense_mask(spans), scale=0.3, enable_gqa=True)
    torch.testing.assert_close(attend(query, key, value, spans, 0.3), exact, rtol=1e-5, atol=1e-6)


def test_no_row_goes_to_the_kernel_for_decoding(monkeypatch):
    given = {}
    monkeypatch.setattr(shared_prefix_flex, "flex_attention", lambda query, *_, **kwargs: given.update(kwargs) or query)
    query = torch.zeros(1, 4, 50, 16)
    attend(query, query[:, :1], query[:, :1], [Span(0, 40, (10,))], None)
    assert given["kernel_options"]["FORCE_USE_FLEX_ATTENTION"]


def test_the_mask_is_built_once_a_row():
    spans = spans_of(ROWS["tiny"])
    assert row_mask(spans, CPU) is row_mask(spans_of(ROWS["tiny"]), CPU)
    assert not row_mask(spans, CPU).kv_num_blocks.is_inference()


def test_every_kind_of_call_is_compiled_for():
    with torch.compiler.config.patch(fail_on_recompile_limit_hit=True):
        attention = compiled(backend="eager")
        for dtype, error in ((torch.float32, 1e-5), (torch.float64, 1e-9), (torch.bfloat16, 2e-2)):
            for gradients in (False, True):
                for prompt in (300, 310, 900, 20):  # other lengths, other numbers of blocks, one block
                    spans = spans_of([(prompt, (7, 5))])
                    query = torch.randn(1, 2, spans[-1].end, 16, dtype=dtype)
                    with torch.set_grad_enabled(gradients):
                        out = attention(query, query, query, block_mask=row_mask(spans, CPU))
                    exact = scaled_dot_product_attention(query, query, query, attn_mask=dense_mask(spans))
                    torch.testing.assert_close(out, exact, rtol=error, atol=error)


def test_every_thread_may_compile_as_often():
    limits = []
    compiled(backend="eager")

    def recomputes():
        compiled(backend="eager")
        limits.append(torch.compiler.config.recompile_limit)

    thread = threading.Thread(target=recomputes)
    thread.start()
    thread.join()
    assert limits == [shared_prefix_flex.KERNELS]


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_the_mask_is_the_one_that_pytorch_makes(row):
    spans = spans_of(row)
    total = spans[-1].end
    theirs = create_block_mask(mask_function(spans, CPU), None, None, total, total, CPU)
    for ours, expected in zip(row_mask(spans, CPU).as_tuple(), theirs.as_tuple(), strict=True):
        assert type(ours) is type(expected)
        if isinstance(expected, torch.Tensor):
            assert (ours.dtype, ours.tolist()) == (expected.dtype, expected.tolist())
        elif not callable(expected):
            assert ours == expected


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler of C++")
def test_the_compiled_kernel_is_right_as_lengths_vary():
    for prompt, lengths in ((900, (300, 243)), (1200, (262,)), (40, (17, 5)), (1500, (200, 52))):
        spans = spans_of([(prompt, lengths), (30, (9,))])
        query, key, value = (torch.randn(1, heads, spans[-1].end, 32) for heads in (4, 2, 2))
        with torch.no_grad():
            options = {"kernel_options": shared_prefix_flex.OPTIONS, "enable_gqa": True}
            out = compiled()(query, key, value, block_mask=row_mask(spans, CPU), **options)
        exact = scaled_dot_product_attention(query, key, value, attn_mask=dense_mask(spans), enable_gqa=True)
        torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)
