"""One of the processes of `benchmarks.processes`: both stages for a few steps, and what they logged.

The model is tiny, random and in float64. The batches of an optimizer step are the same however many processes share
them: in reward training they end unevenly, and every batch of rollouts is trained on twice, since the loss of a policy
on its own samples is 0.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase, Qwen3ForSequenceClassification

from helpsteer_rloo.cli import guarded
from helpsteer_rloo.data.demo import DemoBaseSettings
from helpsteer_rloo.model.sharding import is_sharded
from helpsteer_rloo.training.demo_base import build_model, build_tokenizer
from helpsteer_rloo.training.reward import RewardConfig, RewardTrainer
from helpsteer_rloo.training.rloo import RLOOConfig, RLOOTrainer
from helpsteer_rloo.training.running import train_to_the_end

SHAPE = DemoBaseSettings(hidden_size=32, intermediate_size=64, layers=2, heads=2, key_value_heads=1, head_dim=16)
PAIRS, STEP = 25, 8
"""Pairs of an epoch, and of a step: the last one has a single pair, so that all processes but one have none in it."""
EVALUATED, EVERY = 5, 4
"""Pairs of an evaluation, which are not a whole batch, and the steps between two."""
PROMPTS, SAMPLES, GROUP = 24, 16, 4
"""Prompts, completions of a mini-batch and of a prompt; a batch of rollouts is two mini-batches, each used twice."""
SHARDS = os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
"""Whether `accelerate launch` was given a configuration with FSDP."""
ROWS = {"reward": 40, "rloo": 60}
"""Tokens: so few that processes have different numbers of rows in a micro-batch, some of them none."""
LOGGED = {
    "reward": (
        *("loss", "accuracy", "margin", "min_reward", "max_reward", "num_tokens", "grad_norm"),
        *("eval_loss", "eval_accuracy", "eval_margin", "eval_mean_reward"),
    ),
    "rloo": ("loss", "objective", "kl_per_completion", "entropy", "grad_norm"),
}


def pairs() -> Dataset:
    """Pairs on prompts that come with one to three of them."""
    generator = torch.Generator().manual_seed(0)

    def ids(longest: int) -> list[int]:
        length = int(torch.randint(1, longest + 1, (1,), generator=generator))
        return torch.randint(3, 250, (length,), generator=generator).tolist()

    rows: list[dict[str, Any]] = []
    group = 0
    while len(rows) < PAIRS:
        prompt = ids(9)
        several = [{"chosen_ids": prompt + ids(7), "rejected_ids": prompt + ids(7), "group": group} for _ in range(3)]
        rows += several[: group % 3 + 1]
        group += 1
    return Dataset.from_list(rows[:PAIRS])


def prompts() -> Dataset:
    """Requests that differ in a number."""
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": f"List {n} trees."}]} for n in range(1, PROMPTS + 1)]
    )


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Of no meaning, but different for different completions."""
    return [sum(ids) / 500 - len(ids) / 7 for ids in completion_ids]


def models(tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.nn.Module]:
    """The base of each stage, the same on every process."""
    torch.manual_seed(0)
    policy = build_model(tokenizer, SHAPE)
    policy.config.num_labels = 1
    rewarder = Qwen3ForSequenceClassification(policy.config)
    rewarder.model.load_state_dict(policy.model.state_dict())
    return {"reward": rewarder.double(), "rloo": policy.double()}


def settings(stage: str, directory: Path, steps: int) -> dict[str, Any]:
    """What both stages share."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    shared: dict[str, Any] = {"ddp_backend": "gloo"} if world > 1 else {}
    return shared | {
        "output_dir": str(directory / stage),
        "max_steps": steps,
        "num_train_epochs": steps,
        "per_device_train_batch_size": (SAMPLES if stage == "rloo" else STEP // 2) // world,
        "per_device_eval_batch_size": STEP // world,
        "gradient_accumulation_steps": 1 if stage == "rloo" else 2,
        "packed_tokens": ROWS[stage],
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 1e9,  # for the norm to be logged
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "steps",
        "save_steps": steps // 2,
        "logging_steps": 1,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }


def trainer_of(stage: str, directory: Path, steps: int) -> RewardTrainer | RLOOTrainer:
    """The trainer of a stage."""
    tokenizer = build_tokenizer(300, 0)
    tokenizer.save_pretrained(directory / "tokenizer")
    model, own = models(tokenizer)[stage], settings(stage, directory, steps)
    adapter = {"r": 4, "target_modules": "all-linear"}
    if stage == "reward":
        return RewardTrainer(
            model=model,
            args=on_cpu(RewardConfig(max_length=None, eval_strategy="steps", eval_steps=EVERY, **own)),
            train_dataset=pairs(),
            eval_dataset=pairs().select(range(EVALUATED)),
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type="SEQ_CLS", **adapter),
        )
    own |= {
        "num_generations": GROUP,
        "num_iterations": 2,
        "steps_per_generation": 2,
        "max_completion_length": 6,
        "beta": 0.1,
    }
    return RLOOTrainer(
        model=model,
        reward_funcs=reward,
        args=on_cpu(RLOOConfig(chat_template_kwargs={"enable_thinking": False}, **own)),
        train_dataset=prompts(),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **adapter),
    )


def on_cpu(args: Any) -> Any:
    """Let accelerate do on CPUs what it does with FSDP on GPUs only, if it was launched with FSDP."""
    if SHARDS and args.device.type == "cpu":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return args


def curves(stage: str, directory: Path, steps: int) -> list[dict[str, float]]:
    """The values of `LOGGED` after every step, from the newest checkpoint in the directory on, if there is one."""
    torch.manual_seed(0)
    trainer: Any = trainer_of(stage, directory, steps)
    if not trainer._packed:
        raise SystemExit("This is about packed rows, which are not used here.")
    train_to_the_end(trainer, max_bad_steps=0)
    if is_sharded(trainer.model) != SHARDS:
        raise SystemExit("The weights are shared out although they should not be, or the other way round.")
    by_step: dict[int, dict[str, float]] = {}
    for row in trainer.state.log_history:
        by_step.setdefault(row["step"], {}).update(row)
    return [{name: row[name] for name in LOGGED[stage] if name in row} for row in by_step.values()]


def main() -> None:
    """Write the curves of the stages that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    found = {stage: curves(stage, options.directory, options.steps) for stage in LOGGED}
    if os.environ.get("RANK", "0") == "0":
        (options.directory / "curves.json").write_text(json.dumps(found))


if __name__ == "__main__":
    guarded(main)
