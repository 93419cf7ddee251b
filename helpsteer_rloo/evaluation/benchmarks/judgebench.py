"""JudgeBench (Tan et al. 2024, arXiv 2410.12784): pairs of answers of one model, one of them right.

As its authors judge reward models: the decision is "A>B" if A scores strictly higher, else "B>A", and accuracy is the
share of decisions that are the label. The published numbers are those of the pairs of GPT-4o.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

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
from helpsteer_rloo.statistics import proportion

FIELDS = ("response_A", "response_B")
LABELS = ("A>B", "B>A")
SOURCES = ("mmlu-pro", "livebench-reasoning", "livebench-math", "livecodebench")
"""Beginnings of a pair's source; what begins otherwise is a source of its own."""


def read(path: Path) -> Items:
    """The pairs of one response model's file, or of a directory with several.

    Raises:
        ValueError: as `read_items`.
    """
    return read_items(rows_of(path), _parse)


def _parse(reader: FieldReader, row: dict[str, Any]) -> Item:
    label, source = reader.text(row, "label"), reader.text(row, "source")
    if label not in LABELS:
        raise reader.bad("label", f"expected {' or '.join(LABELS)}, got {shown(label)}")
    labels = {
        "label": label,
        "source": next((name for name in SOURCES if source.startswith(name)), source),
        "response_model": reader.text(row, "response_model") if "response_model" in row else "",
    }
    responses = {name: reader.text(row, name) for name in FIELDS}
    return Item(id_of(reader, row, "pair_id"), question(reader.text(row, "question")), responses, labels)


def result(items: list[Item], scores: Scores) -> Result:
    """Accuracy over all pairs, by response model, and by source within each."""
    right = {item.id: _decision(scores[item.id]) == item.labels["label"] for item in items}

    def accuracy(part: Iterable[Item]) -> Result:
        return proportion([right[item.id] for item in part]).to_json()

    by_model = {
        model: {"accuracy": accuracy(own), "by_source": {name: accuracy(part) for name, part in by(own, "source")}}
        for model, own in by(items, "response_model")
    }
    equal = sum(scores[item.id][FIELDS[0]] == scores[item.id][FIELDS[1]] for item in items)
    return {"accuracy": accuracy(items), "by_response_model": by_model, "equal_scores": equal}


def _decision(scores: Any) -> str:
    return LABELS[0] if scores[FIELDS[0]] > scores[FIELDS[1]] else LABELS[1]


JUDGEBENCH = Benchmark(read, result)
