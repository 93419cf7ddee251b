"""What vLLM tells of its tokens, from a stand-in for TRL's way to it: vLLM itself needs a GPU."""

import math

import pytest
import torch
import trl
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

from helpsteer_rloo.training.ledger import read_rollouts
from helpsteer_rloo.training.rloo import RLOOTrainer
from helpsteer_rloo.training.vllm import TellingVLLM
from tests.training.test_rloo import make_trainer
from tests.training.test_rloo_estimators import logged

GAP = 0.25


class Engine:
    """Draws tokens that depend on their place only, and says that each had half a chance, times exp(GAP)."""

    def __init__(self, model, accelerator, logprobs="not told", **settings):
        self.logprobs = logprobs
        self.model, self.accelerator = model, accelerator
        self.eos = settings["processing_class"].eos_token_id
        self.synced = 0
        self.told = lambda place: math.log(0.5) + GAP

    def sync_weights(self):
        self.synced += 1

    def _iter_named_params(self):
        yield from self.model.named_parameters()

    def generate(self, prompts, images, num_generations, profiler):
        assert self.logprobs == 0
        ids = [[7 + n, 11, *([self.eos] if n % 2 else [13])] for n in range(len(prompts))]
        told = [[[self.told(place)] for place in range(len(own))] for own in ids]
        return prompts, ids, told, None


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    monkeypatch.setattr(trl.trainer.rloo_trainer, "VLLMGeneration", Engine)


def make(tiny_base, tokenizer, tmp_path, **settings):
    return make_trainer(
        tiny_base, tokenizer, tmp_path, use_vllm=True, max_steps=1, rollouts_dir=str(tmp_path / "ledger"), **settings
    )


def test_what_vllm_drew_with_is_logged_and_recorded(tiny_base, tokenizer, tmp_path):
    trainer = make(tiny_base, tokenizer, tmp_path)
    assert isinstance(trainer, RLOOTrainer)
    trainer.train()
    assert trainer.vllm_generation.synced == 1
    entries = read_rollouts(tmp_path / "ledger")
    assert {tuple(entry.sampled_log_probs) for entry in entries} == {(round(math.log(0.5) + GAP, 6),) * 3}
    assert {entry.finish_reason for entry in entries} == {"stop", "length"}
    assert logged(trainer, "sampler_gap/mean")[0] > 1.0  # a tiny model gives no token half a chance


def test_a_truncated_distribution_is_recorded_but_tells_no_gap(tiny_base, tokenizer, tmp_path):
    trainer = make(tiny_base, tokenizer, tmp_path, top_p=0.9)
    trainer.train()
    assert all(entry.sampled_log_probs for entry in read_rollouts(tmp_path / "ledger"))
    assert not [row for row in trainer.state.log_history if "sampler_gap/mean" in row]


def test_weights_correct_for_vllm(tiny_base, tokenizer, tmp_path):
    losses = {}
    for correction in ("none", "sequence"):
        trainer = make(tiny_base, tokenizer, tmp_path, importance_correction=correction)
        trainer.train()
        losses[correction] = logged(trainer, "grad_norm")[0]
    assert 0 < losses["sequence"] < 1e-3 * losses["none"]  # next to no weight for tokens that the policy would not draw


def test_tokens_that_vllm_does_not_tell_of_are_no_ground_for_weights(tiny_base, tokenizer, tmp_path):
    trainer = make(tiny_base, tokenizer, tmp_path, importance_correction="token")
    trainer.vllm_generation._generation.told = lambda place: None if place == 1 else -1.0
    with pytest.raises(ValueError, match="needs the log-probabilities that completions were sampled with"):
        trainer.train()


class Pushing(VLLMGeneration):
    """TRL's own way to name the weights, without an engine behind it."""

    def __init__(self, model):
        self.model = model
        self.accelerator = Accelerator(cpu=True)
        self._dist = DistributedBackend(self.accelerator)


def adapted(tiny_base, dtype, **config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=dtype)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", **config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def test_vllm_is_given_what_merging_gives(tiny_base):
    args = trl.RLOOConfig(use_cpu=True, bf16=False)  # which forgets accelerators made before
    model = adapted(tiny_base, torch.float32)
    by_merging = {name: value.clone() for name, value in Pushing(model)._iter_named_params()}
    telling = Pushing(model)
    TellingVLLM(telling, args, [0])
    given = dict(telling._iter_named_params())
    assert given.keys() == by_merging.keys()
    assert all(key.startswith(("model.", "lm_head.")) for key in given)
    for name, value in given.items():
        torch.testing.assert_close(value, by_merging[name], rtol=1e-6, atol=1e-6)
    assert not torch.equal(
        given["model.layers.0.mlp.up_proj.weight"], model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
    )


@pytest.mark.parametrize("telling", [True, False])
def test_the_base_stays_as_it_was_through_every_synchronization(tiny_base, telling):
    args = trl.RLOOConfig(use_cpu=True, bf16=False)  # which forgets accelerators made before
    model = adapted(tiny_base, torch.bfloat16)
    pushing = Pushing(model)
    if telling:
        TellingVLLM(pushing, args, [0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(3):
        for _ in pushing._iter_named_params():
            pass
    same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert same == telling  # TRL's own way moves weights of a base in bfloat16


def test_what_is_more_than_low_rank_factors_is_left_to_trl(tiny_base):
    args = trl.RLOOConfig(use_cpu=True, bf16=False)  # which forgets accelerators made before
    model = adapted(tiny_base, torch.float32, use_dora=True)
    expected = {name: value.clone() for name, value in Pushing(model)._iter_named_params()}
    pushing = Pushing(model)
    TellingVLLM(pushing, args, [0])
    given = {name: value.clone() for name, value in pushing._iter_named_params()}
    assert given.keys() == expected.keys()
    for name, value in given.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
