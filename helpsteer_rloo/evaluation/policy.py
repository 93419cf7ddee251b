"""Judging a policy: answers of the untrained and the trained model to the same held-out prompts, same seeds."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.model.forward import group_log_probs, score_sequences
from helpsteer_rloo.model.loading import Base, Model, end_ids, load_policy, load_reward_model
from helpsteer_rloo.model.memory import release
from helpsteer_rloo.model.rollout import Completion, Sampling, sample
from helpsteer_rloo.statistics import mean, proportion

Gold = Callable[[str, str, bool], float]
"""The true quality of an answer, where a world knows it: last user turn, answer, whether it ended -> [0, 1]."""


PASS_TOKENS = 4096
"""Tokens in one forward pass that computes log-probabilities."""


@dataclass(frozen=True)
class PolicyPair:
    """What is compared: the starting model, the directory of the trained policy, and whether that is an adapter."""

    base: Base
    trained: Path
    adapter: bool


@dataclass(frozen=True)
class EvaluationKnobs:
    """How it is compared: sampling distribution, limits and seed."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    batch_size: int
    seed: int


@dataclass(frozen=True)
class Answers:
    """Completions to the prompts in order, their text without the end of turn, and their rewards."""

    completions: list[Completion]
    texts: list[str]
    rewards: list[float]


def evaluate_policy(
    pair: PolicyPair,
    reward_model_dir: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    groups: Sequence[TokenGroup],
    knobs: EvaluationKnobs,
    gold: Gold | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compare the two policies on `groups`, one model in memory at a time.

    KL is the mean over prompts of log pi(y) - log pi_start(y) for the trained policy's own answers y (k1, in nats).

    Returns:
        The summary, and one record a prompt with both answers.
    """
    prompts = [group.prompt_ids for group in groups]
    with _loaded(pair, trained=True) as model:
        after_ids = _sampled(model, tokenizer, prompts, knobs)
        drawn = [TokenGroup((), p, (c.ids,)) for p, c in zip(prompts, after_ids, strict=True)]
        log_probs = _completion_log_probs(model, drawn)
    with _loaded(pair, trained=False) as model:
        before_ids = _sampled(model, tokenizer, prompts, knobs)
        start_log_probs = _completion_log_probs(model, drawn)
    reward_model, _ = load_reward_model(reward_model_dir)
    before, after = (
        _answers(ids, prompts, reward_model, tokenizer, knobs.batch_size) for ids in (before_ids, after_ids)
    )
    divergences = [a - b for a, b in zip(log_probs, start_log_probs, strict=True)]
    return _summary(groups, before, after, divergences, gold), _samples(groups, before, after, gold)


@contextmanager
def _loaded(pair: PolicyPair, *, trained: bool) -> Generator[Model]:
    """One of the two policies, in memory for as long as the context lasts."""
    if not trained:
        yield load_policy(pair.base)
    elif pair.adapter:
        yield load_policy(pair.base, adapter=pair.trained)
    else:
        yield load_policy(replace(pair.base, name=str(pair.trained), revision=None))
    release()


def _sampled(
    model: Model, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], knobs: EvaluationKnobs
) -> list[Completion]:
    ends = tuple(end_ids(model, tokenizer))
    sampling = Sampling(knobs.max_new_tokens, knobs.temperature, knobs.top_p, knobs.top_k, ends)
    return sample(model, prompts, sampling, batch_size=knobs.batch_size, seed=knobs.seed)


def _completion_log_probs(model: Model, drawn: Sequence[TokenGroup]) -> list[float]:
    """Sum of the log-probabilities of the tokens of each group's only completion, in nats."""
    return [own.sum().item() for (own,) in group_log_probs(model, drawn, PASS_TOKENS)]


def _answers(
    completions: list[Completion],
    prompts: Sequence[Sequence[int]],
    reward_model: Any,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
) -> Answers:
    sequences = [[*prompt, *completion.ids] for prompt, completion in zip(prompts, completions, strict=True)]
    rewards = score_sequences(reward_model, sequences, batch_size)
    bodies = [c.ids[:-1] if c.ended else c.ids for c in completions]
    return Answers(completions, tokenizer.batch_decode([list(ids) for ids in bodies]), rewards)


def _summary(
    groups: Sequence[TokenGroup], before: Answers, after: Answers, divergences: list[float], gold: Gold | None
) -> dict[str, Any]:
    changes = [b - a for a, b in zip(before.rewards, after.rewards, strict=True)]
    wins = proportion([1.0 if change > 0 else 0.5 if change == 0 else 0.0 for change in changes])
    change, divergence = mean(changes), mean(divergences)
    result = {
        "prompts": len(groups),
        "reward_before": _average(before.rewards),
        "reward_after": _average(after.rewards),
        "reward_change": change.to_json(),
        "win_rate": wins.value,
        "win_rate_interval": wins.interval(),
        "kl": divergence.value,
        "kl_interval": divergence.interval(),
        "length_before": _average([len(c.ids) for c in before.completions]),
        "length_after": _average([len(c.ids) for c in after.completions]),
        "eos_before": _average([c.ended for c in before.completions]),
        "eos_after": _average([c.ended for c in after.completions]),
    }
    if gold is not None:
        qualities = [_gold_values(groups, answers, gold) for answers in (before, after)]
        difference = mean([b - a for a, b in zip(*qualities, strict=True)])
        result |= {
            "gold_before": _average(qualities[0]),
            "gold_after": _average(qualities[1]),
            "gold_change": difference.to_json(),
        }
    return result


def _gold_values(groups: Sequence[TokenGroup], answers: Answers, gold: Gold) -> list[float]:
    return [
        gold(group.prompt[-1].content, text, completion.ended)
        for group, text, completion in zip(groups, answers.texts, answers.completions, strict=True)
    ]


def _samples(groups: Sequence[TokenGroup], before: Answers, after: Answers, gold: Gold | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"prompt": [{"role": m.role, "content": m.content} for m in group.prompt]} for group in groups
    ]
    for name, answers in (("before", before), ("after", after)):
        qualities = _gold_values(groups, answers, gold) if gold else [None] * len(groups)
        for row, text, completion, reward, quality in zip(
            rows, answers.texts, answers.completions, answers.rewards, qualities, strict=True
        ):
            row[name] = {"text": text, "ended": completion.ended, "reward": reward}
            row[name] |= {} if quality is None else {"gold": quality}
    return rows


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)
