"""A policy that is watched while it is trained: what is measured, that nothing changes by it, and how it ends a run."""

import warnings

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpsteer_rloo.alarms import read_watched
from helpsteer_rloo.checkpoints import step_of
from helpsteer_rloo.groups import Message, TokenGroup
from helpsteer_rloo.model.forward import group_log_probs
from helpsteer_rloo.rendering import Renderer
from helpsteer_rloo.run_dir import read_steps
from helpsteer_rloo.training.rloo import RLOOTrainer
from helpsteer_rloo.training.running import train_to_the_end
from helpsteer_rloo.training.watch import PolicyWatch, WatchRules
from tests.training.test_rloo import arguments, chat, length_reward

STEPS = 8


def scripted(values):
    """A guard whose mean score is the next of the values at every measurement."""
    coming = iter(values)

    def guard(prompt_ids, completion_ids):
        value = next(coming)
        return [value + 0.001 * place for place in range(len(completion_ids))]

    return guard


def watched_prompts(tokenizer, count=6):
    renderer = Renderer(tokenizer)
    messages = [(Message("user", f"Name {n} fish."),) for n in range(count)]
    return [TokenGroup(own, renderer.prompt_ids(own), ()) for own in messages]


def make(tiny_base, tokenizer, directory, guard=None, lora=False, action="rollback", every=2, rules=None, **changes):
    settings = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 100, "save_total_limit": 1, **changes}
    trainer = RLOOTrainer(
        model=str(tiny_base),
        reward_funcs=length_reward,
        args=arguments(directory, learning_rate=3e-2, **settings),
        train_dataset=chat([f"List {n} trees, separated by commas." for n in range(12)]),
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM") if lora else None,
    )
    watch = PolicyWatch(
        trainer, watched_prompts(tokenizer), guard, rules or WatchRules(every, action), directory / "watch"
    )
    trainer.add_callback(watch)
    return trainer, watch


def run(trainer, watch):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train_to_the_end(trainer, 5, lambda checkpoint: watch.begin(step_of(checkpoint) if checkpoint else 0))
        watch.finish()
    return [str(warning.message) for warning in told]


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora" in n or p.requires_grad}


def test_what_is_measured_is_the_policys_own(tiny_base, tokenizer, tmp_path):
    trainer, watch = make(tiny_base, tokenizer, tmp_path)
    run(trainer, watch)
    assert [seen.step for seen in watch.history] == [0, 2, 4, 6, 8]
    assert watch.history == read_watched(tmp_path / "watch")
    start, last = watch.history[0], watch.history[-1]
    assert start.kl == pytest.approx([0.0] * 6, abs=1e-4)
    rows = read_steps(tmp_path / "watch")[8]
    assert [row["prompt"] for row in rows] == [f"Name {n} fish." for n in range(6)]
    prompts = watched_prompts(tokenizer)
    groups = [
        TokenGroup((), p.prompt_ids, (tuple(tokenizer(row["text"], add_special_tokens=False).input_ids),))
        for p, row in zip(prompts, rows, strict=True)
    ]
    whole = [i for i, (g, n) in enumerate(zip(groups, last.length, strict=True)) if len(g.continuation_ids[0]) == n]
    assert whole  # those whose text gives their ids again
    base = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    for i in whole:
        own, start_values = (group_log_probs(m, [groups[i]], None)[0][0].sum().item() for m in (trainer.model, base))
        assert -last.surprise[i] == pytest.approx(own, abs=1e-3)
        assert last.kl[i] == pytest.approx(own - start_values, abs=1e-3)
    assert last.reward != start.reward


