"""Judging a policy: answers of the untrained and the trained model to the same held-out prompts, same seeds."""

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from helpsteer_rloo.evaluation.best_of_n import against_policy, curve
from helpsteer_rloo.evaluation.text_features import distinct, is_refusal, repetition
from helpsteer_rloo.evaluation.win_rate import length_controlled_win_rate, win_rate
from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.model.forward import group_log_probs
from helpsteer_rloo.model.loading import Base, Model, end_ids, load_policy, load_reward_model
from helpsteer_rloo.model.memory import release
from helpsteer_rloo.model.roles import RewardRole
from helpsteer_rloo.model.rollout import Completion, Sampling, sample
from helpsteer_rloo.sizes import PASS_TOKENS
from helpsteer_rloo.statistics import Estimate, mean

Gold = Callable[[str, str, bool], float]
"""The true quality of an answer, where a world knows it: last user turn, answer, whether it ended -> [0, 1]."""


@dataclass(frozen=True)
class PolicyPair:
    """What is compared: the starting model, the directory of the trained policy, and whether that is an adapter."""

    base: Base
    trained: Path
    adapter: bool


@dataclass(frozen=True)
class Judges:
    """Who judges: the reward model that was trained against, one that was not (the guard), and who knows the truth."""

    reward_model: str | Path
    guard: str | Path | None = None
    gold: Gold | None = None


@dataclass(frozen=True)
class EvaluationKnobs:
    """How it is compared: sampling distribution, limits and seed; `best_of` samples of the start, 0 for none."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    batch_size: int
    seed: int
    best_of: int = 0


@dataclass(frozen=True)
class Answers:
    """Completions to the prompts in order, their text without the end of turn, their rewards and a guard's scores.

    There may be several a prompt, as many for each, those of one next to each other.
    """

    completions: list[Completion]
    texts: list[str]
    rewards: list[float]
    guards: list[float] | None = None

    @property
    def merits(self) -> list[float]:
        """What an answer is ordered by: the guard's score, without a guard the reward."""
        return self.rewards if self.guards is None else self.guards


