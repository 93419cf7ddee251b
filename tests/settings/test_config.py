"""Flags and YAML: the seed's commands and defaults, precedence, messages for mistakes, and `--help` without torch."""

import dataclasses
import functools
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from helpsteer_rloo.commands.best_of import BEST_OF
from helpsteer_rloo.commands.chat import CHAT
from helpsteer_rloo.commands.demo import demo_settings, parse_demo
from helpsteer_rloo.commands.score import SCORE
from helpsteer_rloo.pipeline import OF_BOTH_TRAININGS, rloo_command
from helpsteer_rloo.settings.checks import check_packages, check_rloo
from helpsteer_rloo.settings.config import PIPELINE, REWARD, RLOO
from helpsteer_rloo.settings.flags import read_yaml, trl_flags, unknown_name
from helpsteer_rloo.settings.knobs import DEFAULT_REWARD_MODEL_DIR, DataKnobs, EngineKnobs, PipelineKnobs, RLOOKnobs
from helpsteer_rloo.settings.parsing import parse_command, parse_pipeline, pipeline_settings

ROOT = Path(__file__).resolve().parents[2]
TRAINER = ("TrainingArguments", "BaseConfig")

REWARD_COMMAND = """
python reward_model_training.py \\
    --output_dir models/qwen3_8b_reward_model \\
    --per_device_train_batch_size 4 \\
    --gradient_accumulation_steps 4 \\
    --learning_rate 1e-5 \\
    --num_train_epochs 3 \\
    --max_length 1024 \\
    --use_peft \\
    --lora_r 16 \\
    --lora_alpha 32
"""
RLOO_COMMAND = """
python rloo_helpsteer_training.py \\
    --output_dir models/rloo_helpsteer3 \\
    --per_device_train_batch_size 2 \\
    --gradient_accumulation_steps 8 \\
    --learning_rate 1e-6 \\
    --total_episodes 50000 \\
    --num_ppo_epochs 1 \\
    --num_mini_batches 1 \\
    --rloo_k 4 \\
    --local_rollout_forward_batch_size 2 \\
    --missing_eos_penalty 1.0 \\
    --reward_model_path models/qwen3_8b_reward_model
"""
PIPELINE_COMMAND = """
python train_pipeline.py \\
    --reward_batch_size 4 \\
    --reward_epochs 3 \\
    --rloo_batch_size 2 \\
    --total_episodes 50000 \\
    --use_peft
"""


def flags_of(command):
    """The flags of a command as it stands in a README."""
    return shlex.split(command.replace("\\\n", " "))[2:]


@pytest.fixture
def write(tmp_path):
    """Writes a configuration file and returns its path as text."""

    def write_file(text):
        path = tmp_path / "settings.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write_file


@pytest.fixture
def refused(capsys):
    """Runs a parser that must end the program with status 2, and returns the message."""

    def message_of(parse, *args):
        with pytest.raises(SystemExit) as ending:
            parse(*args)
        assert ending.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err

    return message_of


# ---- the seed's commands and defaults --------------------------------------------------------------------------------


def test_the_seeds_reward_command_gives_the_documented_settings():
    settings = parse_command(REWARD, flags_of(REWARD_COMMAND))
    assert settings.own.output_dir == "models/qwen3_8b_reward_model"
    assert settings.own.max_length == 1024
    assert settings.trl == {
        "model_name_or_path": "Qwen/Qwen3-8B",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "learning_rate": 1e-5,
        "num_train_epochs": 3.0,
        "use_peft": True,
        "lora_r": 16,
        "lora_alpha": 32,
        "save_steps": 100,
        "save_total_limit": 2,
    }


def test_reward_training_without_flags_has_the_seeds_defaults():
    spelled_out = parse_command(REWARD, [f for f in flags_of(REWARD_COMMAND) if f != "--use_peft"])
    assert parse_command(REWARD, []) == spelled_out


def test_the_seeds_rloo_command_gives_the_documented_settings():
    settings = parse_command(RLOO, flags_of(RLOO_COMMAND))
    own = dataclasses.asdict(settings.own)
    assert {name: own[name] for name in own if name not in dataclasses.asdict(EngineKnobs())} == {
        "output_dir": "models/rloo_helpsteer3",
        "reward_model_path": "models/qwen3_8b_reward_model",
        "total_episodes": 50_000,
        "rloo_k": 4,
        "num_ppo_epochs": 1,
        "num_mini_batches": 1,
        "local_rollout_forward_batch_size": 2,
        "missing_eos_penalty": 1.0,
        "length_penalty": 0.0,
        "kl_coef": 0.05,
        "kl_estimator": "k1",
        "kl_in": "reward",
        "target_kl": None,
        "importance_correction": "none",
        "importance_cap": 2.0,
        "reward_functions": None,
        "cliprange": 0.2,
        "response_length": 512,
        "rollouts_dir": None,
        "reward_ensemble": None,
        "score_of_ensemble": "mean",
        "guard_reward_model": None,
        "watch_steps": None,
        "watch_prompts": 128,
        "on_alarm": "rollback",
        "max_kl": None,
    }
    assert settings.trl["per_device_train_batch_size"] == 2
    assert settings.trl["gradient_accumulation_steps"] == 8
    assert settings.trl["learning_rate"] == 1e-6


