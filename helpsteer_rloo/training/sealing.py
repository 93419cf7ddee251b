"""Checkpoints of a trainer, sealed as they are saved, and the one to go on from."""

import warnings
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import Trainer, TrainerCallback

from helpsteer_rloo.checkpoints import keep_newest, newest_whole, seal


def seal_checkpoints(trainer: Trainer) -> None:
    """Let a trainer seal every checkpoint, and keep the newest by step instead of by the clock.

    `save_total_limit` counts sealed checkpoints from here on.
    """
    limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None
    trainer.add_callback(_Sealing(limit))


def checkpoint_to_go_on_from(output_dir: str) -> Path | None:
    """The newest whole checkpoint, if there is one, with a warning for each newer one that is not whole."""
    checkpoint, problems = newest_whole(Path(output_dir))
    for problem in problems:
        goes_on = f"Going on from {checkpoint}." if checkpoint else "There is none before it: starting anew."
        warnings.warn(f"{problem} {goes_on}", stacklevel=2)
    return checkpoint


class _Sealing(TrainerCallback):
    def __init__(self, limit: int | None) -> None:
        self._limit = limit

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seal the checkpoint once every process has written its part of it."""
        PartialState().wait_for_everyone()
        if not state.is_world_process_zero:
            return
        directory = Path(args.output_dir)
        seal(directory / f"checkpoint-{state.global_step}")
        if self._limit:
            best = state.best_model_checkpoint
            keep_newest(directory, self._limit, Path(best) if best else None)
