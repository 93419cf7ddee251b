"""Log-probabilities at sampling from vLLM, which TRL's RLOO neither asks for nor keeps."""

from collections.abc import Collection
from typing import Any

import trl
from trl.generation.vllm_generation import VLLMGeneration

from helpsteer_rloo.model.rollout import Completion


class TellingVLLM:
    """TRL's way to vLLM, which also remembers what the tokens of the last completions were drawn with.

    TRL sets vLLM up to tell log-probabilities after temperature and truncation (`processed_logprobs`).

    Args:
        generation: Whom every call is passed on to.
        args: Of the trainer; they tell whether the distribution was truncated.
        end_ids: Tokens that end a completion.
    """

    def __init__(self, generation: VLLMGeneration, args: trl.RLOOConfig, end_ids: Collection[int]) -> None:
        self._generation = generation
        self._end_ids = end_ids
        self._whole = args.top_p == 1.0 and not args.top_k and not args.min_p and args.repetition_penalty == 1.0
        self._whole &= not args.generation_kwargs and args.vllm_structured_outputs_regex is None
        generation.logprobs = 0  # the drawn token's alone
        self.drawn: list[Completion] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generation, name)

    def generate(self, *arguments: Any, **named: Any) -> tuple[Any, Any, Any, Any]:
        """Generate as TRL's object does, and keep `drawn`: `None` if vLLM did not tell of every token."""
        result = self._generation.generate(*arguments, **named)
        _, completion_ids, told, _ = result
        self.drawn = None
        if told is not None and all(part and part[0] is not None for parts in told for part in parts):
            self.drawn = [
                self._completion(ids, [part[0] for part in parts])
                for ids, parts in zip(completion_ids, told, strict=True)
            ]
        return result

    def _completion(self, ids: list[int], log_probs: list[float]) -> Completion:
        told = tuple(log_probs)
        return Completion(tuple(ids), ids[-1] in self._end_ids, told, told if self._whole else ())
