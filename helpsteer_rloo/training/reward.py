"""Reward-model training on TRL's `RewardTrainer`, with the scalar head always trained and always saved."""

import copy
import math
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import trl
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel, TaskType
from torch import Tensor

from helpsteer_rloo.model.forward import packed_scores, scalar_head
from helpsteer_rloo.objectives import preference_losses
from helpsteer_rloo.packing import PackedRow
from helpsteer_rloo.training.exact_resume import ResumesExactly
from helpsteer_rloo.training.packed import deal, row_budget, set_up_packing
from helpsteer_rloo.training.pairs import GroupSampler, Pair, PairBatch, PairRow, StepShape, collate_pairs, pack_pairs
from helpsteer_rloo.training.quantized import mend_quantized
from helpsteer_rloo.training.row_passes import MicroBatch, RowPasses


@dataclass
class RewardConfig(trl.RewardConfig):
    """TRL's `RewardConfig` and three more settings."""

    engine: str = field(default="packed", metadata={"help": "'packed' rows with shared prompts, or 'trl': its own."})
    packed_tokens: int | None = field(
        default=None,
        metadata={"help": "Most tokens in one packed row; a larger pair stands alone. Default: 4096, on a CPU 1024."},
    )
    label_smoothing: float = field(default=0.0, metadata={"help": "Probability that a label is wrong, below 0.5."})


