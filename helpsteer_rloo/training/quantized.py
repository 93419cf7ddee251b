"""What TRL's trainers and bitsandbytes leave wrong where LoRA is trained on a base in 4 or 8 bits."""

from typing import Any, cast

from torch import nn
from transformers import Trainer

from helpsteer_rloo.model.forward import base_model

_LAYOUT = "support_avx512bf16_for_cpu"
"""Attribute of bitsandbytes' 4-bit layers: whether they may be laid out anew for inference on this CPU."""


def mend_quantized(trainer: Trainer) -> None:
    """Let a trainer's adapters on a quantized base learn; other models stay as they are.

    TRL puts them into bfloat16, whose spacing is 2^-8 of a weight: of a factor that starts at 0.01, an update of less
    than 2e-5 is rounded away, so that at a learning rate of 1e-6 it would never change. They are float32 again, and so
    is a head under autocast; without that it is of the base's type, which its input has.

    On CPUs with bfloat16 instructions, bitsandbytes (0.50) lays weights out anew when they are first evaluated, and
    then has no gradient for them in training, which a warning alone tells. They keep their layout.
    """
    model = cast(nn.Module, trainer.accelerator.unwrap_model(trainer.model))
    base: Any = base_model(model)
    if getattr(base, "quantization_method", None) is None:
        return
    for module in model.modules():
        if _LAYOUT in module.__dict__:
            module.__dict__[_LAYOUT] = False
    autocast = trainer.args.bf16 or trainer.args.fp16
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float() if autocast or "lora_" in name else parameter.data.to(base.dtype)
