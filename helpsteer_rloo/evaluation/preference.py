"""Held-out accuracy of a reward model, and a table of sample predictions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from helpsteer_rloo.groups import Preference, TokenGroup
from helpsteer_rloo.model.forward import score_groups
from helpsteer_rloo.model.loading import Model
from helpsteer_rloo.objectives import preference_margins
from helpsteer_rloo.statistics import proportion

CHANCE = 0.5


@dataclass(frozen=True, slots=True)
class Judgement:
    """One held-out pair with its scores; `group` numbers the prompts, `prompt` is the last user turn."""

    group: int
    preference: Preference
    prompt: str
    chosen_score: float
    rejected_score: float

    @property
    def margin(self) -> float:
        """Score of the chosen response minus that of the rejected one."""
        return self.chosen_score - self.rejected_score

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
            "chosen_score": self.chosen_score,
            "rejected_score": self.rejected_score,
            "margin": self.margin,
            "right": self.right,
        }


def judge(model: Model, groups: Sequence[TokenGroup], batch_size: int) -> list[Judgement]:
    """Score every continuation of every group once, and compare the pairs."""
    judgements = []
    chunk = max(1, 8 * batch_size)
    for start in tqdm(range(0, len(groups), chunk), desc="Scoring held-out pairs", leave=False):
        part = groups[start : start + chunk]
        scores = score_groups(model, part, batch_size)
        for number, (group, own) in enumerate(zip(part, scores, strict=True), start=start):
            judgements += [
                Judgement(number, p, group.prompt[-1].content, own[p.chosen], own[p.rejected])
                for p in group.preferences
            ]
    return judgements


def summarize(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Accuracy with a 95 % interval that respects shared prompts, overall and by domain and strength; mean loss."""
    overall = proportion([j.right for j in judgements], [j.group for j in judgements])
    scores = torch.tensor([[j.chosen_score, j.rejected_score] for j in judgements])
    return {
        "heldout_accuracy": overall.value,
        "interval": [overall.low, overall.high],
        "heldout_pairs": overall.count,
        "heldout_prompts": len({j.group for j in judgements}),
        "better_than_chance": overall.low > CHANCE,
        "mean_margin": preference_margins(scores).mean().item(),
        "log_loss": -torch.nn.functional.logsigmoid(preference_margins(scores)).mean().item(),
        "by_domain": _by(judgements, "domain"),
        "by_strength": _by(judgements, "strength"),
    }


def _by(judgements: Sequence[Judgement], name: str) -> dict[str, Any]:
    values = sorted({getattr(j.preference, name) for j in judgements})
    parts = {value: [j for j in judgements if getattr(j.preference, name) == value] for value in values}
    return {str(v): proportion([j.right for j in part], [j.group for j in part]).to_json() for v, part in parts.items()}


def spread_sample(judgements: Sequence[Judgement], count: int) -> list[Judgement]:
    """`count` judgements at even distances through the held-out pairs, so that no choice is made by result."""
    step = max(1, len(judgements) // max(count, 1))
    return list(judgements[::step][:count])
