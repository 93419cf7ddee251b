"""A run that goes on from the checkpoint of any step ends as the one that was not stopped: the same bits."""

from types import SimpleNamespace

import pytest
import torch
import trl
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from helpsteer_rloo.training.ledger import discard_rollouts_from, read_rollouts
from helpsteer_rloo.training.reward import RewardConfig, RewardTrainer
from helpsteer_rloo.training.sharding import refuse_other_engine
from tests.training.test_pairs import pair_rows
from tests.training.test_rloo import PROMPTS, K, make_trainer

TIMES = ("runtime", "per_second", "step_time", "train_loss")
"""Metrics of the clock, and the mean loss of one call of `train`."""


def ending(trainer):
    """All weights, the optimizer's state and all that was logged."""
    moments = [tensor for state in trainer.optimizer.state_dict()["state"].values() for tensor in state.values()]
    logged = [
        {name: value for name, value in row.items() if not name.endswith(TIMES)} for row in trainer.state.log_history
    ]
    return [*map(torch.clone, trainer.model.parameters()), *moments], logged


def check_every_step(make, directory, steps, ledger=False):
    """Train to the end, then once more from the checkpoint of every step, with as much in memory as a new process."""
    whole = make()
    whole.train()
    tensors, logged = ending(whole)
    entries = read_rollouts(directory / "rollouts") if ledger else None
    for step in range(1, steps):
        torch.manual_seed(step)  # another state than the one that the run goes on with
        if ledger:
            discard_rollouts_from(directory / "rollouts", step)
        resumed = make()
        resumed.train(resume_from_checkpoint=str(directory / f"checkpoint-{step}"))
        again, logged_again = ending(resumed)
        assert all(torch.equal(a, b) for a, b in zip(tensors, again, strict=True)), step
        assert logged_again == logged, step
        if ledger:
            assert read_rollouts(directory / "rollouts") == entries, step


SAVING = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None, "logging_steps": 3}
BUFFERED = {"num_iterations": 2, "steps_per_generation": 4, "max_steps": 8, "missing_eos_penalty": 0.5}
"""Four optimizer steps a batch of rollouts: two epochs of two mini-batches of two micro-batches."""


@pytest.mark.parametrize(
    "changes",
    [
        {**BUFFERED},
        {**BUFFERED, "target_kl": 0.05, "importance_correction": "token", "top_k": 5, "num_train_epochs": 3},
        {**BUFFERED, "engine": "trl", "rollout_forward_batch_size": 8},
        {"max_steps": 7, "normalize_advantages": False, "sync_ref_model": True, "ref_model_sync_steps": 2},
        {"max_steps": 7, "num_iterations": 3, "kl_in": "loss", "kl_estimator": "k3", "gradient_accumulation_steps": 1},
    ],
    ids=lambda changes: "-".join(f"{name}={value}" for name, value in changes.items() if name != "max_steps"),
)
def test_rloo_goes_on_exactly_at_every_step(tiny_base, tokenizer, tmp_path, changes):
    def make():
        settings = {**SAVING, **changes, "rollouts_dir": str(tmp_path / "rollouts"), "temperature": 0.9}
        return make_trainer(tiny_base, tokenizer, tmp_path, texts=PROMPTS[:8], **settings)

    check_every_step(make, tmp_path, changes["max_steps"], ledger=True)


@pytest.mark.parametrize("engine", ["packed", "trl"])
def test_reward_training_goes_on_exactly_at_every_step(tiny_base, tokenizer, tmp_path, engine):
    def make():
        torch.manual_seed(0)  # the head is new
        return RewardTrainer(
            model=AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1),
            args=RewardConfig(
                output_dir=str(tmp_path),
                max_steps=8,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                max_length=None,
                engine=engine,
                use_cpu=True,
                bf16=False,
                report_to="none",
                disable_tqdm=True,
                gradient_checkpointing=False,
                learning_rate=1e-3,
                **SAVING,
            ),
            train_dataset=Dataset.from_list(pair_rows(3, prompts=8)),
            processing_class=tokenizer,
        )

    check_every_step(make, tmp_path, 8)


