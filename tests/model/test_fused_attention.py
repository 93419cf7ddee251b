import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RMSNorm

from helpsteer_rloo.model.fused_attention import FusedAttention, fuse_attention
from tests.model.test_attention import norm_in_float64

KINDS = [(Qwen3Attention, Qwen3Config), (LlamaAttention, LlamaConfig)]


def pair(kind, config, dtype, attention="sdpa", **settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    settings = config(**sizes, **settings)
    settings._attn_implementation = attention
    stock = nn.ModuleList([kind(settings, layer_idx=0)]).to(dtype)
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=0.2)
    fused = copy.deepcopy(stock)
    assert fuse_attention(fused) == 1
    assert fuse_attention(fused) == 0
    return stock[0], fused[0]


def angles(rows, tokens, dtype):
    """Cosines and sines as transformers makes them, the same in both halves."""
    half = torch.randn(rows, tokens, 4)
    both = torch.cat([half, half], dim=-1)
    return both.cos().to(dtype), both.sin().to(dtype)


def results(layer, hidden, turn, gradient):
    hidden = hidden.clone().requires_grad_()
    layer.zero_grad()
    out, _ = layer(hidden, turn, None)
    out.backward(gradient)
    return [out.detach(), hidden.grad, *(parameter.grad for parameter in layer.parameters())]


def drawn(rows, tokens, dtype):
    hidden, gradient = torch.randn(2, rows, tokens, 24).to(dtype)
    return hidden, angles(rows, tokens, dtype), gradient


@pytest.mark.parametrize(("kind", "config"), KINDS)
@pytest.mark.parametrize("shape", [(1, 9), (3, 4), (1, 1)])
def test_value_and_gradients_equal_autograds_in_float64(kind, config, shape, monkeypatch):
    monkeypatch.setattr(Qwen3RMSNorm, "forward", norm_in_float64)
    stock, fused = pair(kind, config, torch.float64)
    inputs = drawn(*shape, torch.float64)
    for ours, theirs in zip(results(fused, *inputs), results(stock, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "config"), KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-6)])
def test_lower_precision_is_transformers(kind, config, dtype, tolerance):
    stock, fused = pair(kind, config, dtype)
    inputs = drawn(1, 30, dtype)
    for ours, theirs in zip(results(fused, *inputs), results(stock, *inputs), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


@pytest.mark.parametrize(("kind", "config"), KINDS)
def test_under_autocast_it_is_transformers(kind, config):
    stock, fused = pair(kind, config, torch.float32)
    inputs = drawn(1, 30, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = results(fused, *inputs), results(stock, *inputs)
    for x, y in zip(ours, theirs, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=2**-6, atol=2**-6 * y.abs().max().item())


def test_frozen_norms_get_no_gradient_and_backward_may_be_repeated():
    stock, fused = pair(*KINDS[0], torch.float64)
    for layer in (stock, fused):
        layer.q_norm.requires_grad_(False)
    hidden, turn, gradient = drawn(1, 6, torch.float64)
    expected = results(stock, hidden, turn, gradient)[1]
    x = hidden.clone().requires_grad_()
    out, _ = fused(x, turn, None)
    for times in (1, 2):
        out.backward(gradient, retain_graph=True)
        torch.testing.assert_close(x.grad, times * expected, rtol=1e-6, atol=1e-6)
    assert fused.q_norm.weight.grad is None
    assert fused.k_norm.weight.grad is not None


@pytest.mark.parametrize("case", ["hook", "eager", "another class"])
def test_what_is_not_plain_stays_transformers(case):
    stock, fused = pair(*KINDS[0], torch.float32, attention="eager" if case == "eager" else "sdpa")
    seen = []
    if case == "hook":
        fused.k_norm.register_forward_hook(lambda *_: seen.append(1))
    if case == "another class":
        for layer in (stock, fused):
            layer.q_norm = nn.LayerNorm(8)
    assert not FusedAttention(fused)._is_plain()
    hidden, turn, _ = drawn(1, 6, torch.float32)
    assert torch.equal(fused(hidden, turn, None)[0], stock(hidden, turn, None)[0])
    assert seen == ([1] if case == "hook" else [])
