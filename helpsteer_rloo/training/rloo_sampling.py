"""`ScoredRLOOTrainer` that samples by the embedded sampler, or by vLLM with its log-probabilities."""

from collections.abc import Sequence
from typing import Any, cast

import trl

from helpsteer_rloo.model.memory import AtOnce
from helpsteer_rloo.model.rollout import Completion, Sampling, sample_groups, sequence_seed, supports_sampler
from helpsteer_rloo.model.sharding import whole_weights
from helpsteer_rloo.training.rloo_scoring import ScoredRLOOTrainer
from helpsteer_rloo.training.rollouts import Rollout, units_of
from helpsteer_rloo.training.vllm import TellingVLLM


class SamplingRLOOTrainer(ScoredRLOOTrainer):
    """Samples prompts computed once, every sequence with a seed of its own.

    Where vLLM or a setting that only `generate` knows is asked for, or the subclass does not pack its passes, sampling
    is left to TRL.
    """

    _packed: bool

    def __init__(
        self, model: Any, reward_funcs: Any, args: trl.RLOOConfig | None = None, *rest: Any, **kwargs: Any
    ) -> None:
        """Take the arguments of `trl.RLOOTrainer`; `args` may be TRL's `RLOOConfig` or this project's."""
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        self._sampled_at_once = AtOnce()
        if self.use_vllm:
            self.vllm_generation = TellingVLLM(
                cast(Any, self.vllm_generation), cast(Any, self.args), cast(list[int], self.eos_token_ids)
            )

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: dict[str, Any]
    ) -> list[list[int]]:
        policy = self.accelerator.unwrap_model(self.model)
        if not self._packed or images is not None or multimodal_fields or self._asks_for_generate:
            ids = super()._generate_single_turn(prompt_ids, images, multimodal_fields)
            self._drawn = self.vllm_generation.drawn if self.use_vllm else None
            return ids
        if not supports_sampler(policy):
            self._fall_back("this model cannot be sampled by the embedded sampler")
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields)
        place = (self.state.global_step, int(self._sampling_for_training))
        first = self.accelerator.process_index * len(prompt_ids)
        seeds = [sequence_seed(self.args.seed, *place, first + index) for index in range(len(prompt_ids))]
        self._drawn = self.drawn(prompt_ids, seeds)
        return [list(completion.ids) for completion in self._drawn]

    def drawn(self, prompt_ids: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Completion]:
        """Completions by the embedded sampler, one a prompt with its seed; neighbours share their prompt."""
        policy, args = self.accelerator.unwrap_model(self.model), cast(trl.RLOOConfig, self.args)
        sampling = Sampling(
            max_new_tokens=cast(int, self.max_completion_length),
            temperature=self.temperature,
            top_p=args.top_p,
            top_k=args.top_k or 0,
            end_ids=tuple(cast(list[int], self.eos_token_ids)),
        )
        count = len(prompt_ids)
        units = units_of(Rollout([], list(map(list, prompt_ids)), [[0]] * count, [], []), self._group_size)
        prompts = [unit.group.prompt_ids for unit in units]
        seeds_of = [[seeds[place] for place in unit.places] for unit in units]

        def run(rows: int) -> list[list[Completion]]:
            return sample_groups(policy, prompts, seeds_of, sampling, rows=rows)

        with whole_weights(policy):
            found = self._sampled_at_once.run(run, max(self._group_size, self.forward_batch_size or count), 1)
        return [completion for completions in found for completion in completions]

    @property
    def _asks_for_generate(self) -> bool:
        """Whether a setting was given that only vLLM or transformers' `generate` knows."""
        args = cast(trl.RLOOConfig, self.args)
        return bool(
            self.use_vllm
            or self.max_completion_length is None
            or self.use_transformers_continuous_batching
            or args.generation_kwargs
            or args.cache_implementation
            or self.min_p
            or self.repetition_penalty not in (None, 1.0)
        )
