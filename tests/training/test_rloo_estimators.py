"""RLOO's estimators against a plain float64 reference: a forward pass a completion, nothing shared or packed."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpsteer_rloo.model.rollout import Completion
from helpsteer_rloo.training.ledger import read_rollouts
from helpsteer_rloo.training.rloo import RLOOTrainer
from tests.training.test_rloo import K, arguments, length_reward, make_trainer
from tests.training.test_rloo_packed import build, exact, reward

assert exact  # the fixture

RATE = 0.05


def drawn_with(trainer):
    """Let the forced completions come with log-probabilities of a sampler that is not quite the policy."""
    generate = trainer._generate_single_turn

    def told(*arguments):
        completions = generate(*arguments)
        trainer._drawn = [
            Completion(tuple(ids), False, tuple(told_of(ids)), tuple(told_of(ids))) for ids in completions
        ]
        return completions

    trainer._generate_single_turn = told
    return trainer


def told_of(ids):
    return [-7.0 - token % 5 for token in ids]


def plain(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64, attn_implementation="sdpa").eval()


def log_probs_of(model, entry):
    """Of the completion's tokens, by a plain forward pass of one sequence."""
    prompt, ids = entry.prompt_ids, entry.completion_ids
    logits = model(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]


def terms(log_probs, reference, estimator):
    d = log_probs - reference
    return {"k1": d, "k2": d * d / 2, "k3": (-d).exp() - 1 + d}[estimator].sum()


def step(model, reference, entries, old, settings):
    """One step of gradient descent on the loss as it is written in papers, over all completions."""
    beta, estimator = settings.get("beta", 0.1), settings.get("kl_estimator", "k1")
    in_loss = settings.get("kl_in") == "loss"
    rewards = []
    for entry, before in zip(entries, old, strict=True):
        kl = terms(before, log_probs_of(reference, entry).detach(), estimator)
        score = torch.tensor(reward([entry.completion_ids])[0]).item()  # TRL keeps scores in float32
        score -= settings.get("length_penalty", 0.0) * len(entry.completion_ids)
        score -= settings.get("missing_eos_penalty", 0.0) * (entry.finish_reason == "length")
        rewards.append(score - (0.0 if in_loss else beta * kl.item()))
    cap, kind = settings.get("importance_cap", 2.0), settings.get("importance_correction", "none")
    total = 0.0
    for place, (entry, before) in enumerate(zip(entries, old, strict=True)):
        group = rewards[place // K * K : place // K * K + K]
        advantage = rewards[place] - (sum(group) - rewards[place]) / (K - 1)
        now = log_probs_of(model, entry)
        gaps = before - torch.tensor(told_of(entry.completion_ids), dtype=torch.float64)
        if kind == "token":
            weights = gaps.exp().clamp(max=cap)
            gradient_of = (weights * now).sum()
            now_sum = now.sum().detach() + gradient_of - gradient_of.detach()
        else:
            now_sum = now.sum()
        ratio = (now_sum - before.sum()).exp()
        loss = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        if kind == "sequence":
            loss = loss * gaps.sum().exp().clamp(max=cap)
        if in_loss:
            loss = loss + beta * terms(now, log_probs_of(reference, entry).detach(), estimator)
        total = total + loss
    model.zero_grad()
    (total / len(entries)).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= RATE * parameter.grad


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kl_estimator": "k2", "beta": 2.0},
        {"kl_estimator": "k3", "beta": 2.0},
        {"kl_estimator": "k2", "kl_in": "loss", "beta": 2.0},
        {"kl_estimator": "k3", "kl_in": "loss", "beta": 2.0},
        {"importance_correction": "token", "importance_cap": 1.5},
        {"importance_correction": "sequence", "importance_cap": 1.5},
        {"importance_correction": "token", "kl_estimator": "k2", "kl_in": "loss", "beta": 2.0},
        {"length_penalty": 0.125, "missing_eos_penalty": 0.5},
        {"target_kl": 0.5, "beta": 2.0},
        {"target_kl": 0.5, "kl_estimator": "k2", "kl_in": "loss", "beta": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("iterations", [1, 2])
def test_steps_equal_a_plain_reference(tiny_base, tokenizer, tmp_path, exact, changes, iterations):
    steps = 2 * iterations
    trainer = build(
        RLOOTrainer,
        tiny_base,
        tokenizer,
        tmp_path,
        max_steps=steps,
        num_iterations=iterations,
        rollouts_dir=str(tmp_path / "ledger"),
        **changes,
    )
    drawn_with(trainer)
    model, reference = plain(tiny_base), plain(tiny_base)
    trainer.train()
    ledger = read_rollouts(tmp_path / "ledger")
    for first in range(0, steps, iterations):
        entries = [entry for entry in ledger if entry.step == first]
        assert len(entries) == 2 * K
        old = [log_probs_of(model, entry).detach() for entry in entries]
        for _ in range(iterations):
            step(model, reference, entries, old, changes)
        if "target_kl" in changes:
            kl = sum(entry.kl for entry in entries) / len(entries)
            factor = 1 + 0.1 * min(max(kl / changes["target_kl"] - 1, -0.2), 0.2)
            changes = {**changes, "beta": changes["beta"] * factor}
    trained = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    start = dict(reference.named_parameters())
    assert any((parameter - start[name]).abs().max() > 1e-4 for name, parameter in model.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained[name], parameter, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


# ---- the sampler -----------------------------------------------------------------------------------------------------


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


def test_the_gap_of_sampler_and_trainer_is_logged(tiny_base, tokenizer, tmp_path, exact):
    trainer = build(RLOOTrainer, tiny_base, tokenizer, tmp_path, max_steps=1, rollouts_dir=str(tmp_path / "ledger"))
    model = plain(tiny_base)
    drawn_with(trainer).train()
    gaps = torch.cat(
        [
            (log_probs_of(model, entry).detach() - torch.tensor(told_of(entry.completion_ids))).abs()
            for entry in read_rollouts(tmp_path / "ledger")
        ]
    )
    assert logged(trainer, "sampler_gap/mean") == [pytest.approx(gaps.mean().item(), rel=1e-6)]
    assert logged(trainer, "sampler_gap/max") == [pytest.approx(gaps.max().item(), rel=1e-6)]
    assert logged(trainer, "sampler_gap/over_0.1") == [pytest.approx((gaps > 0.1).float().mean().item(), rel=1e-6)]


@pytest.mark.parametrize("truncation", [{}, {"top_p": 0.5}, {"top_k": 3}])
def test_the_embedded_samplers_policy_is_the_trainers(tiny_base, tokenizer, tmp_path, truncation):
    trainer = make_trainer(tiny_base, tokenizer, tmp_path, max_steps=1, temperature=0.7, **truncation)
    trainer.train()
    (widest,) = logged(trainer, "sampler_gap/max")
    assert 0 < widest < 1e-4


def test_correction_needs_a_sampler_that_tells(tiny_base, tokenizer, tmp_path):
    trainer = make_trainer(
        tiny_base, tokenizer, tmp_path, importance_correction="token", generation_kwargs={"num_beams": 1}
    )
    with pytest.raises(ValueError, match="needs the log-probabilities that completions were sampled with"):
        trainer.train()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"kl_in": "both"}, "kl_in is 'both'; expected reward or loss"),
        ({"kl_in": "loss"}, "expected reward with k1"),
        ({"engine": "trl", "importance_correction": "token"}, "expected none with --engine trl"),
        ({"target_kl": 3.0, "beta": 0.0}, "expected --kl_coef above 0"),
    ],
)
def test_the_trainers_configuration_refuses_what_the_commands_refuse(tmp_path, asked, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **asked)


