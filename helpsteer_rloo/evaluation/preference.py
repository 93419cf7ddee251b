"""Held-out pairs and the scores that a reward model gives their responses; its accuracy, whole and in parts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from helpsteer_rloo.evaluation.text_features import markdown_marks
from helpsteer_rloo.events import counted
from helpsteer_rloo.groups import Message, Preference, TokenGroup
from helpsteer_rloo.model.forward import score_groups
from helpsteer_rloo.model.loading import Model
from helpsteer_rloo.objectives import preference_margins
from helpsteer_rloo.statistics import proportion

CHANCE = 0.5
LENGTH_CLASSES = 4
"""Classes of equal size that pairs are put into by their length."""
MANY_TURNS = 4
"""User turns from which conversations are counted together."""


@dataclass(frozen=True, slots=True)
class ScoredResponse:
    """A response: score, length in tokens, number of its headings, list items and bold phrases, and its text."""

    score: float
    tokens: int = 0
    markdown: int = 0
    text: str = ""


@dataclass(frozen=True, slots=True)
class Judgement:
    """One held-out pair with its scores.

    `group` is that of all pairs on one prompt, whatever was cut off it; `prompt` is the last user turn, `turns` the
    number of them, `length` that of the prompt and the longer response in tokens; `conversation` is the whole prompt.
    """

    group: int
    preference: Preference
    chosen: ScoredResponse
    rejected: ScoredResponse
    prompt: str = ""
    turns: int = 1
    length: int = 0
    conversation: tuple[Message, ...] = ()

    @property
    def margin(self) -> float:
        """Score of the chosen response minus that of the rejected one."""
        return self.chosen.score - self.rejected.score

    @property
    def right(self) -> bool:
        """Whether the chosen response scores strictly higher; a tie is wrong."""
        return self.margin > 0

    def to_json(self) -> dict[str, Any]:
        """One line of the table of sample predictions."""
        return {
            "row": self.preference.row,
            "domain": self.preference.domain,
            "strength": self.preference.strength,
            "prompt": self.prompt,
            "chosen_score": self.chosen.score,
            "rejected_score": self.rejected.score,
            "margin": self.margin,
            "right": self.right,
        }

    def to_sample(self) -> dict[str, Any]:
        """The whole pair with its scores, as it is kept to be read."""
        label = self.preference
        sides = {"chosen": self.chosen, "rejected": self.rejected}
        return {
            "row": label.row,
            "domain": label.domain,
            "language": label.language,
            "strength": label.strength,
            "prompt": [{"role": turn.role, "content": turn.content} for turn in self.conversation],
            **{name: {"text": s.text, "score": s.score, "tokens": s.tokens} for name, s in sides.items()},
        }


def judge(
    model: Model, groups: Sequence[TokenGroup], batch_size: int, text_of: Callable[[Sequence[int]], str] | None = None
) -> list[Judgement]:
    """Score every continuation of every group once, and compare the pairs.

    Raises:
        ValueError: a score is not finite.

    Args:
        model: A reward model.
        groups: With preferences.
        batch_size: Continuations in one forward pass.
        text_of: From a continuation's ids to its text, which is kept, and whose markdown is counted.
    """
    judgements: list[Judgement] = []
    chunk = max(1, 8 * batch_size)
    for start in counted(range(0, len(groups), chunk), "scoring held-out pairs"):
        part = groups[start : start + chunk]
        scores = score_groups(model, part, batch_size)
        for number, (group, own) in enumerate(zip(part, scores, strict=True), start=start):
            if not all(map(math.isfinite, own)):
                rows = ", ".join(str(preference.row) for preference in group.preferences)
                raise ValueError(f"A score of row {rows} (counted from 0) is not finite: the reward model is damaged.")
            texts = [text_of(ids) if text_of else "" for ids in group.continuation_ids]
            responses = [
                ScoredResponse(score, len(ids), markdown_marks(text), text)
                for score, ids, text in zip(own, group.continuation_ids, texts, strict=True)
            ]
            judgements += _judgements(number, group, responses)
    return judgements


def _judgements(number: int, group: TokenGroup, responses: Sequence[ScoredResponse]) -> list[Judgement]:
    turns = sum(message.role == "user" for message in group.prompt)
    judgements: list[Judgement] = []
    for preference in group.preferences:
        chosen, rejected = responses[preference.chosen], responses[preference.rejected]
        length = len(group.prompt_ids) + max(chosen.tokens, rejected.tokens)
        prompt = group.prompt[-1].content if group.prompt else ""
        owner = number if preference.first_row is None else preference.first_row
        judgements.append(Judgement(owner, preference, chosen, rejected, prompt, turns, length, group.prompt))
    return judgements


def summarize(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Accuracy with a 95 % interval that respects shared prompts, overall and in parts; mean margin and mean loss."""
    overall = proportion([j.right for j in judgements], [j.group for j in judgements])
    scores = torch.tensor([[j.chosen.score, j.rejected.score] for j in judgements])
    return {
        "heldout_accuracy": overall.value,
        "interval": [overall.low, overall.high],
        "heldout_pairs": overall.count,
        "heldout_prompts": len({j.group for j in judgements}),
        "better_than_chance": overall.low > CHANCE,
        "ties": sum(j.margin == 0 for j in judgements) / len(judgements),
        "mean_margin": preference_margins(scores).mean().item(),
        "log_loss": -torch.nn.functional.logsigmoid(preference_margins(scores)).mean().item(),
        "by_domain": _by(judgements, [j.preference.domain for j in judgements]),
        "by_strength": _by(judgements, [str(j.preference.strength) for j in judgements]),
        "by_turns": _by(judgements, [_turns(j) for j in judgements]),
        "by_length": _by(judgements, _length_classes([j.length for j in judgements])),
    }


def _by(judgements: Sequence[Judgement], labels: Sequence[str]) -> dict[str, Any]:
    """Accuracy of the judgements with each label, in the order of the labels."""
    parts: dict[str, list[Judgement]] = {label: [] for label in sorted(set(labels), key=_natural)}
    for judgement, label in zip(judgements, labels, strict=True):
        parts[label].append(judgement)
    return {
        label: proportion([j.right for j in part], [j.group for j in part]).to_json() for label, part in parts.items()
    }


def _natural(label: str) -> tuple[int, str]:
    digits = label.split(" ")[0].rstrip("+")
    return (int(digits) if digits.isdecimal() else 0, label)


def _turns(judgement: Judgement) -> str:
    return f"{MANY_TURNS}+" if judgement.turns >= MANY_TURNS else str(judgement.turns)


def _length_classes(lengths: Sequence[int]) -> list[str]:
    """The class of each length among `LENGTH_CLASSES` of about equal size, named by its ends.

    >>> _length_classes([1, 2, 3, 4, 5, 6, 7, 8])[::2]
    ['1 to 2', '3 to 4', '5 to 6', '7 to 8']
    """
    ordered = sorted(lengths)
    starts = sorted({ordered[len(ordered) * i // LENGTH_CLASSES] for i in range(LENGTH_CLASSES)})
    ends = [*(start - 1 for start in starts[1:]), ordered[-1]]
    return [
        next(f"{start} to {end}" for start, end in zip(starts, ends, strict=True) if start <= length <= end)
        for length in lengths
    ]


def spread_sample(judgements: Sequence[Judgement], count: int) -> list[Judgement]:
    """`count` judgements at even distances through the held-out pairs, so that no choice is made by result."""
    kept = min(count, len(judgements))
    return [judgements[place * len(judgements) // kept] for place in range(kept)]
