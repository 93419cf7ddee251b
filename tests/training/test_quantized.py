"""LoRA on a base in 4 or 8 bits; what needs bitsandbytes is run where that is installed."""

import importlib.util
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from helpsteer_rloo import cli
from helpsteer_rloo.data.demo import DemoBaseSettings
from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.model.forward import packed_log_probs, prepare_packed
from helpsteer_rloo.model.rollout import Sampling, sample_groups
from helpsteer_rloo.packing import PackedRow
from helpsteer_rloo.training import demo_base
from helpsteer_rloo.training.quantized import mend_quantized
from helpsteer_rloo.training.rloo import RLOOTrainer
from tests.broken.conftest import place, world
from tests.training.test_rloo import arguments, chat, length_reward

__all__ = ["place", "world"]

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
GROUPS = (TokenGroup((), (5, 6, 7), ((8, 9), (10, 11, 12))), TokenGroup((), (13,), ((14,), (15, 16))))


def trainer_of(tiny_base, tokenizer, directory, **changes):
    model = AutoModelForCausalLM.from_pretrained(tiny_base, **changes)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    args = arguments(directory, max_steps=1, learning_rate=1e-6)
    return RLOOTrainer(
        model=model,
        reward_funcs=length_reward,
        args=args,
        train_dataset=chat(["a b", "c d"]),
        processing_class=tokenizer,
        peft_config=lora,
    )


def factors(trainer):
    return {name: weight for name, weight in trainer.model.named_parameters() if "lora_" in name}


def test_adapters_on_a_base_in_few_bits_are_trained_in_float32(tiny_base, tokenizer, tmp_path):
    trainer = trainer_of(tiny_base, tokenizer, tmp_path)
    for weight in factors(trainer).values():  # as TRL leaves them on such a base
        weight.data = weight.data.bfloat16()
    mend_quantized(trainer)
    assert {weight.dtype for weight in factors(trainer).values()} == {torch.bfloat16}  # the base is in all its bits
    trainer.model.get_base_model().is_loaded_in_4bit = True
    mend_quantized(trainer)
    assert {weight.dtype for weight in factors(trainer).values()} == {torch.float32}


@pytest.fixture
def exact(tiny_base):
    """A model in 4 bits that computes in float32, with an adapter."""
    torch.manual_seed(0)
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, quantization_config=bits, dtype=torch.float32)
    return get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
    )


def plain(model):
    return [
        model(torch.tensor([[*group.prompt_ids, *ids]]), use_cache=False)
        .logits[0, len(group.prompt_ids) - 1 : -1]
        .log_softmax(-1)
        .gather(-1, torch.tensor(ids)[:, None])[:, 0]
        for group in GROUPS
        for ids in group.continuation_ids
    ]


def gradients(model, log_probs):
    model.zero_grad()
    log_probs.sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@needs_bitsandbytes
def test_packed_passes_on_a_base_in_four_bits_are_plain_ones(exact):
    exact.train()
    expected = torch.cat(plain(exact))
    expected_gradients = gradients(exact, expected)
    assert prepare_packed(exact)
    found = packed_log_probs(exact, PackedRow(GROUPS)).log_probs
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found_gradients = gradients(exact, found)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in found_gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-5)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_base_in_few_bits_learns_after_it_was_sampled_from(tiny_base, tokenizer, tmp_path, bits):
    options = {"bnb_4bit_compute_dtype": torch.bfloat16} if bits == "load_in_4bit" else {}
    config = BitsAndBytesConfig(**{bits: True}, **options)
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("without bfloat16 instructions, layouts stay as they are")
    trainer = trainer_of(tiny_base, tokenizer, tmp_path, quantization_config=config, dtype=torch.bfloat16)
    for name, weight in factors(trainer).items():
        torch.nn.init.normal_(weight, std=0.1) if "lora_B" in name else None
    before = {name: weight.detach().clone() for name, weight in factors(trainer).items()}
    model, row = trainer.model, PackedRow(GROUPS)
    expected = gradients(model.train(), packed_log_probs(model, row).log_probs)
    sample_groups(model, [[5, 6]], [[1]], Sampling(3, 1.0, 1.0, 0, ()), rows=1)
    found = gradients(model.train(), packed_log_probs(model, row).log_probs)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])
    trainer.train()
    assert all(not torch.equal(weight, before[name]) for name, weight in factors(trainer).items())


@pytest.fixture
def wider_base(tokenizer, tmp_path):
    """One whose rows hold whole blocks of 64 weights, without which bitsandbytes does not run on CPUs."""
    settings = DemoBaseSettings(
        hidden_size=64, intermediate_size=128, layers=2, heads=1, key_value_heads=1, head_dim=64
    )
    demo_base.build_model(tokenizer, settings).save_pretrained(tmp_path / "wider")
    tokenizer.save_pretrained(tmp_path / "wider")
    return tmp_path / "wider"


@needs_bitsandbytes
def test_both_stages_run_on_a_base_in_four_bits_and_share_it(place, wider_base):
    flags = {"model_name_or_path": wider_base, "use_peft": "true", "load_in_4bit": "true", "use_cpu": "true"}
    cli.train_reward_model(place.training(**flags))
    cli.train_policy(place.rloo(reward_model_path=str(place.root / "out"), output_dir="policy", **flags))
    record = json.loads((place.root / "policy" / "policy.json").read_text())
    assert record["training"]["shared_base"] is True
