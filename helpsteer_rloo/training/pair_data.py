"""Labelled groups as the data set of `RewardTrainer`: one row a preference, with what its loss needs of the label."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from helpsteer_rloo.groups import Preference, TokenGroup
from helpsteer_rloo.settings.knobs import RewardKnobs


def pair_dataset(groups: Sequence[TokenGroup], own: RewardKnobs) -> Dataset:
    """One row a preference: `chosen_ids` and `rejected_ids`, each prompt and continuation together, and `group`.

    With `loss` "margin" also `margin`, the strength of the preference; with `loss` "scaled" or `weight_by_agreement`
    also `weight`, the product of what the two ask for.

    Raises:
        ValueError: weights by agreement are asked for, and no pair has annotators, or none an annotator on its side.
    """
    if own.weight_by_agreement:
        _check_annotators([preference for group in groups for preference in group.preferences])
    return Dataset.from_list(
        [
            {
                "chosen_ids": list(group.sequence(preference.chosen)),
                "rejected_ids": list(group.sequence(preference.rejected)),
                "group": number,
                **_targets(preference, own),
            }
            for number, group in enumerate(groups)
            for preference in group.preferences
        ]
    )


def _targets(preference: Preference, own: RewardKnobs) -> dict[str, Any]:
    targets: dict[str, Any] = {"margin": float(preference.strength)} if own.loss == "margin" else {}
    if own.loss == "scaled" or own.weight_by_agreement:
        weight = float(preference.strength) if own.loss == "scaled" else 1.0
        targets["weight"] = weight * (agreement(preference) if own.weight_by_agreement else 1.0)
    return targets


def _check_annotators(preferences: Sequence[Preference]) -> None:
    if not any(preference.annotators for preference in preferences):
        raise ValueError(
            "--weight_by_agreement has nothing to weigh by: no row of the training data has individual_preference."
        )
    if not any(map(agreement, preferences)):
        raise ValueError("--weight_by_agreement: all annotators contradict their labels. Are the labels inverted?")


def agreement(preference: Preference) -> float:
    """Share of the annotators on the side of the label, those without a side counted half; 1 if there are none.

    >>> agreement(Preference(0, 1, 1, row=0, domain="general", language="english", annotators=(2, 0, -1, 1)))
    0.625
    """
    sides = [1.0 if score > 0 else 0.5 if score == 0 else 0.0 for score in preference.annotators]
    return sum(sides) / len(sides) if sides else 1.0
