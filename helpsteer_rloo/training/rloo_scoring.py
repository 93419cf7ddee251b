"""TRL's `RLOOTrainer`, scoring exactly what was sampled, keeping prompt groups together, and keeping a ledger."""

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import trl
from accelerate.utils import gather, gather_object
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import nanstd, pad, split_tensor_dict, use_adapter

from helpsteer_rloo.groups import Message
from helpsteer_rloo.model.forward import scalar_head
from helpsteer_rloo.model.roles import RewardRole
from helpsteer_rloo.model.rollout import Completion, sequence_seed
from helpsteer_rloo.objectives import kl_terms
from helpsteer_rloo.rendering import Renderer
from helpsteer_rloo.training.kl_weight import KLWeight
from helpsteer_rloo.training.ledger import Entry, number_or_none, write_rollout
from helpsteer_rloo.training.quantized import mend_quantized
from helpsteer_rloo.training.rloo_config import RLOOConfig
from helpsteer_rloo.training.rloo_resume import ResumingRLOOTrainer
from helpsteer_rloo.training.rollouts import AdvantageRule, Rewards, Rollout, Scores, mini_batch_order
from helpsteer_rloo.training.scorer import RewardModelScorer


class ScoredRLOOTrainer(ResumingRLOOTrainer):
    """TRL's `RLOOTrainer`, same arguments and configurations, with these differences.

    - A reward model, bare or with LoRA, that shares the policy's vocabulary and chat template is given the sampled ids
      themselves, in chunks. (TRL 1.16 decodes and renders them again, so a completion that was cut off arrives with an
      end of turn.) Reward functions receive the rendered prompts as `prompt_ids`, besides TRL's arguments.
    - Text of a prompt that spells a control token stays text.
    - The completions of a prompt stay together when a batch of rollouts is shuffled and split.
    - `missing_eos_penalty` is subtracted from the score of a completion that did not end by itself, and
      `length_penalty` for each of its tokens.
    - With `rollouts_dir`, every completion goes to a ledger.
    - A run goes on exactly from a checkpoint of any step, also inside a batch of rollouts and in later epochs.

    Images, prompts that do not end with a user turn, and reward models with another vocabulary, chat template or head
    are left to TRL's own path, the reward models and images with one warning.
    """

    def __init__(
        self, model: Any, reward_funcs: Any, args: trl.RLOOConfig | None = None, *rest: Any, **kwargs: Any
    ) -> None:
        """Take the arguments of `trl.RLOOTrainer`; `args` may be TRL's `RLOOConfig` or this project's."""
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        mend_quantized(self)
        ours = self.args if isinstance(self.args, RLOOConfig) else None
        self.missing_eos_penalty = ours.missing_eos_penalty if ours else 0.0
        self.length_penalty = ours.length_penalty if ours else 0.0
        self.forward_batch_size = ours.rollout_forward_batch_size if ours else None
        self.rollouts_dir = Path(ours.rollouts_dir) if ours and ours.rollouts_dir else None
        self.kl_estimator, self.kl_in = (ours.kl_estimator, ours.kl_in) if ours else ("k1", "reward")
        self.importance_correction = ours.importance_correction if ours else "none"
        self.importance_cap = ours.importance_cap if ours else 0.0
        self._drawn: list[Completion] | None = None
        self._kl_weight = KLWeight(self, ours.target_kl) if ours and ours.target_kl is not None else None
        if self._kl_weight is not None:
            self.add_callback(self._kl_weight)
        self._fallbacks: set[str] = set()
        self._renderer = self._make_renderer()
        pairs = zip(self.reward_funcs, self.reward_processing_classes, strict=True)
        prepared = [self._prepare_adapted(func, processing) for func, processing in pairs]
        self.reward_processing_classes = [processing for _, processing in prepared]
        self.reward_funcs = [
            self._exact(func, processing, name)
            for (func, processing), name in zip(prepared, self.reward_func_names, strict=True)
        ]

    def _make_renderer(self) -> Renderer | None:
        if self._is_vlm or not self._tokenizer.chat_template:
            return None
        return Renderer(self._tokenizer, template_kwargs=cast(dict[str, Any], self.chat_template_kwargs))

    def _prepare_adapted(self, func: Any, processing: Any) -> tuple[Any, Any]:
        """Give a reward model with an adapter the device, tokenizer and padding id that TRL gives bare ones only."""
        if not isinstance(func, PeftModel):
            return func, processing
        func = self.accelerator.prepare_model(func.eval(), evaluation_mode=True, device_placement=True)
        config = func.get_base_model().config
        if processing is None:
            processing = self._tokenizer_of(config._name_or_path)
        if processing is not None:
            if processing.pad_token_id is None:
                processing.pad_token = processing.eos_token
            config.get_text_config().pad_token_id = processing.pad_token_id
        return func, processing

    def _tokenizer_of(self, base: str) -> PreTrainedTokenizerBase | None:
        try:
            trusted = cast(Any, self.args).trust_remote_code
            return cast(Any, AutoTokenizer).from_pretrained(base, trust_remote_code=trusted)
        except (OSError, ValueError, KeyError, ImportError):
            self._fall_back(
                f"the tokenizer of a reward model's base, {base!r}, cannot be loaded; pass `reward_processing_classes`"
            )
            return None

    def _exact(self, func: Any, processing: Any, name: str) -> Any:
        """A reward model that can be given the policy's ids becomes a scorer of ids; anything else is left to TRL."""
        if not isinstance(func, PreTrainedModel | PeftModel) or processing is None:
            return func
        obstacle = self._obstacle(func, processing)
        if obstacle is not None:
            self._fall_back(f"a reward model with {obstacle} is given decoded text")
            return func
        return RewardModelScorer(RewardRole(func.eval()), batch_size=self._chunk(), max_length=None, name=name)

    def _obstacle(self, func: PreTrainedModel | PeftModel, processing: Any) -> str | None:
        """What keeps a reward model from being given the policy's ids, if anything does."""
        if not isinstance(processing, PreTrainedTokenizerBase) or processing.get_vocab() != self._tokenizer.get_vocab():
            return "a vocabulary of its own"
        theirs, ours = processing.chat_template, self._tokenizer.chat_template
        if theirs and ours and theirs != ours:
            return "a chat template of its own"
        if isinstance(func, PeftModel) and func.active_peft_config.is_prompt_learning:
            return "virtual tokens"  # which are added by a forward pass that scoring goes around
        try:
            scalar_head(func)
        except ValueError:
            return "no head named 'score'"
        return None

    def _fall_back(self, what: str) -> None:
        if what not in self._fallbacks:
            self._fallbacks.add(what)
            warnings.warn(f"Using TRL's own path: {what}.", stacklevel=3)

    def _chunk(self) -> int:
        return self.forward_batch_size or self.args.per_device_train_batch_size

    @property
    def _sampling_for_training(self) -> bool:
        return cast(nn.Module, self.model).training

    @property
    def _group_size(self) -> int:
        """Completions a prompt, in training or in evaluation."""
        return cast(int, self.num_generations if self._sampling_for_training else self.num_generations_eval)

    # ---- sampling ---------------------------------------------------------------------------------------------------

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], Any, dict[str, Any]]:
        if self._renderer is None or not all(_is_plain_chat(prompt) for prompt in prompts):
            return super()._tokenize_prompts(prompts)
        messages = [[Message(turn["role"], turn["content"]) for turn in prompt] for prompt in prompts]
        return [list(self._renderer.prompt_ids(prompt)) for prompt in messages], None, {}

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: dict[str, Any]
    ) -> list[list[int]]:
        size = self.forward_batch_size
        if size is None or self.use_vllm or images is not None or multimodal_fields:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields)
        chunks = [prompt_ids[start : start + size] for start in range(0, len(prompt_ids), size)]
        return [
            ids for chunk in chunks for ids in super(ScoredRLOOTrainer, self)._generate_single_turn(chunk, None, {})
        ]

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if not self._sampling_for_training or has_images(generation_batch):
            return super()._prepare_inputs(generation_batch)
        slices = cast(int, cast(trl.RLOOConfig, self.args).steps_per_generation)
        if not self._inside_a_batch or not self._buffered_inputs:
            batch = self._shuffled(self._generate_and_score_completions(generation_batch))
            self._buffered_inputs = split_tensor_dict(cast(dict[str, Tensor | None], batch), slices)
        return self._buffered_inputs[self._step % slices]

    @property
    def _mini_batches(self) -> int:
        """Optimizer steps in a pass over a batch of rollouts."""
        args = cast(Any, self.args)
        return max(1, args.steps_per_generation // args.gradient_accumulation_steps)

    def _mini_batch_order(self, count: int) -> list[int]:
        seed = sequence_seed(self.args.seed, self.state.global_step)
        return mini_batch_order(count, self._mini_batches, seed, self.accelerator.process_index)

    def _shuffled(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch whose prompts are dealt to mini-batches anew; as it is if it does not hold all samples of each."""
        count, rest = divmod(len(batch["advantages"]), self._group_size)
        if rest:
            return batch
        order_P = torch.tensor(self._mini_batch_order(count))
        order_B = (order_P[:, None] * self._group_size + torch.arange(self._group_size)).flatten()
        return {name: tensor[order_B.to(tensor.device)] for name, tensor in batch.items()}

    # ---- rewards and advantages -------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if has_images(inputs):
            self._fall_back("prompts with images")
            return super()._generate_and_score_completions(inputs)
        rollout = self._rollout(inputs)
        batch = self._pad(rollout)
        old_BC, reference_BC = self._log_probs(batch)
        kl_B = None
        if reference_BC is not None:
            terms_BC = kl_terms(old_BC, reference_BC, self.kl_estimator)
            kl_B = gathered(terms_BC.where(batch["completion_mask"].bool(), 0.0).sum(-1))
        rewards = self._rule.rewards(self._scores(inputs, rollout), kl_B)
        self._log_rollout(rollout, rewards, batch["completion_mask"].sum())
        return {
            **batch,
            "old_logps": (old_BC * batch["completion_mask"]).sum(1),
            "advantages": self._local(rewards.advantage_B),
        }

    @property
    def _rule(self) -> AdvantageRule:
        in_reward = self.beta if self.kl_in == "reward" else 0.0
        penalties = (self.missing_eos_penalty, self.length_penalty)
        return AdvantageRule(in_reward, *penalties, self._group_size, bool(self.normalize_advantages))

    def _local(self, all_B: Tensor) -> Tensor:
        """This process's part of a tensor of all processes' values."""
        count = len(all_B) // self.accelerator.num_processes
        return all_B[self.accelerator.process_index * count :][:count]

    def _rollout(self, inputs: list[dict[str, Any]]) -> Rollout:
        prompts = [row["prompt"] for row in inputs]
        self._drawn = None
        prompt_ids, completion_ids, completions = self._generate(prompts)
        ended = [bool(ids) and ids[-1] in self.eos_token_ids for ids in completion_ids]
        return Rollout(prompts, prompt_ids, completion_ids, completions, ended, self._drawn)

    def _pad(self, rollout: Rollout) -> dict[str, Tensor]:
        device, multiple = self.accelerator.device, cast(int | None, self.pad_to_multiple_of)

        def padded(rows: list[list[int]], value: int, side: str) -> Tensor:
            tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
            return pad(tensors, value, padding_side=side, pad_to_multiple_of=multiple).to(device)

        pad_id = cast(int, self._tokenizer.pad_token_id)
        completion_mask = padded([[1] * len(ids) for ids in rollout.completion_ids], 0, "right")
        if self.mask_truncated_completions:
            completion_mask = completion_mask * torch.tensor(rollout.ended, device=device).unsqueeze(1)
        return {
            "prompt_ids": padded(rollout.prompt_ids, pad_id, "left"),
            "prompt_mask": padded([[1] * len(ids) for ids in rollout.prompt_ids], 0, "left"),
            "completion_ids": padded(rollout.completion_ids, pad_id, "right"),
            "completion_mask": completion_mask,
        }

    @torch.no_grad()
    def _log_probs(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of the sampled tokens under the policy and, if KL is used, the reference, `[B, C]`."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        keep, size = batch["completion_ids"].size(1), self._chunk()

        def log_probs(model: Any) -> Tensor:
            return self._get_per_token_logps_and_entropies(model, ids, mask, keep, batch_size=size)[0]

        with disable_gradient_checkpointing(cast(Any, self.model), cast(Any, self.args.gradient_checkpointing_kwargs)):
            old_BC = log_probs(self.model)
            if self.beta == 0.0:
                return old_BC, None
            if self.ref_model is not None:
                return old_BC, log_probs(self.ref_model)
            model = self.accelerator.unwrap_model(self.model)
            with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
                return old_BC, log_probs(self.model)

    def _scores(self, inputs: list[dict[str, Any]], rollout: Rollout) -> Scores:
        """clip(sum of weighted scores), and what penalties depend on, of all processes' completions."""
        device = self.accelerator.device
        with_ids = [{**row, "prompt_ids": ids} for row, ids in zip(inputs, rollout.prompt_ids, strict=True)]
        by_source_BF = self._calculate_rewards(with_ids, rollout.prompts, rollout.completions, rollout.completion_ids)
        unclipped_B = (by_source_BF * self.reward_weights.to(device)).nansum(dim=1)
        unclipped_B[by_source_BF.isnan().all(dim=1)] = torch.nan
        score_B = unclipped_B
        if self.reward_clip_range:  # which must not make a broken score a good one
            score_B = torch.where(unclipped_B.isinf(), unclipped_B, unclipped_B.clamp(*self.reward_clip_range))
        told = [[float(not ended), float(length)] for ended, length in zip(rollout.ended, rollout.lengths, strict=True)]
        return Scores(by_source_BF, unclipped_B, score_B, *gathered(torch.tensor(told, device=device)).unbind(1))

    # ---- records ----------------------------------------------------------------------------------------------------

    def _log_rollout(self, rollout: Rollout, rewards: Rewards, tokens: Tensor) -> None:
        """Metrics, tables and the ledger of one batch; `tokens` is the number of those that count on this process."""
        metrics, scores, total = self._current_metrics, rewards.scores, gathered(tokens).sum().item()
        if rewards.kl_B is not None:
            metrics["kl"].append(rewards.kl_B.sum().item() / max(total, 1))
            metrics["kl_per_completion"].append(rewards.kl_B.mean().item())
            metrics["kl_coef"].append(self.beta)
        for name, source_B in zip(self.reward_func_names, rewards.scores.by_source_BF.unbind(1), strict=True):
            metrics[f"rewards/{name}/mean"].append(source_B.nanmean().item())
            metrics[f"rewards/{name}/std"].append(nanstd(source_B).item())
            if source_B.isnan().all():
                warnings.warn(f"{name} gave no completion of this batch a reward.", stacklevel=2)
        metrics["reward"].append(scores.unclipped_B.nanmean().item())
        metrics["reward_std"].append(nanstd(scores.unclipped_B).item())
        groups_PN = rewards.reward_B.view(-1, self._group_size)
        equal_P = (groups_PN - groups_PN[:, :1]).abs().nan_to_num(0.0).amax(1) < 1e-8
        metrics["frac_reward_zero_std"].append(equal_P.float().mean().item())
        metrics["missing_eos"].append(scores.unfinished_B.mean().item())
        metrics["penalties"].append(self._rule.penalties(scores).mean().item())
        metrics["objective"].append(rewards.reward_B.nanmean().item())
        self._log_tables(rollout, rewards)
        if self._sampling_for_training and self.rollouts_dir is not None:
            self._write_ledger(rollout, rewards)
        if self._sampling_for_training and self._kl_weight is not None and rewards.kl_B is not None:
            self._kl_weight.adapt(rewards.kl_B.mean().item())

    @property
    def _current_metrics(self) -> defaultdict[str, list[float]]:
        return cast(Any, self._metrics)["train" if self._sampling_for_training else "eval"]

    def _log_tables(self, rollout: Rollout, rewards: Rewards) -> None:
        """Fill the tables of completions that TRL prints and sends to trackers."""
        logs = cast(dict[str, Any], self._logs)
        logs["prompt"].extend(gather_object(rollout.prompts))
        logs["completion"].extend(gather_object(rollout.completions))
        for name, source_B in zip(self.reward_func_names, rewards.scores.by_source_BF.unbind(1), strict=True):
            logs["rewards"][name].extend(source_B.tolist())
        logs["advantages"].extend(rewards.advantage_B.tolist())
        for column in sorted(set(gather_object(list(self._pending_extra_logs)))):
            values = self._pending_extra_logs.get(column, [None] * len(rollout.prompts))
            logs["extra"][column].extend(gather_object(values))
        self._pending_extra_logs.clear()
        pending: defaultdict[str, list[float]] = self._pending_metrics
        for name in sorted(set(gather_object(list(pending)))):
            values = [value for part in gather_object([pending.get(name, [])]) for value in part]
            self._current_metrics[name].append(sum(values) / max(len(values), 1))
        pending.clear()

    def _write_ledger(self, rollout: Rollout, rewards: Rewards) -> None:
        drawn = rollout.drawn or [None] * len(rollout.ended)
        told = [None if sample is None else [round(value, 6) for value in sample.log_probs] for sample in drawn]
        rows = gather_object(list(zip(rollout.prompt_ids, rollout.completion_ids, rollout.ended, told, strict=True)))
        if not self.accelerator.is_main_process or self.rollouts_dir is None:
            return
        texts = self._tokenizer.batch_decode([ids for _, ids, _, _ in rows], skip_special_tokens=False)
        kl = [None] * len(rows) if rewards.kl_B is None else rewards.kl_B.tolist()
        scores, rule = rewards.scores, self._rule
        columns = (scores.score_B, scores.unfinished_B, scores.length_B, rewards.reward_B, rewards.advantage_B)
        numbers = list(zip(*(column.tolist() for column in columns), kl, strict=True))
        entries = []
        for place, ((prompt_ids, ids, ended, log_probs), sources) in enumerate(
            zip(rows, scores.by_source_BF.tolist(), strict=True)
        ):
            score, unfinished, length, reward, advantage, kl_value = numbers[place]
            entries.append(
                Entry(
                    step=self.state.global_step,
                    group=place // self._group_size,
                    index=place % self._group_size,
                    prompt_ids=list(prompt_ids),
                    completion_ids=list(ids),
                    sampled_log_probs=log_probs,
                    text=texts[place],
                    finish_reason="stop" if ended else "length",
                    scores=dict(zip(self.reward_func_names, map(number_or_none, sources), strict=True)),
                    score=number_or_none(score),
                    missing_eos_penalty=rule.missing_eos_penalty * unfinished,
                    length_penalty=rule.length_penalty * length,
                    kl=None if kl_value is None else number_or_none(kl_value),
                    kl_coef=rule.beta,
                    reward=number_or_none(reward),
                    advantage=number_or_none(advantage),
                )
            )
        write_rollout(self.rollouts_dir, self.state.global_step, entries)


def gathered(local: Tensor) -> Tensor:
    """A tensor of all processes' values, joined along the first axis."""
    return cast(Tensor, gather(local))


def has_images(inputs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a prompt of a batch comes with an image."""
    return any(row.get("images") or row.get("image") is not None for row in inputs)


def _is_plain_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of text turns of the usual roles that ends with the user's."""
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(t.get("role") in ("system", "user", "assistant") and isinstance(t.get("content"), str) for t in prompt)
        and all(set(turn) <= {"role", "content"} for turn in prompt)
        and prompt[-1]["role"] == "user"
    )