@pytest.mark.parametrize("lora", [False, True])
def test_watching_changes_nothing_of_training(tiny_base, tokenizer, tmp_path, lora):
    plain, _ = make(tiny_base, tokenizer, tmp_path / "plain", lora=lora, every=100)
    plain.pop_callback(PolicyWatch)
    plain.train()
    trainer, watch = make(tiny_base, tokenizer, tmp_path / "watched", lora=lora, every=1)
    run(trainer, watch)
    for name, weight in weights(plain).items():
        assert torch.equal(weight, weights(trainer)[name]), name
    timed = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")
    for one, other in zip(plain.state.log_history, trainer.state.log_history, strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_that_goes_wrong_goes_back_to_its_best_step(tiny_base, tokenizer, tmp_path, lora):
    trainer, watch = make(tiny_base, tokenizer, tmp_path, scripted([0.0, 5.0, 3.0, 1.0]), lora=lora)
    told = run(trainer, watch)
    assert trainer.state.global_step == 6
    assert any("the policy is exploiting the reward" in message for message in told)
    summary = watch.summary()
    assert (summary["best_step"], summary["rolled_back_to"]) == (2, 2)
    assert (summary["verdict"]["name"], summary["verdict"]["step"]) == ("overoptimization", 6)
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    kept = load_file(tmp_path / "checkpoint-2" / file)
    trainer.save_model(str(tmp_path / "end"))
    ended = load_file(tmp_path / "end" / file)
    assert kept.keys() == ended.keys()
    assert all(torch.equal(kept[name], ended[name]) for name in kept)
    assert not all(torch.equal(kept[n], load_file(tmp_path / "checkpoint-6" / file)[n]) for n in kept)


@pytest.mark.parametrize(("action", "step"), [("stop", 6), ("warn", STEPS)])
def test_other_actions_keep_the_last_weights(tiny_base, tokenizer, tmp_path, action, step):
    trainer, watch = make(tiny_base, tokenizer, tmp_path, scripted([0.0, 5.0, 3.0, 1.0, 0.5]), action=action)
    run(trainer, watch)
    assert trainer.state.global_step == step
    assert watch.summary()["rolled_back_to"] is None
    assert watch.summary()["verdict"]["name"] == "overoptimization"


def test_a_run_that_was_ended_stays_ended_when_it_is_started_again(tiny_base, tokenizer, tmp_path):
    trainer, watch = make(tiny_base, tokenizer, tmp_path, scripted([0.0, 5.0, 3.0, 1.0]))
    run(trainer, watch)
    expected = weights(trainer)
    again, watch = make(tiny_base, tokenizer, tmp_path, scripted([]))  # would fail if it measured anything
    run(again, watch)
    assert again.state.global_step == 6
    assert watch.summary()["rolled_back_to"] == 2
    for name, weight in weights(again).items():
        assert torch.equal(weight, expected[name]), name


def test_what_lies_behind_the_checkpoint_is_measured_again(tiny_base, tokenizer, tmp_path):
    """Killed between a measurement and its checkpoint, or later, a run ends as if it had not been."""
    whole, whole_watch = make(tiny_base, tokenizer, tmp_path / "whole", save_steps=3)
    run(whole, whole_watch)
    first, watch = make(tiny_base, tokenizer, tmp_path / "cut", save_steps=3, max_steps=STEPS)
    original, killed = watch._measure, RuntimeError("killed")

    def dies(state):
        original(state)
        if state.global_step == 4:
            raise killed

    watch._measure = dies
    with pytest.raises(RuntimeError, match="killed"):
        run(first, watch)
    assert [seen.step for seen in read_watched(tmp_path / "cut" / "watch")] == [0, 2, 4]
    again, watch = make(tiny_base, tokenizer, tmp_path / "cut", save_steps=3)
    run(again, watch)
    assert watch.history == whole_watch.history
    assert read_watched(tmp_path / "cut" / "watch") == read_watched(tmp_path / "whole" / "watch")
    for name, weight in weights(again).items():
        assert torch.equal(weight, weights(whole)[name]), name


def test_a_training_that_was_killed_before_its_final_save_takes_no_step_more(tiny_base, tokenizer, tmp_path):
    """Its last step is inside an epoch, where transformers goes on with one step more."""
    trainer, watch = make(tiny_base, tokenizer, tmp_path, save_steps=1)
    run(trainer, watch)
    again, again_watch = make(tiny_base, tokenizer, tmp_path, save_steps=1)
    run(again, again_watch)
    assert again.state.global_step == trainer.state.global_step == STEPS
    assert again_watch.history == watch.history
    for name, weight in weights(again).items():
        assert torch.equal(weight, weights(trainer)[name]), name


def test_a_best_checkpoint_that_is_gone_is_said(tiny_base, tokenizer, tmp_path):
    trainer, watch = make(tiny_base, tokenizer, tmp_path, scripted([0.0, 5.0, 3.0, 1.0]))
    run(trainer, watch)
    (tmp_path / "checkpoint-2" / "model.safetensors").unlink()
    again, watch = make(tiny_base, tokenizer, tmp_path, scripted([]))
    with pytest.raises(ValueError, match=r"checkpoint-2 cannot be used: model.safetensors is missing"):
        run(again, watch)


def test_passes_of_trls_own_cannot_be_watched(tiny_base, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="its passes are left to TRL"):
        make(tiny_base, tokenizer, tmp_path, engine="trl")


def test_the_best_checkpoint_is_kept(tiny_base, tokenizer, tmp_path):
    trainer, watch = make(tiny_base, tokenizer, tmp_path, scripted([0.0, 1.0, 5.0, 4.9995, 4.9993]), save_steps=1)
    run(trainer, watch)
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert "checkpoint-4" in kept
    assert trainer.state.best_global_step == 4


def test_a_guard_whose_score_is_no_number_ends_the_run(tiny_base, tokenizer, tmp_path):
    trainer, watch = make(tiny_base, tokenizer, tmp_path, guard=scripted([1.0, float("nan")]))
    with pytest.raises(ValueError, match="guard's scores at step 2 are not finite"):
        run(trainer, watch)


def test_it_is_said_where_no_step_is_within_the_limit_of_kl(tiny_base, tokenizer, tmp_path):
    rules = WatchRules(2, "rollback", max_kl=-100.0)  # which every step is over
    trainer, watch = make(tiny_base, tokenizer, tmp_path, scripted([0.0, 5.0, 6.0]), rules=rules)
    told = run(trainer, watch)
    assert watch.summary()["verdict"]["name"] == "kl"
    assert not any("Going back" in text for text in told)
    trainer, watch = make(tiny_base, tokenizer, tmp_path / "back", scripted([0.0, 6.0, 5.0]), rules=rules)
    told = run(trainer, watch)
    assert watch.rolled_back_to == 2
    assert any("no step after the start is within --max_kl -100" in text for text in told)