def test_the_engine_is_chosen_for_both_stages_or_for_one():
    both = parse_pipeline(["--engine", "trl", "--packed_tokens", "512"])
    assert (both.reward.own.engine, both.rloo.own.engine) == ("trl", "trl")
    assert (both.reward.own.packed_tokens, both.rloo.own.packed_tokens) == (512, 512)
    one = parse_pipeline(["--rloo.engine", "trl"])
    assert (one.reward.own.engine, one.rloo.own.engine) == ("packed", "trl")
    demo = parse_demo(["--config", str(ROOT / "configs/demo.yaml"), "--engine", "trl"]).pipeline
    assert (demo.reward.own.engine, demo.rloo.own.engine) == ("trl", "trl")


@pytest.mark.parametrize(
    ("flag", "nearest"), [("--engin", "engine"), ("--sed=3", "seed"), ("--outputdir", "output_dir")]
)
def test_a_mistyped_flag_of_the_demo_is_refused_with_the_nearest(flag, nearest, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_demo([flag, "trl"])
    assert ended.value.code == 2
    assert f"did you mean '{nearest}'?" in capsys.readouterr().err


def test_rloo_without_flags_has_the_seeds_defaults():
    given_flags = flags_of(RLOO_COMMAND)
    chunk = given_flags.index("--local_rollout_forward_batch_size")
    assert parse_command(RLOO, []) == parse_command(RLOO, given_flags[:chunk] + given_flags[chunk + 2 :])


def test_the_seeds_pipeline_commands_give_the_documented_settings():
    settings = parse_pipeline(flags_of(PIPELINE_COMMAND))
    assert settings.reward.trl["per_device_train_batch_size"] == 4
    assert settings.reward.trl["num_train_epochs"] == 3.0
    assert settings.rloo.trl["per_device_train_batch_size"] == 2
    assert settings.rloo.own.total_episodes == 50_000
    assert settings.reward.trl["use_peft"] is True
    assert settings.rloo.trl["use_peft"] is True

    assert parse_pipeline(["--reward_model_only"]).own.reward_model_only is True
    existing = parse_pipeline(["--rloo_only", "--reward_model_dir", "models/qwen3_8b_reward_model"])
    assert existing.own.rloo_only is True
    assert existing.rloo.own.reward_model_path == "models/qwen3_8b_reward_model"


def test_the_pipelines_stages_default_to_what_the_single_commands_do():
    pipeline, reward, rloo = parse_pipeline([]), parse_command(REWARD, []), parse_command(RLOO, [])
    assert pipeline.reward.own == reward.own
    assert pipeline.rloo.own == dataclasses.replace(rloo.own, rollouts_dir="runs/helpsteer3/rollouts")
    shared = {"seed": 42, "use_peft": False}
    assert pipeline.reward.trl == reward.trl | shared
    assert pipeline.rloo.trl == rloo.trl | shared
    assert pipeline.run_dir == "runs/helpsteer3"


def test_one_output_directory_holds_everything_of_a_pipeline():
    settings = parse_pipeline(["--output_dir", "runs/x", "--name", "y"])
    assert settings.run_dir == "runs/x"
    assert settings.reward.own.output_dir == "runs/x/reward_model"
    assert settings.rloo.own.reward_model_path == "runs/x/reward_model"
    assert settings.rloo.own.output_dir == "runs/x/policy"
    assert settings.rloo.own.rollouts_dir == "runs/x/rollouts"


def test_given_directories_win_over_the_one_output_directory():
    settings = parse_pipeline(["--output_dir", "runs/x", "--reward_model_dir", "models/r", "--policy_dir", "models/p"])
    assert settings.reward.own.output_dir == settings.rloo.own.reward_model_path == "models/r"
    assert settings.rloo.own.output_dir == "models/p"


# ---- precedence ------------------------------------------------------------------------------------------------------


def test_the_command_line_wins_over_the_file_and_the_file_over_our_default(write):
    file = write("learning_rate: 2e-5\nmax_length: 512\nwarmup_steps: 7\n")
    ours, from_file = parse_command(REWARD, []), parse_command(REWARD, ["--config", file])
    final = parse_command(REWARD, ["--config", file, "--learning_rate", "3e-5", "--max_length", "256"])
    assert [s.trl["learning_rate"] for s in (ours, from_file, final)] == [1e-5, 2e-5, 3e-5]
    assert [s.own.max_length for s in (ours, from_file, final)] == [1024, 512, 256]
    assert [s.trl.get("warmup_steps") for s in (ours, from_file, final)] == [None, 7, 7]


def test_what_nobody_sets_is_left_to_trl():
    assert "weight_decay" not in parse_command(REWARD, []).trl
    assert parse_command(REWARD, ["--weight_decay", "0"]).trl["weight_decay"] == 0.0


LAYERS = [
    ("max_length: 96", {}, {}, 96),
    ("max_length: 96\nreward: {max_length: 128}", {}, {}, 128),
    ("max_length: 96\nreward: {max_length: 128}", {"max_length": 160}, {}, 160),
    ("max_length: 96\nreward: {max_length: 128}", {"max_length": 160}, {"max_length": 192}, 192),
    ("reward: {max_length: 128}", {}, {"max_length": 192}, 192),
    ("{}", {"max_length": 160}, {}, 160),
    # A main flag wins over the file's section also where it repeats the file's main part, or the default.
    ("max_length: 96\nreward: {max_length: 128}", {"max_length": 96}, {}, 96),
    ("reward: {max_length: 128}", {"max_length": 1024}, {}, 1024),
]


@pytest.mark.parametrize(("content", "main", "stage", "expected"), LAYERS)
def test_pipeline_precedence_is_file_then_section_then_main_flag_then_stage_flag(content, main, stage, expected):
    settings = pipeline_settings(yaml.safe_load(content), main, {"reward": stage})
    assert settings.reward.own.max_length == expected


def test_a_main_flag_wins_over_the_section_under_the_stages_own_name_for_it(write):
    file = write("rloo: {total_episodes: 100, per_device_train_batch_size: 6}\nreward: {num_train_epochs: 5}\n")
    from_file = parse_pipeline(["--config", file])
    assert from_file.rloo.own.total_episodes == 100
    assert from_file.rloo.trl["per_device_train_batch_size"] == 6
    assert from_file.reward.trl["num_train_epochs"] == 5.0
    final = parse_pipeline(
        ["--config", file, "--total_episodes", "200", "--rloo_batch_size", "12", "--reward_epochs", "1"]
    )
    assert final.rloo.own.total_episodes == 200
    assert final.rloo.trl["per_device_train_batch_size"] == 12
    assert final.reward.trl["num_train_epochs"] == 1.0


def test_a_flag_of_one_stage_leaves_the_other_alone():
    settings = parse_pipeline(["--reward.learning_rate", "3e-4", "--rloo.beta", "0.2", "--seed", "7", "--rloo.seed=9"])
    assert settings.reward.trl["learning_rate"] == 3e-4
    assert settings.rloo.trl["learning_rate"] == 1e-6
    assert settings.rloo.own.kl_coef == 0.2
    assert (settings.own.seed, settings.reward.trl["seed"], settings.rloo.trl["seed"]) == (7, 7, 9)


@pytest.mark.parametrize(
    ("flag", "instead"),
    [
        ("reward.output_dir", "--reward_model_dir"),
        ("rloo.output_dir", "--policy_dir"),
        ("rloo.rollouts_dir", "--output_dir"),
        ("rloo.reward_model_path", "--reward_model_dir"),
        ("rloo.max_length", "--max_length"),
        ("rloo.thinking", "--thinking"),
        ("rloo.dataset_name", "--dataset_name"),
    ],
)
def test_what_the_stages_share_is_set_for_all_of_them(flag, instead, write, refused):
    expected = f"--{flag} cannot be set: the stages share it; give {instead} instead."
    assert expected in refused(parse_pipeline, [f"--{flag}", "1"])
    section, name = flag.split(".")
    assert expected in refused(parse_pipeline, ["--config", write(f"{section}: {{{name}: 1}}\n")])


def test_stage_flags_take_all_the_values_that_follow_them():
    settings = parse_pipeline(["--rloo.lora_target_modules", "q_proj", "v_proj", "--name", "x", "--use_peft"])
    assert settings.rloo.trl["lora_target_modules"] == ["q_proj", "v_proj"]
    assert settings.own.name == "x"
    assert settings.own.use_peft is True


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_an_unknown_flag_ends_with_the_nearest_name(refused):
    message = refused(parse_command, REWARD, ["--lora_alfa", "8"])
    assert message.splitlines()[0] == "reward_model_training.py: unknown flag 'lora_alfa'; did you mean 'lora_alpha'?"
    assert message.splitlines()[1] == "See reward_model_training.py --help for all flags."


def test_an_unknown_flag_of_a_stage_ends_with_the_nearest_name(refused):
    assert "unknown flag 'lora_alfa'; did you mean 'lora_alpha'?" in refused(
        parse_pipeline, ["--reward.lora_alfa", "8"]
    )


def test_a_part_of_a_name_is_answered_with_the_whole_one(refused):
    told = refused(parse_pipeline, ["--forward_batch_size", "8"])
    assert "local_rollout_forward_batch_size belongs to a stage: give --rloo.local_rollout_forward_batch_size" in told


def test_a_stage_before_a_flag_of_a_command_without_stages_is_told(refused):
    told = refused(parse_command, RLOO, ["--rloo.packed_tokens", "8"])
    assert "unknown flag 'rloo.packed_tokens'; it is 'packed_tokens' here" in told


@pytest.mark.parametrize("other", ["reward_model_only", "rloo_only"])
def test_what_a_stage_needs_is_asked_for_where_that_is_run(other, refused, monkeypatch):
    stage = {"reward_model_only": "rloo", "rloo_only": "reward"}[other]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert parse_pipeline([f"--{other}", f"--{stage}.use_liger_kernel"]).own
    told = refused(parse_pipeline, [f"--{stage}.use_liger_kernel"])
    assert f"--{stage}.use_liger_kernel needs the package liger-kernel" in told


def test_an_unknown_key_names_the_file_and_the_nearest_key(write, refused):
    file = write("lerning_rate: 1e-5\n")
    message = refused(parse_command, RLOO, ["--config", file])
    assert f"{file}: unknown key 'lerning_rate'; did you mean 'learning_rate'?" in message


def test_an_unknown_key_in_a_section_names_file_and_section(write, refused):
    file = write("reward:\n  max_lenght: 12\n")
    message = refused(parse_pipeline, ["--config", file])
    assert f"{file}: reward: unknown key 'max_lenght'; did you mean 'max_length'?" in message


def test_a_configuration_file_inside_a_file_or_a_stage_is_not_answered_with_its_own_name(write, refused):
    assert "did you mean 'config'" not in refused(parse_command, REWARD, ["--config", write("config: other.yaml\n")])
    assert "did you mean 'config'" not in refused(parse_pipeline, ["--reward.config", "other.yaml"])


def test_a_name_like_no_other_is_answered_without_a_guess():
    assert unknown_name("zzzz", ["lora_r", "seed"], "key") == "unknown key 'zzzz'"


def test_a_training_flag_of_the_pipeline_says_how_to_give_it_to_a_stage(refused):
    assert "give --reward.learning_rate or --rloo.learning_rate" in refused(parse_pipeline, ["--learning_rate", "1"])
    assert "give --rloo.rloo_k" in refused(parse_pipeline, ["--rloo_k", "4"])


def test_a_stray_argument_is_refused(refused):
    assert "unexpected argument 'data.jsonl'" in refused(parse_command, REWARD, ["data.jsonl"])


@pytest.mark.parametrize(
    ("alias", "name", "value"),
    [
        ("num_generations", "rloo_k", 8),
        ("num_iterations", "num_ppo_epochs", 2),
        ("beta", "kl_coef", 0.5),
        ("epsilon", "cliprange", 0.3),
        ("max_completion_length", "response_length", 64),
    ],
)
def test_trls_name_of_a_setting_is_an_alias_and_giving_both_is_an_error(alias, name, value, write, refused):
    for argv in ([f"--{alias}", str(value)], ["--config", write(f"{alias}: {value}\n")]):
        settings = parse_command(RLOO, argv)
        assert getattr(settings.own, name) == value
        assert alias not in settings.trl
    both = f"{alias} and {name} are two names of one setting; give one of them."
    assert both in refused(parse_command, RLOO, [f"--{alias}", "2", f"--{name}", "2"])
    file = write(f"{alias}: 2\n{name}: 2\n")
    assert f"{file}: {both}" in refused(parse_command, RLOO, ["--config", file])


def test_an_alias_on_the_command_line_wins_over_the_other_name_in_the_file(write):
    assert parse_command(RLOO, ["--config", write("rloo_k: 8\n"), "--num_generations", "2"]).own.rloo_k == 2
    assert parse_command(RLOO, ["--config", write("num_generations: 8\n"), "--rloo_k", "2"]).own.rloo_k == 2


@pytest.mark.parametrize(("command", "name"), [(c, name) for c in (REWARD, RLOO) for name in c.refused])
def test_a_flag_that_cannot_be_set_says_what_decides_instead(command, name, write, refused):
    expected = f"{name} cannot be set here: {command.refused[name]}"
    assert expected in refused(parse_command, command, [f"--{name}", "1"])
    assert expected in refused(parse_command, command, ["--config", write(f"{name}: 1\n")])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max_length", "ten"], "--max_length: expected int, got 'ten'"),
        (["--max_length", "12.5"], "--max_length: expected int, got '12.5'"),
        (["--max_length", "inf"], "--max_length: expected int, got 'inf'"),
        (["--learning_rate", "fast"], "--learning_rate: expected float, got 'fast'"),
        (["--use_peft", "maybe"], "--use_peft: expected bool, got 'maybe'"),
        (["--save_total_limit", "few"], "--save_total_limit: expected int | None, got 'few'"),
        (["--model_init_kwargs", "{a: ["], "--model_init_kwargs: expected YAML or JSON"),
        (["--max_length"], "--max_length: expected one argument"),
    ],
)
def test_a_value_of_the_wrong_type_on_the_command_line_is_named(argv, message, refused):
    assert message in refused(parse_command, REWARD, argv)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("max_length: ten", "max_length: expected int, got 'ten'"),
        ("max_length: 12.5", "max_length: expected int, got '12.5'"),
        ("max_length: true", "max_length: expected int, got True"),
        ("max_length: [1, 2]", "max_length: expected int, got [1, 2]"),
        ("max_length: {a: 1}", "max_length: expected int, got"),
        ("max_length:", "max_length: expected int, got"),
        ("max_length: .inf", "max_length: expected int, got 'inf'"),
        ("language:", "language: expected str, got"),
        ("language: {a: 1}", "language: expected str, got"),
        ("skip_bad_rows:", "skip_bad_rows: expected bool, got"),
        ("learning_rate: null", "learning_rate: expected float, got"),
        ("use_peft: 2", "use_peft: expected bool, got '2'"),
        ("lora_target_modules: {a: 1}", "lora_target_modules: expected list[str] | None, got"),
    ],
)
def test_a_value_of_the_wrong_type_in_a_file_is_named_with_the_file(line, reason, write, refused):
    file = write(line + "\n")
    message = refused(parse_command, REWARD, ["--config", file])
    assert reason in message
    assert file in message


