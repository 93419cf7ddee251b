"""A batch of rollouts in the midst of training, as a checkpoint keeps it."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.packing import PackedRow
from helpsteer_rloo.training.rollouts import Rollout, RolloutRow, Scores, TrainingBatch, TrainingSlice

_SCORES = tuple(column.name for column in fields(Scores))
_TENSORS = ("counted_B", "reference_T", "old_T", "sampler_T", "drawn_T", "advantage_B", "kl_B")


def values_of(slices: Sequence[TrainingSlice]) -> dict[str, Any]:
    """The part of the slices of one batch that is no tensor; their rows as the places of their completions."""
    batch = slices[0].batch
    return {
        "kl_coef": batch.kl_coef,
        "awaited": batch.awaited,
        "ended": batch.rollout.ended,
        "weight": slices[0].weight,
        "slices": [[_places_by_group(row) for row in part.rows] for part in slices],
    }


def tensors_of(slices: Sequence[TrainingSlice]) -> dict[str, Tensor]:
    """The tensors of the slices of one batch, and the token ids of its completions."""
    batch = slices[0].batch
    found: dict[str, Tensor | None] = {name: getattr(batch, name) for name in _TENSORS}
    found |= {f"scores.{name}": getattr(batch.scores, name) for name in _SCORES}
    for name in ("prompt_ids", "completion_ids"):
        rows: list[list[int]] = getattr(batch.rollout, name)
        found[name] = torch.tensor([token for row in rows for token in row])
        found[f"{name}.lengths"] = torch.tensor([len(row) for row in rows])
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def restored(values: dict[str, Any], tensors: dict[str, Tensor]) -> list[TrainingSlice]:
    """The slices that `values_of` and `tensors_of` were taken of, without the text of their completions."""
    prompt_ids, completion_ids = (_rows(tensors, name) for name in ("prompt_ids", "completion_ids"))
    batch = TrainingBatch(
        rollout=Rollout([], prompt_ids, completion_ids, [], values["ended"]),
        scores=Scores(**{name: tensors[f"scores.{name}"] for name in _SCORES}),
        kl_coef=values["kl_coef"],
        awaited=values["awaited"],
        **{name: tensors.get(name) for name in _TENSORS},  # pyright: ignore[reportArgumentType]
    )
    return [
        TrainingSlice(batch, [_row(batch.rollout, places) for places in rows], values["weight"])
        for rows in values["slices"]
    ]


def _places_by_group(row: RolloutRow) -> list[list[int]]:
    places = iter(row.places)
    return [[next(places) for _ in group.continuation_ids] for group in row.row.groups]


def _row(rollout: Rollout, places_by_group: Sequence[Sequence[int]]) -> RolloutRow:
    groups = tuple(
        TokenGroup((), tuple(rollout.prompt_ids[own[0]]), tuple(tuple(rollout.completion_ids[p]) for p in own))
        for own in places_by_group
    )
    return RolloutRow(PackedRow(groups), [place for own in places_by_group for place in own])


def _rows(tensors: dict[str, Tensor], name: str) -> list[list[int]]:
    return [part.tolist() for part in tensors[name].split(tensors[f"{name}.lengths"].tolist())]
