"""Models that are not as transformers made them: packed passes and the sampler are right there, or leave them alone."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.model.forward import group_log_probs, prepare_packed
from helpsteer_rloo.model.rollout import Sampling, sample_groups, supports_sampler

GROUPS = [TokenGroup((), (5, 6, 7), ((8, 9), (10, 11, 12))), TokenGroup((), (6, 7, 13, 14), ((15,), (16, 17)))]


def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def adapted(**changes):
    return get_peft_model(tiny(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **changes)).eval()


def with_a_copied_layer():
    model = tiny()
    model.model.layers.append(copy.deepcopy(model.model.layers[1]))
    model.model.layers[2].self_attn.layer_idx = 2
    model.config.num_hidden_layers = 3
    return model


def with_a_layer_twice():
    model = tiny()
    model.model.layers.append(model.model.layers[0])
    model.config.num_hidden_layers = 3
    return model


LEFT_ALONE = {
    "a_copied_layer": with_a_copied_layer,
    "a_layer_twice": with_a_layer_twice,
    "replicated_layers": lambda: adapted(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]]),
    "attention_trained_in_full": lambda: adapted(target_modules=["up_proj"], modules_to_save=["self_attn"]),
    "activated_lora": lambda: adapted(target_modules=["q_proj", "up_proj"], alora_invocation_tokens=[6, 7]),
}


def hooked(model, name):
    model.get_submodule(name).register_forward_hook(lambda module, args, output: output * 0.5)
    return model


def with_another_network():
    model = tiny()
    network = model.model.layers[1].mlp
    forward = network.forward
    network.forward = lambda hidden: forward(hidden) * 0.5
    return model


PACKED = {
    "a_hook_on_the_head": lambda: hooked(tiny(), "lm_head"),
    "a_hook_on_a_gate": lambda: hooked(tiny(), "model.layers.0.mlp.act_fn"),
    "another_network": with_another_network,
    **{
        f"a_hook_on_{part}": lambda part=part: hooked(
            adapted(target_modules=["q_proj"]), f"base_model.model.model.layers.0.self_attn.q_proj.{part}"
        )
        for part in ("base_layer", "lora_A.default", "lora_B.default")
    },
}


@torch.no_grad()
def plain(model, prompt, continuation):
    logits = model(torch.tensor([[*prompt, *continuation]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(continuation)[:, None])[:, 0]


@pytest.mark.parametrize("name", [name for name in [*LEFT_ALONE, *PACKED] if name != "activated_lora"])
def test_log_probabilities_are_those_of_plain_forwards(name):
    model = (LEFT_ALONE | PACKED)[name]()
    expected = [[plain(model, g.prompt_ids, c) for c in g.continuation_ids] for g in GROUPS]
    for ours, own in zip(group_log_probs(model, GROUPS, 100), expected, strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_cannot_be_packed_is_not(name):
    model = LEFT_ALONE[name]()
    assert not prepare_packed(model)
    assert not supports_sampler(model)


def test_adapters_that_look_for_tokens_are_refused():
    with pytest.raises(ValueError, match="Activated LoRA"):
        group_log_probs(LEFT_ALONE["activated_lora"](), GROUPS, 100)


@pytest.mark.parametrize("name", PACKED)
def test_the_sampler_tells_the_log_probabilities_of_plain_forwards(name):
    model = PACKED[name]()
    assert supports_sampler(model)
    ((drawn,),) = sample_groups(model, [[5, 6, 7]], [[3]], Sampling(6, 1.0, 1.0, 0, ()), rows=1)
    torch.testing.assert_close(torch.tensor(drawn.log_probs), plain(model, (5, 6, 7), drawn.ids), rtol=1e-5, atol=1e-5)
