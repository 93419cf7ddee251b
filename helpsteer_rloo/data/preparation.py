"""From prompt groups to token groups that fit the length limit, and the report of everything that was counted."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from helpsteer_rloo.data.helpsteer3 import Corpus, Counts, hash_share, load_corpus, prompt_key
from helpsteer_rloo.data.sources import content_digest, locate
from helpsteer_rloo.events import counted
from helpsteer_rloo.groups import Message, Preference, PromptGroup, Split, TokenGroup
from helpsteer_rloo.rendering import Renderer
from helpsteer_rloo.run_dir import fingerprint
from helpsteer_rloo.settings.knobs import DataKnobs
from helpsteer_rloo.statistics import binned

PERCENTILES = (50, 90, 95, 99, 100)
CHOOSING_SHARE = 0.1
"""Of the training prompts, where the best of several steps is to be chosen."""


@dataclass
class FitCounts:
    """What the length limit did to the pairs."""

    over_max_length: int = 0
    context_cut: int = 0
    response_cut: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, list[int]] = field(default_factory=lambda: {"prompt": [], "chosen": [], "rejected": []})


@dataclass(frozen=True)
class Prepared:
    """A data set ready for training: as text, as token groups, and the report that goes to `data.json`."""

    corpus: Corpus
    groups: dict[Split, list[TokenGroup]]
    report: dict[str, Any]

    @property
    def heldout_prompts(self) -> list[str]:
        """Keys of all prompts of the validation split, sorted."""
        return sorted(prompt_key(group.prompt) for group in self.corpus.groups["validation"])


def prepare(knobs: DataKnobs, renderer: Renderer, *, allow_empty_split: bool = False) -> Prepared:
    """Read, select, split, group and tokenize a data set.

    Raises:
        ValueError: as `load_corpus`; or a split is empty, which no training can use.
    """
    corpus = load_corpus(knobs)
    groups: dict[Split, list[TokenGroup]] = {}
    fits: dict[Split, FitCounts] = {}
    for split, prompts in corpus.groups.items():
        fits[split] = FitCounts()
        told = counted(prompts, f"tokenizing {split}", "prompts")
        groups[split] = tokenize_groups(told, renderer, knobs, fits[split])
    groups["train"] = without_heldout(groups["train"], groups["validation"], fits["train"])
    report = build_report(knobs, corpus, groups, fits)
    for split, kept in groups.items():
        if not kept and not allow_empty_split:
            raise ValueError(_empty_split(split, knobs, report))
    return Prepared(corpus, groups, report)


def without_heldout(
    train: Iterable[TokenGroup], validation: Iterable[TokenGroup], counts: FitCounts
) -> list[TokenGroup]:
    """Drop training groups whose prompt, cut from the left, has become one of the validation split's."""
    heldout = {group.prompt_ids for group in validation}
    kept = []
    for group in train:
        if group.prompt_ids in heldout:
            counts.dropped["prompt_in_validation_after_cut"] += len(group.preferences)
        else:
            kept.append(group)
    return kept


def _empty_split(split: Split, knobs: DataKnobs, report: dict[str, Any]) -> str:
    advice = f"--max_length is {knobs.max_length}"
    if split == "validation":
        advice += f" and --validation_fraction {knobs.validation_fraction}; hold out more, or use more rows"
    return (
        f"{knobs.dataset_name}: no pair is left in the {split} split "
        f"({report['pairs']} pairs on {report['prompts']} prompts in all, dropped: {report['dropped']}); {advice}."
    )


def tokenize_groups(
    groups: Iterable[PromptGroup], renderer: Renderer, knobs: DataKnobs, counts: FitCounts
) -> list[TokenGroup]:
    """Tokenize groups and make every pair fit `max_length`; pairs whose prompts were cut alike stay together."""
    return [piece for group in groups for piece in _tokenize_group(group, renderer, knobs, counts)]


def _tokenize_group(group: PromptGroup, renderer: Renderer, knobs: DataKnobs, counts: FitCounts) -> list[TokenGroup]:
    prompt_length = len(_rendered(group, renderer))
    continuations = [renderer.continuation_ids(c.text, ended=c.ended) for c in group.continuations]
    builders: dict[tuple[Message, ...], _Builder] = {}
    for preference in group.preferences:
        pair = continuations[preference.chosen], continuations[preference.rejected]
        for name, length in zip(counts.lengths, (prompt_length, *map(len, pair)), strict=True):
            counts.lengths[name].append(length)
        longest = max(map(len, pair))
        overlong = prompt_length + longest > knobs.max_length
        counts.over_max_length += overlong
        if overlong and knobs.overlong == "drop":
            counts.dropped["over_max_length"] += 1
            continue
        fitted = renderer.fit_prompt(group.prompt, longest, knobs.max_length)
        if fitted is None:
            counts.dropped["prompt_over_max_length"] += 1
            continue
        prompt, prompt_ids = fitted
        room = knobs.max_length - len(prompt_ids)
        chosen, rejected = (ids[:room] for ids in pair)
        if chosen == rejected:
            counts.dropped["identical_after_cut"] += 1
            continue
        counts.context_cut += prompt != group.prompt
        counts.response_cut += longest > room
        builders.setdefault(prompt, _Builder(prompt_ids)).add(preference, chosen, rejected)
    return [builder.build(prompt) for prompt, builder in builders.items()]


def _rendered(group: PromptGroup, renderer: Renderer) -> tuple[int, ...]:
    try:
        return renderer.prompt_ids(group.prompt)
    except ValueError as error:
        rows = [preference.row for preference in group.preferences]
        raise ValueError(
            f"The prompt of row {min(rows, default=0)} (counted from 0) cannot be rendered. {error}"
        ) from None


