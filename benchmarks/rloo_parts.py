"""The parts of an RLOO measurement that need the libraries: models, trainers, phases, forced completions, FLOPs."""

import random
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset

from benchmarks import models
from benchmarks.harness import Run, Spec
from benchmarks.models import Shape, Work
from helpsteer_rloo.model.roles import load_shared_reward
from helpsteer_rloo.training.rloo import RLOOConfig, RLOOTrainer
from helpsteer_rloo.training.scorer import RewardModelScorer

BATCH = 4
SCORED = 8
"""Completions scored at once by ours, the default of `--local_rollout_forward_batch_size`; TRL scores all at once."""
FORCED_LEARNING_RATE = 0.1
Phases = dict[str, str | Callable[[], str]]


def make_models(spec: Spec, shape: Shape, dtype: torch.dtype, directory: str) -> tuple[Any, Any]:
    """The policy and what scores: a reward model, or with `constant_reward` a function.

    The reward model is the policy's body with an adapter and a head: ours is given the directory of these, to put them
    on the policy's base; TRL a model of its own with the same weights.
    """
    policy = models.make_policy(shape, dtype, spec["seed"])
    if spec.get("constant_reward"):
        return policy, constant_reward
    adapter = Path(directory) / "reward"
    models.write_reward_adapter(shape, adapter, spec["seed"] + 1)
    return policy, adapter if spec["side"] == "ours" else models.merged_reward_model(policy, shape, adapter)


def constant_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    """Alternating scores that cost neither time nor memory, for measurements of other parts."""
    return [float(index % 2) for index in range(len(completions))]


def make_trainer(spec: Spec, pair: tuple[Any, Any], prompts: Sequence[Sequence[int]], directory: str) -> Any:
    """Our trainer or TRL's, with the same arguments.

    Under forced completions plain SGD at a large rate is used: later steps then depend on earlier gradients smoothly,
    where Adam would turn rounding errors of small ones into full steps.
    """
    policy, reward = pair
    ours = spec["side"] == "ours"
    tokenizer = models.make_tokenizer(getattr(models, spec["shape"]))
    forced = {"optim": "sgd", "learning_rate": FORCED_LEARNING_RATE} if spec.get("forced") else {}
    args = (RLOOConfig if ours else trl.RLOOConfig)(
        output_dir=directory,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=spec["groups"] * spec["k"] // BATCH,
        num_generations=spec["k"],
        max_completion_length=spec["completion"],
        max_steps=spec["steps"] + 1,
        gradient_checkpointing=spec["checkpointing"],
        shuffle_dataset=False,
        bf16=False,
        use_cpu=True,
        seed=spec["seed"],
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **forced,
    )
    scorer = RewardModelScorer(None, batch_size=SCORED, max_length=None) if isinstance(reward, Path) else reward
    trainer = (RLOOTrainer if ours else trl.RLOOTrainer)(
        model=policy,
        reward_funcs=scorer,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": models.as_text(prompt)} for prompt in prompts]),
        processing_class=tokenizer,
        reward_processing_classes=tokenizer,
        peft_config=models.make_lora("CAUSAL_LM"),
    )
    if isinstance(scorer, RewardModelScorer):
        scorer.role = load_shared_reward(trainer.model, reward)
    return trainer


def phases(side: str) -> Phases:
    """Methods of a trainer and the phases that they are.

    "reference", "reward", "policy" and "backward" are compared with their FLOPs. TRL computes old and reference
    log-probabilities in the method that training uses too; ours needs no old ones when every rollout is used once.
    """
    shared: Phases = {"_generate": "sampling", "_calculate_rewards": "reward", "accelerator.backward": "backward"}
    own: dict[str, Phases] = {
        "ours": {"compute_loss": "policy", "_pass": "reference"},
        "trl": {"_get_per_token_logps_and_entropies": _log_probs_phase},
    }
    return {**shared, **own[side]}


def _log_probs_phase() -> str:
    return "policy" if torch.is_grad_enabled() else "old_and_reference"


def force_completions(trainer: Any, shape: Shape, spec: Spec) -> None:
    """Give both sides the same completions instead of sampling: of full length if `forced` is "full", else ragged."""

    def forced(prompt_ids: Sequence[Sequence[int]], *_: Any) -> list[list[int]]:
        seen: Counter[tuple[int, ...]] = Counter()
        completions = []
        for prompt in map(tuple, prompt_ids):
            rng = random.Random(str((prompt, seen[prompt])))
            seen[prompt] += 1
            length = spec["completion"] if spec["forced"] == "full" else rng.randint(1, spec["completion"])
            completions.append([rng.randrange(2, shape.vocabulary) for _ in range(length)])
        return completions

    trainer._generate_single_turn = forced


def sampled(trainer: Any, spec: Spec) -> Run:
    """What a trainer logged: completions and their tokens a step, and the mean reward of every step."""
    rows = [row for row in trainer.state.log_history if "reward" in row]
    completions = spec["groups"] * spec["k"]
    return {
        "completions": completions,
        "completion_tokens": statistics.mean(row["completions/mean_length"] for row in rows[1:]) * completions,
        "rewards": [row["reward"] for row in rows],
    }


def needed(spec: Spec, shape: Shape, prompts: Sequence[int], result: Run) -> Run:
    """FLOPs that a step needs, each prompt computed once, by pass and as a share of the measured GEMM rate.

    The floor of sampling is the prompts' forward pass, and for every new token of all rows at once the longer of
    reading all weights once (at the measured rate of copying) and computing (at the fastest GEMM rate measured).
    """
    steps, gemm = spec["steps"], statistics.mean(result["gemm_flops"])
    work = sum((Work.of_group(prompt, [spec["completion"]] * spec["k"]) for prompt in prompts), Work())
    head = models.head_flops(shape, len(prompts) * spec["k"] * spec["completion"])
    forward, backward = models.forward_flops(shape, work), models.backward_flops(shape, work)
    # The gradient under the frozen head is computed along with its values, in the policy pass.
    flops = {"reference": forward + head, "reward": forward, "policy": forward + 2 * head, "backward": backward}
    flops = {phase: count / steps for phase, count in flops.items()}
    seconds = result["phase_seconds"]
    return {
        "flops": sum(flops.values()),
        "recomputed_flops": models.recomputed_flops(shape, work) / steps if spec["checkpointing"] else 0,
        "flops_seconds": result["seconds"] - seconds.get("sampling", 0.0),
        "phase_flops_fraction": {
            phase: count / seconds[phase] / gemm for phase, count in flops.items() if phase in seconds
        },
        "sampling_floor": _sampling_floor(spec, shape, prompts, result),
    }


def _sampling_floor(spec: Spec, shape: Shape, prompts: Sequence[int], result: Run) -> float:
    gemm, rows = statistics.mean(result["fastest_gemm_flops"]), spec["groups"] * spec["k"]
    prefill = sum((Work.of_group(prompt, []) for prompt in prompts), Work())
    weights = shape.body_parameters() + shape.hidden * shape.vocabulary
    itemsize = getattr(torch, spec["dtype"]).itemsize
    reading = weights * itemsize / result["copy_bytes_per_second"]
    computing = 2 * weights * rows / gemm
    return models.forward_flops(shape, prefill) / spec["steps"] / gemm + spec["completion"] * max(reading, computing)
