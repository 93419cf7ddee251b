"""What is done before weights are shared out over processes; training itself is test_processes.py's."""

from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from helpsteer_rloo.training.packed import set_up_packing
from helpsteer_rloo.training.sharding import loaded_whole


class Zero3:
    def is_zero3(self):
        return True


@pytest.mark.parametrize("held_by", ["plugin", "arguments", "nothing"])
def test_under_zero3_other_models_are_loaded_whole(held_by):
    config = Zero3()
    plugin = SimpleNamespace(dschf=config) if held_by == "plugin" else None
    args = SimpleNamespace(deepspeed_plugin=plugin, hf_deepspeed_config=config if held_by == "arguments" else None)
    if held_by != "nothing":
        set_hf_deepspeed_config(config)
    try:
        with loaded_whole(SimpleNamespace(args=args)):
            assert not is_deepspeed_zero3_enabled()
        assert is_deepspeed_zero3_enabled() == (held_by != "nothing")
    finally:
        unset_hf_deepspeed_config()


def test_under_fsdp2_every_micro_batch_exchanges_its_gradients(tiny_base):
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    accelerator = SimpleNamespace(
        is_fsdp2=True,
        distributed_type=None,
        state=SimpleNamespace(fsdp_plugin=SimpleNamespace(cpu_ram_efficient_loading=False)),
        gradient_state=SimpleNamespace(plugin_kwargs={"num_steps": 4}),
        unwrap_model=lambda model: model,
    )
    trainer = SimpleNamespace(accelerator=accelerator, model=model, args=SimpleNamespace(neftune_noise_alpha=None))
    assert set_up_packing(trainer) is None
    assert accelerator.gradient_state.plugin_kwargs == {"num_steps": 4, "sync_each_batch": True}
