import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.model import shared_prefix_cpu, short_prefix_cpu
from helpsteer_rloo.model.attention import (
    SHARED_PREFIX,
    attend_by_blocks,
    dense_mask,
    shared_prefix_attention,
    use_shared_prefix,
)
from helpsteer_rloo.packing import PackedRow, Span

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def norm_in_float64(self, hidden_states):
    """Root-mean-square norm without transformers' detour through float32, which would hide what is compared."""
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


@pytest.fixture(params=["qwen3", "llama"])
def model(request, monkeypatch):
    torch.manual_seed(0)
    if request.param == "qwen3":
        monkeypatch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", norm_in_float64)
        return Qwen3ForCausalLM(Qwen3Config(**SIZES)).double().train()
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm_in_float64)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).double().train()


def random_groups(seed, count=3):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    def ids(length):
        return tuple(torch.randint(1, 60, (length,), generator=generator).tolist())

    return [TokenGroup((), ids(draw(1, 9)), tuple(ids(draw(1, 7)) for _ in range(draw(1, 8)))) for _ in range(count)]


def packed_hidden(model, row):
    use_shared_prefix(model)
    return model.model(
        input_ids=torch.tensor([row.input_ids]),
        position_ids=torch.tensor([row.position_ids]),
        spans=row.spans,
        use_cache=False,
    ).last_hidden_state[0]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_log_probabilities_and_gradients_equal_plain_unpadded_forwards(model, seed, checkpointing):
    row = PackedRow(tuple(random_groups(seed)))
    weights = torch.randn(len(row.predicted_ids), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    model.set_attn_implementation("sdpa")
    plain = []
    for group in row.groups:
        for index, continuation in enumerate(group.continuation_ids):
            logits = model(input_ids=torch.tensor([group.sequence(index)])).logits[0]
            kept = logits[len(group.prompt_ids) - 1 : -1].log_softmax(-1)
            plain.append(kept.gather(-1, torch.tensor(continuation)[:, None])[:, 0])
    expected = torch.cat(plain)
    expected_gradients = gradients(model, (expected * weights).sum())
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    hidden = packed_hidden(model, row)[row.predicting_positions]
    packed = model.lm_head(hidden).log_softmax(-1).gather(-1, torch.tensor(row.predicted_ids)[:, None])[:, 0]
    packed_gradients = gradients(model, (packed * weights).sum())
    model.gradient_checkpointing_disable()
    torch.testing.assert_close(packed, expected, rtol=1e-9, atol=1e-10)
    assert packed_gradients.keys() == expected_gradients.keys()
    for name, gradient in packed_gradients.items():
        scale = expected_gradients[name].abs().max().item()
        torch.testing.assert_close(
            gradient, expected_gradients[name], rtol=1e-9, atol=1e-9 * max(scale, 1e-3), msg=name
        )


@pytest.mark.parametrize("seed", range(4))
def test_the_blocks_meet_the_dense_mask(model, seed):
    row = PackedRow(tuple(random_groups(seed)))
    ours = packed_hidden(model, row)
    model.set_attn_implementation("sdpa")
    mask = dense_mask(row.spans)[None, None]
    inputs = {"input_ids": torch.tensor([row.input_ids]), "position_ids": torch.tensor([row.position_ids])}
    theirs = model.model(**inputs, attention_mask=mask, use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


EDGES = {
    "no prompt": (Span(0, 0, (2, 3)),),
    "prompt of one token": (Span(0, 1, (1, 4)), Span(6, 1, (1,))),
    "prompts only": (Span(0, 4, ()), Span(4, 2, ())),
    "mixed": (Span(0, 5, (1, 4, 2)), Span(12, 3, ()), Span(15, 0, (3,)), Span(18, 2, (2,))),
}


def draw(spans, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    total = spans[-1].end
    return [
        torch.randn(1, total, heads, 8, generator=generator, dtype=dtype).transpose(1, 2).requires_grad_()
        for heads in (4, 2, 2)
    ]


def under_dense_mask(query, key, value, spans, scaling):
    mask = dense_mask(spans)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)


@pytest.mark.parametrize("attend", [shared_prefix_cpu.attend, short_prefix_cpu.attend, attend_by_blocks])
@pytest.mark.parametrize("spans", EDGES.values(), ids=EDGES.keys())
def test_every_way_to_attend_meets_the_dense_mask(spans, attend):
    inputs = draw(spans)
    ours, exact = attend(*inputs, spans, 0.4), under_dense_mask(*inputs, spans, 0.4)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)
    weights = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(1))
    gradients = (torch.autograd.grad(out, inputs, weights) for out in (ours, exact))
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("supported", [True, False])
def test_the_cpu_is_served_with_and_without_its_kernels(monkeypatch, supported):
    calls = []
    monkeypatch.setattr(shared_prefix_cpu, "supported", lambda: supported)
    monkeypatch.setattr(short_prefix_cpu, "SHORT", 0)
    plan_row, spans = shared_prefix_cpu.plan_row, EDGES["mixed"]
    monkeypatch.setattr(
        shared_prefix_cpu, "plan_row", lambda spans, piece: calls.append(spans) or plan_row(spans, piece)
    )
    inputs = draw(spans)
    out, weights = shared_prefix_attention(torch.nn.Module(), *inputs, None, spans=spans, scaling=0.4)
    assert weights is None
    assert len(calls) == supported
    torch.testing.assert_close(out.transpose(1, 2), under_dense_mask(*inputs, spans, 0.4), rtol=1e-10, atol=1e-10)