def test_a_wrong_type_in_a_section_names_file_and_section(write, refused):
    file = write("reward:\n  max_length: ten\n")
    assert f"{file}: reward: max_length: expected int, got 'ten'" in refused(parse_pipeline, ["--config", file])


def test_what_yaml_reads_as_a_boolean_is_no_text(write, refused):
    message = refused(parse_command, REWARD, ["--config", write("save_strategy: no\n")])
    assert "save_strategy: expected SaveStrategy | str, got" in message
    assert parse_command(REWARD, ["--config", write("save_strategy: 'no'\n")]).trl["save_strategy"] == "no"


@pytest.mark.parametrize(
    ("command", "argv", "message"),
    [
        *(
            (
                command,
                [f"--dataset_name={blank}"],
                f"--dataset_name is {blank!r}; expected a hub id, a directory "
                "('.' is the current one) or a .jsonl, .jsonl.gz or .parquet file.",
            )
            for command in (REWARD, RLOO)
            for blank in ("", " ")
        ),
        *(
            (
                REWARD,
                [f"--{name}={blank}"],
                f"--{name} is {blank!r}; expected names separated by commas, or 'all' to keep everything.",
            )
            for name in ("language", "domains")
            for blank in ("", " ", ",", " , ,")
        ),
        (REWARD, ["--html_entities", "some"], "--html_entities is 'some'; expected prompt, all, none."),
        (REWARD, ["--overlong", "keep"], "--overlong is 'keep'; expected cut or drop."),
        (REWARD, ["--validation_fraction", "0"], "--validation_fraction is 0.0; expected between 0 and 1."),
        (REWARD, ["--validation_fraction", "1"], "--validation_fraction is 1.0; expected between 0 and 1."),
        (REWARD, ["--validation_fraction", "nan"], "--validation_fraction is nan; expected between 0 and 1."),
        (REWARD, ["--max_length", "15"], "--max_length is 15; expected at least 16 tokens."),
        (RLOO, ["--rloo_k", "1"], "--rloo_k is 1; expected at least 2"),
        (RLOO, ["--total_episodes", "0"], "--total_episodes is 0; expected at least 1."),
        (RLOO, ["--num_ppo_epochs", "0"], "--num_ppo_epochs is 0; expected at least 1."),
        (RLOO, ["--num_mini_batches", "0"], "--num_mini_batches is 0; expected at least 1."),
        (RLOO, ["--kl_coef", "-1"], "--kl_coef is -1.0; expected 0 or more."),
        (RLOO, ["--cliprange", "0"], "--cliprange is 0.0; expected more than 0."),
        (RLOO, ["--missing_eos_penalty", "-1"], "--missing_eos_penalty is -1.0; expected 0 or more."),
        (RLOO, ["--length_penalty", "-0.1"], "--length_penalty is -0.1; expected 0 or more."),
        (RLOO, ["--response_length", "0"], "--response_length is 0; expected at least 1 token."),
        (RLOO, ["--kl_estimator", "k4"], "--kl_estimator is 'k4'; expected k1, k2 or k3."),
        (RLOO, ["--kl_in", "both"], "--kl_in is 'both'; expected reward or loss."),
        (
            RLOO,
            ["--kl_in", "loss"],
            "--kl_in is 'loss'; expected reward with k1, whose mean gradient in the loss is zero",
        ),
        (RLOO, ["--target_kl", "0"], "--target_kl is 0.0; expected more than 0 nats, and finite."),
        (RLOO, ["--target_kl", "5", "--kl_coef", "0"], "--target_kl is 5.0; expected --kl_coef above 0"),
        (RLOO, ["--importance_correction", "all"], "--importance_correction is 'all'; expected none, token or"),
        (RLOO, ["--importance_cap", "0"], "--importance_cap is 0.0; expected more than 0."),
        (
            RLOO,
            ["--engine", "trl", "--importance_correction", "token"],
            "--importance_correction is 'token'; expected none with --engine trl.",
        ),
        (
            RLOO,
            ["--engine", "trl", "--kl_in", "loss", "--kl_estimator", "k2"],
            "--kl_in is 'loss'; expected reward with --engine trl.",
        ),
    ],
)
def test_a_value_out_of_range_says_what_is_expected(command, argv, message, refused):
    assert message in refused(parse_command, command, argv)


