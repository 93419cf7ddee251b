"""Every knob of the three commands that is our own: dataclasses, defaults, and the checks of their values."""

import math
from dataclasses import dataclass, field, fields
from pathlib import PurePath
from typing import Any

DEFAULT_MODEL = "Qwen/Qwen3-8B"
DEFAULT_REWARD_MODEL_DIR = "models/qwen3_8b_reward_model"
DEFAULT_POLICY_DIR = "models/rloo_helpsteer3"
LOSSES = ("bt", "margin", "scaled")
ACTIONS = ("rollback", "stop", "warn")
PROGRESS = ("auto", "rich", "plain", "json", "quiet")
SHARDINGS = ("ddp", "fsdp", "zero2", "zero3")
MOST = 10**9
"""Of tokens, completions, steps, prompts or anything else that is counted: more is a slip of the keyboard."""
MOST_EPOCHS = 10**6
MOST_MODELS = 100
"""In an ensemble, each of which is a stage of its own."""
_RIG = {"gpu_memory_gb": (0.01, 10**6), "tflops": (0.001, 10**6), "bandwidth_gbs": (0.001, 10**6), "gpus": (1, 10**5)}
"""Of a machine: the least and the most that is taken for true."""


def _knob(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class DataKnobs:
    """Which preferences are read, which of them are kept, and how they become token ids."""

    dataset_name: str = _knob("nvidia/HelpSteer3", "Hub id, directory, .jsonl, .jsonl.gz or .parquet file.")
    dataset_subset: str = _knob("preference", "Subset (folder) of the data set.")
    dataset_revision: str | None = _knob(None, "Branch, tag or commit of a data set on the hub.")
    language: str = _knob("english", "Languages to keep, separated by commas, or 'all'.")
    domains: str = _knob("all", "Domains to keep, separated by commas, or 'all'.")
    skip_bad_rows: bool = _knob(False, "Count and skip rows that cannot be read, instead of stopping at the first.")
    html_entities: str = _knob("prompt", "Where to decode HTML entities such as &lt;: 'prompt', 'all' or 'none'.")
    validation_fraction: float = _knob(
        0.1, "Share of prompts held out, by a hash of the prompt, if the data set has no validation split of its own."
    )
    max_length: int = _knob(1024, "Longest prompt and response together, in tokens.")
    overlong: str = _knob(
        "cut", "Pairs over max_length: 'cut' the oldest turns (then the response) or 'drop' the pair."
    )
    thinking: bool = _knob(False, "Render prompts in Qwen3's thinking mode.")

    def __post_init__(self) -> None:
        """Check values that no type can check."""
        _require_countable(self)
        _require(
            self.dataset_name.strip() != "",
            "dataset_name",
            self.dataset_name,
            "a hub id, a directory ('.' is the current one) or a .jsonl, .jsonl.gz or .parquet file",
        )
        _require(
            _stays_inside(self.dataset_subset), "dataset_subset", self.dataset_subset, "a folder inside the data set"
        )
        for name in ("language", "domains"):
            value = getattr(self, name)
            named = value.replace(",", " ").strip() != ""
            _require(named, name, value, "names separated by commas, or 'all' to keep everything")
        _require(
            self.html_entities in ("prompt", "all", "none"), "html_entities", self.html_entities, "prompt, all, none"
        )
        _require(self.overlong in ("cut", "drop"), "overlong", self.overlong, "cut or drop")
        _require(0 < self.validation_fraction < 1, "validation_fraction", self.validation_fraction, "between 0 and 1")
        _require(self.max_length >= 16, "max_length", self.max_length, "at least 16 tokens")


@dataclass(frozen=True, kw_only=True)
class EngineKnobs(DataKnobs):
    """How passes are computed, the same loss of the same batch to float error, and what is shown of a run.

    Batches of reward training differ: packed ones hold whole prompts, TRL's scattered pairs.
    """

    engine: str = _knob(
        "packed",
        "'packed': rows with next to no padding, each prompt computed once; 'trl': TRL's own passes, for comparison.",
    )
    packed_tokens: int | None = _knob(
        None,
        "Most tokens in one packed row (default: 4096, on a CPU 1024); a larger pair or group of completions "
        "stands alone. Less saves memory, more may save time.",
    )
    max_bad_steps: int = _knob(
        5, "Optimizer steps in a row that may be skipped because their gradient is not finite; more end the run."
    )
    progress: str = _knob(
        "auto",
        "What is shown while a run goes on: 'rich', a live block in the terminal; 'plain' lines; 'json', an event a "
        "line on standard output; 'quiet', warnings and results alone; 'auto' is rich in a terminal, plain elsewhere.",
    )
    progress_seconds: float | None = _knob(
        None, "Least seconds between two plain lines, or two json events, about a task's steps (default: 10, json 1)."
    )
    force: bool = _knob(False, "Start even if the plan says that the run cannot fit into memory (helpsteer-rloo plan).")

    def __post_init__(self) -> None:
        """Check values that no type can check."""
        super().__post_init__()
        _require(self.engine in ("packed", "trl"), "engine", self.engine, "packed or trl")
        _require(
            self.packed_tokens is None or self.packed_tokens >= 1,
            "packed_tokens",
            self.packed_tokens,
            "at least 1 token",
        )
        _require(self.max_bad_steps >= 0, "max_bad_steps", self.max_bad_steps, "0 or more")
        _require(self.progress in PROGRESS, "progress", self.progress, ", ".join(PROGRESS))
        seconds = self.progress_seconds
        _require(seconds is None or 0 <= seconds < math.inf, "progress_seconds", seconds, "0 or more, and finite")


@dataclass(frozen=True, kw_only=True)
class RewardKnobs(EngineKnobs):
    """Reward-model training."""

    output_dir: str = _knob(DEFAULT_REWARD_MODEL_DIR, "Directory of the trained reward model.")
    sample_predictions: int = _knob(8, "Held-out pairs to print with their scores after training.")
    loss: str = _knob(
        "bt",
        "'bt': Bradley-Terry; 'margin': the chosen response ought to score higher by the strength of the preference, "
        "1 to 3; 'scaled': Bradley-Terry, every pair counted by that strength.",
    )
    label_smoothing: float = _knob(0.0, "Probability that a label is wrong, below 0.5.")
    weight_by_agreement: bool = _knob(False, "Count every pair by the share of annotators who agree with its label.")
    early_stopping_patience: int | None = _knob(
        None,
        "Stop when the loss on a tenth of the training prompts, kept out of training for that, has not fallen in so "
        "many evaluations (every eval_steps, default save_steps); the best checkpoint is the result.",
    )
    ensemble: int = _knob(
        1, "Reward models to train, with seeds one after the other; those after the first go to OUTPUT_DIR_2, _3, …"
    )
    half: str = _knob(
        "all", "Training prompts to use, by a hash of the prompt: 'first' or 'second' half, or 'all'; for a guard."
    )

    def __post_init__(self) -> None:
        """Check values that no type can check."""
        super().__post_init__()
        _require(self.loss in LOSSES, "loss", self.loss, ", ".join(LOSSES))
        patience = self.early_stopping_patience
        _require(patience is None or patience >= 1, "early_stopping_patience", patience, "at least 1")
        _require(self.ensemble >= 1, "ensemble", self.ensemble, "at least 1")
        _require(self.ensemble <= MOST_MODELS, "ensemble", self.ensemble, f"at most {MOST_MODELS}")
        _require(self.half in ("all", "first", "second"), "half", self.half, "all, first or second")
        _require(0 <= self.label_smoothing < 0.5, "label_smoothing", self.label_smoothing, "from 0 to below 0.5")
        if self.engine == "trl":
            _require(self.loss != "scaled", "loss", self.loss, "bt or margin with --engine trl")
            for name in ("label_smoothing", "weight_by_agreement"):
                _require(not getattr(self, name), name, getattr(self, name), "none with --engine trl")
        _require_directory("output_dir", self.output_dir)
        _require(self.sample_predictions >= 0, "sample_predictions", self.sample_predictions, "0 or more")


@dataclass(frozen=True, kw_only=True)
class RLOOKnobs(EngineKnobs):
    """RLOO training of the policy; the names are those of the published RLOO scripts."""

    output_dir: str = _knob(DEFAULT_POLICY_DIR, "Directory of the trained policy.")
    reward_model_path: str = _knob(DEFAULT_REWARD_MODEL_DIR, "Directory of the trained reward model.")
    reward_functions: str | None = _knob(
        None,
        "Functions that give rewards besides the reward model: package.module:function, separated by commas; "
        "--reward_weights has the model's weight first.",
    )
    total_episodes: int = _knob(50_000, "Completions to sample in all.")
    rloo_k: int = _knob(4, "Completions sampled for each prompt.")
    num_ppo_epochs: int = _knob(1, "Passes over each batch of rollouts.")
    num_mini_batches: int = _knob(1, "Optimizer steps in a pass over a batch of rollouts.")
    local_rollout_forward_batch_size: int = _knob(
        8, "Completions sampled or scored at once; with the packed engine at least those of one prompt."
    )
    missing_eos_penalty: float = _knob(1.0, "Subtracted from the score of a completion that did not end by itself.")
    length_penalty: float = _knob(0.0, "Subtracted from the score for every token of a completion.")
    kl_coef: float = _knob(0.05, "Weight of the KL divergence from the starting policy.")
    kl_estimator: str = _knob(
        "k1", "Estimate of KL at every token: 'k1' (unbiased), 'k2' or 'k3' (never negative), Schulman 2020."
    )
    kl_in: str = _knob("reward", "Where KL stands: subtracted from the 'reward', or added to the 'loss' (k2, k3).")
    target_kl: float | None = _knob(
        None, "KL of a completion, in nats, that the weight is adapted to after every batch, from kl_coef on."
    )
    importance_correction: str = _knob(
        "none",
        "Weights that correct for the sampler, whose probabilities are not quite the trainer's (and with top-p or "
        "top-k not at all): 'token', 'sequence' or 'none'. The gap is logged in any case.",
    )
    importance_cap: float = _knob(2.0, "Largest importance weight.")
    cliprange: float = _knob(0.2, "Clip range of the sequence-level probability ratio.")
    response_length: int = _knob(512, "Longest completion, in tokens.")
    rollouts_dir: str | None = _knob(None, "Where the rollouts are recorded (default: OUTPUT_DIR/rollouts).")
    reward_ensemble: str | None = _knob(
        None, "More reward models to train against together with the first, directories separated by commas."
    )
    score_of_ensemble: str = _knob(
        "mean", "What the models of an ensemble say together: their 'mean', or the score of the 'worst' for each."
    )
    guard_reward_model: str | None = _knob(
        None, "Reward model of other data and seed, which the policy is watched with and not trained against."
    )
    watch_steps: int | None = _knob(
        None,
        "Optimizer steps between two measurements of the policy (default: save_steps, if there is a guard or max_kl).",
    )
    watch_prompts: int = _knob(128, "Prompts to measure it on, which are not trained on; at most a quarter of all.")
    on_alarm: str = _knob(
        "rollback",
        "What follows when the guard's score falls and the reward does not, or KL is over max_kl: 'rollback' to the "
        "best checkpoint by the guard, 'stop', or 'warn'.",
    )
    max_kl: float | None = _knob(None, "KL of a completion from the start, in nats, that is not to be exceeded.")

    @property
    def ensemble_members(self) -> list[str]:
        """Directories of the reward models besides the first."""
        return [name.strip() for name in (self.reward_ensemble or "").split(",") if name.strip()]

    @property
    def watched(self) -> bool:
        """Whether the policy is measured while it is trained."""
        return not (self.guard_reward_model is None and self.watch_steps is None and self.max_kl is None)

    def __post_init__(self) -> None:
        """Check values that no type can check."""
        super().__post_init__()
        _require(
            self.rloo_k >= 2, "rloo_k", self.rloo_k, "at least 2: the baseline of a sample is the mean of the others"
        )
        for name in ("total_episodes", "num_ppo_epochs", "num_mini_batches", "local_rollout_forward_batch_size"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("missing_eos_penalty", "length_penalty", "kl_coef"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
            _require(getattr(self, name) < math.inf, name, getattr(self, name), "a finite number")
        _require_directory("output_dir", self.output_dir)
        _require(self.cliprange > 0, "cliprange", self.cliprange, "more than 0")
        check_estimators(self, self.kl_coef)
        _require(self.importance_cap < math.inf, "importance_cap", self.importance_cap, "a finite number")
        _require(self.response_length >= 1, "response_length", self.response_length, "at least 1 token")
        for name in ("watch_steps", "watch_prompts"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1")
        _require(
            self.score_of_ensemble in ("mean", "worst"), "score_of_ensemble", self.score_of_ensemble, "mean or worst"
        )
        _require(self.on_alarm in ACTIONS, "on_alarm", self.on_alarm, ", ".join(ACTIONS))
        _require(
            self.max_kl is None or 0 < self.max_kl < math.inf, "max_kl", self.max_kl, "more than 0 nats, and finite"
        )
        _require_directory("guard_reward_model", self.guard_reward_model)

    def steps_between(self, save_steps: float, steps: int) -> int:
        """Optimizer steps between two measurements of the policy, in a run of so many.

        Args:
            save_steps: Those between two checkpoints; below 1 a share of all steps, as transformers has it.
            steps: Of the run.

        >>> RLOOKnobs().steps_between(0.3, 100), RLOOKnobs(watch_steps=7).steps_between(50, 100)
        (30, 7)
        """
        every = self.watch_steps or save_steps
        return math.ceil(every * steps) if every < 1 else int(every)

    def optimizer_steps(self, per_device: int, accumulation: int, processes: int) -> int:
        """Optimizer steps in the run: ceil(E / B) · epochs · mini-batches, with B completions a batch of rollouts.

        >>> RLOOKnobs(total_episodes=100, num_mini_batches=2).optimizer_steps(per_device=2, accumulation=4, processes=1)
        14
        """
        completions = per_device * accumulation * self.num_mini_batches * processes
        return math.ceil(self.total_episodes / completions) * self.num_ppo_epochs * self.num_mini_batches


@dataclass(frozen=True, kw_only=True)
class PipelineKnobs(EngineKnobs):
    """The whole run; any flag of a single stage can be given as --reward.FLAG or --rloo.FLAG."""

    name: str = _knob("helpsteer3", "Name of the run; its record goes to runs/NAME.")
    output_dir: str | None = _knob(None, "Put everything in one directory: its record, reward_model/ and policy/.")
    model_name_or_path: str = _knob(DEFAULT_MODEL, "Model that both the reward model and the policy start from.")
    seed: int = _knob(42, "Seed of every stage.")
    reward_batch_size: int | None = _knob(None, "Per-device batch size of reward training.")
    reward_epochs: float | None = _knob(None, "Epochs of reward training.")
    rloo_batch_size: int | None = _knob(None, "Per-device batch size of RLOO.")
    total_episodes: int | None = _knob(None, "Completions that RLOO samples in all.")
    report_to: tuple[str, ...] | None = _knob(
        None, "Trackers of every training: tensorboard, trackio, wandb, … (default: none)."
    )
    use_peft: bool = _knob(False, "Train LoRA adapters instead of all weights, in both stages.")
    reward_model_only: bool = _knob(False, "Stop after the reward model and its verification.")
    rloo_only: bool = _knob(False, "Use the reward model in REWARD_MODEL_DIR instead of training one.")
    reward_model_dir: str | None = _knob(
        None, f"Directory of the reward model (default: OUTPUT_DIR/reward_model or {DEFAULT_REWARD_MODEL_DIR})."
    )
    policy_dir: str | None = _knob(
        None, f"Directory of the policy (default: OUTPUT_DIR/policy or {DEFAULT_POLICY_DIR})."
    )
    guard: bool = _knob(
        False,
        "Train a second reward model, the guard, with another seed on the other half of the prompts (the reward model "
        "then has the first half), and watch the policy with it.",
    )
    guard_dir: str | None = _knob(
        None, "Directory of the guard (default: OUTPUT_DIR/guard_model or REWARD_MODEL_DIR_guard)."
    )
    allow_weak_reward_model: bool = _knob(False, "Go on even if the reward model is not better than chance.")
    evaluation_prompts: int = _knob(256, "Held-out prompts on which the policy is judged before and after.")
    evaluation_batch_size: int = _knob(8, "Completions sampled or scored at once in the evaluation.")
    best_of: int = _knob(
        0, "Samples of the untrained policy a held-out prompt, whose best by reward the trained one is compared with."
    )

    def __post_init__(self) -> None:
        """Check values that no type can check."""
        super().__post_init__()
        if self.reward_model_only and self.rloo_only:
            raise ValueError("--reward_model_only and --rloo_only exclude each other; give one of them or neither.")
        if self.rloo_only and self.guard:
            raise ValueError("--rloo_only trains no guard; give the directory of one: --rloo.guard_reward_model.")
        _require(self.evaluation_prompts >= 1, "evaluation_prompts", self.evaluation_prompts, "at least 1")
        epochs = self.reward_epochs
        within = epochs is None or 0 < epochs <= MOST_EPOCHS
        _require(within, "reward_epochs", epochs, f"more than 0 and at most {MOST_EPOCHS:,}")
        _require(self.best_of >= 0, "best_of", self.best_of, "0 or more")
        _require(_stays_inside(self.name), "name", self.name, "a name without .. for a directory inside of runs")
        for name in ("output_dir", "reward_model_dir", "policy_dir", "guard_dir"):
            _require_directory(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class PlanKnobs(PipelineKnobs):
    """What the plan takes besides the pipeline's own flags, which it plans for."""

    gpu_memory_gb: float | None = _knob(
        None,
        "Memory of a GPU that a program can have, in GiB (default: that of gpu_name; without either, what is free on "
        "this machine).",
    )
    gpus: int = _knob(1, "GPUs, one process each.")
    sharding: str = _knob(
        "ddp",
        "What they share: 'ddp' nothing, 'fsdp' weights, gradients and optimizer; 'zero2' and 'zero3' are DeepSpeed's.",
    )
    gpu_name: str | None = _knob(None, "GPU of a small table, for memory and rates: a100, h100, l40s, 'RTX 4090', …")
    tflops: float | None = _knob(None, "TFLOP/s that a GPU reaches on this work, of any type.")
    bandwidth_gbs: float | None = _knob(None, "GB/s that it reaches reading memory, for sampling; needed with tflops.")
    measure: bool = _knob(False, "Measure the rates of this machine.")
    data_json: str | None = _knob(None, "data.json of a run, for the lengths (default: HelpSteer3's published ones).")
    json: bool = _knob(False, "Print one JSON document instead of tables.")

    def __post_init__(self) -> None:
        """Check values that no type can check."""
        super().__post_init__()
        for name, (least, most) in _RIG.items():
            value = getattr(self, name)
            _require(value is None or least <= value <= most, name, value, f"from {least} to {most:,}")
        _require(self.sharding in SHARDINGS, "sharding", self.sharding, ", ".join(SHARDINGS))
        _require(self.gpus > 1 or self.sharding == "ddp", "sharding", self.sharding, "more than one of --gpus with it")
        given = [name for name in ("gpu_name", "tflops", "measure") if getattr(self, name)]
        if self.tflops is not None and self.measure:
            raise ValueError("--tflops and --measure exclude each other; give one of them or neither.")
        _require(
            self.bandwidth_gbs is None or "tflops" in given, "bandwidth_gbs", self.bandwidth_gbs, "--tflops beside it"
        )


def check_estimators(given: Any, kl_coef: float) -> None:
    """Check the settings of RLOO's estimators, by their names in `RLOOKnobs`, whoever has them.

    Raises:
        ValueError: one is out of range, or two do not go together.
    """
    named, place, correction = given.kl_estimator, given.kl_in, given.importance_correction
    _require(named in ("k1", "k2", "k3"), "kl_estimator", named, "k1, k2 or k3")
    _require(place in ("reward", "loss"), "kl_in", place, "reward or loss")
    alone = place == "loss" and named == "k1"
    _require(not alone, "kl_in", place, "reward with k1, whose mean gradient in the loss is zero; or k2 or k3")
    if given.target_kl is not None:
        _require(0 < given.target_kl < math.inf, "target_kl", given.target_kl, "more than 0 nats, and finite")
        _require(kl_coef > 0, "target_kl", given.target_kl, "--kl_coef above 0, which it is adapted from")
    kinds = ("none", "token", "sequence")
    _require(correction in kinds, "importance_correction", correction, "none, token or sequence")
    _require(given.importance_cap > 0, "importance_cap", given.importance_cap, "more than 0")
    if given.engine == "trl":
        _require(place == "reward", "kl_in", place, "reward with --engine trl")
        _require(correction == "none", "importance_correction", correction, "none with --engine trl")


def _require_countable(knobs: Any) -> None:
    """Refuse whole numbers that nothing can be counted by; seeds are no counts."""
    for knob in fields(knobs):
        value = getattr(knobs, knob.name)
        if isinstance(value, int) and knob.name != "seed":
            _require(value <= MOST, knob.name, value, f"at most {MOST:,}")


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"--{name} is {value!r}; expected {expected}.")


def _stays_inside(name: str) -> bool:
    """Whether a name, put behind a directory, leads to something inside of it."""
    path = PurePath(name)
    return path != PurePath() and not path.is_absolute() and ".." not in path.parts


def _require_directory(flag: str, value: str | None) -> None:
    """Refuse what has no name of its own: nothing at all, and the root."""
    named = value is None or (value.strip() != "" and PurePath(value) != PurePath(PurePath(value).anchor or "\0"))
    _require(named, flag, value, "a directory that can be made")
