"""Optimizer steps whose gradient is not finite: skipped and counted, and too many in a row end the run."""

import warnings
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState


class BadSteps(TrainerCallback, ExportableState):
    """Leaves weights and optimizer as they are where a gradient is not finite.

    A loss or a reward that is no number makes the gradient so; data parallelism gives all processes the same one.
    Checkpoints keep the count. With fp16, loss scaling does this by itself, and with DeepSpeed the engine.

    Args:
        most: Steps in a row that may be skipped.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.total = 0
        self.in_a_row = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"total": self.total, "in_a_row": self.in_a_row}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on with the counts that the checkpoint keeps, if training goes on from one."""
        kept = state.stateful_callbacks.get(type(self).__name__, {"attributes": {}})["attributes"]
        self.total, self.in_a_row = kept.get("total", 0), kept.get("in_a_row", 0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop the gradients, if they are not finite.

        Raises:
            ValueError: there were too many such steps in a row.
        """
        parameters = list(kwargs["model"].parameters())
        gradients = cast(list[Tensor], [p.grad for p in parameters if p.grad is not None])
        if args.fp16 or not gradients or _is_finite(gradients):
            self.in_a_row = 0
            return
        self.total += 1
        self.in_a_row += 1
        for parameter in parameters:
            parameter.grad = None
        step = state.global_step + 1
        if self.in_a_row > self._most:
            raise ValueError(
                f"The gradient was not finite in {self.in_a_row} optimizer steps in a row, up to step {step}; none of "
                f"them changed the weights, and the last checkpoint in {args.output_dir} is good. Lower "
                "--learning_rate, or look at the rewards and rows of these steps; --max_bad_steps allows more."
            )
        warnings.warn(f"Step {step} is skipped: its gradient is not finite ({self.total} so far).", stacklevel=2)


def _is_finite(gradients: list[Tensor]) -> bool:
    norm = get_total_norm(gradients)
    if isinstance(norm, DTensor):  # weights shared out over processes: the norm of all parts
        norm = norm.full_tensor()
    return bool(torch.isfinite(norm))


def skip_bad_steps(trainer: Trainer, most: int) -> BadSteps:
    """Let a trainer skip steps whose gradient is not finite, at most so many in a row; the counter of them."""
    callback = BadSteps(most)
    trainer.add_callback(callback)
    return callback