def test_two_stages_that_exclude_each_other_are_refused(refused):
    message = refused(parse_pipeline, ["--reward_model_only", "--rloo_only"])
    assert "--reward_model_only and --rloo_only exclude each other" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "expected a mapping from flag names to values, got list."),
        ("a: [", "not valid YAML"),
        ("reward: [1]", "reward: expected a mapping from flag names to values."),
    ],
)
def test_a_file_that_is_no_mapping_is_refused_by_name(text, message, write, refused):
    file = write(text)
    assert f"{file}: {message}" in refused(parse_pipeline, ["--config", file])


def test_a_missing_configuration_file_is_refused_by_name(tmp_path, refused):
    file = str(tmp_path / "none.yaml")
    assert f"{file}: cannot read the configuration file" in refused(parse_command, REWARD, ["--config", file])


def test_an_empty_file_changes_nothing(write):
    assert parse_command(REWARD, ["--config", write("# nothing yet\n")]) == parse_command(REWARD, [])


def test_flags_may_be_written_with_dashes_and_equals_signs():
    settings = parse_command(REWARD, ["--learning-rate=2e-5", "--max-length", "99", "--output-dir=a-b"])
    assert settings.trl["learning_rate"] == 2e-5
    assert settings.own.max_length == 99
    assert settings.own.output_dir == "a-b"


