"""TRL's arguments from flags: one device a process, and as many processes as were launched."""

from types import SimpleNamespace

import pytest

from helpsteer_rloo.settings.config import REWARD
from helpsteer_rloo.training.reward import RewardConfig
from helpsteer_rloo.training.trl_configs import build_args, with_its_processes


def test_processes_that_form_no_group_are_refused(monkeypatch, tmp_path):
    settings = REWARD.resolve({"use_cpu": True, "bf16": False, "output_dir": str(tmp_path), "report_to": "none"})
    assert build_args(RewardConfig, settings, output_dir=str(tmp_path)).world_size == 1
    monkeypatch.setattr("helpsteer_rloo.training.trl_configs.process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"2 processes were launched, but torch found no GPUs .* give --use_cpu true"):
        build_args(RewardConfig, settings, output_dir=str(tmp_path))


def test_one_process_uses_one_gpu():
    args = SimpleNamespace(world_size=1, n_gpu=3)
    with pytest.warns(UserWarning, match="One of 3 GPUs is used; accelerate launch uses all of them"):
        assert with_its_processes(args)._n_gpu == 1
