"""Tests of the device itself, and of passes on it; they run with the plugin `tests.elsewhere` alone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.model.forward import group_log_probs, packed_log_probs, prepare_packed
from helpsteer_rloo.model.rollout import Sampling, sample_groups
from helpsteer_rloo.packing import PackedRow
from tests.elsewhere import DEVICE, Elsewhere
from tests.training.test_pairs import make_trainer, pair_rows

GROUPS = [TokenGroup((), (5, 6, 7, 8), ((9, 10), (11, 12, 13))), TokenGroup((), (14, 15), ((16,),))]


@pytest.fixture
def policy(tiny_base):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    prepare_packed(adapted)
    return adapted


def test_tensors_of_two_devices_are_refused():
    away = torch.arange(3.0, device=DEVICE)
    assert away.device == DEVICE
    assert (away * 2 + 1).cpu().tolist() == [1.0, 3.0, 5.0]
    with pytest.raises(RuntimeError, match="tensors of the CPU and of elsewhere"):
        away + torch.arange(3.0)
    with pytest.raises(RuntimeError, match="tensors of the CPU and of elsewhere"):
        away.index_select(0, torch.tensor([0]))


def test_trainers_put_their_models_there(tiny_base, tokenizer, tmp_path):
    from helpsteer_rloo.training.reward import RewardTrainer

    trainer = make_trainer(RewardTrainer, tiny_base, tokenizer, tmp_path, pair_rows(0))
    assert all(isinstance(parameter, Elsewhere) for parameter in trainer.model.parameters())


def test_passes_and_samples_are_those_of_the_cpu(policy):
    sampling = Sampling(max_new_tokens=9, temperature=0.9, top_p=0.95, top_k=40, end_ids=(3,))

    def results():
        policy.zero_grad()
        packed_log_probs(policy, PackedRow(tuple(GROUPS))).log_probs.sum().backward()
        gradients = [p.grad.cpu().clone() for p in policy.parameters() if p.grad is not None]
        plain = [values.cpu() for group in group_log_probs(policy, GROUPS, 64) for values in group]
        prompts = [group.prompt_ids for group in GROUPS]
        drawn = sample_groups(policy, prompts, [[1, 2, 3], [4]], sampling, rows=4)
        return [*gradients, *plain], [completion.ids for group in drawn for completion in group]

    tensors, drawn = results()
    policy.to(DEVICE)
    again, drawn_again = results()
    assert drawn == drawn_again
    torch.testing.assert_close(again, tensors, rtol=1e-4, atol=1e-5)