class RewardTrainer(ResumesExactly, trl.RewardTrainer):
    """TRL's `RewardTrainer`, same arguments, with seven differences.

    - Pairs are computed in packed rows: next to no padding, the prompt once for both responses, and for all pairs that
      share a value in the column `group`, if the data set has one. Loss and gradients are TRL's to float error; only
      where the batches of one optimizer step differ in size does every pair count alike, instead of every batch.
    - With a column `group`, a shuffled batch holds whole prompts, as far as sizes allow; TRL scatters their pairs.
    - The scalar head is trained and saved whatever the `peft_config` says: its task type becomes `SEQ_CLS`. (TRL 1.16
      leaves the head frozen and unsaved without a task type, and crashes on `CAUSAL_LM`.)
    - Under bf16 the trained weights of a LoRA run, the head among them, are kept in float32. (PEFT leaves the head in
      the base's bf16, where most updates of 1e-5 to weights around 0.02 are rounded away.)
    - Pairs that `max_length` removes are counted and reported. (TRL drops them without a word.)
    - A data set may have a column `weight`, how much each pair counts, and `label_smoothing` is for labels that are
      wrong; both are refused where packed rows cannot be used.
    - The metrics of a run that goes on from a checkpoint are those of one that was not stopped.
    """

    def __init__(self, *args: Any, peft_config: PeftConfig | None = None, **kwargs: Any) -> None:
        """Take the arguments of `trl.RewardTrainer`.

        Raises:
            ValueError: the model is a `PeftModel` whose scalar head is frozen.
        """
        super().__init__(*args, peft_config=with_trained_head(peft_config), **kwargs)
        mend_quantized(self)
        inner = self.accelerator.unwrap_model(self.model)
        if isinstance(inner, PeftModel) and self.args.bf16:
            for parameter in inner.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        head = getattr(inner.get_base_model() if isinstance(inner, PeftModel) else inner, "score", None)
        if isinstance(head, torch.nn.Module) and not any(parameter.requires_grad for parameter in head.parameters()):
            raise ValueError(
                "The model's scalar head 'score' is frozen, so training would optimize against a random head. "
                "Create the adapter with task_type='SEQ_CLS', or pass `peft_config` and let the trainer do so."
            )

        self._passes = RowPasses(self, self._set_up_packing(kwargs.get("data_collator")))

    def _set_up_packing(self, collator: Any) -> int:
        """Use packed rows if the model and the arguments allow it, or say why not; most tokens in a row."""
        self._packed = False
        self._unlogged: list[tuple[Tensor, int]] = []
        ours = self.args if isinstance(self.args, RewardConfig) else None
        if ours and ours.engine == "trl":
            self._refuse_packed_only("engine='trl'")
            return 0
        obstacle = "a data collator of its own" if collator is not None else set_up_packing(self)
        if obstacle is not None:
            self._refuse_packed_only(obstacle)
            warnings.warn(f"Using TRL's own path: packed rows cannot be used with {obstacle}.", stacklevel=4)
            return 0
        self._packed, self.data_collator = True, collate_pairs
        return row_budget(self, ours.packed_tokens if ours else None)

    def _refuse_packed_only(self, obstacle: str) -> None:
        """Refuse what TRL's passes would leave out.

        Raises:
            ValueError: there is such.
        """
        weighted = "weight" in (getattr(self.train_dataset, "column_names", None) or [])
        smoothed = isinstance(self.args, RewardConfig) and self.args.label_smoothing
        asked = [
            name for name, is_asked in (("a column `weight`", weighted), ("label_smoothing", smoothed)) if is_asked
        ]
        if asked:
            raise ValueError(f"{' and '.join(asked)} needs packed rows, which cannot be used with {obstacle}.")

    # ---- batches ----------------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns or []
        columns += [name for name in ("group", "weight") if name not in columns]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        shuffled = self._packed and self.args.train_sampling_strategy == "random"
        if not shuffled or not isinstance(dataset, Dataset) or "group" not in dataset.column_names:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return GroupSampler(list(dataset["group"]), self._step_shape, seed)

    @property
    def _step_shape(self) -> StepShape:
        return StepShape(self._train_batch_size, self.args.gradient_accumulation_steps, self.args.world_size)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of one optimizer step; pairs on one prompt are brought together across them.

        Every pair of the step, on whatever process, counts alike, and none twice at the end of an epoch.
        """
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not self._packed or not batches:
            return batches, items
        pairs = self._step_shape.new_in_turn(
            [batch["pairs"] for batch in batches], self.args.process_index, self._left_in_epoch()
        )
        counts = self.accelerator.reduce(torch.tensor(len(pairs), device=self.args.device))
        weight = len(batches) * self.args.world_size / cast(Tensor, counts).item()
        hands = deal(pack_pairs(pairs, self._passes.budget), len(batches))
        return [{"batch": PairBatch(rows, weight)} for rows in hands], items

    def _left_in_epoch(self) -> int:
        """Pairs of the epoch that no step before this one has taken; no limit where accelerate repeats none."""
        args, dataset = cast(Any, self.args), self.train_dataset
        ends_are_cut = args.dataloader_drop_last or args.ignore_data_skip or args.accelerator_config.split_batches
        if args.world_size == 1 or ends_are_cut or not isinstance(dataset, Dataset):
            return sys.maxsize
        step = self._step_shape.pairs
        return len(dataset) - self.state.global_step % math.ceil(len(dataset) / step) * step

    # ---- loss -------------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Bradley-Terry loss of a micro-batch, TRL's formula with its margins and its centering of rewards."""
        if not self._packed or "input_ids" in inputs:  # padded as TRL's collator does it
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = inputs.get("batch")
        if batch is None:  # an evaluation, which takes no part in `get_batch_samples`
            pairs = self._new_in_evaluation(inputs["pairs"])
            batch = PairBatch(pack_pairs(pairs, self._passes.budget), 1 / max(1, len(pairs)))
        loss, rewards = self._passes.total(
            model,
            MicroBatch(
                batch.rows,
                lambda row: self._row_loss(model, row, batch.weight),
                lambda row: self._row_scores(model, row),
            ),
        )
        rewards_P2 = torch.cat(rewards).float() if rewards else torch.zeros(0, 2, device=loss.device)
        self._unlogged.append((rewards_P2, sum(pairs.pair_tokens for pairs in batch.rows)))
        if not model.training or self.accelerator.sync_gradients:
            self._log_pairs()
        if not return_outputs:
            return loss
        places = [place for pairs in batch.rows for place in pairs.places]
        logits_P2 = rewards_P2.new_zeros(len(inputs.get("pairs", places)), 2)  # as many on every process, for gathering
        logits_P2[places] = rewards_P2
        return loss, {"logits": logits_P2}

    def _new_in_evaluation(self, pairs: list[Pair]) -> list[Pair]:
        """A process's pairs of an evaluation's batch without those that accelerate fills up the last one with."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return pairs
        return pairs[: max(0, state.remainder - self.args.process_index * len(pairs))]

    def _row_loss(self, model: Any, pairs: PairRow, weight: float) -> tuple[Tensor, Tensor]:
        """The loss of a row's pairs, and their rewards `[P, 2]`, chosen and rejected."""
        scores_B = self._row_scores(model, pairs.row)
        chosen_P, rejected_P = scores_B[pairs.chosen], scores_B[pairs.rejected]
        margins_P, weights_P = (
            None if values is None else torch.tensor(values, dtype=chosen_P.dtype, device=chosen_P.device)
            for values in (pairs.margins, pairs.weights)
        )
        smoothing = self.args.label_smoothing if isinstance(self.args, RewardConfig) else 0.0
        losses_P = preference_losses(
            chosen_P, rejected_P, margins_P=margins_P, weights_P=weights_P, smoothing=smoothing
        )
        centering = cast(trl.RewardConfig, self.args).center_rewards_coefficient
        if centering is not None:
            losses_P = losses_P + centering * (chosen_P + rejected_P) ** 2
        return losses_P.sum() * weight, torch.stack([chosen_P, rejected_P], dim=1).detach()

    def _row_scores(self, model: Any, row: PackedRow) -> Tensor:
        return packed_scores(model, scalar_head(self.accelerator.unwrap_model(model))[1], row)

    def _log_pairs(self) -> None:
        """TRL's metrics of one optimizer step over all processes, every pair with the same weight in the means.

        Not of every micro-batch: in one where a process has no row, its part in them would come before its part in what
        data parallelism exchanges at a first forward pass, and after it on the others.
        """
        rewards_P2 = torch.cat([rewards for rewards, _ in self._unlogged])
        tokens = sum(tokens for _, tokens in self._unlogged)
        self._unlogged = []
        margins_P = rewards_P2[:, 0] - rewards_P2[:, 1]
        sums = [len(margins_P), (margins_P > 0).sum(), margins_P.sum(), rewards_P2.sum(), tokens]
        totals = self.accelerator.reduce(torch.tensor([float(value) for value in sums], device=rewards_P2.device))
        count, right, margin, total, tokens = cast(Tensor, totals).tolist()
        extremes = [rewards_P2.min(), -rewards_P2.max()] if len(rewards_P2) else [margins_P.new_tensor(torch.inf)] * 2
        gathered = cast(Tensor, self.accelerator.gather(torch.stack(extremes)))
        lowest, highest_negated = gathered.view(-1, 2).amin(0).tolist()
        training = cast(torch.nn.Module, self.model).training
        metrics = self._metrics["train" if training else "eval"]
        if training:
            self._total_train_tokens += int(tokens)
        metrics["num_tokens"] = [self._total_train_tokens]
        if count:
            metrics["min_reward"].append(lowest)
            metrics["max_reward"].append(-highest_negated)
            means = {"mean_reward": total / (2 * count), "accuracy": right / count, "margin": margin / count}
            for name, value in means.items():
                metrics[name] += [value] * int(count)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Operations of a micro-batch: 6 a parameter and token computed, by the usual count of a training step."""
        if not self._packed:
            return super().floating_point_ops(inputs)
        tokens = sum(len(pairs.row.input_ids) for pairs in inputs["batch"].rows)
        return 6 * tokens * cast(Any, self.model).num_parameters(exclude_embeddings=True)

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
