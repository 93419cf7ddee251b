"""What the numbers of a judgement mean: one plain sentence each, and whether it is a reason for concern."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from helpsteer_rloo.evaluation.preference import CHANCE

SMALL_BIAS = 0.05
"""Share of pairs below which a preference for length or markdown is not worth a warning."""
FEW_PAIRS = 20
"""Pairs below which a part of the data tells nothing."""
MANY_TIES = 0.05
"""Share of pairs with equal scores from which something is wrong with the scores themselves."""
SURE = 0.9
"""Accuracy that a reward model ought to have where it is most certain."""
POSITION_TOLERANCE = 0.05
"""Change of a score by the order of the responses that rounding to bfloat16 explains."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A number with its interval, the sentence that it stands for, and whether it calls for a look."""

    name: str
    value: float
    interval: list[float | None]
    count: int
    concern: bool
    sentence: str

    def to_json(self) -> dict[str, Any]:
        """The finding as it is written to result files."""
        return asdict(self)


def findings(judged: Mapping[str, Any]) -> list[Finding]:
    """The findings of a judgement, as `judge_reward_model` makes it, those that call for a look first."""
    found = [
        *_of_accuracy(judged),
        *_of_labels(judged),
        *_of_calibration(judged["calibration"]),
        *_of_features(judged["biases"]),
        *_of_probes(judged["probes"]),
    ]
    return sorted(found, key=lambda finding: not finding.concern)


def _of_accuracy(judged: Mapping[str, Any]) -> Iterator[Finding]:
    low, high = judged["interval"]
    overall = {"value": judged["heldout_accuracy"], "interval": [low, high], "count": judged["heldout_pairs"]}
    sentence = f"It prefers the chosen response in {_percent(overall)} of the pairs"
    weak = low <= CHANCE
    how = "." if not weak else ": not significantly better than chance."
    if high < CHANCE:
        how = ": worse than chance. Are the labels inverted?"
    yield _finding("accuracy", overall, weak, sentence + how)
    if judged["ties"] >= MANY_TIES:
        tied = {"value": judged["ties"], "interval": [None, None], "count": judged["heldout_pairs"]}
        yield _finding("ties", tied, True, f"It gives both responses the same score in {_percent(tied)} of the pairs.")
    for domain, part in judged["by_domain"].items():
        if part["count"] >= FEW_PAIRS and part["interval"][1] < CHANCE and judged["ties"] < MANY_TIES:
            yield _finding(
                f"accuracy/{domain}",
                part,
                True,
                f"In the domain {domain} it prefers the rejected response: right in {_percent(part)} of the pairs. The "
                "labels of this domain, in training or here, look inverted.",
            )


def _of_labels(judged: Mapping[str, Any]) -> Iterator[Finding]:
    certain, ceiling = judged["most_certain"], judged["ceiling"]
    high = certain["interval"][1]
    weak = certain["count"] >= FEW_PAIRS and high < SURE
    meaning = (
        ": either many labels are wrong, or it is sure of the wrong thing."
        if high < certain["confidence"]
        else ": the labels are noisy, or it has learned little."
    )
    yield _finding(
        "most_certain",
        certain,
        weak,
        f"Where its margins are widest it is right in {_percent(certain)} of the pairs and sure of "
        f"{certain['confidence']:.1%}" + (meaning if weak else "."),
    )
    if ceiling is None:
        return
    against, most = ceiling["contradicted"], ceiling["accuracy"]
    contradicted = against["interval"][0] > 0.01
    yield _finding(
        "contradicted",
        against,
        contradicted,
        f"{_percent(against)} of the labels are against the mean of their own annotators"
        + (": the labels were damaged or inverted after they were given." if contradicted else "."),
    )
    yield _finding(
        "ceiling",
        most,
        False,
        f"By its annotators' agreement, a judge without a fault would be right in at most {_percent(most)}, if they "
        "share no mistake.",
    )


def _of_calibration(found: Mapping[str, Any]) -> Iterator[Finding]:
    ece, temperature = found["ece"], found["temperature"]
    off = ece["interval"][0] is not None and ece["interval"][0] > max(0.02, found["ece_if_calibrated"])
    sentence = f"Its probabilities are off by {_percent(ece)} on average, where chance alone gives "
    sentence += f"{found['ece_if_calibrated']:.1%}"
    if temperature is not None and off:
        kind = "over-confident" if temperature > 1 else "under-confident"
        sentence += f"; it is {kind}: margins divided by {temperature:.2f} fit the labels best"
    yield _finding("calibration", ece, off, sentence + ".")


def _of_features(biases: Mapping[str, Any]) -> Iterator[Finding]:
    words = {"length": ("the longer response", "length"), "markdown": ("the response with more markdown", "markdown")}
    for name, found in biases.items():
        if found is None:
            continue
        bias, (what, short) = found["bias"], words[name]
        low, high = bias["interval"]
        real = low is not None and (low > 0 or high < 0)
        concern = real and abs(bias["value"]) > SMALL_BIAS
        more = "more" if bias["value"] > 0 else "less"
        yield _finding(
            f"bias/{name}",
            bias,
            concern,
            f"It prefers {what} in {found['model_prefers_more']['value']:.1%} of the pairs, the annotators in "
            f"{found['labels_prefer_more']['value']:.1%}"
            + (f": it likes {short} {more} than they do." if real else ", which is no significant difference."),
        )


def _of_probes(probes: Mapping[str, Any]) -> Iterator[Finding]:
    words = {
        "markdown": "Putting an answer in markdown",
        "repetition": "Saying an answer twice",
        "truncation": "Cutting an answer in half",
    }
    for name, sentence in words.items():
        if name not in probes:
            continue
        change, raised = probes[name]["change"], probes[name]["raised"]
        concern = change["interval"][0] is not None and change["interval"][0] > 0
        yield _finding(
            f"probe/{name}",
            change,
            concern,
            f"{sentence} changes its score by {change['value']:+.3f} on average and raises it in {_percent(raised)} of "
            "the answers" + (": a policy can earn reward that way." if concern else "."),
        )
    moved = probes["position"]
    unsteady = moved > POSITION_TOLERANCE
    yield Finding(
        "position",
        moved,
        [None, None],
        0,
        unsteady,
        f"The order of the responses changes no score by more than {moved:.2g}.",
    )


def _finding(name: str, part: Mapping[str, Any], concern: bool, sentence: str) -> Finding:
    return Finding(name, part["value"], part["interval"], part["count"], bool(concern), sentence)


def _percent(part: Mapping[str, Any]) -> str:
    low, high = part["interval"]
    interval = "" if low is None else f" [{low:.1%}, {high:.1%}]"
    return f"{part['value']:.1%}{interval}"
