"""A trained reward model as a reward function for RLOO: it scores the very ids that were sampled."""

import itertools
from collections.abc import Sequence
from typing import Any

from torch import nn

from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.model.forward import score_groups


class RewardModelScorer:
    """Scores prompt and completion ids with a reward model, in chunks, a prompt once for its neighbouring completions.

    Nothing is decoded and rendered again, so a completion that was cut off reaches the reward model without an end of
    turn, as it was sampled.
    """

    def __init__(
        self, model: nn.Module, *, batch_size: int, max_length: int | None, name: str = "reward_model"
    ) -> None:
        """Bind a reward model; `max_length` is the longest sequence it was trained on, in tokens."""
        self.model, self.batch_size, self.max_length = model, batch_size, max_length
        self.__name__ = name

    def __call__(
        self, *, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], **_: Any
    ) -> list[float]:
        """One score a completion, in the order given.

        Raises:
            ValueError: a sequence is longer than what the reward model was trained on.
        """
        pairs = list(zip(map(tuple, prompt_ids), map(tuple, completion_ids), strict=True))
        longest = max(len(prompt) + len(completion) for prompt, completion in pairs)
        if self.max_length is not None and longest > self.max_length:
            raise ValueError(
                f"A prompt and its completion have {longest} tokens together, the reward model was trained on at most "
                f"{self.max_length}. Lower --response_length, or train the reward model with a larger --max_length."
            )
        groups = [
            TokenGroup((), prompt, tuple(completion for _, completion in same))
            for prompt, same in itertools.groupby(pairs, key=lambda pair: pair[0])
        ]
        return [score for scores in score_groups(self.model, groups, self.batch_size) for score in scores]
