import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from helpsteer_rloo.model import light_linears as module
from helpsteer_rloo.model import products
from helpsteer_rloo.model.fused_linears import fuse_linears
from helpsteer_rloo.model.light_linears import light_linears

X = torch.randn(5, 1, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def lay_out_small_weights_too(monkeypatch):
    monkeypatch.setattr(products, "LEAST_MULTIPLICATIONS", 0)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 8, bias=False)

    def forward(self, x):
        return self.second(self.first(x).relu())


def adapted(**changes):
    config = LoraConfig(**{"r": 4, "target_modules": ["first", "second"]} | changes)
    policy = get_peft_model(Small(), config).eval()
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return policy


def shadowed(model):
    return [name.rpartition(".")[2] for name, part in model.named_modules() if "forward" in part.__dict__]


@torch.no_grad()
def compared(model, x=X):
    """What the model returns as it is and with light layers, and which of these were light."""
    plain = model(x)
    with light_linears((model,), rows=5):
        light, names = model(x), shadowed(model)
    assert shadowed(model) == []
    assert torch.equal(model(x), plain)
    return plain, light, names


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_adapters_with_their_scaling_count(dtype):
    policy = adapted(lora_alpha=12).to(dtype)
    plain, light, names = compared(policy, X.to(dtype))
    assert names == ["first", "second"]
    assert light.dtype == dtype
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(light, plain, rtol=tolerance, atol=tolerance)


def test_a_small_adapter_survives_in_bfloat16():
    """Merged, it would vanish: each of its changes is less than half the last place of the weight."""
    layer = adapted().base_model.model.first.bfloat16()
    signs = torch.tensor([1.0, -1.0]).repeat(8)
    layer.base_layer.weight.data.fill_(0.375)
    layer.base_layer.bias.data.zero_()
    layer.lora_A["default"].weight.data = (0.008 * signs).expand(4, -1).clone()
    layer.lora_B["default"].weight.data = torch.full((24, 4), 0.008)
    weight, delta = layer.base_layer.weight, layer.get_delta_weight("default")
    assert torch.equal(weight + delta.bfloat16(), weight)
    with torch.no_grad(), light_linears((layer,), rows=1):
        light = layer(signs[None].bfloat16())
    torch.testing.assert_close(light.float(), (delta @ signs)[None], rtol=0.01, atol=0)


def test_two_active_adapters_add_up():
    policy = adapted()
    policy.add_adapter("second_one", LoraConfig(r=2, target_modules=["first"]))
    nn.init.normal_(policy.base_model.model.first.lora_B["second_one"].weight)
    policy.base_model.set_adapter(["default", "second_one"])
    plain, light, names = compared(policy)
    assert names == ["first", "second"]
    torch.testing.assert_close(light, plain, rtol=1e-5, atol=1e-5)


def test_what_is_not_plain_runs_as_it_is():
    for policy in (adapted(use_dora=True), adapted(lora_bias=True, target_modules=["first"])):
        plain, light, names = compared(policy)
        assert "first" not in names
        torch.testing.assert_close(light, plain)
    model = Small()
    handle = model.first.register_forward_hook(lambda *_: torch.ones(5, 1, 24))
    plain, light, names = compared(model)
    handle.remove()
    assert "first" not in names
    torch.testing.assert_close(light, plain)


def test_disabled_and_merged_adapters():
    policy = adapted()
    with policy.disable_adapter():
        plain, light, _ = compared(policy)
    torch.testing.assert_close(light, plain)
    policy.merge_adapter()
    plain, light, _ = compared(policy)
    torch.testing.assert_close(light, plain)


