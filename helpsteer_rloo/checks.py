"""Checks of settings against each other, made before any work: a mistake must not come out after hours of training."""

import importlib.util
from pathlib import Path
from typing import Any, cast

from helpsteer_rloo.config import PipelineSettings, RLOOKnobs, Settings
from helpsteer_rloo.processes import process_count
from helpsteer_rloo.reward_functions import check_reward_weights, load_reward_functions

MINIMUM_ROOM = 8
"""A prompt must leave at least 1 / MINIMUM_ROOM of the length limit for the response."""

_AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "lora_r")
_POSITIVE = ("num_train_epochs", "learning_rate", "temperature", "save_steps")


def check_training(settings: Settings[Any]) -> None:
    """Check the ranges of the flags of a training.

    Raises:
        ValueError: one is out of range, with what is expected.
    """
    for names, lowest, expected in ((_AT_LEAST_ONE, 1, "at least 1"), (("seed",), 0, "0 or more")):
        for name in names:
            value = settings.trl.get(name)
            if isinstance(value, (int, float)) and value < lowest:
                raise ValueError(f"--{name} is {value}; expected {expected}.")
    for name in _POSITIVE:
        value = settings.trl.get(name)
        if isinstance(value, (int, float)) and not value > 0:
            raise ValueError(f"--{name} is {value}; expected more than 0.")


def check_rloo(settings: Settings[RLOOKnobs]) -> None:
    """Check that batches of rollouts hold whole groups, besides `check_training`.

    Raises:
        ValueError: they do not, a flag is out of range, or a reward function cannot be found.
    """
    check_training(settings)
    top_p = settings.trl.get("top_p")
    if isinstance(top_p, (int, float)) and not 0 < top_p <= 1:
        raise ValueError(f"--top_p is {top_p}; expected more than 0 and at most 1.")
    if settings.trl.get("use_vllm") and importlib.util.find_spec("vllm") is None:
        raise ValueError("--use_vllm needs the package vllm, which is not installed here: pip install vllm.")
    own, trl, processes = settings.own, settings.trl, process_count()
    load_reward_functions(own.reward_functions)
    check_reward_weights(own.reward_functions, cast(Any, trl.get("reward_weights")))
    per_device, accumulation = int(trl["per_device_train_batch_size"]), int(trl["gradient_accumulation_steps"])
    completions = per_device * accumulation * own.num_mini_batches * processes
    if completions % own.rloo_k:
        raise ValueError(
            f"A batch of rollouts has {completions} completions ({per_device} per device x {accumulation} accumulation "
            f"x {own.num_mini_batches} mini-batches x {processes} processes), which is no multiple of --rloo_k "
            f"{own.rloo_k}: change one of them, so that every prompt gets all of its samples."
        )


def check_pipeline(settings: PipelineSettings) -> None:
    """Check the settings of a run: its stages', and that their directories and lengths fit together.

    Raises:
        ValueError: they do not.
    """
    own = settings.own
    check_training(settings.reward)
    check_rloo(settings.rloo)
    for name in ("evaluation_prompts", "evaluation_batch_size"):
        if getattr(own, name) < 1:
            raise ValueError(f"--{name} is {getattr(own, name)}; expected at least 1.")
    if not own.rloo_only and not own.reward_model_only:
        prompt_room(settings.reward.own.max_length, settings.rloo.own.response_length)
    if own.thinking != settings.reward.own.thinking:
        raise ValueError("--reward.thinking cannot differ from --thinking: both stages must render prompts alike.")
    reward, policy = (Path(stage.own.output_dir).resolve() for stage in (settings.reward, settings.rloo))
    run = Path(settings.run_dir).resolve()
    if reward == policy or reward in policy.parents or policy in reward.parents:
        raise ValueError(
            f"The reward model ({reward}) and the policy ({policy}) need directories apart from each other."
        )
    if run in (reward, policy) or reward in run.parents or policy in run.parents:
        raise ValueError(f"The record of the run ({run}) must not lie in the directory of the reward model or policy.")


def prompt_room(max_length: int, response_length: int) -> int:
    """Tokens that a reward model's limit leaves for a prompt beside the longest completion.

    Raises:
        ValueError: it leaves too few.
    """
    room = max_length - response_length
    if room < max_length // MINIMUM_ROOM:
        raise ValueError(
            f"--response_length {response_length} leaves {max(room, 0)} tokens for the prompt: the reward model reads "
            f"at most {max_length} in all. Lower --response_length, or train the reward model with more --max_length."
        )
    return room
