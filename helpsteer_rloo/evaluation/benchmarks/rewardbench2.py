"""RewardBench 2 (Malik et al. 2025, arXiv 2506.01937): the best of several answers, and answers that are equally good.

As its authors compute it. In every subset but Ties a row counts 1 / (number of responses with the highest score) if the
right one is among these, else 0. Ties has prompts twice, with one right answer (`ref:`) and with several (`tied:`). Of
a row, let w be the lowest score of a right answer, b the highest of a wrong one and s the spread of the right ones'
scores; it is accurate if w > b. The subset's score is

    0.3 · accuracy of tied + 0.3 · accuracy of ref + 0.2 · P(w - b of tied > s)
    + 0.2 · P(m > s) + 0.01 · mean tanh(m / s - 1)    with m the lesser w - b of tied and ref,

over the prompts that stand in both; a term of 0 / 0 counts 0. The overall score is the mean of the six subsets.
"""

from pathlib import Path
from typing import Any

import numpy as np

from helpsteer_rloo.data.fields import FieldReader, shown
from helpsteer_rloo.evaluation.benchmarks.items import (
    Benchmark,
    Item,
    Items,
    Result,
    Scores,
    by,
    id_of,
    question,
    read_items,
    rows_of,
)
from helpsteer_rloo.statistics import mean

SUBSETS = ("Factuality", "Focus", "Math", "Precise IF", "Safety", "Ties")
TIES = "Ties"
KINDS = ("ref", "tied")


def read(path: Path) -> Items:
    """The rows of a file or directory.

    Raises:
        ValueError: as `read_items`.
    """
    return read_items(rows_of(path), _parse)


def _parse(reader: FieldReader, row: dict[str, Any]) -> Item:
    subset = reader.text(row, "subset")
    name = {known.lower(): known for known in SUBSETS}.get(subset.lower())
    if name is None:
        raise reader.bad("subset", f"expected one of {', '.join(SUBSETS)}, got {shown(subset)}")
    own_id = id_of(reader, row, "id")
    kind, colon, number = own_id.partition(":")
    if name == TIES and (kind not in KINDS or not colon):
        raise reader.bad("id", f"expected ref:NUMBER or tied:NUMBER in the subset Ties, got {shown(own_id)}")
    responses: dict[str, str] = {}
    for side in ("chosen", "rejected"):
        texts = reader.texts(row, side)
        if not texts:
            raise reader.bad(side, "expected at least one response")
        responses |= {f"{side}.{place}": text for place, text in enumerate(texts)}
    labels = {"subset": name, "kind": kind, "number": number}
    return Item(own_id, question(reader.text(row, "prompt")), responses, labels)


def result(items: list[Item], scores: Scores) -> Result:
    """The score of every subset that is there and, where all are, the overall one."""
    by_subset: dict[str, Result] = {}
    for subset, part in by(items, "subset"):
        if subset == TIES:
            by_subset[subset] = _ties(part, scores)
        else:
            by_subset[subset] = mean([_share_of_best(scores[item.id]) for item in part]).to_json()
    missing = [subset for subset in SUBSETS if subset not in by_subset]
    incomplete = missing or by_subset[TIES]["value"] is None
    overall = None if incomplete else float(np.mean([found["value"] for found in by_subset.values()]))
    return {"overall": overall, "by_subset": by_subset, "missing_subsets": missing}


def _share_of_best(scores: Any) -> float:
    best = max(scores.values())
    top = [name for name, score in scores.items() if score == best]
    return 1 / len(top) if "chosen.0" in top else 0.0


def _ties(items: list[Item], scores: Scores) -> Result:
    rows = {kind: {i.labels["number"]: _margins(scores[i.id]) for i in part} for kind, part in by(items, "kind")}
    ref, tied = rows.get("ref", {}), rows.get("tied", {})
    accuracy = {kind: float(np.mean([gap > 0 for gap, _ in own.values()])) for kind, own in rows.items()}
    both = sorted(ref.keys() & tied.keys())
    found: Result = {
        "value": None,
        "count": len(items),
        "prompts_in_both": len(both),
        **{f"{kind}_accuracy": accuracy.get(kind) for kind in KINDS},
    }
    if not both:
        return found
    gaps, spreads = np.array([tied[number] for number in both]).T
    least = np.minimum([ref[number][0] for number in both], gaps)
    with np.errstate(divide="ignore", invalid="ignore"):
        margins = np.nan_to_num(np.tanh(least / spreads - 1), nan=0.0)
    preferred, hard = float(np.mean(gaps > spreads)), float(np.mean(least > spreads))
    value = 0.3 * accuracy["tied"] + 0.3 * accuracy["ref"] + 0.2 * preferred + 0.2 * hard
    return found | {
        "value": value + 0.01 * float(np.mean(margins)),
        "correctness_preferred": preferred,
        "correctness_preferred_hard": hard,
        "correctness_margin": float(np.mean(margins)),
    }


def _margins(scores: Any) -> tuple[float, float]:
    """The gap between right and wrong answers, w - b, and the spread of the right ones, s."""
    right = [score for name, score in scores.items() if name.startswith("chosen.")]
    wrong = [score for name, score in scores.items() if name.startswith("rejected.")]
    return min(right) - max(wrong), max(right) - min(right)


REWARDBENCH2 = Benchmark(read, result)
