"""The whole pipeline through its commands, on rows of the demo world and a tiny random model."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpsteer_rloo import cli, opening, pipeline
from helpsteer_rloo.data.demo import write_rows
from helpsteer_rloo.data.helpsteer3 import prompt_key
from helpsteer_rloo.groups import Message
from helpsteer_rloo.identity import model_identity, reward_model_identity
from helpsteer_rloo.report.collect import collect, find_run
from helpsteer_rloo.report.page import render
from helpsteer_rloo.run_dir import locked
from helpsteer_rloo.settings.checks import check_training
from helpsteer_rloo.settings.config import REWARD
from helpsteer_rloo.settings.parsing import parse_command
from helpsteer_rloo.steps import data_context, reward_stage
from helpsteer_rloo.training.ledger import read_rollouts

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "--validation_fraction=0.2",
    "--max_length=96",
    "--evaluation_prompts=8",
    "--reward_batch_size=32",
    "--reward_epochs=1",
    "--reward.gradient_accumulation_steps=1",
    "--reward.learning_rate=1e-3",
    "--reward.gradient_checkpointing=false",
    "--reward.save_steps=2",
    "--rloo_batch_size=8",
    "--rloo.gradient_accumulation_steps=1",
    "--rloo.learning_rate=1e-3",
    "--rloo.gradient_checkpointing=false",
    "--rloo.response_length=8",
    "--total_episodes=16",
    "--reward.disable_tqdm=true",
    "--rloo.disable_tqdm=true",
]


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(path, 0, 260)
    return path


@pytest.fixture(scope="module")
def command(rows_file, tiny_base):
    return [f"--dataset_name={rows_file}", f"--model_name_or_path={tiny_base}", *SMALL]


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["full", "lora"])
def finished(request, command, tmp_path_factory):
    """A finished run: its directory and the arguments it was started with."""
    directory = tmp_path_factory.mktemp("run")
    arguments = [*command, f"--output_dir={directory}", "--allow_weak_reward_model"]
    arguments += ["--use_peft"] if request.param else []
    cli.run_pipeline(arguments)
    return directory, arguments


def test_the_summary_holds_everything(finished):
    directory, arguments = finished
    summary = json.loads((directory / "summary.json").read_text())
    reward, policy = summary["reward_model"], summary["policy"]
    assert 0 <= reward["interval"][0] <= reward["heldout_accuracy"] <= reward["interval"][1] <= 1
    assert reward["heldout_pairs"] == summary["data"]["splits"]["validation"]["pairs"] > 20
    assert policy["prompts"] == 8
    assert policy["win_rate_interval"][0] <= policy["win_rate"] <= policy["win_rate_interval"][1]
    assert {"reward_before", "reward_after", "kl", "eos_before", "eos_after", "length_after"} <= set(policy)
    assert "gold_before" not in policy
    stages = ["data", "reward_model", "verification", "rloo", "evaluation"]
    assert list(summary["seconds"]) == stages
    started = json.loads((directory / "run.json").read_text())
    assert started["stages"] == started["passed"] == stages
    assert summary["provenance"] == started["provenance"]
    assert summary["provenance"]["trl"].startswith("1.16")
    adapter = "--use_peft" in arguments
    assert (directory / "reward_model" / "adapter_model.safetensors").exists() == adapter
    assert (directory / "policy" / "model.safetensors").exists() != adapter
    record = json.loads((directory / "reward_model" / "reward_model.json").read_text())
    assert record["reload"]["max_difference"] <= 1e-5
    assert len(record["sample_predictions"]) == 8
    assert f"n = {reward['heldout_pairs']}" in (directory / "reward_model" / "README.md").read_text()


def test_the_report_shows_what_was_found(finished):
    directory, _ = finished
    summary = json.loads((directory / "summary.json").read_text())
    run = collect(find_run(str(directory)), "now")
    assert (run.state, run.notes, len(run.stages)) == ("finished", (), 5)
    (model,) = run.reward_models
    assert model.judged.accuracy.value == summary["reward_model"]["heldout_accuracy"]
    assert len(model.pairs) == model.judged.accuracy.count == run.data.splits["validation"].pairs
    right = [pair.second.scores["score"] > pair.first.scores["score"] for pair in model.pairs]
    assert sum(right) / len(right) == pytest.approx(model.judged.accuracy.value)
    assert all(pair.second.text and pair.prompt and pair.domain for pair in model.pairs)
    lengths = run.data.splits["train"].lengths
    assert {lengths[part].total for part in ("prompt", "chosen", "rejected")} == {run.data.splits["train"].pairs}
    assert run.policy.steps == summary["rloo"]["steps"]
    assert (directory / "policy" / "metrics.jsonl").read_text() == ""  # fewer steps than --logging_steps
    assert run.policy.judged.changes["reward"].after == summary["policy"]["reward_after"]
    assert {sample.domain for sample in run.policy.answers} <= set(run.data.splits["validation"].domains)
    page = render([run]).replace("\xa0", " ").replace("<wbr>", "")
    assert f"(n = {summary['reward_model']['heldout_pairs']})" in page
    for setting in run.settings:
        page = page.replace(setting.value, "")
    assert str(directory.parent) not in page  # no path but the settings' own


def test_no_heldout_prompt_is_trained_on(finished, tokenizer):
    directory, _ = finished
    heldout = set((directory / "reward_model" / "heldout_prompts.txt").read_text().split())
    samples = [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]
    keys = {prompt_key(Message(**turn) for turn in sample["prompt"]) for sample in samples}
    assert len(samples) == 8
    assert keys <= heldout
    judged = {tuple(tokenizer.decode(prompt_of(sample, tokenizer))) for sample in samples}
    entries = read_rollouts(directory / "rollouts")
    assert len(entries) == 16
    assert not judged & {tuple(tokenizer.decode(entry.prompt_ids)) for entry in entries}


def prompt_of(sample, tokenizer):
    text = tokenizer.apply_chat_template(
        sample["prompt"], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return tokenizer(text, add_special_tokens=False).input_ids


def test_a_second_run_does_nothing_again_and_needs_no_torch(finished):
    directory, arguments = finished
    kept = [*(directory / "stages").iterdir(), directory / "run.json"]
    before = {path: path.stat().st_mtime_ns for path in kept}
    code = "import sys; from helpsteer_rloo.cli import run_pipeline; run_pipeline(); assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Stage" not in done.stdout
    assert "held-out accuracy" in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in kept}
    assert len(kept) == len(list((directory / "stages").iterdir())) + 1


def test_the_provenance_of_a_result_is_that_of_the_run_that_made_it(finished, monkeypatch):
    directory, arguments = finished
    kept = (directory / "summary.json").read_text()
    for module in (pipeline, opening):
        monkeypatch.setattr(module, "provenance", lambda: {"commit": "another"})
    cli.run_pipeline(arguments)
    assert (directory / "summary.json").read_text() == kept


def test_scoring_options_change_nothing_but_training_options_invalidate(finished, capsys):
    directory, arguments = finished
    cli.run_pipeline([*arguments, "--rloo.logging_steps=3", "--reward.save_total_limit=5"])
    assert "Stage" not in capsys.readouterr().out
    cli.run_pipeline([*arguments, "--rloo.kl_coef=0.3"])
    out = " ".join(capsys.readouterr().out.split())
    assert "kl_coef 0.05 -> 0.3. These stages run again: rloo, evaluation." in out
    assert "Stage reward_model" not in out
    assert (directory / "policy.previous" / "policy.json").exists()
    assert len(read_rollouts(directory / "rollouts.previous")) == len(read_rollouts(directory / "rollouts")) == 16


@pytest.mark.parametrize(
    ("flags", "environment", "same"),
    [
        (["--per_device_train_batch_size=8", "--gradient_accumulation_steps=2"], {}, True),
        (["--per_device_train_batch_size=2"], {"WORLD_SIZE": "2"}, True),
        (["--use_cpu", "--save_steps=7", "--eval_strategy=steps", "--eval_steps=7"], {}, True),
        (["--dataloader_num_workers=1"], {}, True),
        ([], {"WORLD_SIZE": "2"}, False),
        ([], {"ACCELERATE_MIXED_PRECISION": "bf16"}, False),
        (["--gradient_accumulation_steps=8"], {}, False),
        (["--dataloader_drop_last"], {}, False),
        (["--load_best_model_at_end", "--eval_strategy=steps", "--eval_steps=7", "--save_steps=7"], {}, False),
    ],
)
def test_what_decides_the_result_of_a_stage_is_in_its_key(rows_file, monkeypatch, flags, environment, same):
    def inputs(*flags):
        settings = parse_command(REWARD, [f"--dataset_name={rows_file}", *flags], checks=[check_training])
        return reward_stage(settings, data_context(settings)).inputs

    before = inputs()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (inputs(*flags) == before) is same


def test_the_best_checkpoints_settings_decide_where_it_is_the_result(rows_file):
    def inputs(*flags):
        best = ["--load_best_model_at_end", "--eval_strategy=steps"]
        settings = parse_command(REWARD, [f"--dataset_name={rows_file}", *best, *flags])
        return reward_stage(settings, data_context(settings)).inputs

    assert inputs("--eval_steps=7", "--save_steps=7") != inputs("--eval_steps=9", "--save_steps=9")


@pytest.mark.parametrize("busy", ["reward_model", "policy"])
def test_a_directory_that_another_run_works_in_is_refused(command, tmp_path, capsys, busy):
    """Runs of other names have the same directories by default."""
    with locked(tmp_path / f".{busy}.lock", tmp_path / busy), pytest.raises(SystemExit) as stopped:
        cli.run_pipeline([*command, f"--output_dir={tmp_path}"])
    assert stopped.value.code == 1
    assert f"is working on {tmp_path / busy}; wait" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("rest", ["--rloo_only", pytest.param("--reward_model_only=false", marks=pytest.mark.slow)])
def test_only_the_reward_model_then_the_rest(command, tmp_path, capsys, rest):
    model = tmp_path / "model"
    arguments = [
        *command,
        f"--output_dir={tmp_path / 'run'}",
        f"--reward_model_dir={model}",
        "--allow_weak_reward_model",
    ]
    cli.run_pipeline([*arguments, "--reward_model_only"])
    assert not (tmp_path / "run" / "policy").exists()
    out = capsys.readouterr().out
    assert "Stage verification" in out
    assert "Next: the same command with --reward_model_only false" in out
    cli.run_pipeline([*arguments, rest])
    out = capsys.readouterr().out
    assert "Stage rloo" in out
    assert "Stage reward_model" not in out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["policy"]["prompts"] == 8


def test_a_reward_model_no_better_than_chance_stops_the_run(tiny_base, rows_file, tmp_path, capsys):
    lines = [json.loads(line) for line in rows_file.read_text().splitlines()]
    for number, row in enumerate(lines):
        row["overall_preference"] = 2 if number % 2 else -2
    noise = tmp_path / "noise.jsonl"
    noise.write_text("".join(json.dumps(row) + "\n" for row in lines))
    arguments = [
        f"--dataset_name={noise}",
        f"--model_name_or_path={tiny_base}",
        *SMALL,
        f"--output_dir={tmp_path / 'run'}",
    ]
    with pytest.raises(SystemExit) as stopped:
        cli.run_pipeline(arguments)
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert "not significantly better than chance" in error
    assert "--allow_weak_reward_model goes on" in error
    assert not (tmp_path / "run" / "policy").exists()
    found = collect(find_run(str(tmp_path / "run")), "now")
    assert (found.state, found.next_stage) == ("unfinished", "rloo")


def test_an_interrupted_stage_goes_on_from_its_checkpoint(command, tmp_path, capsys, monkeypatch):
    import trl

    arguments = [*command, f"--output_dir={tmp_path}", "--reward_model_only", "--allow_weak_reward_model"]
    step = trl.RewardTrainer.training_step
    steps = []

    def dies_at_step_3(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(trl.RewardTrainer, "training_step", dies_at_step_3)
    with pytest.raises(SystemExit) as stopped:
        cli.run_pipeline(arguments)
    assert stopped.value.code == 130
    assert "Give the same command again" in capsys.readouterr().err
    cli.run_pipeline(arguments)
    assert "Stage reward_model goes on." in capsys.readouterr().out
    assert steps[:6] == [0, 1, 2, 3, 2, 3]  # the checkpoint of step 2 is where it goes on


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_later(command, tmp_path, capsys, monkeypatch, number):
    import trl

    arguments = [*command, f"--output_dir={tmp_path}", "--allow_weak_reward_model", "--rloo.num_mini_batches=2"]
    arguments += ["--rloo.gradient_accumulation_steps=1", "--total_episodes=64"]
    asked_at = {"RewardTrainer": 3, "RLOOTrainer": 4}
    steps = {name: [] for name in asked_at}
    for name in asked_at:
        trainer = getattr(trl, name)

        def asked(self, *args, step=trainer.training_step, name=name, **kwargs):
            steps[name].append(self.state.global_step)
            if len(steps[name]) == asked_at[name]:
                os.kill(os.getpid(), number)
            return step(self, *args, **kwargs)

        monkeypatch.setattr(trainer, "training_step", asked)
    before = signal.getsignal(number)
    for stage, step in (("reward_model", 3), ("policy", 4)):
        with pytest.raises(SystemExit) as stopped:
            cli.run_pipeline(arguments)
        assert stopped.value.code == 75
        written = capsys.readouterr()
        assert f"Stopped as asked, after step {step}" in written.err
        assert signal.Signals(number).name in written.out
        assert (tmp_path / stage / f"checkpoint-{step}").is_dir()
        assert signal.getsignal(number) is before
    cli.run_pipeline(arguments)
    assert steps["RewardTrainer"] == list(range(len(steps["RewardTrainer"])))  # nothing twice, nothing left out
    assert steps["RLOOTrainer"] == list(range(8))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(command, tmp_path, monkeypatch):
    import trl

    arguments = [*command, f"--output_dir={tmp_path}", "--reward_model_only", "--allow_weak_reward_model"]
    arguments += ["--reward.save_steps=1", "--reward.save_total_limit=2"]
    step = trl.RewardTrainer.training_step
    steps = []

    def dies_at_step_4(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(trl.RewardTrainer, "training_step", dies_at_step_4)
    with pytest.raises(SystemExit):
        cli.run_pipeline(arguments)
    checkpoints = sorted(path.name for path in (tmp_path / "reward_model").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-3", "checkpoint-4"]
    weights = next((tmp_path / "reward_model" / "checkpoint-4").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.warns(
        UserWarning, match=rf"checkpoint-4 cannot be used: {weights.name} is not what was saved. Going on"
    ):
        cli.run_pipeline(arguments)
    assert steps[4:7] == [4, 3, 4]


def test_the_scripts_run_one_after_the_other(command, tmp_path, capsys):
    data = [argument for argument in command if argument.startswith(("--dataset", "--model", "--valid", "--max_l"))]
    model, policy = tmp_path / "rm", tmp_path / "policy"
    common = ["--gradient_checkpointing=false", "--disable_tqdm=true", "--gradient_accumulation_steps=1", "--use_peft"]
    cli.train_reward_model(
        [*data, *common, f"--output_dir={model}", "--per_device_train_batch_size=32", "--num_train_epochs=1"]
    )
    rloo = [f"--reward_model_path={model}", f"--output_dir={policy}", "--total_episodes=16", "--response_length=8"]
    cli.train_policy([*data, *common, *rloo, "--per_device_train_batch_size=8"])
    record = json.loads((policy / "policy.json").read_text())
    assert record["training"]["episodes"] == 16
    assert record["judges"] == {"reward_model": str(model.resolve()), "guard_reward_model": None}
    assert record["judge_identities"] == {"reward_model": reward_model_identity(model), "guard_reward_model": None}
    assert record["base_identity"] == model_identity(record["base"]["name"])
    assert record["base_identity"].startswith("local:")
    assert len(read_rollouts(policy / "rollouts")) == 16
    assert (tmp_path / "rm.run" / "data.json").exists()
    for name, stages in (("rm", ["data", "reward_model", "verification"]), ("policy", ["data", "rloo"])):
        assert json.loads((tmp_path / f"{name}.run" / "run.json").read_text())["stages"] == stages
        assert collect(find_run(str(tmp_path / name)), "now").state == "finished"
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.train_policy([*data, *common, *rloo, "--per_device_train_batch_size=8", "--response_length=90"])
    assert "--response_length 90 leaves 6 tokens for the prompt" in capsys.readouterr().err
    estimators = ["--kl_estimator=k3", "--kl_in=loss", "--target_kl=2", "--importance_correction=token", "--top_k=20"]
    own = ["--reward_functions=tests.training.test_rloo:length_reward", "--reward_weights", "0.5", "2"]
    other = ["--per_device_train_batch_size=8", f"--output_dir={tmp_path / 'other'}", *estimators, *own]
    cli.train_policy([*data, *common, *rloo, *other])
    for entry in read_rollouts(tmp_path / "other" / "rollouts"):
        assert entry.scores["length_reward"] == pytest.approx(sum(entry.completion_ids) / 1000, rel=1e-5)
        weighted = 0.5 * entry.scores["reward_model"] + 2 * entry.scores["length_reward"]
        assert entry.score == pytest.approx(weighted, abs=1e-5)
        assert entry.kl_coef == 0  # it stands in the loss


def test_without_a_hub_the_default_run_says_what_is_missing_and_how_to_go_on(tmp_path):
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_pipeline.py"), "--force"],  # which no machine of tests would hold
        capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Could not fetch the data set 'nvidia/HelpSteer3'" in done.stderr
    assert "--dataset_name PATH" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reward_model_of_another_rendering_is_refused(finished, command, tmp_path, capsys):
    directory, _ = finished
    model = tmp_path / "model"
    subprocess.run(["cp", "-r", str(directory / "reward_model"), str(model)], check=True)
    record = json.loads((model / "reward_model.json").read_text())
    record["rendering"]["chat_template"] = "another"
    (model / "reward_model.json").write_text(json.dumps(record))
    data = [argument for argument in command if argument.startswith(("--dataset", "--model", "--valid", "--max_l"))]
    with pytest.raises(SystemExit):
        cli.train_policy(
            [*data, f"--reward_model_path={model}", f"--output_dir={tmp_path / 'p'}", "--response_length=8"]
        )
    assert "chat_template differ" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rloo.rloo_k=3"], "no multiple of --rloo.rloo_k 3"),
        (["--rloo.response_length=90"], "--rloo.response_length 90 leaves 6 tokens for the prompt"),
        (["--rloo.temperature=0"], "--rloo.temperature is 0.0; expected more than 0."),
        (["--reward_epochs=-1"], "--reward_epochs is -1.0; expected more than 0 and at most"),
        (["--reward_batch_size=0"], "--reward.per_device_train_batch_size is 0; expected at least 1."),
        (["--evaluation_batch_size=0"], "--evaluation_batch_size is 0; expected at least 1."),
        (["--seed=-1"], "--seed is -1; expected 0 or more."),
        (["--rloo.eval_strategy=steps"], "eval_strategy cannot be set here"),
        (["--reward.thinking=true"], "--reward.thinking cannot differ"),
        (["--policy_dir=models/qwen3_8b_reward_model"], "need directories apart"),
        (["--reward_model_dir=runs/x", "--policy_dir=p", "--output_dir=runs/x"], "must not lie in the directory"),
    ],
)
def test_mistakes_in_later_stages_are_found_before_the_first(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.run_pipeline([*SMALL, *flags])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_directory_of_the_users_is_never_touched(command, tmp_path, capsys):
    for name in ("checkpoint-500", "notes"):
        (tmp_path / "mine" / name).mkdir(parents=True)
    (tmp_path / "mine" / "precious.txt").write_text("years of work")
    for flag in ("--reward_model_dir", "--policy_dir"):
        with pytest.raises(SystemExit):
            cli.run_pipeline([*command, f"--output_dir={tmp_path / 'run'}", f"{flag}={tmp_path / 'mine'}"])
        assert "does not hold a result of this tool" in capsys.readouterr().err
    assert (tmp_path / "mine" / "precious.txt").read_text() == "years of work"
    assert not (tmp_path / "run" / "reward_model").exists()


@pytest.mark.slow
def test_a_model_that_another_run_replaced_is_not_taken_for_finished(command, tmp_path, capsys):
    model = tmp_path / "model"
    common = [*command, f"--reward_model_dir={model}", "--reward_model_only", "--allow_weak_reward_model"]
    first, second = ([*common, f"--output_dir={tmp_path / name}"] for name in ("a", "b"))
    cli.run_pipeline(first)
    weights = (model / "model.safetensors").read_bytes()
    cli.run_pipeline([*second, "--reward.learning_rate=5e-4"])
    assert (tmp_path / "model.previous" / "model.safetensors").read_bytes() == weights
    capsys.readouterr()
    cli.run_pipeline(first)
    assert "Stage reward_model." in capsys.readouterr().out
    assert (model / "model.safetensors").read_bytes() == weights  # the same settings give the same bits


@pytest.mark.slow
def test_lost_weights_are_noticed_and_another_spelling_of_a_path_is_not(command, tmp_path, capsys, monkeypatch):
    arguments = [*command, "--reward_model_only", "--allow_weak_reward_model"]
    cli.run_pipeline([*arguments, f"--output_dir={tmp_path / 'run'}"])
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    cli.run_pipeline([*arguments, "--output_dir=run"])
    assert "Stage" not in capsys.readouterr().out
    (tmp_path / "run" / "reward_model" / "model.safetensors").unlink()
    cli.run_pipeline([*arguments, "--output_dir=run"])
    assert "Stage reward_model." in capsys.readouterr().out


def test_prompts_that_cannot_be_judged_stop_the_run_before_rloo(command, tmp_path, capsys):
    arguments = [*command, f"--output_dir={tmp_path}", "--allow_weak_reward_model", "--rloo.response_length=80"]
    with pytest.raises(SystemExit):
        cli.run_pipeline(arguments)
    assert "No held-out prompt is left to judge the policy on" in capsys.readouterr().err
    assert not (tmp_path / "policy" / "policy.json").exists()
    assert not list(tmp_path.glob("policy/checkpoint-*"))


def test_a_reward_model_without_its_heldout_prompts_is_refused(finished, command, tmp_path, capsys):
    directory, _ = finished
    model = tmp_path / "model"
    subprocess.run(["cp", "-r", str(directory / "reward_model"), str(model)], check=True)
    (model / "heldout_prompts.txt").unlink()
    with pytest.raises(SystemExit):
        cli.run_pipeline([*command, f"--output_dir={tmp_path / 'run'}", "--rloo_only", f"--reward_model_dir={model}"])
    error = capsys.readouterr().err
    assert "--reward_model_dir" in error
    assert "heldout_prompts.txt is missing" in error
