"""What TRL's trainers and bitsandbytes leave wrong where LoRA is trained on a base in 4 or 8 bits."""

from typing import Any, cast

from torch import nn
from transformers import Trainer

from helpsteer_rloo.model.forward import base_model

_LAYOUT = "support_avx512bf16_for_cpu"
"""Attribute of bitsandbytes' 4-bit layers: whether they may be laid out anew for inference on this CPU."""


def mend_quantized(trainer: Trainer) -> None:
    """Let a trainer's adapters on a quantized base learn; other models stay as they are.

    TRL rounds them to bfloat16, whose spacing is at least 2^-8 of a weight. At a learning rate of 1e-6 the factor A,
    which starts near 0.01, would never change, and B, which starts at zero, not beyond some 3e-4. They are float32
    again, and so is a head under autocast; without that it is of the base's type, which TRL's own path needs.

    On CPUs with bfloat16 instructions, bitsandbytes (0.50) lays weights out anew when they are first evaluated, and
    then has no gradient for them in training, which a warning alone tells. Here they keep their layout.

    Raises:
        ValueError: they were laid out so before the trainer was given them.
    """
    model = cast(nn.Module, trainer.accelerator.unwrap_model(trainer.model))
    base: Any = base_model(model)
    if not (getattr(base, "is_loaded_in_4bit", False) or getattr(base, "is_loaded_in_8bit", False)):
        return
    for module in model.modules():
        if _LAYOUT in module.__dict__:
            _keep_layout(module)
    autocast = trainer.args.bf16 or trainer.args.fp16
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float() if autocast or "lora_" in name else parameter.data.to(base.dtype)


def _keep_layout(layer: Any) -> None:
    if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        raise ValueError(
            "This model in 4 bits was evaluated on a CPU, where it has no gradients after that: load it anew."
        )
    setattr(layer, _LAYOUT, False)
