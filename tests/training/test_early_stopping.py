"""A reward model whose training ends when the loss on pairs kept for that no longer falls."""

import json

import pytest
import torch
from safetensors.torch import load_file

from helpsteer_rloo import cli
from helpsteer_rloo.data.demo import write_rows
from helpsteer_rloo.data.preparation import half_of, to_choose_by
from helpsteer_rloo.groups import Message, TokenGroup
from tests.test_pipeline import SMALL

FLAGS = [flag.replace("--reward.", "--") for flag in SMALL if flag.startswith("--reward.")]


@pytest.fixture
def command(tiny_base, tmp_path):
    """Flags of a training that gets worse and worse: its learning rate is far too high."""
    write_rows(tmp_path / "rows.jsonl", 0, 260)
    return [
        f"--dataset_name={tmp_path / 'rows.jsonl'}",
        f"--model_name_or_path={tiny_base}",
        f"--output_dir={tmp_path / 'model'}",
        "--max_length=96",
        "--per_device_train_batch_size=16",
        *FLAGS,
        "--learning_rate=3e-2",
        "--num_train_epochs=6",
        "--save_steps=2",
        "--eval_steps=2",
        "--early_stopping_patience=2",
    ]


def state_of(directory):
    last = max(directory.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return json.loads((last / "trainer_state.json").read_text())


def test_training_ends_early_with_the_best_weights(command, tmp_path, capsys):
    cli.train_reward_model(command)
    model = tmp_path / "model"
    state = state_of(model)
    losses = [row["eval_loss"] for row in state["log_history"] if "eval_loss" in row]
    assert state["global_step"] < state["max_steps"]
    assert len(losses) - 1 - losses.index(min(losses)) == 2  # two evaluations in a row without a better one
    record = json.loads((model / "reward_model.json").read_text())
    assert record["training"]["steps"] == state["global_step"]
    best = load_file(f"{state['best_model_checkpoint']}/model.safetensors")
    final = load_file(model / "model.safetensors")
    assert all(torch.equal(best[name], final[name]) for name in best)


def test_a_training_that_was_killed_after_its_early_end_stays_ended(command, tmp_path, monkeypatch):
    from helpsteer_rloo.training import reward_model

    def killed(trainer):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(reward_model, "save_final", killed)
        with pytest.raises(SystemExit):
            cli.train_reward_model(command)
    state = state_of(tmp_path / "model")
    cli.train_reward_model(command)
    assert state_of(tmp_path / "model")["global_step"] == state["global_step"]
    best = load_file(f"{state['best_model_checkpoint']}/model.safetensors")
    final = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(best[name], final[name]) for name in best)


def groups(count):
    return [TokenGroup((Message("user", f"prompt {n}"),), (n,), ((1,), (2,))) for n in range(count)]


def test_the_step_is_chosen_by_a_tenth_of_the_prompts_which_are_not_trained_on():
    train, choosing = to_choose_by(groups(2000))
    assert len(train) + len(choosing) == 2000
    assert 150 < len(choosing) < 250
    with pytest.raises(ValueError, match="too few training prompts"):
        to_choose_by(groups(1))


def test_halves_and_that_tenth_are_drawn_apart():
    first, second = half_of(groups(2000), "first"), half_of(groups(2000), "second")
    assert not {g.prompt_ids for g in first} & {g.prompt_ids for g in second}
    assert 900 < len(first) < 1100
    assert len(first) + len(second) == 2000
    assert 60 < len(to_choose_by(first)[1]) < 140
    assert half_of(groups(7), "all") == groups(7)
    with pytest.raises(ValueError, match="No training prompt is in the"):
        half_of([], "first")
