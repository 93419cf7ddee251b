"""A trainer that tells of its steps and metrics by events, in place of its own bars and prints."""

from collections.abc import Generator, Sized
from contextlib import contextmanager
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from helpsteer_rloo.events import PATIENCE, Measured, Task, publish


@contextmanager
def reporting(trainer: Trainer) -> Generator[None]:
    """Within, the trainer tells of itself on the main process; from now on it draws and prints nothing of its own."""
    for own in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(own)
    callback = _Reports()
    trainer.add_callback(callback)
    try:
        yield
    finally:
        trainer.remove_callback(callback)


class _Reports(TrainerCallback):
    def __init__(self) -> None:
        self._training: Task | None = None
        self._evaluation: Task | None = None
        self._batches = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell of the first step, or of the one that is gone on from."""
        if state.is_world_process_zero:
            self._training = Task("training", state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell of an optimizer step."""
        if self._training is not None:
            self._training.reach(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell of the end."""
        if self._training is not None:
            self._training.end()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Tell what is logged, which is what trackers are sent."""
        if state.is_world_process_zero and logs:
            publish(Measured("training", state.global_step, state.max_steps, dict(logs)))

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Tell of a batch of an evaluation, where its number of batches is known."""
        if not state.is_world_process_zero or not isinstance(eval_dataloader, Sized):
            return
        if self._evaluation is None:
            self._evaluation = Task("evaluation", len(eval_dataloader), unit="batches", patience=PATIENCE)
            self._batches = 0
        self._batches += 1
        self._evaluation.reach(self._batches)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell of the end of an evaluation."""
        if self._evaluation is not None:
            self._evaluation.end()
            self._evaluation = None
