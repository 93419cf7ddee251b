"""Training on two processes against one: the same batches must give the same curve of losses and rewards.

Run as a module under `torchrun` it is one of the two processes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from helpsteer_rloo.training.reward import RewardConfig, RewardTrainer
from helpsteer_rloo.training.rloo import RLOOConfig, RLOOTrainer
from tests.training.test_pairs import pair_rows
from tests.training.test_rloo import PROMPTS, K, arguments, chat
from tests.training.test_rloo_packed import reward

PLAIN = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
BUDGETS = {"reward": 30, "rloo": 60}
"""Tokens a row: so few that processes have different numbers of rows in a micro-batch, some of them none."""


def lora(task):
    return LoraConfig(r=4, target_modules="all-linear", task_type=task)


def curves(base, directory, processes):
    """What is logged in three steps of reward training and four of RLOO, the batches of an optimizer step fixed."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    shared = PLAIN | {"ddp_backend": "gloo"} if processes > 1 else PLAIN
    rewarded = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(base, num_labels=1),
        args=RewardConfig(
            output_dir=str(directory),
            max_steps=3,
            per_device_train_batch_size=4 // processes,
            gradient_accumulation_steps=2,
            train_sampling_strategy="sequential",
            max_length=None,
            packed_tokens=BUDGETS["reward"],
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            **shared,
        ),
        train_dataset=Dataset.from_list(pair_rows(3, prompts=20)),
        processing_class=tokenizer,
        peft_config=lora("SEQ_CLS"),
    )
    rewarded.train()
    policy = RLOOTrainer(
        model=str(base),
        reward_funcs=reward,
        args=arguments(
            directory,
            RLOOConfig,
            max_steps=4,
            per_device_train_batch_size=2 * K // processes,
            packed_tokens=BUDGETS["rloo"],
            **shared,
        ),
        train_dataset=chat(PROMPTS),
        processing_class=tokenizer,
        peft_config=lora("CAUSAL_LM"),
    )
    policy.train()
    assert rewarded._packed
    assert policy._packed
    names = ("loss", "accuracy", "margin", "min_reward", "max_reward", "num_tokens")
    return {
        "reward": [[row[name] for name in names] for row in rewarded.state.log_history if "loss" in row],
        "rloo": [
            [row[name] for name in ("reward", "kl", "entropy")] for row in policy.state.log_history if "kl" in row
        ],
    }


def test_two_processes_give_the_curves_of_one(tiny_base, tmp_path):
    (tmp_path / "one").mkdir()
    one = curves(tiny_base, tmp_path / "one", 1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.training.test_processes", str(tiny_base), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "curves.json").read_text())
    for stage, rows in one.items():
        assert len(rows) > 2
        for ours, theirs in zip(rows, two[stage], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6), stage


if __name__ == "__main__":
    base, directory = map(Path, sys.argv[1:])
    found = curves(base, directory, int(os.environ["WORLD_SIZE"]))
    if os.environ["RANK"] == "0":
        (directory / "curves.json").write_text(json.dumps(found))
