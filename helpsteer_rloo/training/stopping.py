"""Training that stops when it is asked to, where it can go on from."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate.utils import reduce
from transformers import Trainer, TrainerCallback

from helpsteer_rloo.preemption import Stopped, StopRequest, listening


@contextmanager
def stopping_on_request(trainer: Trainer) -> Generator[None]:
    """Within, a signal makes the trainer save and stop at the end of its step.

    Raises:
        Stopped: at the end, if that came before the last step. In the last one it is too late for this training, and
            the run stops before its next stage.
    """
    with listening() as request:
        callback = _Stop(request)
        trainer.add_callback(callback)
        try:
            yield
        finally:
            trainer.remove_callback(callback)
        if callback.stopped_at is not None:
            place = trainer.args.output_dir
            raise Stopped(f"Stopped as asked, after step {callback.stopped_at}; its checkpoint is in {place}.")


class _Stop(TrainerCallback):
    def __init__(self, request: StopRequest) -> None:
        self._request = request
        self.stopped_at: int | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop, if any process was asked to."""
        if state.global_step >= state.max_steps:
            return
        made = torch.tensor(float(self._request.made), device=args.device)
        if args.world_size > 1:  # all stop at the same step, or those that go on would wait for the others for ever
            made = cast(torch.Tensor, reduce(made))
        if made.item():
            control.should_save = control.should_training_stop = True
            self.stopped_at = state.global_step
            self._request.answered = True
