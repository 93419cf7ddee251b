"""The figures of policies: how they were trained, watched and judged."""

from collections.abc import Iterator, Sequence

from helpsteer_rloo.report.charts import Axes, Dot, Line
from helpsteer_rloo.report.figure import (
    STEPS,
    Figure,
    curves,
    distributions,
    dot_figure,
    line_figure,
    named,
    slug,
)
from helpsteer_rloo.report.records import Log, Point, Policy, PolicyJudged, Run


def policies_of(runs: Sequence[Run]) -> list[tuple[str, Policy]]:
    """The policies of the runs, under the runs' names."""
    return [(run.name, run.policy) for run in runs if run.policy is not None]


_ROOT_OF_KL = "√KL, with KL in nats"
_METRICS: tuple[tuple[str, str, str, str], ...] = (
    ("reward", "Reward", "score", "Mean of the weighted scores of a batch, before penalties and KL."),
    ("objective", "Objective", "score", "What is left of the reward after penalties and KL."),
    ("kl_per_completion", "KL", "nats a completion", "From the reference, of the completions of a batch."),
    ("entropy", "Entropy", "nats a token", "How open the choice of a token is."),
    ("completions/mean_length", "Length", "tokens", "Of a completion."),
    ("grad_norm", "Norm of the gradient", "norm", "Before clipping."),
    ("sampler_gap/mean", "Sampler and trainer", "nats a token", "Mean difference of their log-probabilities."),
    ("ensemble/disagreement", "Disagreement of the ensemble", "score", "How far the scores of its members are apart."),
    ("machine/step_seconds", "Time of a step", "seconds", "Without measurements and checkpoints between steps."),
    ("machine/tokens_per_second", "Throughput", "tokens a second", "Prompts and completions, of all processes."),
)
"""What is drawn of a log: metric, title, unit, caption."""


def policy_figures(policies: Sequence[tuple[str, Policy]]) -> Iterator[Figure]:
    """How policies were trained, watched and judged."""
    yield from _against_kl(policies)
    logs = [(name, policy.log) for name, policy in policies]
    for metric, title, unit, caption in _METRICS:
        series = [(name, log.series(metric)) for name, log in logs]
        yield from curves(f"policy-{slug(metric)}", title, caption, series, Axes(STEPS, unit))
        if metric == "reward":
            caption = "On the prompts that the policy is watched on."
            yield from curves("guard", "Guard's score", caption, _guarded(policies), Axes(STEPS, "score"))
    ended = [(name, _ended(log)) for name, log in logs]
    shares = Axes(STEPS, "share", limits=(0.0, 1.0))
    yield from curves("eos", "Share ending by itself", "Of the completions of a batch.", ended, shares)
    memory = [(name, _memory(log)) for name, log in logs]
    yield from curves("memory", "Peak memory", "Of the main process so far.", memory, Axes(STEPS, "GiB", zero=True))
    yield from _judged(policies)


def _guarded(policies: Sequence[tuple[str, Policy]]) -> list[tuple[str, tuple[Point, ...]]]:
    seen = [(name, [one.to_json() for one in policy.watched]) for name, policy in policies]
    return [(n, tuple((float(r["step"] or 0), r["guard"]) for r in rows if r["guard"] is not None)) for n, rows in seen]


def _ended(log: Log) -> tuple[Point, ...]:
    return tuple((step, 1 - share) for step, share in log.series("missing_eos"))


def _memory(log: Log) -> tuple[Point, ...]:
    return tuple((step, size / 2**30) for step, size in log.series("machine/peak_memory_bytes"))


