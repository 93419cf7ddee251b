"""Rows in HelpSteer3's schema become prompt groups; every row that does not is counted under a named reason.

Polarity: a negative `overall_preference` means that response 1 is better, a positive one that response 2 is; the
magnitude is the strength (1 slightly, 2 better, 3 much better). Source: the data set's card, and NVIDIA's own loader.
"""

import dataclasses
import hashlib
import html
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from helpsteer_rloo.data.fields import FieldReader, shown
from helpsteer_rloo.data.sources import BadRowError, RawRow, RowFile, locate, read_rows
from helpsteer_rloo.groups import Continuation, Message, Preference, PromptGroup, Split
from helpsteer_rloo.settings.knobs import DataKnobs

_ENTITY = re.compile(r"&(?:lt|gt|amp|quot|apos|nbsp|#\d{1,7}|#x[0-9a-fA-F]{1,6});")
"""Entities are decoded only when written in full, so that `?a=1&copy=2` stays as it is."""

_BLANK = re.compile(r"[\s\u200b\u200c\u200d\u2060\ufeff]*")
"""Whitespace, and the characters of no width, which `str.strip` leaves."""


@dataclass(frozen=True, slots=True)
class Row:
    """A valid row, entities decoded; `index` counts the rows of the whole data set from 0."""

    index: int
    split: Split | None
    domain: str
    language: str
    context: tuple[Message, ...]
    responses: tuple[str, str]
    overall_preference: int
    annotators: tuple[int, ...] = ()


@dataclass
class Counts:
    """What happened to every row. `dropped` names one reason a row, the first that applies, in a fixed order."""

    rows: int = 0
    bad_rows: Counter[str] = field(default_factory=Counter)
    not_selected: Counter[str] = field(default_factory=Counter)
    selected: int = 0
    ties: int = 0
    empty_responses: int = 0
    entities_decoded: int = 0
    prompts: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    pairs: int = 0


@dataclass(frozen=True)
class Corpus:
    """The kept preferences as groups, by split, and the counts of everything else."""

    groups: dict[Split, list[PromptGroup]]
    counts: Counts


def load_corpus(knobs: DataKnobs) -> Corpus:
    """Read a data set into prompt groups.

    Raises:
        BadRowError: the first row that cannot be read, unless `skip_bad_rows`.
        ValueError: the source cannot be read, or no pair is left.
    """
    counts = Counts()
    rows = list(select_rows(read_all(locate(knobs), knobs, counts), knobs, counts))
    corpus = Corpus(split_and_group(rows, knobs.validation_fraction, counts), counts)
    if not counts.pairs:
        raise ValueError(_nothing_left(knobs, counts))
    return corpus


def _nothing_left(knobs: DataKnobs, counts: Counts) -> str:
    lost = {**counts.bad_rows, **counts.not_selected, **counts.dropped}
    listed = ", ".join(f"{count} {reason}" for reason, count in lost.items()) or "the files are empty"
    return (
        f"{knobs.dataset_name}: no usable preference pair among {counts.rows} rows ({listed}). "
        f"Look at --language (now {knobs.language}) and --domains (now {knobs.domains})."
    )


def read_all(
    files: Iterable[RowFile],
    knobs: DataKnobs,
    counts: Counts,
    hint: str = "Mend or remove the row, or pass --skip_bad_rows to count and skip such rows.",
) -> Iterator[Row]:
    """Read and validate the rows of all files; bad ones raise with a hint, or are counted with `skip_bad_rows`."""
    for file in files:
        for raw in read_rows(file):
            try:
                yield read_row(raw, counts, knobs.html_entities)
            except BadRowError as error:
                if not knobs.skip_bad_rows:
                    raise ValueError(f"{error}\n{hint}") from None
                counts.bad_rows[f"{error.field}: {error.reason}"] += 1
            finally:
                counts.rows += 1


def read_row(raw: RawRow, counts: Counts, html_entities: str) -> Row:
    """A validated row, its HTML entities decoded as asked.

    Raises:
        BadRowError: a field is missing or not as it should be.
    """
    if isinstance(raw.content, BadRowError):
        raise raw.content
    check = _RowReader(raw)
    row = Row(
        index=counts.rows,
        split=raw.file.split,
        domain=check.text(raw.content, "domain").lower(),
        language=check.text(raw.content, "language").lower(),
        context=check.turns(raw.content, "context"),
        responses=(check.text(raw.content, "response1"), check.text(raw.content, "response2")),
        overall_preference=check.preference(),
        annotators=check.annotators(),
    )
    decoded = _decode_entities(row, html_entities)
    counts.entities_decoded += decoded != row
    return decoded


def read_context(raw: RawRow, html_entities: str) -> tuple[Message, ...]:
    """The conversation of a row alone, which may have no responses, its HTML entities decoded as asked.

    Raises:
        BadRowError: it is missing or not as it should be.
    """
    context = FieldReader(raw).turns(raw.content, "context")
    return context if html_entities == "none" else _without_entities(context)