# ---- TRL's flags -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sources"),
    [
        ("RewardConfig", (*TRAINER, "RewardConfig")),
        ("RLOOConfig", (*TRAINER, "RLOOConfig")),
        ("ModelConfig", ("ModelConfig",)),
    ],
)
def test_the_flags_read_from_source_are_exactly_the_fields_of_trls_classes(name, sources):
    import trl

    fields = {field.name for field in dataclasses.fields(getattr(trl, name)) if field.init}
    assert {flag.name for flag in trl_flags(*sources)} == fields


@pytest.mark.parametrize("command", [REWARD, RLOO])
def test_every_field_of_trls_classes_is_a_flag_or_refused_with_a_reason(command):
    import trl

    known = {flag.name for section in command.flags().values() for flag in section}
    for config in (getattr(trl, command.trl_classes[2]), trl.ModelConfig):
        for field in dataclasses.fields(config):
            assert field.name in known or field.name in command.refused, field.name


@pytest.mark.parametrize("command", [REWARD, RLOO])
def test_trls_own_defaults_are_values_that_a_file_may_give(command):
    import trl

    flags = {flag.name: flag for section in command.flags().values() for flag in section}
    own = {field.name for field in dataclasses.fields(command.knobs)}
    plain = [
        field
        for config in (getattr(trl, command.trl_classes[2]), trl.ModelConfig)
        for field in dataclasses.fields(config)
        if field.name in flags.keys() - own and isinstance(field.default, (bool, int, float, str, type(None)))
    ]
    assert len(plain) > 100
    same = {"include_num_input_tokens_seen": ["no", False]}  # TRL takes either for the other.
    for field in plain:
        taken = flags[field.name].from_yaml(field.default)
        assert taken in same.get(field.name, [field.default, [field.default]]), field.name


