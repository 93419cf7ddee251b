import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.model import roles
from helpsteer_rloo.model.forward import group_log_probs, score_sequences
from helpsteer_rloo.model.loading import Base, load_reward_model
from helpsteer_rloo.model.roles import (
    REWARD_ADAPTER,
    RewardRole,
    acting_as,
    can_share,
    load_own_reward,
    load_shared_reward,
    without_reward,
)
from helpsteer_rloo.run_dir import REWARD_MODEL_RECORD, write_json

GROUPS = [TokenGroup((), (5, 6, 7), ((8,), (9, 10, 11))), TokenGroup((), (12,), ((13, 14), (15,), (16, 17)))]


def perturb(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
            assert "lora" in name or "score" in name or not parameter.requires_grad


@pytest.fixture
def reward_dir(tiny_base, tmp_path):
    """A reward model as the reward stage leaves it: adapter, head and record."""
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1)
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear"))
    perturb(model, 1)
    directory = tmp_path / "reward"
    model.save_pretrained(directory)
    record = {"base": {"name": str(tiny_base)}, "adapter": True, "thinking": False, "rendering": {}, "base_model": ""}
    write_json(directory / REWARD_MODEL_RECORD, record)
    return directory


@pytest.fixture
def policy(tiny_base):
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.3, target_modules="all-linear"))
    perturb(model, 2)
    return model.train()


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def state(model):
    return (
        list(model.active_adapters),
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
    )


def flat(scores):
    return [score for own in scores for score in own]


def test_on_the_policys_base_the_reward_model_scores_as_on_its_own(policy, reward_dir):
    separate = load_reward_model(reward_dir)[0]
    sequences = [group.sequence(i) for group in GROUPS for i in range(len(group.continuation_ids))]
    expected = score_sequences(separate, sequences, 1)
    shared = load_shared_reward(policy, reward_dir)
    assert flat(shared.score(GROUPS, 8)) == pytest.approx(expected, abs=1e-5)
    assert flat(load_own_reward(reward_dir).score(GROUPS, 8)) == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.01


def test_adapters_are_read_on_the_cpu(policy, monkeypatch):
    seen = []
    monkeypatch.setattr(type(policy), "load_adapter", lambda *_, **given: seen.append(given))
    with roles.adapters_read_on_cpu(policy):
        policy.load_adapter("here", "default", is_trainable=True)
    policy.load_adapter("here", "default")
    assert seen == [{"is_trainable": True, "torch_device": "cpu"}, {}]


def test_a_head_follows_its_model_to_another_device(policy, reward_dir, monkeypatch):
    seen = []
    monkeypatch.setattr(roles, "score_groups", lambda *_, head: seen.append(head.weight.device.type))
    shared = load_shared_reward(policy, reward_dir)
    policy.to("meta")  # as FSDP does when a trainer prepares it
    shared.score(GROUPS, 8)
    assert seen == ["meta"]


def test_every_role_computes_what_a_model_of_its_own_would(policy, reward_dir, tiny_base):
    alone = group_log_probs(copy.deepcopy(policy).eval(), GROUPS, None)
    base = group_log_probs(AutoModelForCausalLM.from_pretrained(tiny_base).eval(), GROUPS, None)
    role = load_shared_reward(policy, reward_dir)
    scores = role.score(GROUPS, 8)
    with acting_as(policy, None):
        reference = group_log_probs(policy, GROUPS, None)
    again = group_log_probs(policy.eval(), GROUPS, None)
    for ours, expected in ((again, alone), (reference, base)):
        for a, b in zip(flat(ours), flat(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert role.score(GROUPS, 8) == scores
    assert (flat(alone)[1] - flat(base)[1]).abs().max() > 1e-3


@pytest.mark.parametrize("adapter", [None, REWARD_ADAPTER])
@pytest.mark.parametrize("error", [False, True])
def test_switching_leaves_everything_as_it_was(policy, reward_dir, adapter, error):
    load_shared_reward(policy, reward_dir)
    before, weights = state(policy), snapshot(policy)
    if error:
        with pytest.raises(KeyError), acting_as(policy, adapter):
            raise KeyError("in the middle")
    else:
        with acting_as(policy, adapter):
            assert not any(parameter.requires_grad for parameter in policy.parameters() if adapter)
            assert not policy.training
    assert state(policy) == before
    assert all(torch.equal(weight, weights[name]) for name, weight in policy.named_parameters())


@pytest.mark.parametrize("adapter", [None, "second"])
def test_several_active_adapters_are_active_again(policy, adapter):
    policy.add_adapter("second", LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    policy.base_model.set_adapter(["default", "second"])
    before = state(policy)
    with acting_as(policy, adapter):
        assert policy.active_adapters == (["default", "second"] if adapter is None else ["second"])
    assert state(policy) == before
    assert policy.active_adapters == ["default", "second"]


def test_a_role_is_taken_and_left_within_the_bare_base(policy, reward_dir):
    role = load_shared_reward(policy, reward_dir)
    scores = role.score(GROUPS, 8)
    with acting_as(policy, None):
        reference = group_log_probs(policy, GROUPS, None)
        assert role.score(GROUPS, 8) == scores
        after = group_log_probs(policy, GROUPS, None)
    for one, other in zip(flat(reference), flat(after), strict=True):
        assert torch.equal(one, other)
    assert (flat(group_log_probs(policy.eval(), GROUPS, None))[1] - flat(reference)[1]).abs().max() > 1e-3


def test_the_reward_adapter_arrives_frozen_and_the_policys_stays_trainable(policy, reward_dir):
    before = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
    role = load_shared_reward(policy, reward_dir)
    for name, parameter in policy.named_parameters():
        assert parameter.requires_grad == before.get(name, False), name
    assert not role.head.weight.requires_grad
    assert policy.active_adapters == ["default"]


def test_training_one_role_changes_no_parameter_of_another(policy, reward_dir):
    role = load_shared_reward(policy, reward_dir)
    head = role.head.weight.clone()
    weights = snapshot(policy)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        scores = role.score(GROUPS, 8)
        with acting_as(policy, None):
            group_log_probs(policy, GROUPS, None)
        ids = torch.tensor([[5, 6, 7, 8]])
        policy(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert role.score(GROUPS, 8) == scores
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, weights[name]) == (".default." not in name), name
    assert torch.equal(role.head.weight, head)


def test_a_checkpoint_of_the_policy_holds_the_policy_alone(policy, reward_dir, tmp_path):
    load_shared_reward(policy, reward_dir)
    with without_reward(policy):
        policy.save_pretrained(tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir() if p.is_dir()) == []
    names = list(load_file(tmp_path / "saved" / "adapter_model.safetensors"))
    assert not any("reward" in name for name in names), names
    policy.save_pretrained(tmp_path / "both")
    assert (tmp_path / "both" / REWARD_ADAPTER).is_dir()


def test_what_does_not_fit_the_base_is_refused(policy, reward_dir):
    path = reward_dir / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, path)
    with pytest.raises(ValueError, match=r"1 of the adapter's tensors do not fit the base, the first is .*q_proj"):
        load_shared_reward(policy, reward_dir)


def test_an_adapter_without_its_head_is_refused(policy, reward_dir):
    path = reward_dir / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "score" not in name}, path)
    with pytest.raises(ValueError, match=r"the scalar head .* is missing"):
        load_shared_reward(policy, reward_dir)