def evaluate_policy(
    pair: PolicyPair,
    judges: Judges,
    tokenizer: PreTrainedTokenizerBase,
    groups: Sequence[TokenGroup],
    knobs: EvaluationKnobs,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compare the two policies on `groups`, one model in memory at a time.

    KL is the mean over prompts of log pi(y) - log pi_start(y) for the trained policy's own answers y (k1, in nats),
    at the temperature of sampling and without its top-p and top-k.

    Returns:
        The summary, and one record a prompt with both answers, the worst regressions first.
    """
    prompts = [group.prompt_ids for group in groups]
    with _loaded(pair, trained=True) as model:
        after_ids = _sampled(model, tokenizer, prompts, knobs)
        drawn = [TokenGroup((), p, (c.ids,)) for p, c in zip(prompts, after_ids, strict=True)]
        log_probs = _completion_log_probs(model, drawn, knobs.temperature)
        del model  # a name that outlives its context would keep the first in memory beside the second
    with _loaded(pair, trained=False) as model:
        before_ids = _sampled(model, tokenizer, prompts, knobs)
        start_log_probs = _completion_log_probs(model, drawn, knobs.temperature)
        many = [prompt for prompt in prompts for _ in range(knobs.best_of)]
        many_ids = _sampled(model, tokenizer, many, replace(knobs, seed=knobs.seed + 1))
        del model
    sides = [_answers(ids, tokenizer) for ids in (before_ids, after_ids, many_ids)]
    sides = _scored(sides, prompts, judges.reward_model, knobs.batch_size, "rewards")
    if judges.guard is not None:
        sides = _scored(sides, prompts, judges.guard, knobs.batch_size, "guards")
    before, after, chosen_from = sides
    divergences = [a - b for a, b in zip(log_probs, start_log_probs, strict=True)]
    summary = _summary(groups, before, after, divergences, judges.gold)
    if knobs.best_of:
        summary["best_of_n"] = _best_of_n(groups, chosen_from, after, summary["kl"], judges.gold)
    return summary, _samples(groups, before, after, judges.gold)


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


def _completion_log_probs(model: Model, drawn: Sequence[TokenGroup], temperature: float) -> list[float]:
    """Sum of the log-probabilities of the tokens of each group's only completion, in nats."""
    return [own.sum().item() for (own,) in group_log_probs(model, drawn, PASS_TOKENS, temperature)]


def _answers(completions: list[Completion], tokenizer: PreTrainedTokenizerBase) -> Answers:
    return Answers(completions, tokenizer.batch_decode([list(c.body) for c in completions]), [])


def _scored(
    answers: Sequence[Answers], prompts: Sequence[Sequence[int]], directory: str | Path, batch_size: int, column: str
) -> list[Answers]:
    """The answers with the scores of a reward model in one of their columns."""
    role = RewardRole(load_reward_model(directory)[0])
    scored: list[Answers] = []
    for side in answers:
        each = len(side.completions) // len(prompts)
        groups = [
            TokenGroup((), tuple(prompt), tuple(c.ids for c in side.completions[place * each : (place + 1) * each]))
            for place, prompt in enumerate(prompts)
        ]
        scores = role.score(groups, batch_size) if each else []
        if not all(math.isfinite(score) for own in scores for score in own):
            raise ValueError(f"The scores of the reward model in {directory} are not finite: it is damaged.")
        scored.append(replace(side, **{column: [score for own in scores for score in own]}))
    del role
    release()
    return scored


def _summary(
    groups: Sequence[TokenGroup], before: Answers, after: Answers, divergences: list[float], gold: Gold | None
) -> dict[str, Any]:
    longer = [len(b.ids) - len(a.ids) for a, b in zip(before.completions, after.completions, strict=True)]
    rewards = _changes(before.rewards, after.rewards)
    wins, divergence = win_rate(rewards), mean(divergences)
    result = {
        "prompts": len(groups),
        **_compared("reward", before.rewards, after.rewards),
        "win_rate": wins.value,
        "win_rate_interval": wins.interval(),
        "length_controlled_win_rate": _json(length_controlled_win_rate(rewards, longer)),
        "kl": divergence.value,
        "kl_interval": divergence.interval(),
        **_of_texts(before, "before"),
        **_of_texts(after, "after"),
    }
    if before.guards is not None and after.guards is not None:
        guards = _changes(before.guards, after.guards)
        result |= _compared("guard", before.guards, after.guards)
        result["guard_win_rate"] = win_rate(guards).to_json()
        result["guard_length_controlled_win_rate"] = _json(length_controlled_win_rate(guards, longer))
    if gold is not None:
        result |= _compared("gold", *(_gold_values(groups, answers, gold) for answers in (before, after)))
    return result


def _best_of_n(
    groups: Sequence[TokenGroup], samples: Answers, policy: Answers, kl: float, gold: Gold | None
) -> dict[str, Any]:
    """Best-of-n by reward from samples of the start, along n, and the policy against it at the policy's KL."""
    each = len(samples.completions) // len(groups)
    columns, own = {"reward": samples.rewards}, {"reward": policy.rewards}
    if samples.guards is not None and policy.guards is not None:
        columns["guard"], own["guard"] = samples.guards, policy.guards
    if gold is not None:
        columns["gold"] = _gold_values([group for group in groups for _ in range(each)], samples, gold)
        own["gold"] = _gold_values(groups, policy, gold)
    values = {name: np.reshape(column, (len(groups), each)) for name, column in columns.items()}
    return {
        "samples": each,
        "curve": curve(values["reward"], values),
        "at_the_policys_kl": against_policy(values["reward"], values, own, kl),
    }


def _compared(name: str, before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    change = mean(_changes(before, after))
    return {
        f"{name}_before": _average(before),
        f"{name}_after": _average(after),
        f"{name}_change": change.to_json(),
    }


def _json(estimate: Estimate | None) -> dict[str, Any] | None:
    return None if estimate is None else estimate.to_json()


def _changes(before: Sequence[float], after: Sequence[float]) -> list[float]:
    return [b - a for a, b in zip(before, after, strict=True)]


def _of_texts(answers: Answers, side: str) -> dict[str, float]:
    """What the answers of one side look like: length, endings, repetition, variety, refusals."""
    return {
        f"length_{side}": _average([len(c.ids) for c in answers.completions]),
        f"eos_{side}": _average([c.ended for c in answers.completions]),
        f"repetition_{side}": _average([repetition(text) for text in answers.texts]),
        f"distinct_2_{side}": distinct(answers.texts),
        f"refusals_{side}": _average([is_refusal(text) for text in answers.texts]),
    }


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
        for row, score in zip(rows, answers.guards or (), strict=False):
            row[name]["guard"] = score
    changes = _changes(before.merits, after.merits)
    return [rows[place] for place in sorted(range(len(rows)), key=lambda place: changes[place])]


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)
