"""RLOO on packed rows against TRL's padded passes: same weights, same completions, same rewards."""

import warnings

import pytest
import torch
import trl
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from transformers.models.qwen3 import modeling_qwen3

from helpsteer_rloo.training.ledger import read_rollouts
from helpsteer_rloo.training.rloo import RLOOConfig, RLOOTrainer
from tests.model.test_attention import norm_in_float64
from tests.training.test_rloo import PROMPTS, K, arguments, chat

WORDS = ("oak", "oak, elm", "oak, elm and ash", "no idea")


def force(trainer, tokenizer):
    """Completions that depend on the prompt and the place in its group only: some end, some are cut off."""

    def generate(prompt_ids, images, multimodal_fields):
        completions = []
        for place, prompt in enumerate(prompt_ids):
            text = WORDS[(sum(prompt) + place) % len(WORDS)]
            ids = tokenizer(text, add_special_tokens=False).input_ids[:5]
            completions.append([*ids, tokenizer.eos_token_id] if (sum(prompt) + place) % 3 else ids)
        return completions

    trainer._generate_single_turn = generate
    return trainer


def reward(completion_ids, **_):
    return [sum(ids) / 500 - len(ids) / 7 for ids in completion_ids]


def build(trainer_class, base, tokenizer, directory, **changes):
    lora = changes.pop("lora", False)
    settings = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "disable_dropout": True}
    settings |= {"lr_scheduler_type": "constant", **changes}
    config = trl.RLOOConfig if trainer_class is trl.RLOOTrainer else RLOOConfig
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64),
        reward_funcs=reward,
        args=arguments(directory, config, **settings),
        train_dataset=chat(PROMPTS),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
    )
    return force(trainer, tokenizer)


