"""A grid of settings in which TRL's trainer is right: same completions and rewards, same loss and gradients.

`pytest tests/training/test_parity_grid.py -s` prints the number of settings and the worst errors.
"""

import itertools

import pytest
import torch
import trl
from transformers import TrainerCallback

from helpsteer_rloo.training import rloo_scoring
from helpsteer_rloo.training.rloo import RLOOTrainer
from tests.training.test_rloo_packed import build, exact

__all__ = ["exact"]

ONCE = {"max_steps": 2}
BUFFERED = {"num_iterations": 2, "steps_per_generation": 4, "max_steps": 8}
"""Two epochs of two mini-batches of two micro-batches on every batch of rollouts."""
AXES = (
    [{"normalize_advantages": False}, {"normalize_advantages": True}],
    [{"beta": 0.0}, {"beta": 0.3}],
    [ONCE, BUFFERED],
    [{}, {"mask_truncated_completions": True}],
    [{}, {"lora": True}],
    [{"num_generations": 4}, {"num_generations": 2, "reward_clip_range": (-0.2, 1.5), "temperature": 0.7}],
)
GRID = [dict(itertools.chain(*(part.items() for part in parts))) for parts in itertools.product(*AXES)]
SPECIAL = [
    {"gradient_checkpointing": True, **BUFFERED},
    {"lora": True, "gradient_checkpointing": True, "beta": 0.3, **ONCE},
    {"epsilon": 0.01, "epsilon_high": 0.02, "learning_rate": 0.001, **BUFFERED},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, **ONCE},
    {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_generations": 8, **ONCE},
    {"packed_tokens": 1, **BUFFERED},
    {"packed_tokens": 60, "beta": 2.0, **BUFFERED},
    {"max_grad_norm": 0.5, **BUFFERED},
]
TOLERANCE = 1e-9


class Gradients(TrainerCallback):
    """The gradient of every optimizer step, as one vector."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))


def run(trainer_class, base, tokenizer, directory, changes):
    own = {k: v for k, v in changes.items() if k != "packed_tokens" or trainer_class is RLOOTrainer}
    trainer = build(trainer_class, base, tokenizer, directory, **own)
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return torch.tensor(losses), torch.stack(gradients.seen)


def worst_errors(base, tokenizer, directory, changes):
    """Of the losses and of the gradients' norms, relative to TRL's, or to 1e-3 where those are less.

    A loss is near 0 on-policy, and a gradient is 0 where every ratio is clipped.
    """
    (losses, gradients), (their_losses, their_gradients) = (
        run(kind, base, tokenizer, directory, changes) for kind in (RLOOTrainer, trl.RLOOTrainer)
    )
    assert len(losses) == changes["max_steps"] == len(their_losses)
    norms = their_gradients.norm(dim=1)
    assert norms.max() > 0.1
    loss = ((losses - their_losses).abs() / their_losses.abs().clamp(min=1e-3)).max().item()
    gradient = ((gradients - their_gradients).norm(dim=1) / norms.clamp(min=1e-3)).max().item()
    return loss, gradient


@pytest.fixture
def all_in_float64(exact, monkeypatch):
    """TRL's rewards too, and both trainers' mini-batches of the same completions, which are otherwise shuffled."""
    monkeypatch.setattr(trl.trainer.rloo_trainer, "shuffle_sequence_dict", lambda batch: batch)
    monkeypatch.setattr(rloo_scoring, "mini_batch_order", lambda count, *_: list(range(count)))
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def check(settings, tiny_base, tokenizer, tmp_path):
    errors = [worst_errors(tiny_base, tokenizer, tmp_path, changes) for changes in settings]
    losses, gradients = zip(*errors, strict=True)
    print(f"\nsettings {len(settings)}, worst relative error of loss {max(losses):.1e}, gradient {max(gradients):.1e}")
    failed = [(changes, error) for changes, error in zip(settings, errors, strict=True) if max(error) > TOLERANCE]
    assert not failed


def test_special_settings_equal_trls(tiny_base, tokenizer, tmp_path, all_in_float64):
    check(SPECIAL, tiny_base, tokenizer, tmp_path)


@pytest.mark.slow
def test_the_grid_of_settings_equals_trls(tiny_base, tokenizer, tmp_path, all_in_float64):
    check([*GRID, *SPECIAL], tiny_base, tokenizer, tmp_path)