@pytest.mark.parametrize("most", [0, 4 * 16 * 24])
def test_beyond_the_limit_nothing_is_copied(most, monkeypatch):
    monkeypatch.setattr(module, "MOST_COPIED_BYTES", most)
    copied = []
    packed, merged = module._packed, module._merged
    monkeypatch.setattr(module, "gains_by_layout", lambda weight, rows: True)
    monkeypatch.setattr(
        module, "_packed", lambda weight, bias, rows: copied.append(weight.shape) or packed(weight, bias, rows)
    )
    monkeypatch.setattr(module, "_merged", lambda parts: merged(parts))
    plain, light, names = compared(adapted())
    assert copied == []
    assert names == ["first", "second"]
    torch.testing.assert_close(light, plain, rtol=1e-5, atol=1e-5)


def test_beyond_the_limit_fused_layers_stay(monkeypatch):
    monkeypatch.setattr(module, "MOST_COPIED_BYTES", 0)
    model = adapted()
    fuse_linears(model)
    fused = {name: part.__dict__["forward"] for name, part in model.named_modules() if "forward" in part.__dict__}
    with torch.no_grad(), light_linears((model,), rows=5):
        assert all(model.get_submodule(name).__dict__["forward"] is forward for name, forward in fused.items())


def test_on_a_gpu_fused_layers_beyond_the_limit_cast_their_factors_once(monkeypatch):
    monkeypatch.setattr(module, "MOST_COPIED_BYTES", 0)
    monkeypatch.setattr(module, "_is_fast_enough", lambda _: False)
    model = adapted(lora_alpha=12)
    for layer in (model.base_model.model.first, model.base_model.model.second):
        layer.base_layer.bfloat16()  # under adapters in float32, as they are trained
    fuse_linears(model)
    x = X.bfloat16()
    with torch.no_grad():
        expected = model(x)
        with light_linears((model,), rows=5), torch.profiler.profile() as profile:
            light = model(x)
    assert light.dtype == torch.bfloat16
    torch.testing.assert_close(light, expected, rtol=0.02, atol=0.02)
    assert not any("_to_copy" in event.key for event in profile.key_averages())


def test_without_the_packed_product_results_are_the_same(monkeypatch):
    monkeypatch.setattr(module, "gains_by_layout", lambda weight, rows: False)
    assert compared(Small())[2] == []
    plain, light, names = compared(adapted())
    assert names == ["first", "second"]
    torch.testing.assert_close(light, plain, rtol=1e-5, atol=1e-5)


def test_layers_come_back_when_preparing_fails(monkeypatch):
    model = adapted()
    calls = []

    def fails(parts, rows, copies):
        if calls:
            raise RuntimeError("no memory")
        calls.append(parts)
        return nn.Identity()

    monkeypatch.setattr(module, "_forward", fails)
    with pytest.raises(RuntimeError, match="no memory"), light_linears((model,), rows=5):
        pass
    assert shadowed(model) == []


class Attention(nn.Module):
    """Three layers that are given one input, as a decoder's are, and one that is given another."""

    def __init__(self, bias):
        super().__init__()
        torch.manual_seed(2)
        self.q_proj, self.k_proj = nn.Linear(16, 24, bias=bias), nn.Linear(16, 8, bias=bias)
        self.v_proj, self.o_proj = nn.Linear(16, 8, bias=bias), nn.Linear(24, 16, bias=bias)

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q = q + self.q_proj(x + 1)  # called again with another input
        return self.o_proj(q * torch.cat([k, v, k * v], dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lora", [(), ("q_proj", "k_proj", "v_proj", "o_proj"), ("q_proj", "v_proj")])
def test_layers_with_the_same_input_become_one_product(lora, bias, dtype, monkeypatch):
    model, products = Attention(bias), []
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=list(lora), init_lora_weights=False)).eval()
    make = module._forward
    monkeypatch.setattr(module, "_forward", lambda parts, *rest: products.append(parts.sizes) or make(parts, *rest))
    plain, light, _ = compared(model.to(dtype), X.to(dtype))
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(light, plain, rtol=tolerance, atol=tolerance)
    assert ((24, 8, 8) in products) == (len(lora) != 2)
