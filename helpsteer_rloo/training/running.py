"""One run of a trainer, as both stages do it: from the newest whole checkpoint to the end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from helpsteer_rloo.checkpoints import damage, full_disk_explained
from helpsteer_rloo.training.bad_steps import skip_bad_steps
from helpsteer_rloo.training.metrics_log import record_metrics
from helpsteer_rloo.training.reporting import reporting
from helpsteer_rloo.training.sealing import checkpoint_to_go_on_from, seal_checkpoints
from helpsteer_rloo.training.sharding import refuse_other_engine, save_finished
from helpsteer_rloo.training.stopping import stopping_on_request
from helpsteer_rloo.training.tied_weights import tied_weights_unsaid


def train_to_the_end(
    trainer: Trainer, max_bad_steps: int, begin: Callable[[Path | None], bool] = lambda checkpoint: False
) -> int:
    """Train from the newest whole checkpoint, with sealed checkpoints, skipping bad steps, telling by events.

    Args:
        trainer: Any; its output directory is where checkpoints are.
        max_bad_steps: Steps in a row whose gradient may be not finite.
        begin: Called with the checkpoint that training goes on from, once that is known; whether it ended there.

    Returns:
        The number of steps that were skipped.

    Raises:
        Stopped: a signal asked for that.
        ValueError: there were too many bad steps in a row, there is no room on the disk, or the checkpoint is one of
            another engine.
    """
    directory = str(trainer.args.output_dir)
    checkpoint = checkpoint_to_go_on_from(directory)
    if checkpoint:
        refuse_other_engine(trainer, checkpoint)
    seal_checkpoints(trainer)
    bad_steps = skip_bad_steps(trainer, max_bad_steps)
    record_metrics(trainer, checkpoint)
    ended = begin(checkpoint)
    if checkpoint and not _is_sharded(trainer):
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if ended or _was_the_last_step(trainer, state):  # transformers would take one step more
            with tied_weights_unsaid(trainer.model):
                _stand_at(trainer, checkpoint, state)
            bad_steps.on_train_begin(trainer.args, state, trainer.control)
            return bad_steps.total
    loaded_quietly = tied_weights_unsaid(trainer.model)
    with stopping_on_request(trainer), full_disk_explained(Path(directory)), reporting(trainer), loaded_quietly:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return bad_steps.total


def _was_the_last_step(trainer: Trainer, state: TrainerState) -> bool:
    """Whether a checkpoint's step is the last one, also by arguments that may ask for more than it was trained with."""
    if trainer.args.max_steps > 0:
        return state.global_step >= trainer.args.max_steps
    return state.global_step >= state.max_steps and trainer.args.num_train_epochs <= state.num_train_epochs


def _is_sharded(trainer: Trainer) -> bool:
    """Whether weights can only be loaded once the engine has shared them out, which training does."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def _stand_at(trainer: Trainer, checkpoint: Path, state: TrainerState) -> None:
    """Give a trainer weights and state of the end of its training, the best weights if they are the result.

    Raises:
        ValueError: the checkpoint with the best weights is not what was saved.
    """
    trainer.state, source = state, checkpoint
    if trainer.args.load_best_model_at_end and state.best_global_step:
        source = checkpoint.with_name(f"checkpoint-{state.best_global_step}")
        if problem := damage(source):
            raise ValueError(f"Training had ended with {source} as the best, which cannot be used: {problem}.")
    cast(Any, trainer)._load_from_checkpoint(str(source))


def save_final(trainer: Trainer) -> None:
    """Save the model of a finished run where its checkpoints are; to be called by all processes.

    Raises:
        ValueError: there is no room for it on the disk.
    """
    directory = str(trainer.args.output_dir)
    with full_disk_explained(Path(directory)):
        save_finished(trainer, directory)
