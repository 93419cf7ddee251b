import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers import AutoModelForCausalLM

from helpsteer_rloo.model.fused_linears import FusedLora, fuse_linears
from helpsteer_rloo.model.light_linears import light_linears


def adapted(tiny_base, dtype=torch.float64, **changes):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=dtype)
    settings = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear", "init_lora_weights": False}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings | changes))


def outcome(model, ids, autocast=None):
    """Logits and the gradients of all trained weights."""
    model.zero_grad()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        logits = model(input_ids=ids).logits
    (logits.double() ** 2).mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, tolerance):
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=tolerance)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in ours[1].items():
        scale = theirs[1][name].abs().max().item()
        torch.testing.assert_close(gradient, theirs[1][name], rtol=tolerance, atol=tolerance * scale, msg=name)


IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_output_and_gradients_are_pefts_in_float64(tiny_base, checkpointing):
    model = adapted(tiny_base).train()
    expected = outcome(model, IDS)
    assert fuse_linears(model) == 29  # 14 with LoRA, their bases, and the head
    if checkpointing:
        model.enable_input_require_grads()
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(outcome(model, IDS), expected, 1e-6)  # through float32 norms


@pytest.mark.parametrize("bias", [False, True])
def test_one_layer_is_exact_in_float64(bias):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(6, 5, bias=bias)).double()
    model = get_peft_model(layer, LoraConfig(r=2, lora_alpha=5, target_modules=["0"], init_lora_weights=False))
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    results = []
    for _ in range(2):
        y = model(x)
        x.grad = None
        model.zero_grad()
        (y**3).sum().backward()
        results.append([y.detach(), x.grad.clone(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
        fuse_linears(model)
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_bfloat16_is_as_close_to_the_truth_as_peft(tiny_base):
    truth = outcome(adapted(tiny_base), IDS)
    model = adapted(tiny_base).bfloat16()
    peft = outcome(model, IDS)
    fuse_linears(model)
    ours = outcome(model, IDS)
    errors = [(found[0].double() - truth[0]).abs().mean().item() for found in (ours, peft)]
    assert errors[0] < 1.2 * errors[1]
    assert_same(ours, peft, 0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_the_type_that_it_gives_to_peft(tiny_base, dtype):
    model = adapted(tiny_base, dtype)
    expected = outcome(model, IDS, torch.bfloat16)
    fuse_linears(model)
    ours = outcome(model, IDS, torch.bfloat16)
    assert ours[0].dtype == expected[0].dtype
    assert_same(ours, expected, 0.2)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize(
    "changes", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}]
)
def test_other_kinds_are_left_to_peft(tiny_base, changes):
    model = adapted(tiny_base, **changes).train()
    torch.manual_seed(1)
    expected = outcome(model, IDS)
    fuse_linears(model)
    torch.manual_seed(1)
    assert_same(outcome(model, IDS), expected, 1e-6)


def test_disabled_switched_merged_and_several_adapters(tiny_base):
    model = adapted(tiny_base).eval()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    plain = copy.deepcopy(model)
    fuse_linears(model)

    def both(change):
        with torch.no_grad():
            results = []
            for each in (model, plain):
                change(each)
                results.append(each(input_ids=IDS).logits)
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)

    both(lambda each: each.base_model.disable_adapter_layers())
    both(lambda each: each.base_model.enable_adapter_layers())
    both(lambda each: each.set_adapter("other"))
    both(lambda each: each.base_model.set_adapter(["default", "other"]))
    both(lambda each: each.base_model.set_adapter(["default"]))
    both(lambda each: each.merge_adapter())
    both(lambda each: each.unmerge_adapter())


def test_a_copy_of_the_model_uses_its_own_layers(tiny_base):
    model = adapted(tiny_base)
    fuse_linears(model)
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if type(module) is LoraLinear:
            assert isinstance(module.__dict__["forward"], FusedLora)
            assert module.__dict__["forward"].layer is module


def test_light_layers_take_the_place_of_fused_ones_for_a_while(tiny_base):
    model = adapted(tiny_base, torch.float32).eval()
    fuse_linears(model)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        with light_linears((model,), rows=2):
            layer = next(module for module in model.modules() if type(module) is LoraLinear)
            assert not isinstance(layer.__dict__["forward"], FusedLora)
            light = model(input_ids=IDS).logits
    torch.testing.assert_close(light, expected, rtol=1e-4, atol=1e-5)
    assert all(isinstance(m.__dict__["forward"], FusedLora) for m in model.modules() if type(m) is LoraLinear)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_of_the_base_move(bias):
    """PEFT's forward is used where anything of the base is trained, also if it was set free after fusing."""
    torch.manual_seed(0)

    def net():
        model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), LoraConfig(r=2, target_modules=["0"], bias=bias))
        return model.double()

    stock = net()
    fused = copy.deepcopy(stock)
    assert fuse_linears(fused) == 2
    x = torch.randn(3, 6, dtype=torch.float64)
    for free in (False, True):
        for model in (stock, fused):
            model.base_model.model[0].base_layer.weight.requires_grad_(free)
            model.zero_grad()
            model(x).square().sum().backward()
        for (name, ours), theirs in zip(fused.named_parameters(), stock.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None), name
            if ours.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    assert fused.base_model.model[0].base_layer.bias.grad is not None
