"""`metrics.jsonl`: every line that was logged, once, whether the run was interrupted or not."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from helpsteer_rloo.processes import peak_memory
from helpsteer_rloo.run_dir import METRICS, read_lines, write_text
from helpsteer_rloo.training import metrics_log
from helpsteer_rloo.training.metrics_log import MetricsLog
from helpsteer_rloo.training.reward import RewardConfig, RewardTrainer
from helpsteer_rloo.training.running import train_to_the_end
from tests.training.test_pairs import pair_rows

STEPS = 8


def make_trainer(tiny_base, tokenizer, directory):
    torch.manual_seed(0)
    args = RewardConfig(
        output_dir=str(directory),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_length=None,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        gradient_checkpointing=False,
        learning_rate=1e-3,
        save_steps=3,
        logging_steps=2,
    )
    return RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1),
        args=args,
        train_dataset=Dataset.from_list(pair_rows(3, prompts=8)),
        processing_class=tokenizer,
    )


def lines(directory):
    rows, problem = read_lines(directory / METRICS)
    assert problem is None
    return rows


def timeless(rows):
    return [{name: value for name, value in row.items() if name != "machine"} for row in rows]


@pytest.fixture
def undisturbed(tiny_base, tokenizer, tmp_path):
    train_to_the_end(make_trainer(tiny_base, tokenizer, tmp_path / "whole"), 0)
    return lines(tmp_path / "whole")


def test_every_logged_line_is_there_with_what_the_machine_did(undisturbed):
    assert [row["step"] for row in undisturbed] == [2, 4, 6, 8]
    assert all({"loss", "accuracy", "margin", "num_tokens", "epoch"} <= row.keys() for row in undisturbed)
    for before, row in zip([{"num_tokens": 0}, *undisturbed], undisturbed, strict=False):
        machine = row["machine"]
        tokens = (row["num_tokens"] - before["num_tokens"]) / 2
        assert machine["tokens_per_second"] == pytest.approx(tokens / machine["step_seconds"])
        assert 0 < machine["step_seconds"] < 60
        assert 2**20 < machine["peak_memory_bytes"] <= peak_memory()


@pytest.mark.parametrize("killed_at", [2, 4, 5, 7])
def test_a_run_that_was_killed_leaves_the_same_lines(
    tiny_base, tokenizer, tmp_path, monkeypatch, undisturbed, killed_at
):
    step = RewardTrainer.training_step
    directory = tmp_path / "killed"

    def dies(self, *args, **kwargs):
        if self.state.global_step == killed_at:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(RewardTrainer, "training_step", dies)
        with pytest.raises(KeyboardInterrupt):
            train_to_the_end(make_trainer(tiny_base, tokenizer, directory), 0)
    with (directory / METRICS).open("a") as file:
        file.write('{"step": 8, "lo')  # in the middle of a line
    train_to_the_end(make_trainer(tiny_base, tokenizer, directory), 0)
    assert timeless(lines(directory)) == timeless(undisturbed)
    train_to_the_end(make_trainer(tiny_base, tokenizer, directory), 0)  # which finds it finished
    assert timeless(lines(directory)) == timeless(undisturbed)


def test_what_is_no_number_can_be_read_again(tmp_path):
    class State:
        is_world_process_zero, global_step = True, 3

    log = MetricsLog(tmp_path / METRICS)
    log.begin(None)
    values = {"loss": float("nan"), "grad_norm": torch.tensor(2.0), "note": "x", "none": None, "up": float("inf")}
    log.on_log(None, State(), None, values)
    log.on_log(None, State(), None, {"train_runtime": 3.0, "train_loss": 0.1})
    (row,) = lines(tmp_path)
    assert json.loads(json.dumps(row["machine"]))["step_seconds"] is None
    assert timeless([row]) == [{"step": 3, "loss": None, "grad_norm": 2.0, "note": "x", "none": None, "up": None}]


class Moment:
    """Of a trainer's state what the log looks at."""

    is_world_process_zero = True

    def __init__(self, step):
        self.global_step = step


def take_steps(log, clock, count):
    for _ in range(count):
        log.on_step_begin(None, None, None)
        clock[0] += 0.5
        log.on_optimizer_step(None, None, None)


def test_tokens_a_second_are_those_since_tokens_were_last_counted(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(metrics_log.time, "monotonic", lambda: clock[0])
    log = MetricsLog(tmp_path / METRICS)
    log.begin(None)
    take_steps(log, clock, 10)
    log.on_log(None, Moment(10), None, {"loss": 0.5, "num_tokens": 1000.0})
    log.on_log(None, Moment(10), None, {"eval_loss": 0.4})
    take_steps(log, clock, 5)
    log.on_log(None, Moment(15), None, {"loss": 0.5, "num_tokens": 1500.0})
    log.begin(tmp_path / "checkpoint-15")
    take_steps(log, clock, 5)
    log.on_log(None, Moment(20), None, {"loss": 0.5, "num_tokens": 2000.0})
    assert [row["machine"]["tokens_per_second"] for row in lines(tmp_path)] == [200.0, None, 200.0, 200.0]


def test_a_run_that_began_without_a_log_has_what_its_checkpoint_keeps(tmp_path):
    history = [
        {"epoch": 0.1, "loss": 0.7, "num_tokens": 100.0, "step": 5},
        {"eval_loss": float("nan"), "step": 5},
        {"train_runtime": 3.0, "step": 10},
        {"loss": 0.6, "num_tokens": 200.0, "step": 10},
    ]
    write_text(tmp_path / "checkpoint-10" / "trainer_state.json", json.dumps({"log_history": history}))
    log = MetricsLog(tmp_path / METRICS)
    log.begin(tmp_path / "checkpoint-10")
    log.on_log(None, Moment(15), None, {"loss": 0.5, "num_tokens": 300.0})
    rows = lines(tmp_path)
    assert [row["step"] for row in rows] == [5, 5, 10, 15]
    assert [row.get("loss", "none") for row in rows] == [0.7, "none", 0.6, 0.5]
    assert rows[1] == {"step": 5, "eval_loss": None}


def test_a_gpu_that_is_there_and_not_used_does_not_hide_the_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert peak_memory() > 2**20