@pytest.mark.parametrize("command", [REWARD, RLOO])
def test_aliases_and_defaults_name_real_flags(command):
    known = {flag.name for section in command.flags().values() for flag in section}
    assert set(command.aliases) | set(command.aliases.values()) | set(command.trl_defaults) <= known
    assert not set(command.refused) & known


TRL_SAMPLE = [
    (REWARD, "--bf16 false", "bf16", False),
    (REWARD, "--gradient_checkpointing", "gradient_checkpointing", True),
    (REWARD, "--center_rewards_coefficient 0.01", "center_rewards_coefficient", 0.01),
    (REWARD, "--report_to none", "report_to", ["none"]),
    (REWARD, "--report_to wandb tensorboard", "report_to", ["wandb", "tensorboard"]),
    (REWARD, "--lr_scheduler_type cosine", "lr_scheduler_type", "cosine"),
    (REWARD, "--warmup_steps 0.1", "warmup_steps", 0.1),
    (REWARD, "--max_steps 1e3", "max_steps", 1000),
    (REWARD, "--save_total_limit none", "save_total_limit", None),
    (REWARD, "--load_in_4bit", "load_in_4bit", True),
    (REWARD, "--model_revision main", "model_revision", "main"),
    (REWARD, "--lora_target_modules q_proj v_proj", "lora_target_modules", ["q_proj", "v_proj"]),
    (REWARD, "--model_init_kwargs '{\"low_cpu_mem_usage\": true}'", "model_init_kwargs", {"low_cpu_mem_usage": True}),
    (REWARD, "--gradient_checkpointing_kwargs '{use_reentrant: false}'", "gradient_checkpointing_kwargs",
     {"use_reentrant": False}),
    (REWARD, "--optim adamw_torch", "optim", "adamw_torch"),
    (REWARD, "--eos_token '<|im_end|>'", "eos_token", "<|im_end|>"),
    (RLOO, "--temperature 0.7", "temperature", 0.7),
    (RLOO, "--top_k 50", "top_k", 50),
    (RLOO, "--use_vllm", "use_vllm", True),
    (RLOO, "--vllm_mode colocate", "vllm_mode", "colocate"),
    (RLOO, "--normalize_advantages true", "normalize_advantages", True),
    (RLOO, "--reward_weights 0.5 1", "reward_weights", [0.5, 1.0]),
    (RLOO, "--reward_clip_range -5 5", "reward_clip_range", [-5.0, 5.0]),
    (RLOO, "--dtype bfloat16", "dtype", "bfloat16"),
    (RLOO, "--attn_implementation sdpa", "attn_implementation", "sdpa"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "argv", "name", "value"), TRL_SAMPLE, ids=[name for _, _, name, _ in TRL_SAMPLE])
def test_trls_flags_are_taken_and_converted(command, argv, name, value):
    taken = parse_command(command, shlex.split(argv)).trl[name]
    assert taken == value
    assert type(taken) is type(value)
    if isinstance(value, list):
        assert [type(item) for item in taken] == [type(item) for item in value]


def test_a_list_in_a_file_has_its_items_checked(write, refused):
    assert parse_command(RLOO, ["--config", write("reward_weights: [0.5, 1]\n")]).trl["reward_weights"] == [0.5, 1.0]
    assert parse_command(RLOO, ["--config", write("reward_weights: 0.5\n")]).trl["reward_weights"] == [0.5]
    assert "reward_weights: expected list[float]" in refused(
        parse_command, RLOO, ["--config", write("reward_weights: [heavy]\n")]
    )


def test_no_tracker_in_a_file_is_no_tracker(write):
    for line in ("report_to: none", "report_to: [none]"):
        assert parse_command(REWARD, ["--config", write(line + "\n")]).trl["report_to"] in ("none", ["none"])


