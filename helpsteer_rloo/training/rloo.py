"""RLOO on packed rows: `ScoredRLOOTrainer` with the project's own passes and sampler in place of TRL's."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import trl
from torch import Tensor, nn

from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.model.drawing import widest_float
from helpsteer_rloo.model.forward import group_log_probs, packed_log_probs, prepare_packed
from helpsteer_rloo.model.loading import Base
from helpsteer_rloo.model.memory import AtOnce
from helpsteer_rloo.model.roles import (
    REWARD_ADAPTER,
    RewardRole,
    acting_as,
    can_share,
    load_own_reward,
    load_shared_reward,
    without_reward,
)
from helpsteer_rloo.model.rollout import Completion
from helpsteer_rloo.model.sharding import whole_weights
from helpsteer_rloo.objectives import kl_terms
from helpsteer_rloo.packing import token_count
from helpsteer_rloo.training import rollout_buffer
from helpsteer_rloo.training.exact_resume import Position
from helpsteer_rloo.training.packed import row_budget, set_up_packing
from helpsteer_rloo.training.rloo_config import RLOOConfig
from helpsteer_rloo.training.rloo_objective import RLOOObjective
from helpsteer_rloo.training.rloo_sampling import SamplingRLOOTrainer
from helpsteer_rloo.training.rloo_scoring import gathered, has_images
from helpsteer_rloo.training.rollouts import (
    KnownTokens,
    Rewards,
    Rollout,
    RolloutRow,
    Scores,
    TrainingBatch,
    TrainingSlice,
    Unit,
    lengths_of,
    rows_of,
    slices_of,
    sums_by_completion,
    units_of,
)
from helpsteer_rloo.training.row_passes import MicroBatch, RowPasses
from helpsteer_rloo.training.row_stats import RowStats, metrics_of, summed
from helpsteer_rloo.training.sharding import loaded_whole

__all__ = ["RLOOConfig", "RLOOTrainer"]


class RLOOTrainer(SamplingRLOOTrainer):
    """TRL's `RLOOTrainer`, same arguments and configurations, with these differences besides `ScoredRLOOTrainer`'s.

    - Policy, reference and reward passes run on packed rows: next to no padding, each prompt once for its completions.
    - Where every completion is trained on once, there is no pass for the old log-probabilities: the training pass
      yields them, with the same value.
    - Completions are sampled by the embedded sampler, prompts computed once, unless vLLM or a setting that only
      `generate` knows is asked for.

    Images, mixtures of experts with a balancing loss, architectures without shared-prefix attention and DeepSpeed are
    left to TRL's passes, with one warning; `engine="trl"` leaves everything to them.
    """

    def __init__(
        self, model: Any, reward_funcs: Any, args: trl.RLOOConfig | None = None, *rest: Any, **kwargs: Any
    ) -> None:
        """Take the arguments of `trl.RLOOTrainer`; `args` may be TRL's `RLOOConfig` or this project's."""
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        self._passes = RowPasses(self, self._set_up_packing())
        self._objective = RLOOObjective(
            clip=(self.epsilon_low, self.epsilon_high),
            kl_estimator=self.kl_estimator,
            kl_in_loss=self.kl_in == "loss",
            importance_correction=self.importance_correction,
            importance_cap=self.importance_cap,
        )
        self._slices: list[TrainingSlice] = []
        self._unlogged: list[RowStats] = []
        self._computed_at_once = AtOnce()

    def _set_up_packing(self) -> int:
        """Use packed rows if the model and the arguments allow it, or say why not; most tokens in a row."""
        self._packed = False
        ours = self.args if isinstance(self.args, RLOOConfig) else None
        if ours and ours.engine == "trl":
            return 0
        obstacle = "images" if self._is_vlm else "a balancing loss of experts" if self.aux_loss_enabled else None
        args = cast(Any, self.args)
        if args.steps_per_generation % args.gradient_accumulation_steps:
            obstacle = "steps_per_generation that is no multiple of gradient_accumulation_steps"
        obstacle = obstacle or set_up_packing(self)
        if obstacle is not None:
            self._refuse_packed_only(obstacle)
            self._fall_back(f"packed rows cannot be used with {obstacle}")
            return 0
        if self.ref_model is not None:
            prepare_packed(cast(nn.Module, self.ref_model))
        self._packed = True
        return row_budget(self, ours.packed_tokens if ours else None)

    def _refuse_packed_only(self, obstacle: str) -> None:
        """Refuse settings that TRL's passes would leave out.

        Raises:
            ValueError: there are such.
        """
        asked = {"kl_in='loss'": self.kl_in == "loss"}
        asked[f"importance_correction={self.importance_correction!r}"] = self.importance_correction != "none"
        if names := [name for name, is_asked in asked.items() if is_asked]:
            raise ValueError(f"{' and '.join(names)} needs packed rows, which cannot be used with {obstacle}.")

    def reward_role(self, directory: str | Path, base: Base, name: str = REWARD_ADAPTER) -> RewardRole:
        """A trained reward model: on the policy's own base where it is an adapter for it, else a model of its own.

        Args:
            directory: Of the reward model.
            base: Where the policy's base came from.
            name: Of the adapter, if it becomes one of the policy's.
        """
        policy = self.accelerator.unwrap_model(self.model)
        if self._packed and can_share(policy, base, directory):
            return load_shared_reward(policy, directory, name)
        with loaded_whole(self):
            return load_own_reward(directory)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with without_reward(self.accelerator.unwrap_model(self.model)):
            super()._save(output_dir, state_dict)

    # ---- scores -----------------------------------------------------------------------------------------------------

    def _scores(self, inputs: list[dict[str, Any]], rollout: Rollout) -> Scores:
        with whole_weights(self.accelerator.unwrap_model(self.model)):  # on which the reward model may stand
            return super()._scores(inputs, rollout)

    # ---- the batch of rollouts --------------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if not self._packed or has_images(generation_batch):
            return super()._prepare_inputs(generation_batch)
        if not self._sampling_for_training:
            batch = self._rolled_out(generation_batch, fresh=False)
            rows = rows_of(units_of(batch.rollout, self._group_size), self._passes.budget)
            return TrainingSlice(batch, rows, 1 / len(batch.rollout.prompts))
        args = cast(Any, self.args)
        per_generation, accumulation = args.steps_per_generation, args.gradient_accumulation_steps
        if not self._inside_a_batch or not self._slices:
            once = self.num_iterations == 1 and per_generation == accumulation
            batch = self._rolled_out(generation_batch, fresh=once and not self.normalize_advantages)
            units = units_of(batch.rollout, self._group_size)
            shuffled = [units[i] for i in self._mini_batch_order(len(units))]
            steps = slices_of(shuffled, self._mini_batches, accumulation, self._passes.budget)
            weight = per_generation / len(batch.rollout.prompts)
            self._slices = [TrainingSlice(batch, rows, weight) for step in steps for rows in step]
        return self._slices[self._step % per_generation]

    def _rolled_out(self, inputs: list[dict[str, Any]], *, fresh: bool) -> TrainingBatch:
        """Sample and score a batch; `fresh` leaves policy log-probabilities to the training pass.

        That needs every group whole on one process, since an advantage depends on the KL of all its siblings.
        """
        rollout = self._rollout(inputs)
        scores = self._scores(inputs, rollout)
        units = units_of(rollout, self._group_size)
        device, count = self.accelerator.device, len(rollout.prompts)
        kept = [ended or not self.mask_truncated_completions for ended in rollout.ended]
        sampler_T, drawn_T = self._told_by_sampler(rollout)
        batch = TrainingBatch(
            rollout,
            scores,
            counted_B=torch.tensor(kept, device=device),
            reference_T=None,
            old_T=None,
            sampler_T=sampler_T,
            drawn_T=drawn_T,
            advantage_B=torch.zeros(count, device=device),
            kl_B=None,
            kl_coef=self.beta,
            awaited=count,
        )
        if self.beta != 0.0:
            with self.as_reference() as model:
                batch.reference_T = self._pass(model, units)
        if not (fresh and self._groups_are_whole(units)):
            batch.old_T = self._pass(self.model, units)
            kl_B = None
            if batch.reference_T is not None:
                terms_T = kl_terms(batch.old_T, batch.reference_T, self.kl_estimator)
                kl_B = gathered(sums_by_completion(terms_T, rollout.lengths) * batch.counted_B)
            self._finish(batch, self._rule.rewards(scores, kl_B))
        return batch

    def _told_by_sampler(self, rollout: Rollout) -> tuple[Tensor | None, Tensor | None]:
        """Log-probabilities of all completion tokens by the sampler: under its policy, and under what it drew from.

        Raises:
            ValueError: it does not tell, and they are to be corrected for.
        """
        if rollout.drawn is None:
            if self.importance_correction != "none":
                raise ValueError(
                    f"importance_correction={self.importance_correction!r} needs the log-probabilities that "
                    "completions were sampled with; the embedded sampler and vLLM tell them, transformers' `generate` "
                    "does not. Leave out the settings that only `generate` knows, or use 'none'."
                )
            return None, None
        device, dtype = self.accelerator.device, widest_float(self.accelerator.device)

        def side_by_side(told: Sequence[tuple[float, ...]]) -> Tensor | None:
            values = [value for part in told for value in part]
            return torch.tensor(values, dtype=dtype, device=device) if len(values) == sum(rollout.lengths) else None

        return side_by_side([c.untruncated for c in rollout.drawn]), side_by_side([c.log_probs for c in rollout.drawn])

    def _groups_are_whole(self, units: Sequence[Unit]) -> bool:
        whole = all(len(unit.places) == self._group_size for unit in units)
        return bool(gathered(torch.tensor([float(whole)], device=self.accelerator.device)).min().item())

    @torch.no_grad()
    def _pass(self, model: Any, units: Sequence[Unit]) -> Tensor:
        """Log-probabilities of all completions' tokens side by side, in the order of the batch; `[T]`."""
        groups: list[TokenGroup] = [unit.group for unit in units]

        def run(tokens: int) -> list[list[Tensor]]:
            return group_log_probs(model, groups, tokens, self.temperature)

        with whole_weights(model), self.accelerator.autocast():
            found = self._computed_at_once.run(run, self._passes.budget, max(map(token_count, groups)))
        places = [place for unit in units for place in unit.places]
        values = dict(zip(places, (values for own in found for values in own), strict=True))
        return torch.cat([values[place] for place in sorted(values)])

    @property
    def is_packed(self) -> bool:
        """Whether passes are this project's, on packed rows."""
        return self._packed

    def penalties_of(self, drawn: Sequence[Completion]) -> list[float]:
        """What is subtracted from the score of each completion."""
        return [self.missing_eos_penalty * (not c.ended) + self.length_penalty * len(c.ids) for c in drawn]

    def rewards_of(self, groups: Sequence[TokenGroup], drawn: Sequence[Completion]) -> list[float]:
        """Scores less penalties of completions, one a prompt, as many on every process; NaN where there is no score."""
        texts = self._tokenizer.batch_decode([list(c.ids) for c in drawn], skip_special_tokens=True)
        prompts = [[{"role": m.role, "content": m.content} for m in group.prompt] for group in groups]
        rollout = Rollout(
            prompts,
            prompt_ids=[list(group.prompt_ids) for group in groups],
            completion_ids=[list(c.ids) for c in drawn],
            completions=[[{"role": "assistant", "content": text}] for text in texts],
            ended=[c.ended for c in drawn],
        )
        scores = self._scores([{"prompt": prompt} for prompt in prompts], rollout)
        for pending in (self._pending_extra_logs, self._pending_metrics):
            pending.clear()  # what reward functions say of completions that are not a batch's
        return self._local(scores.score_B - self._rule.penalties(scores)).tolist()

    def summed_log_probs(self, groups: Sequence[TokenGroup], model: Any = None) -> list[float]:
        """Log-probability of the only completion of each group, in nats, under the policy or another model."""
        units = [Unit(group, (place,)) for place, group in enumerate(groups)]
        values_T = self._pass(self.model if model is None else model, units)
        return sums_by_completion(values_T, [len(group.continuation_ids[0]) for group in groups]).tolist()

    @contextmanager
    def as_reference(self) -> Generator[Any]:
        """The reference model: one of its own, or the policy without its adapter (or with the one it started from)."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        policy = self.accelerator.unwrap_model(self.model)
        with acting_as(policy, "ref" if "ref" in policy.peft_config else None):
            yield policy

    def _finish(self, batch: TrainingBatch, rewards: Rewards) -> None:
        """Take over the advantages, and record the batch."""
        batch.advantage_B = self._local(rewards.advantage_B)
        batch.awaited = 0
        lengths = [len(ids) for ids in batch.rollout.completion_ids]
        tokens = (torch.tensor(lengths, device=batch.counted_B.device) * batch.counted_B).sum()
        self._log_rollout(batch.rollout, rewards, tokens)

    def _position(self) -> Position:
        position = super()._position()
        if self._slices and self._inside_a_batch:
            position.values["rollouts"] = rollout_buffer.values_of(self._slices)
            position.tensors |= rollout_buffer.tensors_of(self._slices)
        return position

    def _go_on_from(self, position: Position) -> None:
        super()._go_on_from(position)
        if "rollouts" in position.values:
            self._slices = rollout_buffer.restored(position.values["rollouts"], position.tensors)

    # ---- loss -------------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The clipped RLOO loss of a micro-batch, TRL's formula."""
        if not isinstance(inputs, TrainingSlice):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, found = self._passes.total(
            model,
            MicroBatch(
                inputs.rows,
                lambda row: self._row_loss(model, inputs, row),
                lambda row: packed_log_probs(model, row, self.temperature).log_probs,
            ),
        )
        self._unlogged += found
        if not model.training or self.accelerator.sync_gradients:
            self._log_losses()
        batch = inputs.batch
        batch.awaited -= sum(len(row.places) for row in inputs.rows)
        if batch.old_T is None and batch.awaited == 0:
            kl_B = None if batch.kl_B is None else gathered(batch.kl_B)  # the last micro-batch of a step: never empty
            self._finish(batch, self._rule.rewards(batch.scores, kl_B))
        return loss

    def _row_loss(self, model: nn.Module, inputs: TrainingSlice, row: RolloutRow) -> tuple[Tensor, RowStats]:
        """The loss of a row, and what is counted; in a `fresh` batch its advantages are filled in on the way."""
        batch, lengths = inputs.batch, lengths_of(row.row)
        with self.accelerator.autocast():  # for the vocabulary head, which stands outside the model's forward
            found = packed_log_probs(model, row.row, self.temperature)
        known = batch.known_of(row, found.log_probs.detach())
        if batch.old_T is None:
            self._fill_in(batch, row, known)
        places = torch.tensor(row.places, device=batch.counted_B.device)
        losses_B, stats = self._objective.losses(
            found, known, lengths, batch.counted_B[places], batch.advantage_B[places], batch.kl_coef
        )
        return losses_B.sum() * inputs.weight, stats

    def _fill_in(self, batch: TrainingBatch, row: RolloutRow, known: KnownTokens) -> None:
        """Rewards and advantages of whole groups whose policy log-probabilities have just been computed."""
        places = torch.tensor(row.places, device=batch.counted_B.device)
        first = self.accelerator.process_index * len(batch.counted_B)
        own = batch.scores.of(first + places)
        kl_B = None
        if known.reference_T is not None:
            terms_T = kl_terms(known.old_T, known.reference_T, self.kl_estimator)
            kl_B = sums_by_completion(terms_T, lengths_of(row.row)) * batch.counted_B[places]
            batch.kl_B = kl_B.new_zeros(len(batch.counted_B)) if batch.kl_B is None else batch.kl_B
            batch.kl_B[places] = kl_B
        advantage_B = self._rule.rewards(own, kl_B).advantage_B
        batch.advantage_B = batch.advantage_B.to(advantage_B.dtype)
        batch.advantage_B[places] = advantage_B

    def _log_losses(self) -> None:
        """Take the metrics of one optimizer step, over all processes."""
        stats = summed(self._unlogged, self.accelerator.device)
        self._unlogged = []
        sums = cast(Tensor, self.accelerator.reduce(stats.sums)).tolist()
        widest = gathered(stats.widest_gap[None]).max().item()
        metrics: Mapping[str, list[float]] = self._current_metrics
        for name, value in metrics_of(sums, widest).items():
            metrics[name].append(value)
