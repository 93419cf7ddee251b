"""What a server looks at before it takes requests: whether texts scored together have the scores they have alone."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from helpsteer_rloo.groups import Message, TokenGroup
from helpsteer_rloo.model.forward import regroup, score_sequences
from helpsteer_rloo.rendering import Renderer

WITHIN = {torch.float32: 1e-4, torch.float64: 1e-4}
WITHIN_HALF = 0.05
"""How far scores may be apart, as a part of the larger one if that is over 1: rounding alone stays below."""
_QUESTIONS = ("Name two trees.", "What is two and two?", "Write one sentence about rain. Let it be short.")
_ANSWERS = ("Oak, elm.", "Four", "It rains, and the street shines.")


def check_scores(
    score: Callable[[Sequence[TokenGroup]], list[list[float]]], model: nn.Module, renderer: Renderer
) -> float:
    """Score some texts together and each one alone, in padded passes without packing or sharing.

    Also makes what the first pass makes once, so that the first client does not wait for it.

    Args:
        score: As the server scores.
        model: The reward model.
        renderer: Its own.

    Returns:
        The largest difference.

    Raises:
        ValueError: they differ by more than rounding does.
    """
    answers = tuple(renderer.continuation_ids(answer, ended=True) for answer in _ANSWERS)
    prompts = (renderer.prompt_ids([Message("user", question)]) for question in _QUESTIONS)
    groups = [TokenGroup((), tuple(prompt), answers) for prompt in prompts]
    alone = regroup(score_sequences(model, [group.sequence(i) for group in groups for i in range(3)], 1), groups)
    pairs = [
        (one, other)
        for own, others in zip(score(groups), alone, strict=True)
        for one, other in zip(own, others, strict=True)
    ]
    limit = WITHIN.get(next(model.parameters()).dtype, WITHIN_HALF)
    if not all(abs(one - other) <= limit * max(1.0, abs(other)) for one, other in pairs):  # also where one is NaN
        raise ValueError(
            f"Scores of texts that are scored together differ from those of each alone, by up to "
            f"{max(abs(one - other) for one, other in pairs):.2g}: they would depend on what else is asked. Start "
            "again; if it stays so, the engine is wrong on this device: report it."
        )
    return max(abs(one - other) for one, other in pairs)
