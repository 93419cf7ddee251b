"""Preferences in HelpSteer3's schema: the share of pairs whose better response scores strictly higher.

A row's id is its index, from 0, among all rows of the files; rows that prefer neither are left out and counted.
"""

from pathlib import Path

from helpsteer_rloo.data.helpsteer3 import Counts, Row, chosen_response, prompt_key, read_all, unusable
from helpsteer_rloo.data.sources import locate
from helpsteer_rloo.evaluation.benchmarks.items import Benchmark, Item, Items, Result, Scores, by
from helpsteer_rloo.settings.knobs import DataKnobs
from helpsteer_rloo.statistics import proportion

FIELDS = ("response1", "response2")


def read(path: Path) -> Items:
    """The pairs of a file, or of a directory as a data set has them.

    Raises:
        ValueError: a file or row cannot be read, or no row makes a pair.
    """
    if not path.exists():
        raise ValueError(f"--benchmark_path {path}: no such file or directory.")
    knobs, found = DataKnobs(dataset_name=str(path), language="all"), Items([])
    for row in read_all(locate(knobs), knobs, Counts(), hint="Mend or remove the row."):
        reason = unusable(row)
        if reason is None:
            found.items.append(_item(row))
        else:
            found.left_out[reason] += 1
    if not found.items:
        raise ValueError(f"--benchmark_path {path}: no row in it makes a pair ({dict(found.left_out)}).")
    return found


def _item(row: Row) -> Item:
    labels = {
        "better": FIELDS[chosen_response(row) - 1],
        "domain": row.domain,
        "language": row.language,
        "strength": str(abs(row.overall_preference)),
        "prompt": prompt_key(row.context),
    }
    return Item(str(row.index), row.context, dict(zip(FIELDS, row.responses, strict=True)), labels)


def result(items: list[Item], scores: Scores) -> Result:
    """Accuracy overall, by domain, language and strength; a tie is wrong. Intervals respect pairs on one prompt."""

    def accuracy(part: list[Item]) -> Result:
        return proportion([_is_right(i, scores) for i in part], [i.labels["prompt"] for i in part]).to_json()

    parts = {
        f"by_{label}": {value: accuracy(part) for value, part in by(items, label)}
        for label in ("domain", "language", "strength")
    }
    return {"accuracy": accuracy(items), **parts}


def _is_right(item: Item, scores: Scores) -> bool:
    own, better = scores[item.id], item.labels["better"]
    return all(own[better] > own[name] for name in FIELDS if name != better)


HELPSTEER3 = Benchmark(read, result)
