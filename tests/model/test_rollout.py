import pytest
import torch
from transformers import AutoModelForCausalLM

from helpsteer_rloo.model.loading import end_ids
from helpsteer_rloo.model.rollout import Sampling, _cut_at_end, sample

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14], [15]]


@pytest.fixture(scope="module")
def policy(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base).eval()


def test_the_same_seed_gives_the_same_completions_and_leaves_the_random_state(policy, tokenizer):
    sampling = Sampling(12, 1.0, 1.0, 0, tuple(end_ids(policy, tokenizer)))
    torch.manual_seed(3)
    expected_next = torch.rand(1).item()
    torch.manual_seed(3)
    first = sample(policy, PROMPTS, sampling, batch_size=3, seed=1)
    assert torch.rand(1).item() == expected_next
    assert sample(policy, PROMPTS, sampling, batch_size=3, seed=1) == first
    assert sample(policy, PROMPTS, sampling, batch_size=3, seed=2) != first


def test_a_completion_ends_with_its_end_id_or_at_the_limit(policy, tokenizer):
    ends = tuple(end_ids(policy, tokenizer))
    for completion in sample(policy, PROMPTS * 8, Sampling(6, 1.0, 1.0, 0, ends), batch_size=32, seed=0):
        if completion.ended:
            assert completion.ids[-1] in ends
            assert not set(completion.ids[:-1]) & set(ends)
        else:
            assert len(completion.ids) == 6
            assert not set(completion.ids) & set(ends)


def test_what_follows_the_end_is_cut_off():
    assert _cut_at_end([4, 2, 9, 9], end_ids=(2, 3)).ids == (4, 2)
    assert not _cut_at_end([4, 5, 6], end_ids=(2, 3)).ended
