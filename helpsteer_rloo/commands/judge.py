"""`helpsteer-rloo evaluate` without a benchmark: a reward model on held-out pairs, and several side by side."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpsteer_rloo.display.console import comparison_table, findings_table, judgement_table, say, show, warn
from helpsteer_rloo.records.provenance import provenance
from helpsteer_rloo.records.reward_model import check_reward_model, read_heldout_prompts
from helpsteer_rloo.run_dir import REWARD_MODEL_RECORD, write_json
from helpsteer_rloo.settings.flags import own_flags
from helpsteer_rloo.settings.knobs import DataKnobs

if TYPE_CHECKING:
    from helpsteer_rloo.evaluation.preference import Judgement
    from helpsteer_rloo.groups import TokenGroup
    from helpsteer_rloo.model.loading import Model
    from helpsteer_rloo.rendering import Renderer


@dataclass(frozen=True, kw_only=True)
class JudgeKnobs:
    """Which reward model is judged, on which pairs, and where the result goes."""

    reward_model_dir: str | None = field(default=None, metadata={"help": "Directory of the reward model to judge."})
    compare_with: str | None = field(
        default=None, metadata={"help": "Other reward models, separated by commas, judged on the same held-out pairs."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Judge it on pairs of this data set (default: the one it was trained on)."}
    )
    language: str | None = field(default=None, metadata={"help": "Languages to keep (default: those of training)."})
    domains: str | None = field(default=None, metadata={"help": "Domains to keep (default: those of training)."})
    skip_bad_rows: bool | None = field(default=None, metadata={"help": "Count and skip rows that cannot be read."})
    output: str | None = field(default=None, metadata={"help": "Write the result to this .json file."})
    batch_size: int = field(default=8, metadata={"help": "Responses scored in one forward pass."})
    max_length: int | None = field(
        default=None, metadata={"help": "Longest prompt and response, in tokens (default: the reward model's)."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the reward model."})


def run_judgement(own: JudgeKnobs) -> None:
    """Judge a reward model on the pairs held out from it, print and write what was found; compare it with others.

    Raises:
        ValueError: a reward model or the data cannot be read, or no held-out pair is left.
    """
    others = [name.strip() for name in (own.compare_with or "").split(",") if name.strip()]
    names = [str(own.reward_model_dir), *others]
    if len({Path(name).resolve() for name in names}) < len(names):
        raise ValueError("--compare_with names a reward model twice; give each once.")
    heldout = set.intersection(*(read_heldout_prompts(name) for name in names if _renderer(own, name)))
    if not heldout:
        raise ValueError("No prompt was held out from all of these reward models, so they cannot be compared fairly.")
    judgements: dict[str, Sequence[Judgement]] = {}
    results: dict[str, Any] = {}
    for name in names:
        judgements[name], results[name] = _judged(own, name, heldout)
        show(judgement_table(name, results[name]))
        show(findings_table(results[name]["findings"]))
    report: dict[str, Any] = {"reward_model": names[0], **results[names[0]], "provenance": provenance()}
    if others:
        from helpsteer_rloo.evaluation.comparison import compare

        report |= {"others": {name: results[name] for name in others}, "comparison": compare(judgements)}
        show(comparison_table(report["comparison"]))
        for pair in report["comparison"]["compared"]:
            say(pair["sentence"])
    if own.output:
        write_json(Path(own.output), report)
        say(f"The result is in {own.output}")


def _flag(own: JudgeKnobs, name: str) -> str:
    return "--reward_model_dir" if name == own.reward_model_dir else "--compare_with"


def _checked(own: JudgeKnobs, name: str) -> dict[str, Any]:
    return check_reward_model(name, _flag(own, name), trusted=own.trust_remote_code)


def _renderer(own: JudgeKnobs, name: str) -> "Renderer":
    from helpsteer_rloo.model.loading import own_renderer

    return own_renderer(name, _checked(own, name), _flag(own, name), trusted=own.trust_remote_code)


def _judged(own: JudgeKnobs, directory: str, heldout: set[str]) -> "tuple[list[Judgement], dict[str, Any]]":
    from helpsteer_rloo.evaluation.reward_model import judge_reward_model
    from helpsteer_rloo.model.loading import load_reward_model
    from helpsteer_rloo.model.memory import release

    record = _checked(own, directory)
    renderer = _renderer(own, directory)
    first = str(own.reward_model_dir)  # whose data all are judged on
    knobs = data_knobs(own, first, _checked(own, first))
    longest = own.max_length or record["rendering"]["max_length"]
    knobs = dataclasses.replace(knobs, thinking=record["thinking"], max_length=longest)
    try:
        groups, counts = heldout_pairs(knobs, renderer, heldout)
    except ValueError as error:
        hint = "" if own.dataset_name else f"\nThe data are those of {first}'s training; --dataset_name names others."
        raise ValueError(f"{error}{hint}") from None
    if directory == first:
        _say_what_is_left_out(counts, len(heldout))
    pairs = sum(len(group.preferences) for group in groups)
    listed = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items() if count)
    say(f"{directory}: {pairs} pairs on {len(groups)} prompts of {knobs.dataset_name} ({listed}).")
    model: Model = load_reward_model(directory)[0]
    judgements, result = judge_reward_model(model, renderer, groups, own.batch_size, knobs.max_length)
    del model
    release()
    return judgements, {"dataset_name": knobs.dataset_name, "counts": counts, **result}


def data_knobs(own: JudgeKnobs, directory: str, record: dict[str, Any]) -> DataKnobs:
    """How data are read: as in the reward model's training, but for what the command line says otherwise."""
    values = _trained_with(directory, record)
    given = {name: getattr(own, name) for name in ("dataset_name", "language", "domains", "skip_bad_rows")}
    values |= {name: value for name, value in given.items() if value is not None}
    if own.dataset_name is not None:
        values["dataset_revision"] = None
    try:
        return DataKnobs(**values)
    except ValueError as error:
        raise ValueError(f"{Path(directory) / REWARD_MODEL_RECORD}, or a flag that replaces it: {error}") from None


