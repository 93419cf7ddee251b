"""The configurations for `accelerate launch`, and the root scripts launched with one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from tests.broken.conftest import place, world
from tests.training.test_processes import free_port

__all__ = ["place", "world"]

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "accelerate"
KINDS = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
    "deepspeed_zero3": DistributedType.DEEPSPEED,
}


def test_every_configuration_is_known():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == KINDS.keys()


@pytest.mark.parametrize("name", KINDS)
def test_configurations_are_what_accelerate_takes(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == KINDS[name]
    assert config.num_processes == 8
    if name.startswith("deepspeed"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2


@pytest.mark.parametrize("name", KINDS)
def test_the_documents_give_a_command_for_each(name):
    assert f"configs/accelerate/{name}.yaml" in (ROOT / "docs" / "several-processes.md").read_text()


def launched(place, *flags):
    command = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={CONFIGS / 'ddp.yaml'}"]
    command += ["--num_processes=2", "--mixed_precision=no", *flags]
    command += [str(ROOT / "rloo_helpsteer_training.py"), *place.rloo(use_cpu="true", rloo_k=2, total_episodes=16)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=place.root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def check_finished(place, launchers):
    ended = [launcher.communicate(timeout=150) for launcher in launchers]
    for launcher, (_, errors) in zip(launchers, ended, strict=True):
        assert launcher.returncode == 0, errors[-3000:]
    assert json.loads((place.root / "out" / "policy.json").read_text())["training"]["episodes"] == 16
    assert [output.count("Stage rloo.") for output, _ in ended] == [1] + [0] * (len(ended) - 1)


def test_a_script_runs_on_two_processes(place):
    check_finished(place, [launched(place, "--main_process_port=0")])


def test_a_script_runs_under_two_launchers_as_on_two_machines(place):
    machines = ["--num_machines=2", "--main_process_ip=127.0.0.1", f"--main_process_port={free_port()}"]
    check_finished(place, [launched(place, *machines, f"--machine_rank={rank}") for rank in range(2)])
