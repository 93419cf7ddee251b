"""What a run came to, in plain sentences, those first that call for a look; and its facts, as rows of a table."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from helpsteer_rloo.report.records import BestOfN, Policy, RewardModel, Run
from helpsteer_rloo.statistics import Estimate

Kind = Literal["look", "good", "plain"]
_MARKED: dict[Kind, int] = {"look": 0, "good": 1, "plain": 2}


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence, and whether it calls for a look, is good news, or neither."""

    text: str
    kind: Kind = "plain"


def verdict(run: Run) -> list[Sentence]:
    """What a run came to so far."""
    found = [*_of_state(run), *_of_models(run.reward_models), *(_of_policy(run.policy) if run.policy else ())]
    return sorted(found, key=lambda sentence: _MARKED[sentence.kind])


def _of_state(run: Run) -> Iterator[Sentence]:
    open_stages = [stage.name.replace("_", " ") for stage in run.stages if stage.seconds is None]
    stage = f" Its stage now: {', '.join(open_stages)}." if open_stages else ""
    if run.state == "running":
        yield Sentence(f"It is still running, as of {run.as_of}.{stage}")
    elif run.state == "unfinished":
        ahead = f" before the stage {run.next_stage.replace('_', ' ')}" if run.next_stage else ""
        left = f" in the stage {', '.join(open_stages)}" if open_stages else ahead
        yield Sentence(f"It is not finished: it was left{left}. The same command goes on from there.", "look")
    for problem in run.problems:
        yield Sentence(f"This cannot be read, and is left out: {problem}", "look")
    for note in run.notes:
        yield Sentence(note, "look")


CHANCE = 0.5


def _of_models(models: Sequence[RewardModel]) -> Iterator[Sentence]:
    for model in models:
        if model.bad_steps:
            yield Sentence(
                f"The {model.name}: {model.bad_steps} steps were skipped, their gradient not finite.", "look"
            )
        if model.judged is None:
            continue
        weak, accuracy = not model.judged.better_than_chance, model.judged.accuracy
        text = f"The {model.name} orders {percent(accuracy)} of the held-out pairs as their labels do"
        how = "." if not weak else ", which is not significantly better than chance."
        if accuracy.high < CHANCE:
            how = ", which is worse than chance: are the labels inverted?"
        yield Sentence(text + how, "look" if weak else "good")
        for finding in model.judged.findings:
            if finding.concern and finding.name != "accuracy":  # which has just been told
                yield Sentence(f"The {model.name}: {finding.sentence}", "look")


_SCORES = {"gold": "The true quality of answers", "reward": "The reward of answers", "guard": "The guard's score"}


def _of_policy(policy: Policy) -> Iterator[Sentence]:
    if policy.bad_steps:
        yield Sentence(f"RLOO: {policy.bad_steps} steps were skipped, their gradient not finite.", "look")
    if policy.verdict:
        back = policy.rolled_back_to
        after = "" if back is None else f" The policy is that of step {back}."
        what = "An alarm was raised (the run went on)" if policy.action == "warn" else "The run was ended by an alarm"
        yield Sentence(f"{what}: {policy.verdict}{after}", "look")
    for alarm in policy.alarms:
        if alarm.sentence not in policy.verdict:
            yield Sentence(f"Alarm at step {alarm.step}: {alarm.sentence}", "look")
    judged = policy.judged
    if judged is None:
        return
    for name, words in _SCORES.items():
        if name in judged.changes:
            change = judged.changes[name]
            fell, rose = change.change.high < 0, change.change.low > 0
            how = "fell" if fell else "rose" if rose else "did not change significantly:"
            numbers = f"from {change.before:z.3f} to {change.after:z.3f} ({_signed(change.change)})"
            text = f"{words} {how} {numbers} on {judged.prompts} held-out prompts."
            yield Sentence(text, "look" if fell else "good" if rose else "plain")
    rate = judged.win_rates["reward"]
    yield Sentence(f"By reward the trained policy's answer is better for {percent(rate)} of the prompts.")
    kl = f"{judged.kl.value:z.2f} {judged.kl.brackets('z.2f')}".rstrip()
    yield Sentence(f"The trained policy's KL from its start is {kl} nats a completion.")
    if judged.best_of_n:
        yield from _against_best_of_n(judged.best_of_n, judged.kl.value)


