"""Passes over the packed rows of micro-batches, the activations of one row in memory at a time."""

import contextlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers import Trainer

from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.model.memory import is_out_of_memory, release
from helpsteer_rloo.model.sharding import is_sharded
from helpsteer_rloo.packing import PackedRow
from helpsteer_rloo.training.sharding import most_of_all

IDLE_ROW = PackedRow((TokenGroup((), (0,), ((0,),)),))
"""The least that a pass can be made of."""
Found = TypeVar("Found")


class Row(Protocol):
    """A packed row with what a loss needs to know of it."""

    @property
    def row(self) -> PackedRow:
        """The row."""
        ...

    def halves(self) -> "Sequence[Row]":
        """Two rows with half of its groups each; none if it has one group."""
        ...


AnyRow = TypeVar("AnyRow", bound=Row)


@dataclass(frozen=True)
class MicroBatch(Generic[AnyRow, Found]):
    """Rows of one process, perhaps none, and their losses.

    `loss_of` gives the loss of a row and what is to be kept of the pass; it has no other effect, so that it may be
    called again. `output_of` is what the model makes of any packed row, from all of its weights that are trained.
    """

    rows: Sequence[AnyRow]
    loss_of: Callable[[AnyRow], tuple[Tensor, Found]]
    output_of: Callable[[PackedRow], Tensor]


class RowPasses:
    """The passes of a trainer over its micro-batches.

    Args:
        trainer: Whose accelerator sends losses backward.
        budget: Most tokens in a row; it falls where memory runs out.
    """

    def __init__(self, trainer: Trainer, budget: int) -> None:
        self._trainer: Any = trainer
        self.budget = budget
        self._longest: int | None = None
        self._step = -1
        self._of_step: list[MicroBatch[Any, Any]] = []

    def total(self, model: nn.Module, batch: MicroBatch[AnyRow, Found]) -> tuple[Tensor, list[Found]]:
        """Sum of the losses of a micro-batch's rows, and what was kept of each pass.

        In training, gradients are sent backward row by row, scaled as the trainer scales the micro-batch, which sends
        backward the tensor that is returned. Where memory runs out, the optimizer step begins again with rows of half
        as many groups, which leaves its gradient as it would have been.

        Raises:
            ValueError: memory runs out in a row of one group.
            RuntimeError: it runs out with several processes, of which one cannot begin again alone.
        """
        if self._trainer.accelerator.num_processes > 1:
            return self._together(model, batch)
        if self._step != self._trainer.state.global_step or not self._in_training:
            self._step, self._of_step = self._trainer.state.global_step, []
        self._of_step.append(batch)
        pending = [batch]
        while True:
            results, failed = self._attempt(pending)
            if failed is None:
                return results[-1]
            self._halve(failed)
            release()
            model.zero_grad()
            pending = self._of_step

    def _attempt(
        self, batches: Sequence[MicroBatch[Any, Any]]
    ) -> tuple[list[tuple[Tensor, list[Any]]], PackedRow | None]:
        """Losses and findings of micro-batches, sent backward; or the row that there was no memory for."""
        results: list[tuple[Tensor, list[Any]]] = []
        for batch in batches:
            total, found = torch.zeros((), device=self._trainer.args.device), list[Any]()
            for row in self._fitting(batch.rows):
                try:
                    loss, kept = batch.loss_of(row)
                    loss = self._sent_backward(loss)
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    return [], row.row
                total = total + loss
                found.append(kept)
            results.append((total.requires_grad_() if self._in_training else total, found))
        return results, None

    @property
    def _in_training(self) -> bool:
        """Whether losses are to be sent backward; outside of training, the caller is given their graph."""
        return torch.is_grad_enabled() and self._trainer.is_in_train

    def _sent_backward(self, loss: Tensor) -> Tensor:
        """The value of a loss, whose gradient has been taken in training."""
        if not self._in_training:
            return loss
        with torch.autocast(loss.device.type, enabled=False):
            self._trainer.accelerator.backward(loss / self._trainer.current_gradient_accumulation_steps)
        return loss.detach()

    def _fitting(self, rows: Sequence[Row]) -> list[Row]:
        """The rows, halved until each has no more tokens than there was memory for."""
        if self._longest is None:
            return list(rows)
        fitting: list[Row] = []
        for row in rows:
            halves = row.halves() if len(row.row.input_ids) > self._longest else ()
            fitting += self._fitting(halves) if halves else [row]
        return fitting

    def _halve(self, row: PackedRow) -> None:
        tokens = len(row.input_ids)
        if len(row.groups) == 1:
            raise ValueError(_too_large(row))
        self._longest = tokens // 2
        self.budget = min(self.budget, self._longest)
        warnings.warn(
            f"The device ran out of memory in a row of {tokens} tokens: step {self._trainer.state.global_step + 1} "
            f"begins again, with rows of {self._longest} from here on. --packed_tokens {self._longest} saves the try.",
            stacklevel=4,
        )

    def _together(self, model: nn.Module, batch: MicroBatch[AnyRow, Found]) -> tuple[Tensor, list[Found]]:
        """The same with several processes; the trainer sends the last row backward.

        Under DDP gradients are synchronized over processes with the last row only, for which a process without any
        takes an idle one. Under FSDP2 every pass exchanges weights and gradients, so processes with fewer rows than
        others join in with idle ones.
        """
        found: list[Found] = []

        def loss_of(row: AnyRow) -> Tensor:
            loss, kept = batch.loss_of(row)
            found.append(kept)
            return loss

        losses: list[Callable[[], Tensor]] = [lambda row=row: loss_of(row) for row in batch.rows]
        sharded = is_sharded(model)
        passes = most_of_all(self._trainer, len(batch.rows)) if sharded else 1
        losses += [lambda: batch.output_of(IDLE_ROW).sum() * 0.0] * (passes - len(batch.rows))
        *earlier, last = losses
        done = torch.zeros((), device=self._trainer.args.device)
        # Under FSDP2 gradients that are not exchanged would be kept whole; and the exchange overlaps with work.
        waits = self._in_training and not sharded
        with self._trainer.accelerator.no_sync(model) if waits else contextlib.nullcontext():
            for loss_of_row in earlier:
                done = done + self._sent_backward(loss_of_row())
        return last() + done, found


def _too_large(row: PackedRow) -> str:
    span = row.spans[0]
    lengths = sorted(span.continuations)
    return (
        f"The device is out of memory in a single prompt with its continuations: {span.prompt} tokens and "
        f"{len(lengths)} continuations of {lengths[0]} to {lengths[-1]}, {span.end} tokens in all. Lower --max_length "
        "in reward training, --response_length or --rloo_k in RLOO; or give --gradient_checkpointing true or "
        "--use_peft. Finished stages are not run again."
    )