@pytest.mark.parametrize("name", ["RewardConfig", "RLOOConfig"])
def test_the_defaults_of_a_command_make_trls_configuration(name, tmp_path):
    import trl

    command = {"RewardConfig": REWARD, "RLOOConfig": RLOO}[name]
    config_class = getattr(trl, name)
    values = parse_command(command, []).trl
    fields = {field.name for field in dataclasses.fields(config_class)}
    of_model = {field.name for field in dataclasses.fields(trl.ModelConfig)}
    assert set(values) <= fields | of_model
    kept = {key: value for key, value in values.items() if key in fields}
    config = config_class(output_dir=str(tmp_path), bf16=False, use_cpu=True, **kept)
    assert config.learning_rate == values["learning_rate"]
    assert config.gradient_checkpointing is True


# ---- records ---------------------------------------------------------------------------------------------------------


def test_a_description_holds_every_setting_but_no_access_token():
    argv = ["--hub_token", "hf_secret", "--seed", "3", "--eos_token", "<|im_end|>", "--max_length", "99"]
    described = parse_command(REWARD, argv).describe()
    assert "hf_secret" not in repr(described)
    assert (described["seed"], described["max_length"], described["learning_rate"]) == (3, 99, 1e-5)
    assert described["eos_token"] == "<|im_end|>", "a token of the vocabulary is a setting, not a secret"


def test_an_access_token_inside_another_setting_is_not_described():
    described = parse_command(REWARD, ["--model_init_kwargs", "{token: hf_secret, low_cpu_mem_usage: true}"]).describe()
    assert "hf_secret" not in repr(described)
    assert described["model_init_kwargs"]["low_cpu_mem_usage"] is True


def test_a_description_can_be_written_as_json():
    for command in (REWARD, RLOO):
        described = parse_command(command, []).describe()
        assert json.loads(json.dumps(described)) == described


# ---- the length of a run ---------------------------------------------------------------------------------------------

STEPS = [
    # episodes, per device, accumulation, mini-batches, processes, epochs → batches of rollouts × epochs × mini-batches
    (50_000, 2, 8, 1, 1, 1, 3125),  # B = 16: 3125 × 1 × 1
    (50_000, 2, 8, 1, 4, 1, 782),  # B = 64: 781.25 → 782
    (50_000, 2, 8, 1, 1, 4, 12_500),  # B = 16: 3125 × 4
    (3200, 32, 2, 1, 1, 1, 50),  # B = 64
    (100, 2, 4, 2, 1, 1, 14),  # B = 16: 6.25 → 7, × 2
    (100, 2, 4, 2, 1, 3, 42),  # … × 3
    (1000, 4, 2, 4, 2, 2, 128),  # B = 64: 15.625 → 16, × 2 × 4
    (16, 2, 8, 1, 1, 1, 1),
    (17, 2, 8, 1, 1, 1, 2),
    (1, 2, 8, 1, 1, 1, 1),
    (1, 2, 8, 3, 1, 2, 6),
]


@pytest.mark.parametrize(("episodes", "device", "accumulation", "minis", "processes", "epochs", "steps"), STEPS)
def test_optimizer_steps(episodes, device, accumulation, minis, processes, epochs, steps):
    knobs = RLOOKnobs(total_episodes=episodes, num_ppo_epochs=epochs, num_mini_batches=minis)
    assert knobs.optimizer_steps(device, accumulation, processes) == steps


@given(st.integers(1, 10_000), *[st.integers(1, 8)] * 5)
def test_a_run_samples_all_episodes_and_less_than_one_batch_more(
    episodes, device, accumulation, minis, processes, epochs
):
    knobs = RLOOKnobs(total_episodes=episodes, num_ppo_epochs=epochs, num_mini_batches=minis)
    batches, rest = divmod(knobs.optimizer_steps(device, accumulation, processes), epochs * minis)
    batch = device * accumulation * minis * processes
    assert rest == 0
    assert episodes <= batches * batch < episodes + batch


# ---- files and help --------------------------------------------------------------------------------------------------

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def loaded(path):
    """A shipped file, read by the command that it is for."""
    content, errors = read_yaml(path), []
    if "demo" in content:
        return demo_settings(content, {}, source=str(path)).pipeline
    for resolve in (functools.partial(pipeline_settings, given={}), REWARD.resolve, RLOO.resolve):
        try:
            return resolve(content)
        except ValueError as error:
            errors.append(str(error))
    raise AssertionError(f"no command takes {path.name}: " + " | ".join(errors))


@pytest.mark.parametrize("path", CONFIGS, ids=[path.name for path in CONFIGS])
def test_every_shipped_configuration_loads(path):
    assert loaded(path).own.max_length >= 16


def test_the_demos_configuration_is_shipped():
    assert "demo.yaml" in [path.name for path in CONFIGS]


