"""RM-Bench (Liu et al. 2024, arXiv 2410.16184): three styles of a right answer against three of a wrong one.

As its authors compute it: of a domain, the matrix M of the shares of rows in which the right answer in style i scores
strictly higher than the wrong one in style j (concise, detailed, detailed with markdown). Hard is the mean above M's
diagonal, where the wrong answer has the fancier style, normal that on the diagonal, easy that below it. A domain's
accuracy is the mean of the three, and the overall one that of the four domains; the rows of both kinds of safety are
one domain.
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
from helpsteer_rloo.statistics import mean, mean_of_means

STYLES = 3
DOMAINS = {"chat": "chat", "code": "code", "math": "math", "safety-refuse": "safety", "safety-response": "safety"}
TOTAL = "total_dataset.json"
LEVELS = {"hard": np.triu_indices(STYLES, 1), "normal": np.diag_indices(STYLES), "easy": np.tril_indices(STYLES, -1)}


def read(path: Path) -> Items:
    """The rows of a domain's file, of the file with all of them, or of a directory.

    Raises:
        ValueError: as `read_items`.
    """
    return read_items(rows_of(path, TOTAL), _parse)


def _parse(reader: FieldReader, row: dict[str, Any]) -> Item:
    domain = reader.text(row, "domain")
    if domain not in DOMAINS:
        raise reader.bad("domain", f"expected one of {', '.join(DOMAINS)}, got {shown(domain)}")
    responses: dict[str, str] = {}
    for name in ("chosen", "rejected"):
        texts = reader.texts(row, name)
        if len(texts) != STYLES:
            raise reader.bad(name, f"expected {STYLES} responses, got {len(texts)}")
        responses |= {f"{name}.{number}": text for number, text in enumerate(texts)}
    labels = {"domain": DOMAINS[domain]}
    return Item(id_of(reader, row, "id"), question(reader.text(row, "prompt")), responses, labels)


def result(items: list[Item], scores: Scores) -> Result:
    """Hard, normal and easy accuracy and their mean, by domain and, where all domains are there, overall."""
    levels = {item.id: _levels(scores[item.id]) for item in items}
    domains = {domain: [levels[item.id] for item in part] for domain, part in by(items, "domain")}
    missing = sorted(set(DOMAINS.values()) - domains.keys())
    names = (*LEVELS, "accuracy")
    by_domain = {
        domain: {name: mean([row[name] for row in rows]).to_json() for name in names}
        for domain, rows in domains.items()
    }
    overall = {
        name: mean_of_means([[row[name] for row in rows] for rows in domains.values()]).to_json() for name in names
    }
    return {"overall": None if missing else overall, "by_domain": by_domain, "missing_domains": missing}


def _levels(scores: Any) -> dict[str, float]:
    """Of one row, the share of comparisons that are right at each level, and the mean of the three."""
    chosen, rejected = (np.array([scores[f"{name}.{i}"] for i in range(STYLES)]) for name in ("chosen", "rejected"))
    matrix = chosen[:, None] > rejected[None, :]
    found = {name: float(matrix[places].mean()) for name, places in LEVELS.items()}
    return found | {"accuracy": sum(found.values()) / len(found)}


RM_BENCH = Benchmark(read, result)
