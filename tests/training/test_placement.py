"""Where a training loads its model: on the GPU of its process, which TRL's default does not see to."""

from types import SimpleNamespace

import pytest
import torch

from helpsteer_rloo.model.forward import prepare_packed
from helpsteer_rloo.settings.config import REWARD
from helpsteer_rloo.training.trl_configs import build_model_setup


def kwargs_on(device, tiny_base, processes=1, **given):
    settings = REWARD.resolve({"model_name_or_path": str(tiny_base)})
    args = SimpleNamespace(device=torch.device(device), world_size=processes, model_init_kwargs=given)
    return build_model_setup(settings, args, "SEQ_CLS").init_kwargs


def test_one_process_loads_its_model_on_its_own_gpu(tiny_base):
    assert kwargs_on("cuda:0", tiny_base)["device_map"] == {"": "cuda:0"}  # a name: arguments are written as JSON
    assert kwargs_on("cuda:0", tiny_base, device_map="auto")["device_map"] == "auto"


@pytest.mark.parametrize(("device", "processes"), [("cpu", 1), ("cuda:1", 2)])
def test_elsewhere_it_is_left_to_the_trainer(tiny_base, device, processes):
    assert "device_map" not in kwargs_on(device, tiny_base, processes)


def test_a_model_on_several_devices_is_not_packed(tiny_base):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    assert not prepare_packed(model)
    model.hf_device_map = {"": 0}
    assert prepare_packed(model)
