import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from helpsteer_rloo.model import products
from helpsteer_rloo.model.fused_linears import fuse_linears
from helpsteer_rloo.model.products import LEAST_MULTIPLICATIONS, gains_by_layout, has_onednn, product

pytestmark = pytest.mark.skipif(not has_onednn(torch.float32), reason="this build of PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch):
    """A processor of another maker, on which oneDNN is asked."""
    monkeypatch.setattr(products, "is_intel", lambda: False)


def draw(rows, inputs, outputs, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(size, generator=generator).to(dtype) for size in ((rows, inputs), (outputs, inputs), (outputs,))
    ]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_large_products_are_as_close_to_float64_as_pytorchs(with_bias, transposed):
    x, weight, bias = draw(300, 128, 192)
    assert x.shape[0] * weight.numel() >= LEAST_MULTIPLICATIONS
    if transposed:
        weight = weight.T.contiguous().T
    bias = bias if with_bias else None
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    errors = [(found.double() - exact).abs().max() for found in (product(x, weight, bias), linear(x, weight, bias))]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize(
    ("rows", "dtype", "asked"),
    [(300, torch.float32, 1), (2, torch.float32, 0), (300, torch.float64, 0), (300, torch.bfloat16, 0)],
)
def test_only_large_products_in_float32_go_to_onednn(rows, dtype, asked, monkeypatch):
    calls = []
    monkeypatch.setattr(products, "onednn_product", lambda *args: calls.append(args) or linear(*args))
    x, weight, bias = draw(rows, 128, 192, dtype)
    assert torch.equal(product(x, weight, bias), linear(x, weight, bias))
    assert len(calls) == asked


def test_slices_are_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(products, "onednn_product", None)
    x, weight, _ = draw(300, 256, 192)
    for parts in ((x[:, :128], weight[:, :128].clone()), (x[:, :128].clone(), weight[:, :128])):
        assert torch.equal(product(*parts), linear(*parts))


def test_on_intels_processors_float32_is_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(products, "is_intel", lambda: True)
    monkeypatch.setattr(products, "onednn_product", None)
    x, weight, bias = draw(300, 128, 192)
    assert torch.equal(product(x, weight, bias), linear(x, weight, bias))


@pytest.mark.parametrize(("rows", "dtype", "gains"), [(300, torch.float32, True), (2, torch.float32, False)])
def test_small_float32_products_gain_nothing_by_a_layout(rows, dtype, gains):
    assert gains_by_layout(draw(rows, 128, 192, dtype)[1], rows) is gains
    assert gains_by_layout(draw(rows, 128, 192, torch.bfloat16)[1], rows) == has_onednn(torch.bfloat16)


def test_without_onednn_everything_is_pytorchs(monkeypatch):
    monkeypatch.setattr(products, "has_onednn", lambda dtype: False)
    x, weight, bias = draw(300, 128, 192)
    assert torch.equal(product(x, weight, bias), linear(x, weight, bias))


def test_tensors_of_any_rank_and_without_rows_are_taken():
    x, weight, bias = draw(300, 128, 192)
    torch.testing.assert_close(product(x.view(3, 100, 128), weight, bias), linear(x, weight, bias).view(3, 100, 192))
    layer = nn.Linear(128, 192)
    fuse_linears(layer)
    assert layer(torch.zeros(1, 0, 128)).shape == (1, 0, 192)


def test_second_derivatives_are_refused():
    layer = nn.Linear(128, 192)
    fuse_linears(layer)
    x = torch.randn(3, 128, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_trained_layer_has_torchs_gradients(with_bias):
    torch.manual_seed(0)
    layer = nn.Linear(128, 192, bias=with_bias)
    x = torch.randn(3, 100, 128, requires_grad=True)
    results = []
    for _ in range(2):
        layer.zero_grad()
        x.grad = None
        y = layer(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad.clone(), *(p.grad.clone() for p in layer.parameters())])
        fuse_linears(layer)
    assert "forward" in layer.__dict__
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_frozen_layer_passes_gradients_on_and_keeps_none():
    torch.manual_seed(0)
    layer = nn.Linear(128, 192).requires_grad_(False)
    fuse_linears(layer)
    x = torch.randn(300, 128, requires_grad=True)
    y = layer(x)
    assert [saved is None or saved is layer.weight for saved in y.grad_fn.saved_tensors] == [True, True]
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, layer.weight.sum(0).expand(300, -1), rtol=1e-5, atol=1e-4)


def test_autocast_decides_the_type():
    layer = nn.Linear(128, 192)
    fuse_linears(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 128)).dtype == torch.bfloat16