def _trained_with(directory: str, record: dict[str, Any]) -> dict[str, Any]:
    """The data's settings in a reward model's record, which may come from anywhere.

    Raises:
        ValueError: one is of another type than it has.
    """
    given, values = record.get("settings"), {}
    if not isinstance(given, dict):
        raise ValueError(f"{Path(directory) / REWARD_MODEL_RECORD}: settings is no mapping; train the model again.")
    for flag in own_flags(DataKnobs):
        if given.get(flag.name) is not None:
            try:
                values[flag.name] = flag.from_yaml(given[flag.name])
            except ValueError as error:
                place = f"{Path(directory) / REWARD_MODEL_RECORD}: settings.{flag.name}"
                raise ValueError(f"{place}: {error} Give the flag, or train the model again.") from None
    return values


def _say_what_is_left_out(counts: Mapping[str, int], heldout: int) -> None:
    found, prompts = counts["heldout_prompts"], counts["prompts"]
    if not found:
        warn("no prompt of this data set was held out in training; all of its pairs are judged.")
    elif found < heldout:
        say(
            f"Of the {heldout} prompts held out in training {found} are in these data; the {prompts - found} other "
            "prompts may have been trained on, and are left out."
        )


def heldout_pairs(
    knobs: DataKnobs, renderer: "Renderer", heldout: set[str]
) -> "tuple[list[TokenGroup], dict[str, int]]":
    """The pairs of a data set on prompts held out from the reward models; all of them if none of its prompts is.

    A prompt of another data set that was trained on cannot be told from one that was not, which `counts` leaves to see.

    Returns:
        The pairs as token groups, and counts: rows, prompts, what was left out and what was cut, by reason.

    Raises:
        ValueError: no pair is left.
    """
    from helpsteer_rloo.data.helpsteer3 import load_corpus, prompt_key
    from helpsteer_rloo.data.preparation import FitCounts, tokenize_groups

    corpus = load_corpus(knobs)
    prompts = [group for groups in corpus.groups.values() for group in groups]
    unseen = [group for group in prompts if prompt_key(group.prompt) in heldout]
    counts = Counter({"rows": corpus.counts.rows, "prompts": len(prompts), "heldout_prompts": len(unseen)})
    counts.update({**corpus.counts.bad_rows, **corpus.counts.not_selected, **corpus.counts.dropped})
    fit = FitCounts()
    groups = tokenize_groups(unseen or prompts, renderer, knobs, fit)
    counts.update({**fit.dropped, "context_cut": fit.context_cut, "response_cut": fit.response_cut})
    if not groups:
        raise ValueError(
            f"{knobs.dataset_name}: no pair is left to judge ({dict(counts)}); give a larger --max_length."
        )
    return groups, dict(counts)
