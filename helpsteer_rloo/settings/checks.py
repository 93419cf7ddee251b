"""Checks of settings against each other, made before any work: a mistake must not come out after hours of training."""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from helpsteer_rloo.processes import process_count
from helpsteer_rloo.records.reward_model import DTYPES
from helpsteer_rloo.reward_functions import check_reward_weights, load_reward_functions
from helpsteer_rloo.settings.config import PipelineSettings, Settings, ensemble, flags_named_of
from helpsteer_rloo.settings.flags import unknown_name
from helpsteer_rloo.settings.knobs import MOST, MOST_EPOCHS, RewardKnobs, RLOOKnobs

MINIMUM_ROOM = 8
"""A prompt must leave at least 1 / MINIMUM_ROOM of the length limit for the response."""

_AT_LEAST_ONE = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "lora_r", "lora_alpha",
    "save_total_limit",
)  # fmt: skip
_AT_LEAST_ZERO = ("seed", "weight_decay", "max_grad_norm", "top_k", "epsilon_high", "warmup_steps")
_BACKENDS = ("nccl", "gloo", "mpi", "ccl", "xccl", "hccl", "cncl", "mccl")
_LOG_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")
_TRACKERS = {
    name: name
    for name in (
        "tensorboard", "trackio", "wandb", "mlflow", "comet_ml", "clearml", "swanlab", "codecarbon", "neptune",
        "dvclive", "dagshub", "kubeflow",
    )
} | {"azure_ml": "azureml", "flyte": "flytekit"}  # fmt: skip
"""What `--report_to` takes, with the package that each of them needs."""
_LARGEST_SEED = 2**32 - 1
"""NumPy takes no larger one."""
_PACKAGES = {
    "load_in_4bit": "bitsandbytes",
    "load_in_8bit": "bitsandbytes",
    "use_liger_kernel": "liger-kernel",
    "use_vllm": "vllm",
}
"""Flags that need a package which the project does not."""
_POSITIVE = ("num_train_epochs", "learning_rate", "temperature", "save_steps", "eval_steps", "logging_steps")


def check_training(settings: Settings[Any]) -> None:
    """Check the ranges of the flags of a training.

    Raises:
        ValueError: one is out of range, with what is expected.
    """
    for names, lowest, expected in ((_AT_LEAST_ONE, 1, "at least 1"), (_AT_LEAST_ZERO, 0, "0 or more")):
        for name in names:
            value = settings.trl.get(name)
            if isinstance(value, (int, float)) and not value >= lowest:
                raise ValueError(f"--{name} is {value}; expected {expected}.")
    for name in _POSITIVE:
        value = settings.trl.get(name)
        if isinstance(value, (int, float)) and not 0 < value < math.inf:
            raise ValueError(f"--{name} is {value}; expected more than 0{'' if value <= 0 else ', and finite'}.")
    _check_bounds(settings.trl)
    for name, value in settings.trl.items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise ValueError(f"--{name} is {value}; expected a finite number.")
    _check_choices(settings.trl)
    _check_quantization(settings.trl)


_NO_COUNTS = ("seed", "data_seed")


def _check_bounds(trl: Mapping[str, Any]) -> None:
    """Refuse numbers that are beyond any run, and that arithmetic with them would be, too."""
    for name, value in trl.items():
        if isinstance(value, int) and name not in _NO_COUNTS and value > MOST:
            raise ValueError(f"--{name} is {value}; expected at most {MOST:,}.")
    if trl.get("num_train_epochs", 1) > MOST_EPOCHS:
        raise ValueError(f"--num_train_epochs is {trl['num_train_epochs']}; expected at most {MOST_EPOCHS:,}.")


def _check_choices(trl: Mapping[str, Any]) -> None:
    """Check values that TRL and transformers take without looking, to fail by them later."""
    if trl.get("seed", 0) > _LARGEST_SEED:
        raise ValueError(f"--seed is {trl['seed']}; expected at most {_LARGEST_SEED}.")
    dtype, level = trl.get("dtype"), trl.get("log_level")
    if dtype is not None and str(dtype).removeprefix("torch.") not in ("auto", *DTYPES):
        raise ValueError(f"--dtype is {dtype!r}; expected float32, bfloat16 or float16.")
    if level is not None and level not in _LOG_LEVELS:
        raise ValueError(f"--log_level is {level!r}; expected one of {', '.join(_LOG_LEVELS)}.")
    if trl.get("ddp_backend") not in (None, *_BACKENDS):
        raise ValueError(f"--ddp_backend is {trl['ddp_backend']!r}; expected one of {', '.join(_BACKENDS)}.")
    if any("=" not in part for part in str(trl.get("optim_args") or "=").split(",")):
        raise ValueError(f"--optim_args is {trl['optim_args']!r}; expected name=value, with commas between several.")
    _check_trackers(trl.get("report_to"))
    if trl.get("bf16") and trl.get("fp16"):
        raise ValueError("--bf16 and --fp16 exclude each other; give one of them or neither.")


