import copy

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from helpsteer_rloo.model.fused_norms import fuse_norms
from tests.model.test_attention import norm_in_float64


def pair(kind, dtype, trained=True):
    torch.manual_seed(0)
    stock = nn.ModuleList([kind(24, eps=1e-6)]).to(dtype)
    stock[0].weight.data.normal_()
    stock[0].weight.requires_grad_(trained)
    fused = copy.deepcopy(stock)
    assert fuse_norms(fused) == 1
    assert fuse_norms(fused) == 0
    return stock[0], fused[0]


def results(norm, hidden, gradient):
    hidden = hidden.clone().requires_grad_()
    norm.weight.grad = None
    out = norm(hidden)
    out.backward(gradient)
    return out.detach(), hidden.grad, norm.weight.grad


@pytest.mark.parametrize("kind", [Qwen3RMSNorm, LlamaRMSNorm])
@pytest.mark.parametrize("shape", [(1, 7, 24), (2, 3, 5, 24), (1, 1, 24)])
def test_value_and_gradients_equal_autograds_in_float64(kind, shape, monkeypatch):
    monkeypatch.setattr(kind, "forward", norm_in_float64)
    stock, fused = pair(kind, torch.float64)
    hidden, gradient = torch.randn(2, *shape, dtype=torch.float64)
    for ours, theirs in zip(results(fused, hidden, gradient), results(stock, hidden, gradient), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_vector_of_zeros_has_a_gradient(monkeypatch):
    monkeypatch.setattr(Qwen3RMSNorm, "forward", norm_in_float64)
    stock, fused = pair(Qwen3RMSNorm, torch.float64)
    hidden, gradient = torch.zeros(1, 2, 24, dtype=torch.float64), torch.randn(1, 2, 24, dtype=torch.float64)
    for ours, theirs in zip(results(fused, hidden, gradient), results(stock, hidden, gradient), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)])
def test_lower_precision_is_transformers(dtype, tolerance):
    stock, fused = pair(Qwen3RMSNorm, dtype)
    hidden, gradient = torch.randn(2, 1, 50, 24).to(dtype)
    ours, theirs = results(fused, hidden, gradient), results(stock, hidden, gradient)
    assert [x.dtype for x in ours] == [dtype] * 3
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * y.abs().max().item())


def test_a_frozen_weight_gets_no_gradient():
    _, fused = pair(Qwen3RMSNorm, torch.float32, trained=False)
    _, d_hidden, d_weight = results(fused, *torch.randn(2, 1, 3, 24))
    assert d_hidden is not None
    assert d_weight is None