def test_the_order_of_a_later_epoch_is_that_of_an_undisturbed_run(tiny_base, tokenizer, tmp_path):
    """TRL 1.16 goes through the first epoch's order again; this project's trainer does not."""

    def prompts_seen(kind, resume):
        settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "num_generations": K}
        seen = []

        def reward(prompts, completion_ids, **_):
            seen.append([prompt[0]["content"] for prompt in prompts])
            return [float(len(ids)) for ids in completion_ids]

        directory = tmp_path / kind.__module__
        trainer = make_trainer(tiny_base, tokenizer, directory, reward, kind, texts=PROMPTS[:4], **settings)
        trainer.train(resume_from_checkpoint=str(directory / "checkpoint-3") if resume else None)
        return seen

    for kind, same in ((type(make_trainer(tiny_base, tokenizer, tmp_path)), True), (trl.RLOOTrainer, False)):
        whole = prompts_seen(kind, resume=False)
        assert len(whole) == 6  # two prompts a step, two steps an epoch
        assert (prompts_seen(kind, resume=True) == whole[3:]) is same


@pytest.mark.parametrize("others", [0, 2])
def test_a_checkpoint_without_a_position_of_this_process_is_reported(tiny_base, tokenizer, tmp_path, others):
    settings = {**SAVING, **BUFFERED, "max_steps": 3}
    make_trainer(tiny_base, tokenizer, tmp_path, **settings).train()
    position = tmp_path / "checkpoint-1" / "position-0-of-1.safetensors"
    assert load_file(position)["completion_ids"].dtype == torch.int64
    kept = position.read_bytes()
    position.unlink()
    for other in range(others):
        position.with_name(f"position-{other}-of-{others}.safetensors").write_bytes(kept)
    trainer = make_trainer(tiny_base, tokenizer, tmp_path, **settings)
    with pytest.warns(UserWarning, match=rf"was saved by {others} of this tool's processes in .*, and 1 go on"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainer._step == 6  # two micro-batches a step, as if it had taken the first one as well


def test_a_reference_that_moves_is_where_it_was_for_another_number_of_processes(tiny_base, tokenizer, tmp_path):
    def make():
        settings = {**SAVING, "max_steps": 3, "beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2}
        return make_trainer(tiny_base, tokenizer, tmp_path, **settings)

    whole = make()
    began = [parameter.clone() for parameter in whole.ref_model.parameters()]
    whole.train()
    position = tmp_path / "checkpoint-2" / "position-0-of-1.safetensors"
    for rank in range(2):
        position.with_name(f"position-{rank}-of-2.safetensors").write_bytes(position.read_bytes())
    position.unlink()
    resumed = make()
    with pytest.warns(UserWarning, match=r"was saved by 2 of this tool's processes in .*, and 1 go on"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    moved = list(whole.ref_model.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(began, moved, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(moved, resumed.ref_model.parameters(), strict=True))


@pytest.mark.parametrize("saved", [True, False])
def test_a_checkpoint_of_another_engine_is_refused(tmp_path, saved):
    if saved:
        (tmp_path / "pytorch_model_fsdp_0").mkdir()
    same, other = (SimpleNamespace(is_fsdp_enabled=used) for used in (saved, not saved))
    refuse_other_engine(same, tmp_path)
    with pytest.raises(ValueError, match=r"was saved with(out)? FSDP, and this run is with"):
        refuse_other_engine(other, tmp_path)


@pytest.mark.parametrize(("step", "same"), [(4, True), (6, False)], ids=["after a batch", "inside a batch"])
def test_rloo_goes_on_in_steps_of_other_passes(tiny_base, tokenizer, tmp_path, step, same):
    """The same batch of a step in one pass instead of two: the same curve from the end of a batch of rollouts on."""

    def make(passes):
        shape = {"gradient_accumulation_steps": passes, "per_device_train_batch_size": 8 // passes}
        settings = {**SAVING, **BUFFERED, "logging_steps": 1, **shape, "steps_per_generation": 2 * passes}
        return make_trainer(tiny_base, tokenizer, tmp_path, texts=PROMPTS[:8], **settings)

    whole, resumed = make(2), make(1)
    whole.train()
    with pytest.warns(UserWarning, match=r"in steps of 2 passes, and 1 go on from it in steps of 1"):
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    rows = [[row for row in trainer.state.log_history if "loss" in row] for trainer in (whole, resumed)]
    assert [row["step"] for row in rows[1]] == list(range(1, 9))
    losses = [[row["loss"] for row in part] for part in rows]
    assert (losses[1] == pytest.approx(losses[0], rel=1e-3, abs=1e-5)) is same
