import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from helpsteer_rloo.model import light_linears as module
from helpsteer_rloo.model.light_linears import light_linears

X = torch.randn(5, 1, 16, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 8, bias=False)

    def forward(self, x):
        return self.second(self.first(x).relu())


def adapted(**changes):
    policy = get_peft_model(Small(), LoraConfig(r=4, target_modules=["first", "second"], **changes)).eval()
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
    policy = adapted().bfloat16()
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            parameter.data = torch.full_like(parameter.data, 0.008, dtype=torch.float32)
    delta = policy.base_model.model.first.get_delta_weight("default")
    weight = policy.base_model.model.first.base_layer.weight.data.fill_(0.25)
    assert torch.equal(weight + delta.bfloat16(), weight)
    layer, x = policy.base_model.model.first, torch.ones(1, 16)
    with torch.no_grad(), light_linears((layer,), rows=1):
        light = layer(x)
    exact = torch.nn.functional.linear(x, weight.float() + delta, layer.base_layer.bias.float())
    unmoved = torch.nn.functional.linear(x, weight.float(), layer.base_layer.bias.float())
    assert (light - exact).abs().max() < 0.5 * (unmoved - exact).abs().max()


def test_two_active_adapters_add_up():
    policy = adapted()
    policy.add_adapter("second_one", LoraConfig(r=2, target_modules=["first"]))
    nn.init.normal_(policy.base_model.model.first.lora_B["second_one"].weight)
    policy.base_model.set_adapter(["default", "second_one"])
    plain, light, names = compared(policy)
    assert names == ["first", "second"]
    torch.testing.assert_close(light, plain, rtol=1e-5, atol=1e-5)


def test_what_is_not_plain_runs_as_it_is():
    for policy in (adapted(use_dora=True), adapted(lora_bias=True)):
        plain, light, names = compared(policy)
        assert not {"first", "second"} & set(names)
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
    monkeypatch.setattr(module, "_packs", lambda dtype: True)
    monkeypatch.setattr(
        module, "_packed", lambda weight, bias, rows: copied.append(weight.shape) or packed(weight, bias, rows)
    )
    monkeypatch.setattr(module, "_merged", lambda parts: merged(parts))
    plain, light, names = compared(adapted())
    assert copied == ([(24, 16)] if most else [])
    assert names == ["first", "second"]
    torch.testing.assert_close(light, plain, rtol=1e-5, atol=1e-5)


def test_without_the_packed_product_results_are_the_same(monkeypatch):
    monkeypatch.setattr(module, "_packs", lambda dtype: False)
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
