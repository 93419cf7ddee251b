"""The judgement of a reward model: accuracy, ceiling, calibration and biases, and what they mean in plain sentences."""

from collections.abc import Sequence
from typing import Any

from helpsteer_rloo.evaluation.biases import feature_bias, probe_effects
from helpsteer_rloo.evaluation.calibration import calibration
from helpsteer_rloo.evaluation.ceiling import label_ceiling, most_certain
from helpsteer_rloo.evaluation.findings import findings
from helpsteer_rloo.evaluation.preference import Judgement, judge, summarize
from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.model.loading import Model
from helpsteer_rloo.rendering import Renderer


def judge_reward_model(
    model: Model, renderer: Renderer, groups: Sequence[TokenGroup], batch_size: int, max_length: int
) -> tuple[list[Judgement], dict[str, Any]]:
    """Score held-out pairs, and say everything about the model that they tell.

    Args:
        model: The reward model.
        renderer: Of its own rendering.
        groups: Held-out prompts with their labelled continuations.
        batch_size: Continuations in one forward pass.
        max_length: Most tokens of a prompt and a response.

    Returns:
        The judgements, and `summarize`'s result with `ceiling`, `most_certain`, `calibration`, `biases`, `probes` and
        `findings`.
    """
    judgements = judge(model, groups, batch_size, renderer.text_of)
    margins, owners = [j.margin for j in judgements], [j.group for j in judgements]
    result = {
        **summarize(judgements),
        "ceiling": label_ceiling([j.preference for j in judgements], owners),
        "most_certain": most_certain(margins, owners),
        "calibration": calibration(margins, owners),
        "biases": {
            "length": feature_bias(judgements, "tokens"),
            "markdown": feature_bias(judgements, "markdown"),
        },
        "probes": probe_effects(model, renderer, groups, batch_size, max_length),
    }
    return judgements, {**result, "findings": [finding.to_json() for finding in findings(result)]}