def _check_quantization(trl: Mapping[str, Any]) -> None:
    given = [flag for flag in ("load_in_4bit", "load_in_8bit") if trl.get(flag)]
    if len(given) > 1:
        raise ValueError("--load_in_4bit and --load_in_8bit exclude each other; give one of them or neither.")
    if given and not trl.get("use_peft"):
        raise ValueError(f"--{given[0]}: a base in 4 or 8 bits is trained by LoRA alone: give --use_peft with it.")


def check_packages(settings: Settings[Any]) -> None:
    """Check that the packages are there which the flags of a training need; a plan for another machine needs none.

    Raises:
        ValueError: one is not, with how to install it.
    """
    trl = settings.trl
    for flag, package in _PACKAGES.items():
        if trl.get(flag):
            _require(f"--{flag}", package)
    flash = "flash_attention_2"  # which transformers takes from the hub where there are kernels
    if trl.get("attn_implementation") == flash and importlib.util.find_spec("kernels") is None:
        _require(f"--attn_implementation {flash} (packed rows have no use for it)", "flash-attn")
    for tracker in _trackers(trl.get("report_to")):
        _require(f"--report_to {tracker}", _TRACKERS[tracker])


def check_packages_of_pipeline(settings: PipelineSettings) -> None:
    """`check_packages` of the stages that are run.

    Raises:
        ValueError: as `check_packages`.
    """
    if not settings.own.rloo_only:
        with flags_named_of("reward"):
            check_packages(settings.reward)
    if not settings.own.reward_model_only:
        with flags_named_of("rloo"):
            check_packages(settings.rloo)


def _require(flag: str, package: str) -> None:
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        raise ValueError(f"{flag} needs the package {package}, which is not installed here: pip install {package}.")


def _check_trackers(report_to: Any) -> None:
    for tracker in _trackers(report_to):
        if tracker not in _TRACKERS:
            raise ValueError(f"--report_to: {unknown_name(tracker, [*_TRACKERS, 'none', 'all'], 'tracker')}")


def _trackers(report_to: Any) -> list[str]:
    given = [report_to] if isinstance(report_to, str) else report_to or ()
    return [tracker for tracker in given if tracker not in ("none", "all")]


def check_rloo(settings: Settings[RLOOKnobs]) -> None:
    """Check that batches of rollouts hold whole groups, besides `check_training`.

    Raises:
        ValueError: they do not, a flag is out of range, or a reward function cannot be found.
    """
    check_training(settings)
    top_p = settings.trl.get("top_p")
    if isinstance(top_p, (int, float)) and not 0 < top_p <= 1:
        raise ValueError(f"--top_p is {top_p}; expected more than 0 and at most 1.")
    _check_clip_range(settings.trl.get("reward_clip_range"))
    _check_watch(settings)
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


def _check_watch(settings: Settings[RLOOKnobs]) -> None:
    """Check that what is watched can be, and that no setting of the watch or of an ensemble is without effect."""
    own, processes = settings.own, process_count()
    if not own.watched and (own.on_alarm != "rollback" or own.watch_prompts != RLOOKnobs().watch_prompts):
        flag = "--on_alarm" if own.on_alarm != "rollback" else "--watch_prompts"
        raise ValueError(f"{flag} has no effect without --guard_reward_model, --watch_steps or --max_kl.")
    if own.score_of_ensemble != "mean" and not own.ensemble_members:
        raise ValueError("--score_of_ensemble has no effect without --reward_ensemble.")
    if not own.watched:
        return
    if own.watch_prompts < 2 * processes:
        raise ValueError(f"--watch_prompts is {own.watch_prompts}; expected at least {2 * processes}, two a process.")
    if own.engine == "trl":
        raise ValueError("--engine trl leaves passes to TRL, which cannot watch the policy with --guard or --max_kl.")
    if own.kl_coef == 0 and not settings.trl.get("use_peft"):
        raise ValueError(
            "--kl_coef 0 without --use_peft leaves no reference to measure KL from, which watching the policy needs: "
            "give a small --kl_coef."
        )