@dataclass
class _Builder:
    """Collects the pairs on one rendered prompt; equal continuations are kept once."""

    prompt_ids: tuple[int, ...]
    index: dict[tuple[int, ...], int] = field(default_factory=dict)
    preferences: list[Preference] = field(default_factory=list)

    def add(self, preference: Preference, chosen: tuple[int, ...], rejected: tuple[int, ...]) -> None:
        places = [self.index.setdefault(ids, len(self.index)) for ids in (chosen, rejected)]
        self.preferences.append(dataclasses.replace(preference, chosen=places[0], rejected=places[1]))

    def build(self, prompt: tuple[Message, ...]) -> TokenGroup:
        return TokenGroup(prompt, self.prompt_ids, tuple(self.index), tuple(self.preferences))


def half_of(groups: Sequence[TokenGroup], which: str) -> list[TokenGroup]:
    """The "first" or "second" half of some groups, by a hash of their prompts, or "all" of them.

    Raises:
        ValueError: none is left.
    """
    if which == "all":
        return list(groups)
    # of the digest another part than the one that holds prompts out
    half = [g for g in groups if (hash_share(prompt_key(g.prompt)[13:]) < 0.5) == (which == "first")]
    if not half:
        raise ValueError(f"No training prompt is in the {which} half; use more rows, or --half all.")
    return half


def to_choose_by(groups: Sequence[TokenGroup]) -> tuple[list[TokenGroup], list[TokenGroup]]:
    """About nine tenths of some groups and one tenth, by a hash of their prompts: to train on, and to choose a step by.

    Held-out pairs are not used for that, since the chosen step is then judged on them.

    Raises:
        ValueError: one of the two is empty.
    """
    parts: tuple[list[TokenGroup], list[TokenGroup]] = ([], [])
    for group in groups:
        parts[hash_share(prompt_key(group.prompt)[19:]) < CHOOSING_SHARE].append(group)
    if not all(parts):
        raise ValueError("There are too few training prompts to choose the best step by a tenth of them.")
    return parts


def rollout_prompts(
    groups: Iterable[PromptGroup], renderer: Renderer, max_prompt_length: int, counts: Counter[str]
) -> list[TokenGroup]:
    """Render prompts for sampling, cut from the left at turn boundaries to `max_prompt_length` tokens.

    `counts` gains `prompts`, `context_cut`, and those that are left out: `prompt_too_long`, and `equal_after_cut`
    (another prompt has been cut to the same ids before).
    """
    kept: dict[tuple[int, ...], TokenGroup] = {}
    for group in groups:
        fitted = renderer.fit_prompt(group.prompt, 0, max_prompt_length)
        if fitted is None:
            counts["prompt_too_long"] += 1
            continue
        prompt, prompt_ids = fitted
        if prompt_ids in kept:
            counts["equal_after_cut"] += 1
            continue
        counts["prompts"] += 1
        counts["context_cut"] += prompt != group.prompt
        kept[prompt_ids] = TokenGroup(prompt, prompt_ids, ())
    return list(kept.values())


def build_report(
    knobs: DataKnobs,
    corpus: Corpus,
    groups: dict[Split, list[TokenGroup]],
    fits: dict[Split, FitCounts],
) -> dict[str, Any]:
    """The content of `data.json`: every count by reason, and by split, domain, language and strength."""
    counts = corpus.counts
    files = locate(knobs)
    dropped = sum((fit.dropped for fit in fits.values()), Counter(counts.dropped))
    return {
        "source": knobs.dataset_name,
        "files": [file.path.name for file in files],
        "source_digest": content_digest(files),
        **_row_counts(counts),
        "dropped": dict(dropped),
        "pairs": sum(len(g.preferences) for split in groups.values() for g in split),
        "max_length": knobs.max_length,
        "overlong": {
            "policy": knobs.overlong,
            "over_max_length": sum(fit.over_max_length for fit in fits.values()),
            "context_cut": sum(fit.context_cut for fit in fits.values()),
            "response_cut": sum(fit.response_cut for fit in fits.values()),
        },
        "splits": {split: _split_report(groups[split], fits[split]) for split in groups},
        "prompts_in_two_splits": len(
            {g.prompt_ids for g in groups["train"]} & {g.prompt_ids for g in groups["validation"]}
        ),
        "fingerprint": fingerprint({split: [_canonical(g) for g in groups[split]] for split in groups}),
    }


def _row_counts(counts: Counts) -> dict[str, Any]:
    return {
        "rows": counts.rows,
        "bad_rows": dict(counts.bad_rows),
        "not_selected": dict(counts.not_selected),
        "selected": counts.selected,
        "ties": counts.ties,
        "empty_responses": counts.empty_responses,
        "entities_decoded": counts.entities_decoded,
        "prompts": counts.prompts,
    }


def _split_report(groups: Sequence[TokenGroup], fit: FitCounts) -> dict[str, Any]:
    preferences = [p for group in groups for p in group.preferences]
    return {
        "pairs": len(preferences),
        "prompts": len({group.prompt for group in groups}),
        "domains": dict(sorted(Counter(p.domain for p in preferences).items())),
        "languages": dict(sorted(Counter(p.language for p in preferences).items())),
        "strengths": {str(k): v for k, v in sorted(Counter(p.strength for p in preferences).items())},
        "tokens": {
            name: dict(zip((f"p{p}" for p in PERCENTILES), np.percentile(values, PERCENTILES).tolist(), strict=True))
            for name, values in fit.lengths.items()
            if values
        },
        "lengths": {name: binned(values) for name, values in fit.lengths.items() if values},
    }


def _canonical(group: TokenGroup) -> list[Any]:
    labels = [[p.chosen, p.rejected, p.strength] for p in group.preferences]
    return [group.prompt_ids, group.continuation_ids, labels]