def test_a_base_is_shared_only_with_an_adapter_for_the_very_same(policy, reward_dir, tiny_base):
    base = Base(str(tiny_base))
    assert can_share(policy, base, reward_dir)
    assert not can_share(policy, Base(str(tiny_base), dtype="bfloat16"), reward_dir)
    assert not can_share(policy, Base("another/base"), reward_dir)
    assert not can_share(AutoModelForCausalLM.from_pretrained(tiny_base), base, reward_dir)


def test_a_model_of_its_own_needs_no_adapter(tiny_base):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1).eval()
    assert len(flat(RewardRole(model).score(GROUPS, 2))) == 5


def saved_with(tiny_base, directory, **changes):
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1)
    config = {"task_type": "SEQ_CLS", "r": 4, "target_modules": "all-linear", **changes}
    get_peft_model(model, LoraConfig(**config)).save_pretrained(directory)
    record = {"base": {"name": str(tiny_base)}, "adapter": True, "thinking": False, "rendering": {}, "base_model": ""}
    write_json(directory / REWARD_MODEL_RECORD, record)
    return directory


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    "changes", [{"init_lora_weights": "pissa"}, {"use_dora": True}, {"target_modules": ["q_proj", "embed_tokens"]}]
)
def test_adapters_that_are_not_plain_are_loaded_apart(tiny_base, tmp_path, policy, changes):
    assert not can_share(policy, Base(str(tiny_base)), saved_with(tiny_base, tmp_path / "reward", **changes))


def test_no_base_is_shared_with_a_policy_whose_adapter_changed_it(tiny_base, reward_dir):
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights="pissa")
    assert not can_share(get_peft_model(base, config), Base(str(tiny_base)), reward_dir)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], bias="lora_only"),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=[3, 4]),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["up_proj"], modules_to_save=["q_proj"]),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["up_proj"], modules_to_save=["self_attn"]),
        IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[]),
    ],
    ids=["bias", "tokens", "layer", "attention", "ia3"],
)
def test_no_base_is_shared_with_a_policy_that_trains_more_of_it(tiny_base, reward_dir, config):
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), config)
    assert not can_share(policy, Base(str(tiny_base)), reward_dir)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_base_is_shared_with_a_policy_that_trains_the_head_beside(tiny_base, reward_dir):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"])
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), config)
    assert can_share(policy, Base(str(tiny_base)), reward_dir)


def test_a_refused_adapter_leaves_nothing_behind(policy, reward_dir):
    weights = reward_dir / "adapter_model.safetensors"
    good = load_file(weights)
    save_file({name: tensor for name, tensor in good.items() if "down_proj" not in name}, weights)
    before = snapshot(policy)
    with pytest.raises(ValueError, match="do not fit the base"):
        load_shared_reward(policy, reward_dir)
    assert list(policy.peft_config) == ["default"]
    assert all(torch.equal(before[name], p) for name, p in policy.named_parameters())
    save_file(good, weights)
    assert load_shared_reward(policy, reward_dir).adapter == REWARD_ADAPTER
