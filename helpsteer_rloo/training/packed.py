"""What both trainers need to train on packed rows: whether a model can, and the backward pass row by row."""

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer

from helpsteer_rloo.model.forward import base_model, prepare_packed
from helpsteer_rloo.model.fused_lora import fuse_lora

DEFAULT_TOKENS = 4096
DEFAULT_TOKENS_CPU = 1024
"""Tokens in a row, unless it is said: what keeps the hardware busy; more only costs memory."""
Row = TypeVar("Row")
Unit = TypeVar("Unit")


def packing_obstacle(trainer: Trainer) -> str | None:
    """What keeps a trainer's model from being trained on packed rows, if anything does; else the model is set up."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.accelerator.num_processes > 1:
        # Processes have rows in different micro-batches; data parallelism and the gathering of metrics then wait for
        # each other for ever.
        return "several processes"
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return "virtual tokens"
    if not prepare_packed(model):
        return f"the architecture of {type(base_model(model)).__name__}"
    fuse_lora(model)
    return None


def row_budget(trainer: Trainer, tokens: int | None) -> int | None:
    """Tokens in a row; no limit under DeepSpeed, whose engine counts one backward pass a micro-batch."""
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        return None
    return tokens or (DEFAULT_TOKENS_CPU if trainer.accelerator.device.type == "cpu" else DEFAULT_TOKENS)


def deal(units: Sequence[Unit], hands: int) -> list[list[Unit]]:
    """Deal units in order over `hands`, as evenly as their number allows; the last hand is empty only if all are.

    >>> deal([1, 2, 3], 2), deal([1], 3)
    ([[1], [2, 3]], [[], [], [1]])
    """
    bounds = [len(units) * hand // hands for hand in range(hands + 1)]
    return [list(units[start:end]) for start, end in itertools.pairwise(bounds)]


def sum_over_rows(trainer: Trainer, model: nn.Module, rows: Sequence[Row], loss_of: Callable[[Row], Tensor]) -> Tensor:
    """Sum of the losses of a micro-batch's rows, with the activations of one row in memory at a time.

    In training, every row but the last is sent backward here, scaled as the trainer scales the micro-batch; the tensor
    returned has the value of the whole sum and the graph of the last row, which the trainer sends backward itself.
    Gradients are synchronized over processes with the last row only.
    """
    if not rows:
        return next(p for p in model.parameters() if p.requires_grad).sum() * 0.0
    *earlier, last = rows
    done = torch.zeros((), device=trainer.args.device)
    training = torch.is_grad_enabled()
    with trainer.accelerator.no_sync(model) if training else contextlib.nullcontext():
        for row in earlier:
            loss = loss_of(row)
            if training:
                with torch.autocast(loss.device.type, enabled=False):
                    trainer.accelerator.backward(loss / _accumulation(trainer))
            done = done + loss.detach()
    return loss_of(last) + done


def _accumulation(trainer: Any) -> int:
    return trainer.current_gradient_accumulation_steps