def _against_best_of_n(best: BestOfN, kl: float) -> Iterator[Sentence]:
    """The policy beside the best of n answers of the untrained one, at the same KL, by the score that means most."""
    words = {"gold": "true quality", "reward": "reward"}
    score = next((name for name in words if name in best.policy_minus), None)
    if score is None:
        return
    less = best.policy_minus[score]
    how = "higher than" if less.low > 0 else "lower than" if less.high < 0 else "not significantly different from"
    there = f"at n = {best.n:.1f}, which has the same KL, {kl:z.2f} nats"
    if not best.reaches:
        own = max((row["kl"] for row in best.curve if "kl" in row), default=0.0)
        there = f"at n = {best.n:.0f}, the largest that was drawn, which has less KL, {own:.2f} nats"
    text = f"The trained policy's {words[score]} is {how} that of best-of-n of the untrained one: {_signed(less)}"
    yield Sentence(f"{text}, {there}.", "good" if less.low > 0 else "plain")


def percent(estimate: Estimate) -> str:
    """A share with its interval and count: `84.5 % [81.8 %, 86.9 %] (n = 1033)`."""
    ends = "" if None in estimate.interval() else f" [{100 * estimate.low:.1f} %, {100 * estimate.high:.1f} %]"
    return f"{100 * estimate.value:.1f} %{ends} (n = {estimate.count})"


def _signed(estimate: Estimate) -> str:
    return f"{estimate.value:+z.3f} {estimate.brackets('+z.3f')}".rstrip()


Row = tuple[str, tuple[str, ...]]


def facts(runs: Sequence[Run]) -> list[tuple[str, list[Row]]]:
    """What was trained on what, in groups: a row a fact, a column a run. What no run has something in is left out."""
    makers: dict[str, Callable[[Run], Iterator[tuple[str, str]]]] = {
        "Data": _of_data,
        "Training": _of_training,
        "Answers, before → after training": _of_answers,
        "Seconds of each stage": _of_stages,
        "Versions": _of_versions,
    }
    groups: list[tuple[str, list[Row]]] = []
    for title, make in makers.items():
        columns = [dict(make(run)) for run in runs]
        names = list(dict.fromkeys(name for column in columns for name in column))
        groups.append((title, [(name, tuple(column.get(name, "") for column in columns)) for name in names]))
    return [group for group in groups if group[1]]


def _of_data(run: Run) -> Iterator[tuple[str, str]]:
    data = run.data
    if data is None:
        return
    yield "data", data.source
    yield "fingerprint", data.fingerprint
    yield "rows read", f"{data.rows:,}"
    for reason, count in data.left_out:
        yield f"left out: {reason}", f"{count:,}"
    yield "pairs left", f"{data.pairs:,}"
    for name, split in data.splits.items():
        yield f"pairs in {name}", f"{split.pairs:,} on {split.prompts:,} prompts"
    for reason, count in data.cut:
        yield f"{reason} to {data.max_length} tokens", f"{count:,}"


def _of_training(run: Run) -> Iterator[tuple[str, str]]:
    if run.seed is not None:
        yield "seed", str(run.seed)
    for model in run.reward_models:
        if model.steps is not None:
            yield f"steps: {model.name}", f"{model.steps:,}"
    if run.policy and run.policy.steps is not None:
        yield "steps: RLOO", f"{run.policy.steps:,}"
    if run.policy and run.policy.episodes is not None:
        yield "completions sampled", f"{run.policy.episodes:,.0f}"


_TEXTS = {
    "length": ("tokens of an answer", "{:.1f}"),
    "eos": ("answers that end by themselves", "{:.1%}"),
    "repetition": ("repeated phrases of 4 words", "{:.1%}"),
    "distinct_2": ("different pairs of words", "{:.1%}"),
    "refusals": ("answers that refuse", "{:.1%}"),
}
"""What is said of the texts of answers, with the shape of its numbers."""


def _of_answers(run: Run) -> Iterator[tuple[str, str]]:
    for name, (before, after) in run.policy.judged.texts.items() if run.policy and run.policy.judged else ():
        words, shape = _TEXTS.get(name, (name, "{:.3g}"))
        yield words, f"{shape.format(before)}\u00a0→\u00a0{shape.format(after)}"


def _of_stages(run: Run) -> Iterator[tuple[str, str]]:
    for stage in run.stages:
        yield stage.name.replace("_", " "), "not finished" if stage.seconds is None else f"{stage.seconds:,.1f}"


def _of_versions(run: Run) -> Iterator[tuple[str, str]]:
    yield from run.versions.items()


def settings(runs: Sequence[Run]) -> list[tuple[str, str, tuple[str, ...]]]:
    """Settings that are not at their defaults in some run: name, default, and the value in every run."""
    columns = [{f"{s.stage}.{s.name}".removeprefix("pipeline."): s for s in run.settings} for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    found: list[tuple[str, str, tuple[str, ...]]] = []
    for name in names:
        default = next(column[name].default for column in columns if name in column)
        found.append((name, default, tuple(column[name].value if name in column else default for column in columns)))
    return found
