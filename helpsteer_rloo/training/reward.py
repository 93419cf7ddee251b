"""Reward-model training on TRL's `RewardTrainer`, with the scalar head always trained and always saved."""

import copy
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel, TaskType
from transformers import PreTrainedTokenizerBase

from helpsteer_rloo.config import RewardKnobs, Settings
from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.model.forward import scalar_head, score_sequences
from helpsteer_rloo.run_dir import latest_checkpoint
from helpsteer_rloo.training.trl_configs import build_args, build_model_setup


class RewardTrainer(trl.RewardTrainer):
    """TRL's `RewardTrainer`, same arguments, with three differences.

    - The scalar head is trained and saved whatever the `peft_config` says: its task type becomes `SEQ_CLS`. (TRL 1.16
      leaves the head frozen and unsaved without a task type, and crashes on `CAUSAL_LM`.)
    - Under bf16 the trained weights of a LoRA run, the head among them, are kept in float32. (PEFT leaves the head in
      the base's bf16, where most updates of 1e-5 to weights around 0.02 are rounded away.)
    - Pairs that `max_length` removes are counted and reported. (TRL drops them without a word.)
    """

    def __init__(self, *args: Any, peft_config: PeftConfig | None = None, **kwargs: Any) -> None:
        """Take the arguments of `trl.RewardTrainer`.

        Raises:
            ValueError: the model is a `PeftModel` whose scalar head is frozen.
        """
        super().__init__(*args, peft_config=with_trained_head(peft_config), **kwargs)
        inner = self.accelerator.unwrap_model(self.model)
        quantized = getattr(inner, "is_loaded_in_4bit", False) or getattr(inner, "is_loaded_in_8bit", False)
        if isinstance(inner, PeftModel) and self.args.bf16 and not quantized:
            for parameter in inner.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        head = getattr(inner.get_base_model() if isinstance(inner, PeftModel) else inner, "score", None)
        if isinstance(head, torch.nn.Module) and not any(parameter.requires_grad for parameter in head.parameters()):
            raise ValueError(
                "The model's scalar head 'score' is frozen, so training would optimize against a random head. "
                "Create the adapter with task_type='SEQ_CLS', or pass `peft_config` and let the trainer do so."
            )

    def _prepare_dataset(
        self, dataset: Dataset | IterableDataset, processing_class: Any, args: Any, dataset_name: str
    ) -> Dataset | IterableDataset:
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if isinstance(dataset, Dataset) and isinstance(prepared, Dataset) and len(prepared) < len(dataset):
            warnings.warn(
                f"{len(dataset) - len(prepared)} of {len(dataset)} pairs of the {dataset_name} data set are longer "
                f"than max_length={args.max_length} and were dropped.",
                stacklevel=2,
            )
        return prepared


def with_trained_head(config: PeftConfig | None) -> PeftConfig | None:
    """The adapter configuration with task type `SEQ_CLS`, under which PEFT trains and saves the scalar head."""
    if config is None or config.task_type == TaskType.SEQ_CLS:
        return config
    config = copy.copy(config)
    config.task_type = TaskType.SEQ_CLS
    return config


def pair_dataset(groups: list[TokenGroup]) -> Dataset:
    """One row a preference: `chosen_ids` and `rejected_ids`, each prompt and continuation together."""
    return Dataset.from_list(
        [
            {"chosen_ids": list(group.sequence(p.chosen)), "rejected_ids": list(group.sequence(p.rejected))}
            for group in groups
            for p in group.preferences
        ]
    )


def train_reward_model(
    settings: Settings[RewardKnobs],
    tokenizer: PreTrainedTokenizerBase,
    train: list[TokenGroup],
    validation: list[TokenGroup],
    probes: list[list[int]],
) -> dict[str, Any]:
    """Train a reward model, going on from the newest checkpoint in its directory, and save it there.

    Args:
        settings: Knobs and TRL flags.
        tokenizer: Saved with the model.
        train: Groups to train on.
        validation: Groups for `--eval_strategy`, if that is set.
        probes: Token sequences whose scores are returned, to be compared with those of the saved model.

    Returns:
        `steps`, `last_metrics`, `base`, `adapter`, and `probe_scores`.
    """
    args = build_args(trl.RewardConfig, settings, output_dir=settings.own.output_dir, max_length=None)
    setup = build_model_setup(settings, args, task_type="SEQ_CLS")
    args.model_init_kwargs = setup.init_kwargs
    trainer = RewardTrainer(
        model=setup.base.name,
        args=args,
        train_dataset=pair_dataset(train),
        eval_dataset=pair_dataset(validation) if args.eval_strategy != "no" else None,
        processing_class=tokenizer,
        quantization_config=setup.quantization,
        peft_config=setup.peft,
    )
    checkpoint = latest_checkpoint(Path(settings.own.output_dir))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    to_stored_dtype(model, setup.base.dtype)
    trainer.save_model(settings.own.output_dir)
    scores = score_sequences(model, probes, batch_size=1)
    return {
        "steps": trainer.state.global_step,
        "last_metrics": _last_metrics(trainer.state.log_history),
        "base": asdict(setup.base),
        "adapter": setup.peft is not None,
        "probe_scores": scores,
    }


def _last_metrics(history: list[dict[str, float]]) -> dict[str, float]:
    """The training metrics logged last; unlike the mean loss of a run they do not depend on interruptions."""
    logged = [row for row in history if "loss" in row]
    return {name: logged[-1][name] for name in ("loss", "accuracy", "margin") if name in logged[-1]} if logged else {}


def to_stored_dtype(model: torch.nn.Module, dtype: str) -> None:
    """Round the head to the type in which stock loaders will hold it, so that saved and loaded scores agree."""
    _, head = scalar_head(model)
    head.to(getattr(torch, dtype))