def test_a_fallback_to_trls_passes_refuses_what_they_would_leave_out(tiny_base, tokenizer, tmp_path):
    message = "kl_in='loss' and importance_correction='token' needs packed rows, which cannot be used with steps_per"
    with pytest.raises(ValueError, match=message):
        make_trainer(
            tiny_base,
            tokenizer,
            tmp_path,
            kl_in="loss",
            kl_estimator="k2",
            importance_correction="token",
            steps_per_generation=1,
            per_device_train_batch_size=8,
        )


# ---- the weight of KL ------------------------------------------------------------------------------------------------


def test_the_weight_of_kl_follows_its_target_through_a_resumption(tiny_base, tokenizer, tmp_path):
    settings = {"target_kl": 1.0, "beta": 0.5, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tiny_base, tokenizer, tmp_path / "whole", length_reward, max_steps=4, **settings)
    whole.train()
    weights = logged(whole, "kl_coef")
    assert weights[:2] == [0.5, pytest.approx(0.5 * 0.98, rel=1e-12)]  # at first there is no KL
    for before, after, kl in zip(weights, weights[1:], logged(whole, "kl_per_completion"), strict=False):
        assert after == pytest.approx(before * (1 + 0.1 * min(max(kl - 1, -0.2), 0.2)), rel=1e-6)
    resumed = make_trainer(tiny_base, tokenizer, tmp_path / "whole", length_reward, max_steps=4, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert logged(resumed, "kl_coef") == pytest.approx(weights, rel=1e-12)
    state = json.loads((tmp_path / "whole" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["KLWeight"]["attributes"]["beta"] == pytest.approx(weights[2], rel=1e-12)
