"""From the JSON that the stages leave to the report's records."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from helpsteer_rloo.report.fields import Node
from helpsteer_rloo.report.records import (
    BestOfN,
    Bias,
    Bin,
    Change,
    Data,
    Finding,
    Histogram,
    Judged,
    PolicyJudged,
    Sample,
    Side,
    Split,
    Turn,
)
from helpsteer_rloo.statistics import Estimate

PARTS = ("domain", "strength", "turns", "length")
LONGEST_TEXT = 20_000
"""Characters of a text that are shown; the run's files have the rest."""
_OF_TEXTS = ("length", "eos", "repetition", "distinct_2", "refusals")
SCORES = ("score", "reward", "guard", "gold")
"""Names of the scores that a response may have."""


def data_of(node: Node) -> Data:
    """The data's record, `data.json`."""
    left_out = [
        *(("bad row: " + name, count) for name, count in node.counts("bad_rows").items()),
        *((f"another {name} than was asked for", count) for name, count in node.counts("not_selected").items()),
        *((name.replace("_", " "), count) for name, count in node.counts("dropped").items()),
    ]
    overlong, splits = node.inside("overlong"), node.inside("splits")
    cut = [(name.replace("_", " "), overlong.count(name)) for name in ("context_cut", "response_cut")]
    return Data(
        source=node.text("source"),
        fingerprint=node.text("fingerprint"),
        rows=node.count("rows"),
        pairs=node.count("pairs"),
        max_length=node.count("max_length"),
        left_out=tuple(left_out),
        cut=tuple(cut),
        splits={name: _split(splits.inside(name)) for name in splits.names()},
    )


def _split(node: Node) -> Split:
    lengths = node.maybe("lengths")  # older runs have none
    return Split(
        pairs=node.count("pairs"),
        prompts=node.count("prompts"),
        domains=node.counts("domains"),
        strengths=node.counts("strengths"),
        lengths={name: _histogram(lengths.inside(name)) for name in lengths.names()} if lengths else {},
    )


def _histogram(node: Node) -> Histogram:
    return Histogram(0.0, node.number("width"), tuple(int(count) for count in node.numbers("counts")))


def judged_of(node: Node) -> Judged:
    """A reward model's judgement, `heldout` of its record."""
    accuracy = Estimate(node.number("heldout_accuracy"), *node.interval("interval"), node.count("heldout_pairs"))
    calibration, biases, probes = (node.maybe(name) for name in ("calibration", "biases", "probes"))
    names = [name for name in (probes.names() if probes else []) if isinstance(_get(probes, name), dict)]
    return Judged(
        accuracy=accuracy,
        better_than_chance=node.flag("better_than_chance"),
        parts={part: _estimates(node.inside(f"by_{part}")) for part in PARTS if node.has(f"by_{part}")},
        reliability=tuple(map(_bin, calibration.each("reliability"))) if calibration else (),
        calibration_error=calibration.estimate("ece") if calibration else None,
        biases={name: _bias(biases.inside(name)) for name in biases.names()} if biases else {},
        probes={name: probes.inside(name).estimate("change") for name in names} if probes else {},
        findings=tuple(map(_finding, node.each("findings"))) if node.has("findings") else (),
    )


def _get(node: Node | None, name: str) -> Any:
    return node.content.get(name) if node else None


def _estimates(node: Node) -> dict[str, Estimate]:
    return {name: node.estimate(name) for name in node.names()}


def _bin(node: Node) -> Bin:
    return Bin(node.number("confidence"), node.number("right"), node.count("count"))


def _bias(node: Node) -> Bias:
    return Bias(node.estimate("model_prefers_more"), node.estimate("labels_prefer_more"), node.estimate("bias"))


def _finding(node: Node) -> Finding:
    return Finding(node.text("sentence"), node.flag("concern"), node.text("name", ""))


