"""Models that answer and models that judge the answers, on one base where their adapters share it, as in training."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from helpsteer_rloo.model.forward import prepare_packed
from helpsteer_rloo.model.loading import Base, Model, end_ids, load_policy
from helpsteer_rloo.model.roles import RewardRole, acting_as, can_share, load_own_reward, load_shared_reward
from helpsteer_rloo.model.rollout import Completion, Sampling, sample, sample_groups, stream, supports_sampler
from helpsteer_rloo.records.policy import PolicySource

_SEEDS = 2**31
"""Seeds that transformers' `generate` is given are below this."""


@dataclass(frozen=True)
class Voice:
    """A model that answers; a `bare` one without its adapters. `ends` are the ids that end an answer."""

    model: Model
    ends: tuple[int, ...]
    bare: bool = False

    @property
    def draws_one_by_one(self) -> bool:
        """Whether an answer depends on its own seed alone, and not on those that are drawn with it."""
        return supports_sampler(self.model)

    def draw(self, prompt: Sequence[int], seeds: Sequence[int], sampling: Sampling, *, rows: int) -> list[Completion]:
        """Draw an answer for every seed, at most `rows` at once; they depend on nothing else that is drawn."""
        with self._speaking():
            if supports_sampler(self.model):
                return sample_groups(self.model, [prompt], [seeds], sampling, rows=rows)[0]
            prompts = [prompt] * len(seeds)
            return sample(self.model, prompts, sampling, batch_size=rows, seed=seeds[0] % _SEEDS)

    def tell(self, prompt: Sequence[int], seed: int, sampling: Sampling, goes_on: Callable[[int], bool]) -> Completion:
        """Draw one answer, its tokens told one by one if the model is one that the sampler takes."""
        with self._speaking():
            if supports_sampler(self.model):
                return stream(self.model, prompt, seed, sampling, goes_on)
        return self.draw(prompt, [seed], sampling, rows=1)[0]

    @contextmanager
    def _speaking(self) -> Generator[None]:
        with acting_as(cast(PeftModel, self.model), None) if self.bare else nullcontext():
            yield


def load_voice(source: PolicySource, tokenizer: PreTrainedTokenizerBase) -> Voice:
    """The policy, or a plain model.

    Raises:
        ValueError: it cannot be loaded.
    """
    base = Base(**source.base)
    if source.adapter:
        model = load_policy(base, adapter=source.directory)
    else:
        model = load_policy(replace(base, name=str(source.directory), revision=None))
    return Voice(model, tuple(end_ids(model, tokenizer)))


def load_start(source: PolicySource, trained: Voice, tokenizer: PreTrainedTokenizerBase) -> Voice:
    """What a policy was before it was trained: the same model without its adapter, or the one that its record names.

    Raises:
        ValueError: that cannot be loaded.
    """
    if source.adapter:
        return replace(trained, bare=True)
    model = load_policy(Base(**source.base))
    return Voice(model, tuple(end_ids(model, tokenizer)))


def load_judge(directory: Path, source: PolicySource, voice: Voice, name: str) -> RewardRole:
    """A reward model, on the base of the policy's adapter if it can stand there, under a name of its own.

    Raises:
        ValueError: it cannot be loaded.
    """
    if not source.adapter or not can_share(voice.model, Base(**source.base), directory):
        return load_own_reward(directory)
    role = load_shared_reward(cast(PeftModel, voice.model), directory, name)
    prepare_packed(voice.model)  # now, so that the first answers are drawn by the same operations as later ones
    return role
