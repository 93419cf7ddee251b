"""The weight of KL, adapted to a target after every batch of rollouts, and kept with the checkpoints."""

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from helpsteer_rloo.objectives import adapted_kl_coef


class KLWeight(TrainerCallback, ExportableState):
    """Keeps a trainer's `beta` where the KL of a completion comes to its target.

    Checkpoints keep the state of a callback that is exportable, so that a run that goes on from one goes on with the
    weight of that step.

    Args:
        trainer: Whose `beta` is set.
        target: KL of a completion, in nats.
    """

    def __init__(self, trainer: Any, target: float) -> None:
        self._trainer, self._target = trainer, target

    def adapt(self, kl: float) -> None:
        """Set the weight for the next batch, after one with this mean KL of a completion, in nats."""
        self._trainer.beta = adapted_kl_coef(self._trainer.beta, kl, self._target)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"beta": self._trainer.beta}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on with the weight that the checkpoint keeps, if training goes on from one."""
        kept = state.stateful_callbacks.get(type(self).__name__)
        if kept is not None:
            self._trainer.beta = kept["attributes"]["beta"]
