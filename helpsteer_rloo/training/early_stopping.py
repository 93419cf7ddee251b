"""Ending the training of a reward model when its held-out loss no longer falls, exactly, interruptions or not."""

from pathlib import Path
from typing import Any, cast

from transformers import EarlyStoppingCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from helpsteer_rloo.settings.flags import FlagValue

_COUNTER = "early_stopping_patience_counter"
BY_LOSS: dict[str, FlagValue] = {
    "eval_strategy": "steps",
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": False,
}
"""Settings of a training that ends early, but for those that the user gave."""


class StopsEarly(EarlyStoppingCallback):
    """transformers' callback, which goes on counting where a checkpoint left off."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over the count that the checkpoint keeps, if training goes on from one."""
        super().on_train_begin(args, state, control, **kwargs)
        self.early_stopping_patience_counter = _count(state)


def had_stopped(checkpoint: Path, patience: int) -> bool:
    """Whether a training had ended early at the step of its checkpoint."""
    return _count(TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))) >= patience


def _count(state: TrainerState) -> int:
    kept = cast(dict[str, Any], state.stateful_callbacks or {}).get(StopsEarly.__name__)
    return int(kept["attributes"][_COUNTER]) if kept else 0