def _against_kl(policies: Sequence[tuple[str, Policy]]) -> Iterator[Figure]:
    """Reward and guard's score along the run against the root of KL, and best-of-n beside the policy."""
    series: list[Line] = []
    for name, policy in policies:
        points = [seen.to_json() for seen in policy.watched]
        for column in ("reward", "guard"):
            found = [(p["sqrt_kl"], p[column]) for p in points if p[column] is not None and p[column] == p[column]]
            label = column if len(policies) == 1 else named(name, column)
            if found:
                series.append(Line(label, [(float(x or 0), float(y or 0)) for x, y in found]))
    caption = (
        "On prompts kept out of training, along the run. Where the reward rises and the guard's score falls, the "
        "reward is exploited."
    )
    axes = Axes(_ROOT_OF_KL, "score", marks=True)
    yield from line_figure("reward-kl", "Reward against √KL", caption, series, axes)


def _best_of_n(policies: Sequence[tuple[str, Policy]], column: str) -> Iterator[Figure]:
    series: list[Line] = []
    for name, policy in policies:
        judged = policy.judged
        if judged is None or judged.best_of_n is None or column not in judged.changes:
            continue
        change, prefix = judged.changes[column], "" if len(policies) == 1 else f"{name}: "
        curve = [(max(row["kl"], 0.0) ** 0.5, row[column]) for row in judged.best_of_n.curve if column in row]
        ours = [(0.0, change.before), (max(judged.kl.value, 0.0) ** 0.5, change.after)]
        series += [Line(f"{prefix}RLOO", ours), Line(f"{prefix}best of n", curve)]
    words = {"reward": "Reward", "guard": "Guard's score", "gold": "True quality"}
    caption = "Held-out prompts: the policy before and after, and the best of n answers of the untrained one by reward."
    axes = Axes(_ROOT_OF_KL, {"gold": "quality"}.get(column, "score"), marks=True)
    yield from line_figure(f"best-of-n-{column}", f"{words[column]} against best-of-n", caption, series, axes)


def _judged(policies: Sequence[tuple[str, Policy]]) -> Iterator[Figure]:
    judged = [(name, policy.judged) for name, policy in policies if policy.judged]
    rows = [Dot(label, name, rate) for name, found in judged for label, rate in found.win_rates.items()]
    caption = (
        "Held-out prompts where the trained policy's answer scores higher than the untrained one's; ties count half."
    )
    yield from dot_figure(
        "win-rates", "Win rates", caption, rows, Axes("share of prompts", rule=0.5, legend=len(policies) > 1)
    )
    for column in ("reward", "guard", "gold"):
        yield from _best_of_n(policies, column)
    yield from _less_best_of_n(judged, several=len(policies) > 1)
    for score, word in (("reward", "Reward"), ("gold", "True quality")):
        for number, (name, policy) in enumerate(policies, start=1):
            sides = [(s.first.scores.get(score), s.second.scores.get(score)) for s in policy.answers]
            before = [one for one, _ in sides if one is not None]
            after = [one for _, one in sides if one is not None]
            title = f"{word} of answers" + (f": {name}" if len(policies) > 1 else "")
            caption = f"{len(sides)} held-out prompts, the same seeds before and after."
            parts = (("before", before), ("after", after))
            yield from distributions(f"answers-{score}-{number}", title, caption, *parts)


def _less_best_of_n(judged: Sequence[tuple[str, PolicyJudged]], *, several: bool) -> Iterator[Figure]:
    rows = [
        Dot({"reward": "reward", "guard": "guard's score", "gold": "true quality"}.get(score, score), name, estimate)
        for name, found in judged
        if found.best_of_n
        for score, estimate in found.best_of_n.policy_minus.items()
    ]
    where = {
        n: f"n = {j.best_of_n.n:.1f}" + ("" if j.best_of_n.reaches else ", at less KL")
        for n, j in judged
        if j.best_of_n
    }
    said = ", ".join(where.values() if len(where) == 1 else (f"{name}: {what}" for name, what in where.items()))
    caption = f"Less that of best-of-n at the policy's KL ({said}); left of the dashed line best-of-n is better."
    yield from dot_figure(
        "policy-less-best-of-n", "The policy and best-of-n", caption, rows, Axes("difference", rule=0.0, legend=several)
    )
