"""What a reward model likes besides quality: length and markdown in pairs as they are, and in answers made for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from helpsteer_rloo.evaluation.preference import Judgement
from helpsteer_rloo.evaluation.text_features import with_markdown
from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.model.forward import score_groups
from helpsteer_rloo.model.loading import Model
from helpsteer_rloo.rendering import Renderer
from helpsteer_rloo.statistics import bootstrap, clustered_mean, proportion, weighted_mean

MOST_PROBES = 256
"""Prompts whose answers are changed on purpose."""


def feature_bias(judgements: Sequence[Judgement], name: str) -> dict[str, Any] | None:
    """Whether the model favours the response with more of a feature, `tokens` or `markdown`; none if no pair differs.

    - model_prefers_more, labels_prefer_more: shares of the pairs that differ in it in which model and labels do.
    - bias: the difference of the two.
    - accuracy_chosen_more, accuracy_chosen_less: the model's, where the labels prefer more of it and where less.
    - accuracy_gap: the difference of the two; None where one of them is of no pair, as it is itself.
    - rank_correlation: of score and feature inside a pair, Kendall's tau: the mean of 1 where they order the two alike
      and -1 where they do not.
    """
    pairs = [j for j in judgements if getattr(j.chosen, name) != getattr(j.rejected, name)]
    if not pairs:
        return None
    owners = [j.group for j in pairs]
    chosen_more = np.array([getattr(j.chosen, name) > getattr(j.rejected, name) for j in pairs])
    right = np.array([1.0 if j.margin > 0 else 0.5 if j.margin == 0 else 0.0 for j in pairs])
    prefers_more = np.where(chosen_more, right, 1 - right)

    def accuracy(where: Any) -> dict[str, Any] | None:
        chosen = np.flatnonzero(where)
        return proportion(right[chosen].tolist(), [owners[i] for i in chosen]).to_json() if len(chosen) else None

    return {
        "model_prefers_more": proportion(prefers_more.tolist(), owners).to_json(),
        "labels_prefer_more": proportion(chosen_more.tolist(), owners).to_json(),
        "bias": clustered_mean((prefers_more - chosen_more).tolist(), owners).to_json(),
        "accuracy_chosen_more": accuracy(chosen_more),
        "accuracy_chosen_less": accuracy(~chosen_more),
        "accuracy_gap": bootstrap(
            lambda w: weighted_mean(right, w * chosen_more) - weighted_mean(right, w * ~chosen_more), owners
        ).to_json()
        if 0 < chosen_more.sum() < len(pairs)
        else None,
        "rank_correlation": clustered_mean((2 * prefers_more - 1).tolist(), owners).to_json(),
    }


@dataclass(frozen=True)
class Probe:
    """An answer that is changed on purpose: how, and whether it still ends by itself."""

    changed: Callable[[str], str]
    ended: bool = True


PROBES = {
    "markdown": Probe(with_markdown),
    "repetition": Probe(lambda text: f"{text} {text}"),
    "truncation": Probe(lambda text: text[: len(text) // 2], ended=False),
}


def probe_effects(
    model: Model, renderer: Renderer, groups: Sequence[TokenGroup], batch_size: int, max_length: int
) -> dict[str, Any]:
    """What a change on purpose does to the score of a chosen answer, one a prompt, of at most `MOST_PROBES` prompts.

    - markdown: the same text under a heading, as a list that begins in bold.
    - repetition: the same text twice.
    - truncation: its first half, without an end of turn.

    Each is given as `change`, the mean change of the score, and `raised`, the share of answers whose score rises. Where
    an answer so changed is over `max_length`, it is left out of all, and counted as `over_max_length`.

    `position` is the largest change of any score when a prompt's responses are scored in the opposite order.
    """
    labelled = [group for group in groups if group.preferences]
    judged = labelled[:: max(1, -(-len(labelled) // MOST_PROBES))]  # spread over the data, which may be sorted
    variants = [_variants(group, renderer) for group in judged]
    fitting = [
        group for group in variants if max(map(len, group.continuation_ids)) + len(group.prompt_ids) <= max_length
    ]
    result: dict[str, Any] = {"over_max_length": len(judged) - len(fitting)}
    scores = np.array(score_groups(model, fitting, batch_size)).reshape(len(fitting), 1 + len(PROBES))
    for place, name in enumerate(PROBES, start=1):
        changes = (scores[:, place] - scores[:, 0]).tolist()
        if changes:
            result[name] = {
                "change": clustered_mean(changes, range(len(changes))).to_json(),
                "raised": proportion([change > 0 for change in changes]).to_json(),
            }
    return {**result, "position": _position(model, judged, batch_size)}


def _variants(group: TokenGroup, renderer: Renderer) -> TokenGroup:
    """A prompt with a chosen answer as it is, and changed in every way."""
    ids = group.continuation_ids[group.preferences[0].chosen]
    text = renderer.text_of(ids)
    changed = [renderer.continuation_ids(probe.changed(text) or text, ended=probe.ended) for probe in PROBES.values()]
    return TokenGroup(group.prompt, group.prompt_ids, (ids, *changed))


def _position(model: Model, groups: Sequence[TokenGroup], batch_size: int) -> float:
    turned = [TokenGroup(g.prompt, g.prompt_ids, g.continuation_ids[::-1]) for g in groups]
    both = zip(score_groups(model, groups, batch_size), score_groups(model, turned, batch_size), strict=True)
    return max((abs(a - b) for own, other in both for a, b in zip(own, other[::-1], strict=True)), default=0.0)
