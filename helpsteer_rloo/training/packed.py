"""What both trainers need to train on packed rows: whether a model can, and the backward pass row by row."""

import contextlib
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer

from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.model.forward import base_model, prepare_packed
from helpsteer_rloo.model.sharding import is_sharded
from helpsteer_rloo.packing import PackedRow
from helpsteer_rloo.training.sharding import most_of_all, refuse_lone_loading

DEFAULT_TOKENS = 4096
DEFAULT_TOKENS_CPU = 1024
"""Tokens in a row, unless it is said: what keeps the hardware busy; more only costs memory."""
IDLE_ROW = PackedRow((TokenGroup((), (0,), ((0,),)),))
"""The least that a pass can be made of."""
Row = TypeVar("Row")
Unit = TypeVar("Unit")


def set_up_packing(trainer: Trainer) -> str | None:
    """Prepare a trainer's model for packed rows, or say what keeps it from being trained on them.

    Processes may have different numbers of rows in a micro-batch, even none. That is sound where each holds all weights
    and gradients are exchanged once a step (DDP), and under FSDP2 with idle rows (`sum_over_rows`). FSDP1 and DeepSpeed
    would wait for each other for ever.

    Raises:
        ValueError: FSDP2 is to load weights on one process only.
    """
    kind = trainer.accelerator.distributed_type
    if trainer.accelerator.is_fsdp2:
        refuse_lone_loading(trainer)
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
        return f"the architecture of {type(base_model(model)).__name__}"
    trainer.args.ddp_broadcast_buffers = False  # constants, whose broadcast would wait for processes without a row
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


def sum_over_rows(
    trainer: Trainer,
    model: nn.Module,
    rows: Sequence[Row],
    loss_of: Callable[[Row], Tensor],
    output_of: Callable[[PackedRow], Tensor],
) -> Tensor:
    """Sum of the losses of a micro-batch's rows, with the activations of one row in memory at a time.

    In training, every row but the last is sent backward here, scaled as the trainer scales the micro-batch; the tensor
    returned has the value of the whole sum and the graph of the last row, which the trainer sends backward itself.
    Under DDP gradients are synchronized over processes with the last row only. Under FSDP2 every pass exchanges weights
    and gradients, so processes with fewer rows than others join in with idle ones.

    Args:
        trainer: Whose accelerator sends losses backward.
        model: The model as the trainer has wrapped it.
        rows: Of this process, perhaps none.
        loss_of: The loss of one of them.
        output_of: What the model makes of any packed row, from all of its weights that are trained.
    """
    losses: list[Callable[[], Tensor]] = [partial(loss_of, row) for row in rows]
    sharded = is_sharded(model)
    if sharded:
        losses += [lambda: output_of(IDLE_ROW).sum() * 0.0] * (most_of_all(trainer, len(rows)) - len(rows))
    if not losses:
        return next(p for p in model.parameters() if p.requires_grad).sum() * 0.0
    *earlier, last = losses
    done = torch.zeros((), device=trainer.args.device)
    training = torch.is_grad_enabled()
    # Under FSDP2 gradients that are not exchanged would be kept whole, and the exchange of a row's overlaps with work.
    waits = training and not sharded
    with trainer.accelerator.no_sync(model) if waits else contextlib.nullcontext():
        for loss_of_row in earlier:
            loss = loss_of_row()
            if training:
                with torch.autocast(loss.device.type, enabled=False):
                    trainer.accelerator.backward(loss / _accumulation(trainer))
            done = done + loss.detach()
    return last() + done


def _accumulation(trainer: Any) -> int:
    return trainer.current_gradient_accumulation_steps