def rotary_in_float64(self, x, position_ids):
    """Rotary angles without float32, in which TRL's positions, counted from the left padding, round differently."""
    angles = position_ids[..., None].double() * self.inv_freq.double()
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class HeadInFloat64:
    """TRL's vocabulary head without float32, for the two outputs that its RLOO trainer asks for."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk, softcap, scale, outputs):  # TRL's order
        log_probs = (hidden @ weight.T / temperature).log_softmax(-1)
        fields = {
            "log_probs": log_probs.gather(-1, targets[:, None])[:, 0],
            "entropy": -(log_probs.exp() * log_probs).sum(-1).detach(),
        }
        return tuple(
            fields.get(name) for name in ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        )


@pytest.fixture
def exact(monkeypatch):
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", HeadInFloat64)
    monkeypatch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", norm_in_float64)
    monkeypatch.setattr(modeling_qwen3.Qwen3RotaryEmbedding, "forward", rotary_in_float64)


LOGGED = ("loss", "kl", "reward", "reward_std", "entropy", "frac_reward_zero_std", "clip_ratio/region_mean")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beta": 0.0},
        {"beta": 2.0, "lora": True},
        {"gradient_checkpointing": True},
        {"lora": True, "gradient_checkpointing": True},
        {"num_iterations": 3, "max_steps": 6},
        {"normalize_advantages": True},
        {"reward_clip_range": (-0.6, 0.4)},
        {"mask_truncated_completions": True},
        {"temperature": 0.5},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
        {"num_generations": 8},
        {"num_generations": 2},
        {"packed_tokens": 60},
        {"packed_tokens": 1},
    ],
    ids=str,
)
def test_training_equals_trls_in_float64(tiny_base, tokenizer, tmp_path, exact, changes):
    """Several steps end in the same weights, with the same loss, KL, rewards and entropy on the way."""
    results = []
    for trainer_class in (RLOOTrainer, trl.RLOOTrainer):
        own = {k: v for k, v in changes.items() if k != "packed_tokens" or trainer_class is RLOOTrainer}
        trainer = build(trainer_class, tiny_base, tokenizer, tmp_path, **own)
        trainer.train()
        history = [[row[name] for name in LOGGED if name in row] for row in trainer.state.log_history if "loss" in row]
        results.append((history, {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}))
    (ours, our_weights), (theirs, their_weights) = results
    assert len(ours) == changes.get("max_steps", 3)
    for our_row, their_row in zip(ours, theirs, strict=True):
        # TRL's rewards are float32, and its entropy is a mean of micro-batch means over other micro-batches
        assert our_row == pytest.approx(their_row, rel=1e-3, abs=1e-5)
    assert our_weights.keys() == their_weights.keys()
    tolerance = 1e-6 if "normalize_advantages" in changes else 1e-9
    for name, weight in our_weights.items():
        torch.testing.assert_close(
            weight, their_weights[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def calls_of(trainer, monkeypatch):
    """Tokens that went through the body, by whether a gradient was asked for."""
    seen = {True: 0, False: 0}
    body = trainer.accelerator.unwrap_model(trainer.model).model

    def count(_module, inputs):
        seen[torch.is_grad_enabled()] += inputs[0].numel()

    body.embed_tokens.register_forward_pre_hook(count)
    return seen


@pytest.mark.parametrize(("iterations", "passes"), [(1, 1), (2, 2)])
def test_there_is_an_old_pass_only_where_batches_are_used_again(
    tiny_base, tokenizer, tmp_path, monkeypatch, iterations, passes
):
    trainer = build(RLOOTrainer, tiny_base, tokenizer, tmp_path, num_iterations=iterations, max_steps=iterations)
    seen = calls_of(trainer, monkeypatch)
    trainer.train()
    # the reference is a model of its own here: without gradient the policy runs only for old log-probabilities
    assert seen[False] == (seen[True] / iterations if passes == 2 else 0)


def test_the_prompt_is_computed_once_for_its_completions(tiny_base, tokenizer, tmp_path, monkeypatch):
    counts = []
    for trainer_class in (RLOOTrainer, trl.RLOOTrainer):
        trainer = build(trainer_class, tiny_base, tokenizer, tmp_path, max_steps=1)
        seen = calls_of(trainer, monkeypatch)
        trainer.train()
        counts.append(sum(seen.values()))
    assert counts[0] < counts[1] / 4  # no old pass, and the prompts once instead of K = 4 times


def test_the_ledger_of_a_fresh_batch_is_complete(tiny_base, tokenizer, tmp_path):
    build(RLOOTrainer, tiny_base, tokenizer, tmp_path, rollouts_dir=str(tmp_path / "r"), beta=0.3).train()
    entries = read_rollouts(tmp_path / "r")
    assert len(entries) == 3 * 8
    for start in range(0, len(entries), K):
        group = entries[start : start + K]
        for entry in group:
            assert entry.reward == pytest.approx(entry.score - 0.3 * entry.kl, abs=1e-5)
            others = [other.reward for other in group if other is not entry]
            assert entry.advantage == pytest.approx(entry.reward - sum(others) / (K - 1), abs=1e-5)
    assert any(abs(entry.kl) > 1e-4 for entry in entries[8:])


def test_sampling_is_reproducible_whatever_the_chunk(tiny_base, tokenizer, tmp_path):
    texts = []
    for size in (1, 3, 8):
        trainer = RLOOTrainer(
            model=str(tiny_base),
            reward_funcs=reward,
            args=arguments(tmp_path, rollout_forward_batch_size=size, max_steps=1),
            train_dataset=chat(PROMPTS),
            processing_class=tokenizer,
        )
        trainer.model.train()
        batch = trainer._rollout([trainer.train_dataset[i // K] for i in range(2 * K)])
        texts.append(batch.completion_ids)
        assert trainer.model.training
    assert texts[0] == texts[1] == texts[2]
    assert len({tuple(ids) for ids in texts[0]}) > 4


def test_the_stock_engine_runs_trls_passes(tiny_base, tokenizer, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer = build(RLOOTrainer, tiny_base, tokenizer, tmp_path, engine="trl")
        trainer.train()
    assert not trainer._packed
    assert trainer.state.global_step == 3


def test_another_architecture_is_left_to_trl_with_one_warning(tiny_base, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(modeling_qwen3.Qwen3ForCausalLM, "_supports_attention_backend", False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        trainer = build(RLOOTrainer, tiny_base, tokenizer, tmp_path)
        trainer.train()
    (message,) = [str(w.message) for w in caught if "TRL's own path" in str(w.message)]
    assert "packed rows cannot be used with the architecture of Qwen3ForCausalLM" in message


def test_batches_of_less_than_an_optimizer_step_are_left_to_trl(tiny_base, tokenizer, tmp_path, exact):
    changes = {"steps_per_generation": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = build(RLOOTrainer, tiny_base, tokenizer, tmp_path, **changes)
    assert any("no multiple of gradient_accumulation_steps" in str(w.message) for w in caught)
    theirs = build(trl.RLOOTrainer, tiny_base, tokenizer, tmp_path, **changes)
    for trainer in (ours, theirs):
        trainer.train()
    for (name, a), b in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=name)