HELP = """
import json, runpy, sys
target, sys.argv = sys.argv[1], sys.argv[1:]
run = runpy.run_path if target.endswith(".py") else runpy.run_module
status = 0
try:
    run(target, run_name="__main__")
except SystemExit as ending:
    status = ending.code or 0
heavy = [name for name in ("torch", "transformers", "trl", "peft", "datasets", "accelerate") if name in sys.modules]
print(json.dumps({"status": status, "heavy": heavy}), file=sys.stderr)
"""
CLI = "helpsteer_rloo.cli"
HELPS = [
    ("reward_model_training.py --help", "--lora_alpha"),
    ("rloo_helpsteer_training.py --help", "--missing_eos_penalty"),
    ("train_pipeline.py --help", "--allow_weak_reward_model"),
    (f"{CLI} --help", "reward-model"),
    (f"{CLI} pipeline --help", "--reward_model_only"),
    (f"{CLI} reward-model --help", "--center_rewards_coefficient"),
    (f"{CLI} rloo --help", "--rloo_k"),
    (f"{CLI} demo --help", "--seed"),
    (f"{CLI} evaluate --help", "--benchmark_path"),
    (f"{CLI} data --help", "--skip_bad_rows"),
    (f"{CLI} plan --help", "--gpu_memory_gb"),
    (f"{CLI} score --help", "--output"),
    (f"{CLI} chat --help", "--guard_dir"),
    (f"{CLI} best-of --help", "--keep_all"),
    (f"{CLI} serve --help", "--queue_tokens"),
    (f"{CLI} export --help", "--push_to_hub"),
    (f"{CLI} report --help", "--output"),
]


@pytest.mark.parametrize(("command", "flag"), HELPS, ids=[command for command, _ in HELPS])
def test_help_exits_0_shows_the_flags_and_loads_nothing_heavy(command, flag):
    done = subprocess.run([sys.executable, "-c", HELP, *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert json.loads(done.stderr.splitlines()[-1]) == {"status": 0, "heavy": []}
    assert flag in done.stdout


def test_every_command_of_the_program_has_its_help_tested():
    from helpsteer_rloo.cli import COMMANDS

    tested = {command.split()[1] for command, _ in HELPS if command.startswith(CLI)} - {"--help"}
    assert tested == set(COMMANDS)


def test_the_help_shows_this_projects_defaults():
    shown = " ".join(subprocess.run(
        [sys.executable, "reward_model_training.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split())  # fmt: skip
    rate = shown.partition("--learning_rate float ")[2].partition(" --")[0]
    assert "(default: 1e-05)" in rate
    assert "--max_length int Longest prompt and response together, in tokens. (default: 1024)" in shown


def test_a_mistake_ends_a_script_with_status_2_and_no_traceback():
    done = subprocess.run(
        [sys.executable, "train_pipeline.py", "--lora_alfa", "1"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("train_pipeline.py: unknown flag 'lora_alfa'")
    assert "Traceback" not in done.stderr


def test_the_pipelines_own_flags_are_all_in_its_help():
    assert {flag.name for section in PIPELINE.flags().values() for flag in section} == {
        field.name for field in dataclasses.fields(PipelineKnobs)
    }


@pytest.mark.parametrize("value", ["0", "2", "-0.5"])
def test_top_p_outside_its_range_is_refused(value, refused):
    assert "expected more than 0 and at most 1" in refused(rloo_checked, [f"--top_p={value}"])


def test_vllm_that_is_not_installed_is_refused_before_any_work(refused, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install vllm" in refused(parse_command, RLOO, ["--use_vllm", "true"], [check_packages])


def rloo_checked(argv):
    return parse_command(RLOO, argv, checks=[check_rloo])


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--rloo.kl_coef=-1"], "--rloo.kl_coef is -1"),
        (["--rloo.rloo_k=3"], r"which is no multiple of --rloo.rloo_k 3"),
        (["--reward.lora_r=0"], "--reward.lora_r is 0"),
        (["--total_episodes=0"], "--total_episodes is 0"),
        (["--engine=other"], "--engine is 'other'"),
    ],
)
def test_the_pipeline_names_flags_of_its_stages_as_it_takes_them(refused, argv, named):
    assert named in refused(parse_pipeline, argv)


def test_the_command_suggested_after_reward_training_has_the_same_data_and_model(capsys):
    argv = ["--dataset_name=my prefs.jsonl", "--max_length=512", "--thinking", "--validation_fraction=0.2", "--seed=7"]
    argv += ["--domains=general", "--skip_bad_rows", "--model_name_or_path=my/model", "--use_peft", "--dtype=bfloat16"]
    reward = parse_command(REWARD, [*argv, "--output_dir=here", "--learning_rate=1"])
    rloo = parse_command(RLOO, shlex.split(rloo_command(reward))[2:])
    assert rloo.own.reward_model_path == "here"
    assert all(getattr(rloo.own, f.name) == getattr(reward.own, f.name) for f in dataclasses.fields(DataKnobs))
    assert rloo.trl == RLOO.resolve({name: reward.trl[name] for name in OF_BOTH_TRAININGS if name in reward.trl}).trl
    untouched = parse_command(REWARD, [])
    assert (
        rloo_command(untouched) == f"python rloo_helpsteer_training.py --reward_model_path {DEFAULT_REWARD_MODEL_DIR}"
    )


@pytest.mark.parametrize("command", [REWARD, RLOO, PIPELINE, CHAT, BEST_OF, SCORE])
def test_help_begins_with_one_line_of_usage_and_names_types_as_people_do(command, capsys):
    with pytest.raises(SystemExit):
        parse_command(command, ["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: {command.program} ")
    assert lines[0].endswith("[FLAGS]")
    assert lines[1] == ""
    named = [text for text in lines if text.startswith("  --")]
    assert len(named) >= 6
    assert not [text for text in named if "None" in text or "tuple[" in text or "list[" in text]


def test_what_is_needed_has_no_default_in_the_help(capsys):
    with pytest.raises(SystemExit):
        parse_command(BEST_OF, ["--help"])
    assert "Answers drawn for each prompt.\n" in capsys.readouterr().out