class _RowReader(FieldReader):
    """Reads the fields that HelpSteer3's schema has besides texts."""

    def preference(self) -> int:
        return self._score(self.value(self.raw.content, "overall_preference"), "overall_preference")

    def annotators(self) -> tuple[int, ...]:
        """The scores of `individual_preference`, which neither a row nor an annotator in it need have."""
        content = self.raw.content
        if not isinstance(content, dict) or content.get("individual_preference") is None:
            return ()
        given = content["individual_preference"]
        if not isinstance(given, list):
            raise self.bad("individual_preference", f"expected a list, got {type(given).__name__}")
        named = ((f"individual_preference[{number}].", one) for number, one in enumerate(given))
        scored = ((path, one) for path, one in named if not isinstance(one, dict) or one.get("score") is not None)
        return tuple(self._score(self.value(one, "score", path), f"{path}score") for path, one in scored)

    def _score(self, value: Any, place: str) -> int:
        whole = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1
        if not whole or not -3 <= value <= 3:
            raise self.bad(place, f"expected a whole number from -3 to 3, got {shown(value)}")
        return int(value)


def _decode_entities(row: Row, where: str) -> Row:
    if where == "none":
        return row
    context = _without_entities(row.context)
    first, second = row.responses
    responses = (_decoded(first), _decoded(second)) if where == "all" else row.responses
    return dataclasses.replace(row, context=context, responses=responses)


def _without_entities(context: tuple[Message, ...]) -> tuple[Message, ...]:
    return tuple(Message(m.role, _decoded(m.content)) for m in context)


def _decoded(text: str) -> str:
    return _ENTITY.sub(lambda match: html.unescape(match[0]), text)


def select_rows(rows: Iterable[Row], knobs: DataKnobs, counts: Counts) -> Iterator[Row]:
    """Keep the rows of the languages and domains asked for, and of those the ones that make a usable pair."""
    languages, domains = _names(knobs.language), _names(knobs.domains)
    prompts: set[tuple[Message, ...]] = set()
    for row in rows:
        if languages and row.language not in languages:
            counts.not_selected["language"] += 1
        elif domains and row.domain not in domains:
            counts.not_selected["domain"] += 1
        else:
            counts.selected += 1
            counts.ties += row.overall_preference == 0
            counts.empty_responses += _has_empty_response(row)
            prompts.add(row.context)
            reason = unusable(row)
            if reason is None:
                yield row
            else:
                counts.dropped[reason] += 1
    counts.prompts = len(prompts)


def _names(text: str) -> set[str]:
    names = {name.strip().lower() for name in text.split(",")} - {""}
    return set() if "all" in names else names


def unusable(row: Row) -> str | None:
    """The first reason why a row makes no preference pair, or `None`."""
    if row.overall_preference == 0:
        return "tie"
    if _has_empty_response(row):
        return "empty_response"
    if row.responses[0] == row.responses[1]:
        return "identical_responses"
    if row.context[-1].role != "user":
        return f"context_ends_with_{row.context[-1].role}"
    return None


def _has_empty_response(row: Row) -> bool:
    return any(_BLANK.fullmatch(response) for response in row.responses)


def chosen_response(row: Row) -> int:
    """Which response is the better one, 1 or 2: negative `overall_preference` means that response 1 is."""
    return 1 if row.overall_preference < 0 else 2


def split_and_group(rows: Iterable[Row], validation_fraction: float, counts: Counts) -> dict[Split, list[PromptGroup]]:
    """Split by prompt and merge the pairs of each prompt into one group, in order of first appearance.

    If the files name a validation split, it is used as it is, and training rows whose prompt stands in it are dropped.
    Otherwise a prompt is held out by its own hash alone, so adding rows never moves a prompt to the other split.
    """
    rows = list(rows)
    held_out = {row.context for row in rows if row.split == "validation"}
    merged: dict[Split, dict[tuple[Message, ...], list[Row]]] = {"train": {}, "validation": {}}
    for row in rows:
        split = row.split or "train"
        if not held_out:
            split = "validation" if hash_share(prompt_key(row.context)) < validation_fraction else "train"
        elif split == "train" and row.context in held_out:
            counts.dropped["prompt_in_validation"] += 1
            continue
        merged[split].setdefault(row.context, []).append(row)
        counts.pairs += 1
    return {split: [group_rows(same) for same in groups.values()] for split, groups in merged.items()}


def group_rows(rows: list[Row]) -> PromptGroup:
    """Merge rows on one prompt into a group; a response that appears in several rows becomes one continuation."""
    index: dict[str, int] = {}
    preferences = []
    for row in rows:
        better = chosen_response(row)
        first, second = (index.setdefault(text, len(index)) for text in row.responses)
        chosen, rejected = (first, second) if better == 1 else (second, first)
        preferences.append(
            Preference(
                chosen,
                rejected,
                strength=abs(row.overall_preference),
                row=row.index,
                domain=row.domain,
                language=row.language,
                chosen_response=better,
                first_row=rows[0].index,
                annotators=tuple(-score if better == 1 else score for score in row.annotators),
            )
        )
    return PromptGroup(rows[0].context, tuple(Continuation(text) for text in index), tuple(preferences))


def prompt_key(messages: Iterable[Message]) -> str:
    """A digest that identifies a prompt by the roles and contents of its turns."""
    text = json.dumps([[m.role, m.content] for m in messages], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def hash_share(key: str) -> float:
    """A prompt key as a number that is uniform in [0, 1).

    >>> hash_share("8" + "0" * 31)
    0.5
    """
    return int(key[:13], 16) / 16**13
