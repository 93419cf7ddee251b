"""Training of a reward model: from the flags of `reward_model_training.py` to a finished `RewardTrainer` run."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from helpsteer_rloo.data.preparation import to_choose_by
from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.model.forward import scalar_head, score_sequences
from helpsteer_rloo.model.sharding import is_sharded, whole_weights
from helpsteer_rloo.settings.config import Settings
from helpsteer_rloo.settings.knobs import RewardKnobs
from helpsteer_rloo.training.early_stopping import BY_LOSS, StopsEarly, had_stopped
from helpsteer_rloo.training.pair_data import pair_dataset
from helpsteer_rloo.training.reward import RewardConfig, RewardTrainer
from helpsteer_rloo.training.running import save_final, train_to_the_end
from helpsteer_rloo.training.trl_configs import build_args, build_model_setup


def train_reward_model(
    settings: Settings[RewardKnobs],
    tokenizer: PreTrainedTokenizerBase,
    train: list[TokenGroup],
    validation: list[TokenGroup],
    probes: list[list[int]],
) -> dict[str, Any]:
    """Train a reward model, going on from the newest whole checkpoint in its directory, and save it there.

    Args:
        settings: Knobs and TRL flags.
        tokenizer: Saved with the model.
        train: Groups to train on.
        validation: Groups for `--eval_strategy`, if that is set and no step is chosen by it.
        probes: Token sequences whose scores are returned, to be compared with those of the saved model.

    Returns:
        `steps`, `bad_steps` (those of them that were skipped), `last_metrics`, `base`, `adapter`, `probe_scores`, and
        `computed_in`, the type these were computed in, which under FSDP2 need not be that of the saved weights.
    """
    args, patience = _args(settings), settings.own.early_stopping_patience
    setup = build_model_setup(settings, args, task_type="SEQ_CLS")
    args.model_init_kwargs = setup.init_kwargs
    if args.load_best_model_at_end:
        train, validation = to_choose_by(train)
    trainer = RewardTrainer(
        model=setup.base.name,
        args=args,
        train_dataset=pair_dataset(train, settings.own),
        eval_dataset=pair_dataset(validation, settings.own) if args.eval_strategy != "no" else None,
        processing_class=tokenizer,
        quantization_config=setup.quantization,
        peft_config=setup.peft,
    )
    if patience:
        trainer.add_callback(StopsEarly(patience))

    def had_ended(checkpoint: Path | None) -> bool:
        return bool(patience and checkpoint and had_stopped(checkpoint, patience))

    bad_steps = train_to_the_end(trainer, settings.own.max_bad_steps, had_ended)
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    to_stored_dtype(model, setup.base.dtype)
    save_final(trainer)
    with whole_weights(model):
        scores = score_sequences(model, probes, batch_size=1)
        computed_in = str(next(model.parameters()).dtype).removeprefix("torch.")
    return {
        "steps": trainer.state.global_step,
        "bad_steps": bad_steps,
        "last_metrics": _last_metrics(trainer.state.log_history),
        "base": asdict(setup.base),
        "adapter": setup.peft is not None,
        "probe_scores": scores,
        "computed_in": computed_in,
    }


def _args(settings: Settings[RewardKnobs]) -> RewardConfig:
    own = settings.own
    defaults = {**BY_LOSS, "eval_steps": settings.trl["save_steps"]} if own.early_stopping_patience else {}
    if "metric_for_best_model" in settings.trl:
        defaults.pop("greater_is_better", None)  # which transformers infers from the metric
    return build_args(
        RewardConfig,
        settings,
        **{name: value for name, value in defaults.items() if name not in settings.trl},
        output_dir=own.output_dir,
        max_length=None,
        engine=own.engine,
        label_smoothing=own.label_smoothing,
        packed_tokens=own.packed_tokens,
    )


def _last_metrics(history: list[dict[str, float]]) -> dict[str, float]:
    """The training metrics logged last; unlike the mean loss of a run they do not depend on interruptions."""
    logged = [row for row in history if "loss" in row]
    return {name: logged[-1][name] for name in ("loss", "accuracy", "margin") if name in logged[-1]} if logged else {}


def to_stored_dtype(model: torch.nn.Module, dtype: str) -> None:
    """Round the head to the type in which stock loaders will hold it, so that saved and loaded scores agree."""
    _, head = scalar_head(model)
    stored: torch.dtype = getattr(torch, dtype)
    if not is_sharded(model):
        head.to(stored)
        return
    with torch.no_grad():  # FSDP holds weights in the type that they were given to it in
        for parameter in head.parameters():
            parameter.copy_(parameter.to(stored))