def policy_judged_of(node: Node) -> PolicyJudged:
    """A policy's judgement, the outputs of the stage `evaluation`."""
    prompts = node.count("prompts")
    rates = {"reward": Estimate(node.number("win_rate"), *node.interval("win_rate_interval"), prompts)}
    others = {
        "reward, equal length": "length_controlled_win_rate",
        "guard": "guard_win_rate",
        "guard, equal length": "guard_length_controlled_win_rate",
    }
    rates |= {label: node.estimate(name) for label, name in others.items() if node.has(name)}
    return PolicyJudged(
        prompts=prompts,
        changes={name: _change(node, name) for name in ("gold", "reward", "guard") if node.has(f"{name}_before")},
        win_rates=rates,
        kl=Estimate(node.number("kl"), *node.interval("kl_interval"), prompts),
        texts={
            name: (node.number(f"{name}_before"), node.number(f"{name}_after"))
            for name in _OF_TEXTS
            if node.has(f"{name}_before")
        },
        best_of_n=_best_of_n(node.inside("best_of_n")) if node.has("best_of_n") else None,
    )


def _change(node: Node, name: str) -> Change:
    return Change(node.number(f"{name}_before"), node.number(f"{name}_after"), node.estimate(f"{name}_change"))


def _best_of_n(node: Node) -> BestOfN:
    there = node.inside("at_the_policys_kl")
    names = [name for name in SCORES if there.has(name)]
    return BestOfN(
        curve=tuple({name: row.number(name) for name in row.names()} for row in node.each("curve")),
        n=there.number("n"),
        reaches=there.flag("reaches_the_kl"),
        policy_minus={name: there.inside(name).estimate("policy_minus_best_of_n") for name in names},
    )


def answer_of(number: int, row: Mapping[str, Any], file: str) -> Sample:
    """A line of `samples.jsonl`: the answers of the untrained and the trained policy."""
    node = Node(row, f"{file}, line {number}")
    first, second = (_side(node.inside(name)) for name in ("before", "after"))
    return Sample(number, _prompt(node), first, second, node.text("domain", ""))


def pair_of(number: int, row: Mapping[str, Any], file: str) -> Sample:
    """A line of `pairs.jsonl`: a held-out pair with its scores."""
    node = Node(row, f"{file}, line {number}")
    first, second = (_side(node.inside(name)) for name in ("rejected", "chosen"))
    return Sample(number, _prompt(node), first, second, node.text("domain", ""), f"strength {node.count('strength')}")


def _prompt(node: Node) -> tuple[Turn, ...]:
    return tuple(Turn(turn.text("role"), shortened(turn.text("content"))) for turn in node.each("prompt"))


def _side(node: Node) -> Side:
    cut = node.has("ended") and not node.flag("ended")
    return Side(
        shortened(node.text("text")),
        {name: node.number(name) for name in SCORES if node.has(name)},
        "cut off by the length limit" if cut else "",
    )


def shortened(text: str) -> str:
    """A text, or its beginning and what it says in place of the rest."""
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:LONGEST_TEXT]}\n[… {len(text) - LONGEST_TEXT:,} more characters in the run's files]"


def around(value: float) -> tuple[float, float]:
    """Limits of an axis on which nothing but one value lies.

    >>> around(2.0), around(0.0)
    ((1.0, 3.0), (-0.5, 0.5))
    """
    half = abs(value) / 2 or 0.5
    return value - half, value + half


def distribution(values: Sequence[float], others: Sequence[float], most: int = 24) -> tuple[Histogram, Histogram]:
    """Histograms of two samples over the same bins of equal width.

    >>> [part.counts for part in distribution([0.0, 1.0], [3.0, 4.0], most=2)]
    [(2, 0), (0, 2)]
    """
    low, high = min(*values, *others), max(*values, *others)
    if math.isclose(low, high):  # between numbers so near to each other there is no room for bins
        low, high = around(low)
    width = high / most - low / most  # the whole difference may be more than a number can be, and so below
    found: list[Histogram] = []
    for part in (values, others):
        counts = [0] * most
        for value in part:
            counts[min(most - 1, int((value / 2 - low / 2) / (width / 2)))] += 1
        found.append(Histogram(low, width, tuple(counts)))
    return found[0], found[1]
