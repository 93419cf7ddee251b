"""Training on several processes against one: the same data and seed must give the same curves.

Run as a module it is a process that is killed, or that loses the one that is.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import TrainerCallback

from benchmarks.processes import ROOT, difference, launched

TOLERANCE = 1e-6
"""Relative; losses are logged in float32."""
BOUND = 60
"""Seconds within which a process that lost another is to have ended, its start and first steps included."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return launched(tmp_path_factory.mktemp("alone"), 1)


def check(alone, curves):
    assert {stage: len(rows) for stage, rows in curves.items()} == {"reward": 8, "rloo": 8}
    assert any(abs(row["loss"]) > 1e-3 for row in curves["rloo"])
    for stage, rows in curves.items():
        assert difference(alone[stage], rows) < TOLERANCE, stage


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_processes_give_the_curves_of_one(alone, tmp_path, kind):
    check(alone, launched(tmp_path, 2, kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_four_processes_give_the_curves_of_one(alone, tmp_path, kind):
    check(alone, launched(tmp_path, 4, kind))


def test_one_process_goes_on_where_two_were(alone, tmp_path):
    launched(tmp_path, 2, "ddp", steps=4)
    check(alone, launched(tmp_path, 1))


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after", "kind"), [(1, 2, "ddp"), (2, 4, "ddp"), (2, 2, "fsdp2"), (2, 4, "fsdp2")])
def test_other_numbers_go_on_where_some_were(alone, tmp_path, before, after, kind):
    launched(tmp_path, before, kind, steps=4)
    check(alone, launched(tmp_path, after, kind))


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.mark.parametrize("stage", ["reward", "rloo"])
def test_a_process_that_loses_another_stops_and_says_so(tmp_path, stage):
    """Without a launcher that would end it."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.test_processes", stage, str(tmp_path)],
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    begin = time.monotonic()
    texts = [process.communicate(timeout=BOUND)[1] for process in processes]
    assert time.monotonic() - begin < BOUND
    assert [process.returncode for process in processes] == [1, -signal.SIGKILL], texts
    assert "error: Another of the 2 processes has ended or cannot be reached" in texts[0]
    assert "The same command goes on from the last checkpoint" in texts[0]
    assert "Traceback" not in texts[0]


class Killed(TrainerCallback):
    """The second process, after its third step."""

    def on_step_end(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)


def train(stage, directory):
    from benchmarks.process_curves import trainer_of
    from helpsteer_rloo.training.lost_processes import lost_processes_explained
    from helpsteer_rloo.training.running import train_to_the_end

    with lost_processes_explained(directory):
        trainer = trainer_of(stage, Path(directory), steps=8)
        trainer.add_callback(Killed())
        train_to_the_end(trainer, max_bad_steps=0)


if __name__ == "__main__":
    from helpsteer_rloo.cli import guarded

    guarded(lambda: train(*sys.argv[1:]))
