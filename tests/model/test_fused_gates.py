import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from helpsteer_rloo.model.fused_gates import fuse_gates

KINDS = [(Qwen3MLP, Qwen3Config), (LlamaMLP, LlamaConfig)]


def pair(kind, config, dtype, **settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 2, "num_key_value_heads": 1}
    stock = nn.ModuleList([kind(config(**sizes, **settings))]).to(dtype)
    fused = copy.deepcopy(stock)
    assert fuse_gates(fused) == 1
    assert fuse_gates(fused) == 0
    return stock[0], fused[0]


def results(network, hidden, gradient):
    hidden = hidden.clone().requires_grad_()
    network.zero_grad()
    out = network(hidden)
    out.backward(gradient)
    return [out.detach(), hidden.grad, *(parameter.grad for parameter in network.parameters())]


@pytest.mark.parametrize(("kind", "config"), KINDS)
@pytest.mark.parametrize("shape", [(1, 7, 12), (2, 3, 12), (1, 0, 12)])
def test_value_and_gradients_equal_autograds_in_float64(kind, config, shape):
    stock, fused = pair(kind, config, torch.float64)
    hidden, gradient = 3 * torch.randn(2, *shape, dtype=torch.float64)
    for ours, theirs in zip(results(fused, hidden, gradient), results(stock, hidden, gradient), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)])
def test_lower_precision_is_transformers(dtype, tolerance):
    stock, fused = pair(*KINDS[0], dtype)
    hidden, gradient = torch.randn(2, 1, 50, 12).to(dtype)
    for ours, theirs in zip(results(fused, hidden, gradient), results(stock, hidden, gradient), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


def test_nothing_that_backward_needs_is_written_over():
    stock, fused = pair(*KINDS[0], torch.float64)
    hidden, gradient = torch.randn(2, 1, 5, 12, dtype=torch.float64)
    kept = gradient.clone()
    expected = results(stock, hidden, gradient)
    x = hidden.clone().requires_grad_()
    out = fused(x)
    for times in (1, 2):
        out.backward(gradient, retain_graph=True)
        torch.testing.assert_close(x.grad, times * expected[1], rtol=1e-12, atol=1e-12)
    assert torch.equal(gradient, kept)


def test_another_activation_stays_transformers():
    stock, fused = pair(*KINDS[0], torch.float64, hidden_act="gelu")
    hidden = torch.randn(1, 4, 12, dtype=torch.float64)
    assert torch.equal(fused(hidden), stock(hidden))
    assert not torch.equal(fused(hidden), pair(*KINDS[0], torch.float64)[1](hidden))
