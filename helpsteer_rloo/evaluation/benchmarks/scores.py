"""Scores of a benchmark's responses: read from a file, written to one, or given by a reward model."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from helpsteer_rloo.data.fields import FieldReader, shown
from helpsteer_rloo.data.sources import BadRowError, RawRow, RowFile, read_rows
from helpsteer_rloo.evaluation.benchmarks.items import Item, Scores, id_of
from helpsteer_rloo.events import counted
from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.model.forward import score_groups
from helpsteer_rloo.model.loading import Model
from helpsteer_rloo.rendering import Renderer
from helpsteer_rloo.run_dir import write_text

ENDINGS = (".jsonl", ".jsonl.gz")


def read_scores(path: Path, items: Sequence[Item]) -> tuple[Scores, int]:
    """Scores that somebody else computed, one line a response: `{"id": …, "field": …, "score": …}`.

    Returns:
        The scores of the items, and the number of those that belong to no item.

    Raises:
        ValueError: the file cannot be read, a line is not as it should be, or a response has no score or two.
    """
    if not path.is_file() or not path.name.endswith(ENDINGS):
        raise ValueError(f"--scores {path}: no file that ends in {' or '.join(ENDINGS)}.")
    found: dict[tuple[str, str], float] = {}
    for raw in read_rows(RowFile(path, None)):
        key, score = _score_of(raw)
        if key in found:
            raise FieldReader(raw).bad("field", f"{key[1]!r} of id {key[0]!r} has a score in an earlier line")
        found[key] = score
    wanted = [(item.id, name) for item in items for name in item.responses]
    missing = [key for key in wanted if key not in found]
    if missing:
        own_id, name = missing[0]
        raise ValueError(
            f"--scores {path}: {len(missing)} of {len(wanted)} responses have no score, {name!r} of id {own_id!r} "
            "the first of them."
        )
    scores = {item.id: {name: found[item.id, name] for name in item.responses} for item in items}
    return scores, len(found) - len(wanted)


def _score_of(raw: RawRow) -> tuple[tuple[str, str], float]:
    if isinstance(raw.content, BadRowError):
        raise raw.content
    reader = FieldReader(raw)
    given = reader.value(raw.content, "score")
    try:
        score = math.nan if isinstance(given, (bool, str)) else float(given)
    except (TypeError, OverflowError):
        score = math.nan
    if not math.isfinite(score):
        raise reader.bad("score", f"expected a finite number, got {shown(given)}")
    return (id_of(reader, raw.content, "id"), reader.text(raw.content, "field")), score


def write_scores(path: Path, scores: Scores) -> None:
    """Write scores as `read_scores` reads them."""
    rows = (
        {"id": own_id, "field": name, "score": score} for own_id, own in scores.items() for name, score in own.items()
    )
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def score_items(
    model: Model, renderer: Renderer, items: Sequence[Item], max_length: int, batch_size: int
) -> tuple[dict[str, dict[str, float]], Counter[str]]:
    """Score every response with a reward model, as it was trained: at most `max_length` tokens with its prompt.

    Returns:
        The scores by item and field, and counts: `context_cut` and `response_cut`, the items whose oldest turns or
        whose responses were cut, and `prompt_over_max_length`, the items that have no score since their last turn
        alone is too long.

    Raises:
        ValueError: a score is not finite.
    """
    counts: Counter[str] = Counter()
    fitted: list[tuple[Item, TokenGroup]] = []
    for item in items:
        group = _fitted(item, renderer, max_length, counts)
        if group is not None:
            fitted.append((item, group))
    scores: dict[str, dict[str, float]] = {}
    chunk = max(1, 8 * batch_size)
    for start in counted(range(0, len(fitted), chunk), "scoring responses"):
        part = fitted[start : start + chunk]
        for (item, _), own in zip(part, score_groups(model, _groups(part), batch_size), strict=True):
            if not all(map(math.isfinite, own)):
                raise ValueError(f"The scores of id {item.id!r} are not finite: the reward model is damaged.")
            scores[item.id] = dict(zip(item.responses, own, strict=True))
    return scores, counts


def _groups(part: Iterable[tuple[Item, TokenGroup]]) -> list[TokenGroup]:
    return [group for _, group in part]


def _fitted(item: Item, renderer: Renderer, max_length: int, counts: Counter[str]) -> TokenGroup | None:
    continuations = [renderer.continuation_ids(text, ended=True) for text in item.responses.values()]
    longest = max(map(len, continuations))
    found = renderer.fit_prompt(item.prompt, longest, max_length)
    if found is None:
        counts["prompt_over_max_length"] += 1
        return None
    prompt, prompt_ids = found
    room = max_length - len(prompt_ids)
    cut = {"context_cut": prompt != item.prompt, "response_cut": longest > room}
    counts.update(name for name, is_cut in cut.items() if is_cut)
    return TokenGroup(prompt, prompt_ids, tuple(ids[:room] for ids in continuations))