def test_another_device_is_served_by_plain_blocks():
    inputs = [x.to("meta") for x in draw(EDGES["mixed"])]
    out, _ = shared_prefix_attention(torch.nn.Module(), *inputs, None, spans=EDGES["mixed"])
    assert out.device.type == "meta"
    assert out.shape == (1, 22, 4, 8)


def test_without_spans_a_padded_batch_is_masked_as_ever(model):
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    left = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]])
    model.set_attn_implementation("sdpa")
    expected = model(input_ids=ids, attention_mask=mask).logits
    use_shared_prefix(model)
    assert model.config._attn_implementation == SHARED_PREFIX
    got = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-12, atol=1e-12)
    from_left = model(input_ids=left, attention_mask=mask.flip(1)[[0, 1]]).logits
    torch.testing.assert_close(from_left[1, 2:], expected[1, :2], rtol=1e-4, atol=1e-6)  # float32 rotary angles
    alone = model(input_ids=ids[:1]).logits
    torch.testing.assert_close(alone[0], expected[0], rtol=1e-12, atol=1e-12)


def test_bfloat16_stays_close(model):
    import copy

    row = PackedRow(tuple(random_groups(1)))
    exact = packed_hidden(model, row)
    rough = packed_hidden(copy.deepcopy(model).bfloat16(), row)
    assert (rough.double() - exact).abs().max() < 0.15


def test_a_model_with_sliding_windows_or_of_another_architecture_is_refused():
    sliding = Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(ValueError, match="was not made for Qwen3ForCausalLM"):
        use_shared_prefix(Qwen3ForCausalLM(sliding))
    other = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None))
    with pytest.raises(ValueError, match="was not made for MistralForCausalLM"):
        use_shared_prefix(other)


class Recorder:
    """A cascade that attends to nothing before, and keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def attend(self, module, query, key, value, scaling):
        self.asked.append((module.layer_idx, query.shape, key.shape, value.shape, scaling))
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2)


def test_a_cascade_attends_in_every_layer(model):
    ids = torch.tensor([[5, 6, 7], [9, 10, 11]])
    model.set_attn_implementation("sdpa")
    expected = model(input_ids=ids).logits
    use_shared_prefix(model)
    cascade = Recorder()
    got = model(input_ids=ids, cascade=cascade, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    shapes = ((2, 4, 3, 8), (2, 2, 3, 8), (2, 2, 3, 8))
    assert cascade.asked == [(layer, *shapes, 8**-0.5) for layer in range(2)]


@pytest.mark.parametrize("given", [{"spans": EDGES["mixed"]}, {"cascade": Recorder()}])
def test_what_only_other_attention_knows_is_refused(given):
    with pytest.raises(ValueError, match="does not know dropout, sliding_window"):
        shared_prefix_attention(
            torch.nn.Module(), *draw(EDGES["mixed"]), None, dropout=0.1, sliding_window=4, softcap=None, **given
        )


def test_a_prepared_model_serves_all_other_calls_as_before(model):
    """A cache and several new tokens without a mask, and rows of several sequences without padding."""
    ids, other = torch.randint(3, 60, (1, 9)), torch.randint(3, 60, (1, 4))
    whole, alone = model(input_ids=ids).logits, model(input_ids=other).logits
    model.eval()
    use_shared_prefix(model)
    cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
    torch.testing.assert_close(model(input_ids=ids[:, 5:], past_key_values=cache).logits, whole[:, 5:])
    positions = torch.tensor([[*range(9), *range(4)]])
    both = model(input_ids=torch.cat([ids, other], dim=1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(both, torch.cat([whole, alone], dim=1))
