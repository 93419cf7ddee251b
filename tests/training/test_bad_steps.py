import math

import pytest
import torch
from transformers import TrainerCallback

from helpsteer_rloo.training.bad_steps import skip_bad_steps
from helpsteer_rloo.training.ledger import read_rollouts
from helpsteer_rloo.training.scorer import EnsembleScorer, RewardModelScorer
from tests.training.test_reward import trainer_on_chat
from tests.training.test_rloo import length_reward, make_trainer


class Weights(TrainerCallback):
    """All weights, before training and after every step."""

    def __init__(self):
        self.seen = []

    def _keep(self, args, state, control, model=None, **kwargs):
        self.seen.append(torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()]))

    on_train_begin = on_step_end = _keep

    def changed(self):
        return [not torch.equal(a, b) for a, b in zip(self.seen, self.seen[1:], strict=False)]


def spoiled(trainer, steps, factor=math.nan):
    """Let the losses of some steps be no numbers."""
    backward = trainer.accelerator.backward

    def spoiled_backward(loss, **kwargs):
        backward(loss * factor if trainer.state.global_step in steps else loss, **kwargs)

    trainer.accelerator.backward = spoiled_backward
    weights = Weights()
    trainer.add_callback(weights)
    return weights


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_step_whose_gradient_is_not_finite_changes_nothing(tiny_base, tokenizer, tmp_path, factor):
    trainer = trainer_on_chat(tiny_base, tokenizer, tmp_path, max_steps=4)
    weights, bad = spoiled(trainer, {1, 2}, factor), skip_bad_steps(trainer, 2)
    with pytest.warns(UserWarning, match="is skipped: its gradient is not finite") as caught:
        trainer.train()
    assert weights.changed() == [True, False, False, True]
    assert (bad.total, bad.in_a_row) == (2, 0)
    texts = [str(warning.message) for warning in caught if "skipped" in str(warning.message)]
    assert texts == [f"Step {n} is skipped: its gradient is not finite ({n - 1} so far)." for n in (2, 3)]
    assert all(value["step"] == 2 for value in trainer.optimizer.state_dict()["state"].values())


def test_too_many_in_a_row_end_the_run_with_good_weights(tiny_base, tokenizer, tmp_path):
    trainer = trainer_on_chat(tiny_base, tokenizer, tmp_path, max_steps=9)
    weights, _ = spoiled(trainer, {1, 3, 4, 5}), skip_bad_steps(trainer, 2)
    with (
        pytest.warns(UserWarning, match="is skipped"),
        pytest.raises(ValueError, match="not finite in 3 optimizer steps in a row, up to step 6; none of them changed"),
    ):
        trainer.train()
    assert weights.changed() == [True, False, True, False, False]
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_the_count_goes_on_from_a_checkpoint(tiny_base, tokenizer, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        trainer = trainer_on_chat(tiny_base, tokenizer, tmp_path, **settings)
        spoiled(trainer, {1, 3})
        bad = skip_bad_steps(trainer, 1)
        with pytest.warns(UserWarning, match="is skipped"):
            trainer.train(resume_from_checkpoint=checkpoint)
        assert bad.total == 2


def test_an_infinite_reward_skips_its_step_and_the_ledger_says_so(tiny_base, tokenizer, tmp_path):
    batches = []

    def reward(completion_ids, **_):
        batches.append(len(completion_ids))
        values = length_reward(completion_ids)
        return [math.inf, *values[1:]] if len(batches) == 2 else values

    trainer = make_trainer(tiny_base, tokenizer, tmp_path, reward, max_steps=3, rollouts_dir=str(tmp_path / "ledger"))
    bad, weights = skip_bad_steps(trainer, 1), Weights()
    trainer.add_callback(weights)
    with pytest.warns(UserWarning, match="Step 2 is skipped"):
        trainer.train()
    assert weights.changed() == [True, False, True]
    assert bad.total == 1
    entries = [entry for entry in read_rollouts(tmp_path / "ledger") if entry.step == 1]
    assert entries[0].score is None
    assert entries[0].advantage is None
    assert entries[-1].advantage is not None


@pytest.mark.parametrize("worst", [False, True])
def test_a_broken_score_of_a_reward_model_skips_the_step(tiny_base, tokenizer, tmp_path, worst):
    calls = iter(range(100))

    class Role:
        adapter = None

        def score(self, groups, batch_size):
            broken = next(calls) // 2 == 1
            return [[math.nan if broken and not n else 0.1 * n for n in range(len(g.continuation_ids))] for g in groups]

    members = [RewardModelScorer(Role(), batch_size=8, max_length=None) for _ in range(2)]
    trainer = make_trainer(
        tiny_base, tokenizer, tmp_path, EnsembleScorer(members, worst=worst), max_steps=3, reward_clip_range=[-5.0, 5.0]
    )
    weights, bad = Weights(), skip_bad_steps(trainer, 2)
    trainer.add_callback(weights)
    with pytest.warns(UserWarning, match="Step 2 is skipped"):
        trainer.train()
    assert weights.changed() == [True, False, True]
    assert bad.total == 1
