"""What both trainers need to train on packed rows: whether a model can, and rows for every micro-batch."""

import itertools
from collections.abc import Sequence
from typing import TypeVar

from accelerate.utils import DistributedType
from peft import PeftModel
from transformers import Trainer

from helpsteer_rloo.model.forward import base_model, prepare_packed
from helpsteer_rloo.sizes import DEFAULT_TOKENS, DEFAULT_TOKENS_CPU
from helpsteer_rloo.training.sharding import refuse_lone_loading

Unit = TypeVar("Unit")


def set_up_packing(trainer: Trainer) -> str | None:
    """Prepare a trainer's model for packed rows, or say what keeps it from being trained on them.

    Processes may have different numbers of rows in a micro-batch, even none. That is sound where each holds all weights
    and gradients are exchanged once a step (DDP), and under FSDP2 with idle rows (`RowPasses`). FSDP1 and DeepSpeed
    would wait for each other for ever.

    Raises:
        ValueError: FSDP2 is to load weights on one process only.
    """
    kind = trainer.accelerator.distributed_type
    if trainer.accelerator.is_fsdp2:
        refuse_lone_loading(trainer)
        # Else the trainer keeps gradients whole, and in the type of the pass, until the last micro-batch of a step.
        trainer.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    elif kind != DistributedType.NO and not kind.name.startswith("MULTI_"):
        return f"the engine {kind.name} of accelerate"
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return "virtual tokens"
    if trainer.args.neftune_noise_alpha is not None:
        return "NEFTune's noise, which is scaled by the length of a sequence"
    if getattr(base_model(model).config, "attention_dropout", 0):
        return "dropout in attention"
    if not prepare_packed(model):
        return f"the architecture of {type(base_model(model)).__name__}, or layers or adapters that it was given"
    return None


def row_budget(trainer: Trainer, tokens: int | None) -> int:
    """Tokens in a row: `tokens`, or what suits the device."""
    return tokens or (DEFAULT_TOKENS_CPU if trainer.accelerator.device.type == "cpu" else DEFAULT_TOKENS)


def deal(units: Sequence[Unit], hands: int) -> list[list[Unit]]:
    """Deal units in order over `hands`, as evenly as their number allows; the last hand is empty only if all are.

    >>> deal([1, 2, 3], 2), deal([1], 3)
    ([[1], [2, 3]], [[], [], [1]])
    """
    bounds = [len(units) * hand // hands for hand in range(hands + 1)]
    return [list(units[start:end]) for start, end in itertools.pairwise(bounds)]