def check_reward(settings: Settings[RewardKnobs]) -> None:
    """Check the flags of reward training, and of each reward model of an ensemble, besides `check_training`.

    Raises:
        ValueError: one is out of range, or two do not go together.
    """
    for member in ensemble(settings):
        check_training(member)
    require_apart([member.own.output_dir for member in ensemble(settings)])
    trl = settings.trl
    if settings.own.early_stopping_patience is None:
        return
    if trl.get("load_best_model_at_end") is False:
        raise ValueError("--early_stopping_patience ends with the best checkpoint: leave out --load_best_model_at_end.")
    if trl.get("save_strategy", "steps") != "steps":
        raise ValueError("--early_stopping_patience goes back to a checkpoint: leave out --save_strategy.")
    if trl.get("eval_strategy", "steps") != "steps" or trl.get("eval_steps", trl["save_steps"]) != trl["save_steps"]:
        raise ValueError(
            "--early_stopping_patience looks at the loss where a checkpoint is saved: --eval_strategy steps, and "
            f"--eval_steps as --save_steps ({trl['save_steps']})."
        )


def require_apart(directories: Sequence[str]) -> None:
    """Check that no directory is another one, or lies in another one.

    Raises:
        ValueError: two are not apart.
    """
    paths = [Path(directory).resolve() for directory in directories]
    for place, path in enumerate(paths):
        for other in paths[place + 1 :]:
            if path == other or path in other.parents or other in path.parents:
                raise ValueError(
                    f"{path} and {other} are of different parts, which need directories apart from each other."
                )


def _check_clip_range(given: Any) -> None:
    if given is not None and not (len(given) == 2 and given[0] < given[1]):
        shown = " ".join(map(str, given))
        raise ValueError(f"--reward_clip_range is {shown}; expected two numbers, the lower first.")


def check_pipeline(settings: PipelineSettings) -> None:
    """Check the settings of a run: its stages', and that their directories and lengths fit together.

    Raises:
        ValueError: they do not.
    """
    own = settings.own
    with flags_named_of("reward"):
        check_reward(settings.reward)
        if settings.guard:
            check_training(settings.guard)
    with flags_named_of("rloo"):
        check_rloo(settings.rloo)
    for name in ("evaluation_prompts", "evaluation_batch_size"):
        if getattr(own, name) < 1:
            raise ValueError(f"--{name} is {getattr(own, name)}; expected at least 1.")
    if not own.rloo_only and not own.reward_model_only:
        with flags_named_of("rloo"):
            prompt_room(settings.reward.own.max_length, settings.rloo.own.response_length)
    if own.thinking != settings.reward.own.thinking:
        raise ValueError("--reward.thinking cannot differ from --thinking: both stages must render prompts alike.")
    _check_directories(settings)


def _check_directories(settings: PipelineSettings) -> None:
    """Check that what a run makes lies apart, its record beside or around it."""
    if settings.own.guard_dir is not None and not settings.own.guard:
        raise ValueError("--guard_dir has no effect without --guard.")
    made = [settings.rloo.own.output_dir, *(member.own.output_dir for member in ensemble(settings.reward))]
    made += [settings.guard.own.output_dir] if settings.guard else []
    require_apart(made)
    run = Path(settings.run_dir).resolve()
    for path in (Path(directory).resolve() for directory in made):
        if run == path or path in run.parents:
            raise ValueError(
                f"The record of the run ({run}) must not lie in the directory of a reward model or the policy ({path})."
            )


def leaves_room(max_length: int, response_length: int) -> bool:
    """Whether a limit of a prompt and a completion together leaves enough for the prompt.

    >>> leaves_room(1024, 896), leaves_room(1024, 897)
    (True, False)
    """
    return max_length - response_length >= max_length // MINIMUM_ROOM


def prompt_room(max_length: int, response_length: int, flag: str = "--response_length") -> int:
    """Tokens that a reward model's limit leaves for a prompt beside the longest completion, which a flag says.

    Raises:
        ValueError: it leaves too few.
    """
    room = max_length - response_length
    if not leaves_room(max_length, response_length):
        raise ValueError(
            f"{flag} {response_length} leaves {max(room, 0)} tokens for the prompt: the reward model reads "
            f"at most {max_length} in all. Lower {flag}, or train the reward model with more --max_length."
        )
    return room
