"""A trained reward model as a reward function for RLOO: it scores the very ids that were sampled."""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.model.memory import AtOnce
from helpsteer_rloo.model.roles import RewardRole
from helpsteer_rloo.reward_functions import MODEL_REWARD


class RewardModelScorer:
    """Scores prompt and completion ids with a reward model, in chunks, a prompt once for its neighbouring completions.

    Nothing is decoded and rendered again, so a completion that was cut off reaches the reward model without an end of
    turn, as it was sampled.
    """

    def __init__(
        self, role: RewardRole | None, *, batch_size: int, max_length: int | None, name: str = MODEL_REWARD
    ) -> None:
        """Bind a reward model, or None until `role` is set, where it is to stand on a base that is not loaded yet.

        `max_length` is the longest sequence it was trained on, in tokens.
        """
        self.role, self.batch_size, self.max_length = role, batch_size, max_length
        self._at_once = AtOnce()
        self.__name__ = name

    def __call__(
        self, *, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], **_: Any
    ) -> list[float]:
        """One score a completion, in the order given; minus infinity where the model's is not finite.

        A broken score must not pass for a missing one, which NaN is among rewards: infinite, it spoils the step, which
        is skipped and counted.

        Raises:
            RuntimeError: no reward model was bound.
            ValueError: a sequence is longer than what the reward model was trained on.
        """
        if self.role is None:
            raise RuntimeError("The scorer has no reward model yet.")
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
        whole = max(self.batch_size, *(len(group.continuation_ids) for group in groups))  # cut, it would cost more
        scored = self._at_once.run(partial(self.role.score, groups), whole, 1)
        return [score if math.isfinite(score) else -math.inf for scores in scored for score in scores]


class EnsembleScorer:
    """Several reward models that score together: by their mean, or by the lowest (Coste et al. 2023, arXiv 2310.02743).

    How far they are apart, the standard deviation over the models, is logged as `ensemble/disagreement`, its mean over
    the completions: it grows where a policy leaves what the models have learned.

    Args:
        members: Two or more.
        worst: Whether the lowest score counts, instead of the mean.
    """

    def __init__(self, members: Sequence[RewardModelScorer], *, worst: bool) -> None:
        self.members, self._worst = list(members), worst
        self.__name__ = MODEL_REWARD

    def __call__(self, *, log_metric: Callable[[str, float], None] | None = None, **given: Any) -> list[float]:
        """One score a completion, in the order given; the arguments are those of `RewardModelScorer`."""
        scores_MB = np.array([member(**given) for member in self.members])
        if log_metric is not None and scores_MB.size and np.isfinite(scores_MB).all():
            log_metric("ensemble/disagreement", float(scores_MB.std(axis=0).mean()))
        return (scores_MB.min(axis=0) if self._worst else scores_MB.mean(axis=0)).tolist()
