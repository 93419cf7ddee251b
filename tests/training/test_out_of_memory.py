"""Where memory runs out, less is computed at once, and the result is the same."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from helpsteer_rloo.model.forward import base_model, body_of
from helpsteer_rloo.model.memory import AtOnce
from helpsteer_rloo.model.roles import RewardRole
from helpsteer_rloo.training import rloo_sampling
from helpsteer_rloo.training.ledger import read_rollouts
from helpsteer_rloo.training.reward import RewardConfig, RewardTrainer
from helpsteer_rloo.training.scorer import RewardModelScorer
from tests.training.test_exact_resume import ending
from tests.training.test_pairs import pair_rows
from tests.training.test_rloo import make_trainer

ERRORS = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:124] data. DefaultCPUAllocator: can't allocate memory"),
}


def shrink(model, tokens, *, backward=False, error="gpu"):
    """Let a model's first layer have no memory for rows of more tokens: forward, or once others were gone backward."""
    failures = []

    def fail(hidden):
        failures.append(hidden.shape[1])
        raise ERRORS[error]

    def forward_hook(_module, _inputs, output):
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        if hidden.shape[1] <= tokens:
            return
        if not backward:
            fail(hidden)
        if hidden.requires_grad:
            hidden.register_hook(fail)

    body_of(base_model(model)).layers[0].register_forward_hook(forward_hook)
    return failures


def reward_trainer(base, tokenizer, directory):
    torch.manual_seed(0)
    return RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float64),
        args=RewardConfig(
            output_dir=str(directory),
            max_steps=4,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=3,
            max_length=None,
            packed_tokens=200,
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            gradient_checkpointing=False,
            learning_rate=1e-3,
            optim="sgd",
            save_strategy="no",
            logging_steps=1,
        ),
        train_dataset=Dataset.from_list(pair_rows(3, prompts=30)),
        processing_class=tokenizer,
    )


def check_same(whole, small):
    """Same weights and metrics to rounding in float64, and at least one retry."""
    (tensors, logged), (again, logged_again) = ending(whole), ending(small)
    for a, b in zip(tensors, again, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)
    for row, other in zip(logged, logged_again, strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(("backward", "error"), [(False, "gpu"), (False, "cpu"), (True, "gpu")])
def test_a_step_of_reward_training_begins_again_with_smaller_rows(tiny_base, tokenizer, tmp_path, backward, error):
    whole = reward_trainer(tiny_base, tokenizer, tmp_path)
    whole.train()
    small = reward_trainer(tiny_base, tokenizer, tmp_path)
    failures = shrink(small.model, 70, backward=backward, error=error)
    with pytest.warns(UserWarning, match=r"ran out of memory in a row of \d+ tokens: step 1 begins again, with rows"):
        small.train()
    assert failures
    assert max(failures) > 70
    assert small._passes.budget <= 70 * 2
    assert len(failures) <= 3  # smaller rows from there on, instead of an attempt every step
    check_same(whole, small)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("changes", [{}, {"num_iterations": 2, "steps_per_generation": 4}], ids=["once", "buffered"])
def test_a_step_of_rloo_begins_again_with_smaller_rows(tiny_base, tokenizer, tmp_path, backward, changes):
    def run(tokens, name):
        settings = {"packed_tokens": 300, "max_steps": 4, "optim": "sgd", "rollouts_dir": str(tmp_path / name)}
        settings |= {"per_device_train_batch_size": 8, **changes}
        model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float64)
        trainer = make_trainer(model, tokenizer, tmp_path, **settings)
        failures = shrink(trainer.model, tokens, backward=backward)
        if tokens < 300:
            with pytest.warns(UserWarning, match="ran out of memory"):
                trainer.train()
            assert failures
        else:
            trainer.train()
            assert not failures
        return trainer

    whole, small = run(10_000, "whole"), run(100, "small")
    check_same(whole, small)
    for entry, other in zip(read_rollouts(tmp_path / "whole"), read_rollouts(tmp_path / "small"), strict=True):
        assert entry.completion_ids == other.completion_ids
        assert (entry.kl, entry.advantage) == pytest.approx((other.kl, other.advantage), rel=1e-6, abs=1e-9)


def test_a_single_prompt_that_is_too_large_is_an_error_that_says_what_to_lower(tiny_base, tokenizer, tmp_path):
    trainer = reward_trainer(tiny_base, tokenizer, tmp_path)
    shrink(trainer.model, 5)
    with (
        pytest.warns(UserWarning, match="begins again"),
        pytest.raises(ValueError, match=r"in a single prompt with its .*: \d+ tokens and 2 cont.*--max_length"),
    ):
        trainer.train()


def test_sampling_and_scoring_go_on_with_fewer_sequences(tiny_base, tokenizer, tmp_path, monkeypatch):
    sampled, scored = [], []
    real_sample, real_score = rloo_sampling.sample_groups, RewardRole.score

    def sample_few(*args, rows, **kwargs):
        sampled.append(rows)
        if rows > 3:
            raise ERRORS["gpu"]
        return real_sample(*args, rows=rows, **kwargs)

    def score_few(self, groups, batch_size):
        scored.append(batch_size)
        if batch_size > 2:
            raise ERRORS["cpu"]
        return real_score(self, groups, batch_size)

    model = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1).eval()

    def prepared(name):
        scorer = RewardModelScorer(RewardRole(model), batch_size=8, max_length=None)
        return make_trainer(tiny_base, tokenizer, tmp_path, reward=scorer, rollouts_dir=str(tmp_path / name))

    def scores(name):
        return [(entry.completion_ids, entry.score) for entry in read_rollouts(tmp_path / name)]

    prepared("whole").train()
    monkeypatch.setattr(rloo_sampling, "sample_groups", sample_few)
    monkeypatch.setattr(RewardRole, "score", score_few)
    few = prepared("few")
    with pytest.warns(UserWarning, match="ran out of memory: going on with"):
        few.train()
    assert (sampled, scored) == ([8, 4, 2, 2], [8, 4, 2, 2])  # learned in the first batch, kept in the second
    for (ids, score), (other_ids, other_score) in zip(scores("whole"), scores("few"), strict=True):
        assert ids == other_ids
        assert score == pytest.approx(other_score, rel=1e-5)


def test_what_is_no_lack_of_memory_is_raised_and_so_is_one_that_less_does_not_help():
    def bug(size):
        raise RuntimeError("shapes do not fit")

    def full(size):
        raise ERRORS["gpu"]

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        AtOnce().run(bug, 8, 1)
    with pytest.warns(UserWarning, match="ran out"), pytest.raises(torch.OutOfMemoryError):
        AtOnce().run(full, 8, 3)
