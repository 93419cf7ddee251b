"""From the runs to figures: a chart, what it shows in words, and its numbers as a table."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from helpsteer_rloo.report import charts
from helpsteer_rloo.report.charts import Axes, Dot, Line
from helpsteer_rloo.report.readings import distribution
from helpsteer_rloo.report.records import Log, Point, Policy, PolicyJudged, RewardModel, Run
from helpsteer_rloo.statistics import Estimate

MOST_POINTS = 300
"""Of a line; of a longer one, means of neighbours are drawn."""
_TABLE_ROWS = 40
OVER_STEPS = Axes("optimizer step")
SHARES = Axes("optimizer step", limits=(0.0, 1.0))


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with its title, a caption, and the numbers in it."""

    name: str
    title: str
    caption: str
    svg: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


Named = tuple[str, RewardModel]


def reward_models_of(runs: Sequence[Run]) -> list[Named]:
    """What is drawn side by side: all reward models of one run, or the first one of each of several."""
    if len(runs) == 1:
        return [(model.name, model) for model in runs[0].reward_models]
    return [(run.name, run.reward_models[0]) for run in runs if run.reward_models]


def policies_of(runs: Sequence[Run]) -> list[tuple[str, Policy]]:
    """The policies of the runs, under the runs' names."""
    return [(run.name, run.policy) for run in runs if run.policy is not None]


# ---- the data -------------------------------------------------------------------------------------------------------


def data_figures(runs: Sequence[Run]) -> Iterator[Figure]:
    """Lengths, strengths and domains of the pairs."""
    several = len(runs) > 1
    parts = ("prompt", "chosen", "rejected")
    lengths = [
        (_named(run.name, part) if several else part, split.lengths[part])
        for run in runs
        if run.data
        for split in (run.data.splits.get("train"),)
        if split
        for part in (parts if not several else ("chosen",))
        if part in split.lengths
    ]
    if lengths:
        title = "Lengths of chosen responses" if several else "Lengths of prompts and responses"
        yield Figure(
            "lengths",
            title,
            "Tokens before any cut, in the pairs that are trained on.",
            charts.svg(
                charts.steps(lengths, Axes("tokens")),
                "lengths",
                title,
                "; ".join(f"{name}: {histogram.total} in bins of {histogram.width:g}" for name, histogram in lengths),
            ),
            ("from", *(name for name, _ in lengths)),
            _histogram_rows([histogram.points for _, histogram in lengths]),
        )
    for kind, title in (("strengths", "Strengths of the preferences"), ("domains", "Domains")):
        yield from _shares(runs, kind, title)


def _shares(runs: Sequence[Run], kind: str, title: str) -> Iterator[Figure]:
    rows: list[tuple[str, str, float]] = []
    table: list[tuple[str, ...]] = []
    for run in runs:
        for name, split in run.data.splits.items() if run.data else ():
            counts = getattr(split, kind)
            series = _named(run.name, name) if len(runs) > 1 else name
            rows += [(value, series, count / max(1, split.pairs)) for value, count in counts.items()]
            table += [
                (value, series, str(count), f"{count / max(1, split.pairs):.1%}") for value, count in counts.items()
            ]
    if rows:
        said = ", ".join(f"{value} in {series} {share:.0%}" for value, series, share in rows)
        drawn = charts.svg(charts.bars(rows, Axes("share of pairs")), kind, title, said)
        yield Figure(kind, title, "", drawn, (kind.removesuffix("s"), "split", "pairs", "share"), tuple(table))


# ---- reward models --------------------------------------------------------------------------------------------------


def reward_figures(models: Sequence[Named]) -> Iterator[Figure]:
    """How reward models were trained and judged."""
    logs = [(name, model.log) for name, model in models]
    for metric, title, caption in (
        ("loss", "Loss in training", "Of the preferences; 0.693 is that of a coin."),
        ("accuracy", "Accuracy in training", "Share of the pairs of a step that are ordered right."),
        ("margin", "Margin in training", "Mean score of the chosen response less that of the rejected one."),
        ("eval_loss", "Loss on the pairs kept out to choose a step", ""),
    ):
        yield from _curves(f"reward-{metric}", title, caption, [(name, log.series(metric)) for name, log in logs])
    yield from _accuracies(models)
    yield from _reliability(models)
    yield from _biases(models)
    yield from _probes(models)
    for name, model in models[:6]:
        yield from _scores(name, model)


def _accuracies(models: Sequence[Named]) -> Iterator[Figure]:
    for part in ("domain", "strength", "turns", "length"):
        rows = [
            Dot(label, name, estimate)
            for name, model in models
            if model.judged
            for label, estimate in model.judged.parts.get(part, {}).items()
        ]
        title = f"Held-out accuracy by {part}"
        caption = {
            "strength": "How much better the annotators found the chosen response, from 1 to 3.",
            "turns": "User turns of the conversation.",
            "length": "Tokens of the prompt and the longer response, in classes of equal size.",
        }.get(part, "")
        caption += " 95 % intervals; the dashed line is chance."
        yield from _dots(f"accuracy-{part}", title, caption.strip(), rows, Axes("share ordered right", rule=0.5))


def _reliability(models: Sequence[Named]) -> Iterator[Figure]:
    judged = [(name, model.judged.reliability) for name, model in models if model.judged and model.judged.reliability]
    if not judged:
        return
    title = "Reliability"
    errors = ", ".join(
        f"{name} {m.judged.calibration_error}" for name, m in models if m.judged and m.judged.calibration_error
    )
    yield Figure(
        "reliability",
        title,
        f"How sure it is of a pair against how often it is right; on the dashed line both agree. Mean error: {errors}.",
        charts.svg(
            charts.reliability(judged, Axes("probability by its margin", "share right")),
            "reliability",
            title,
            "; ".join(
                f"{name}: " + ", ".join(f"sure {b.confidence:.0%}, right {b.right:.0%}" for b in bins)
                for name, bins in judged
            ),
        ),
        ("model", "sure", "right", "pairs"),
        tuple((name, f"{b.confidence:.3f}", f"{b.right:.3f}", str(b.count)) for name, bins in judged for b in bins),
    )


def _biases(models: Sequence[Named]) -> Iterator[Figure]:
    rows: list[Dot] = []
    for (name, model), (kind, words) in itertools.product(
        models, (("length", "longer"), ("markdown", "more markdown"))
    ):
        if model.judged and kind in model.judged.biases:
            bias = model.judged.biases[kind]
            rows += [Dot(f"{words}: model", name, bias.model), Dot(f"{words}: labels", name, bias.labels)]
    yield from _dots(
        "bias",
        "A liking for length or markdown",
        "How often the longer response, or the one with more markdown, is preferred by the model and by the labels.",
        rows,
        Axes("share of pairs"),
    )


def _probes(models: Sequence[Named]) -> Iterator[Figure]:
    words = {"markdown": "put in markdown", "repetition": "said twice", "truncation": "cut in half"}
    rows = [
        Dot(words.get(kind, kind), name, change)
        for name, model in models
        if model.judged
        for kind, change in model.judged.probes.items()
    ]
    caption = (
        "Mean change of the score when a held-out answer is changed so; right of the dashed line it can be exploited."
    )
    yield from _dots("probes", "What changes a score", caption, rows, Axes("change of score", rule=0.0))


def _scores(name: str, model: RewardModel) -> Iterator[Figure]:
    pairs = [(pair.first.scores.get("score"), pair.second.scores.get("score")) for pair in model.pairs]
    rejected = [score for score, _ in pairs if score is not None]
    chosen = [score for _, score in pairs if score is not None]
    caption = f"By the {name}, of {len(pairs)} held-out pairs."
    yield from _distributions(
        f"scores-{_slug(name)}", f"Scores: {name}", caption, ("rejected", rejected), ("chosen", chosen)
    )


# ---- the policy -----------------------------------------------------------------------------------------------------

_METRICS: tuple[tuple[str, str, str], ...] = (
    ("reward", "Reward", "Mean of the weighted scores of a batch, before penalties and KL."),
    ("objective", "Objective", "What is left of the reward after penalties and KL."),
    ("kl_per_completion", "KL", "From the reference, in nats a completion."),
    ("entropy", "Entropy", "Of a token, in nats."),
    ("completions/mean_length", "Length", "Tokens of a completion."),
    ("grad_norm", "Norm of the gradient", ""),
    ("sampler_gap/mean", "Sampler and trainer", "Mean difference of their log-probabilities of a token, in nats."),
    ("ensemble/disagreement", "Disagreement of the ensemble", ""),
    ("machine/step_seconds", "Seconds a step", ""),
    ("machine/tokens_per_second", "Tokens a second", "Prompts and completions, on the main process."),
)


def policy_figures(policies: Sequence[tuple[str, Policy]]) -> Iterator[Figure]:
    """How policies were trained, watched and judged."""
    yield from _against_kl(policies)
    logs = [(name, policy.log) for name, policy in policies]
    for metric, title, caption in _METRICS:
        yield from _curves(
            f"policy-{_slug(metric)}", title, caption, [(name, log.series(metric)) for name, log in logs]
        )
        if metric == "reward":
            yield from _curves(
                "guard", "Guard's score", "On the prompts that the policy is watched on.", _guarded(policies)
            )
    ended = [(name, _ended(log)) for name, log in logs]
    yield from _curves("eos", "Share ending by itself", "Of the completions of a batch.", ended, SHARES)
    memory = [(name, _memory(log)) for name, log in logs]
    yield from _curves("memory", "Peak memory", "GiB, of the main process so far.", memory)
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
            label = column if len(policies) == 1 else _named(name, column)
            if found:
                series.append(Line(label, [(float(x or 0), float(y or 0)) for x, y in found]))
    caption = (
        "On prompts kept out of training, along the run. Where the reward rises and the guard's score falls, the "
        "reward is exploited."
    )
    yield from _lines("reward-kl", "Reward against √KL", caption, series, Axes("√KL, nats", "score", marks=True))


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
    axes = Axes("√KL, nats", marks=True)
    yield from _lines(f"best-of-n-{column}", f"{words[column]} against best-of-n", caption, series, axes)


def _judged(policies: Sequence[tuple[str, Policy]]) -> Iterator[Figure]:
    judged = [(name, policy.judged) for name, policy in policies if policy.judged]
    rows = [Dot(label, name, rate) for name, found in judged for label, rate in found.win_rates.items()]
    caption = (
        "Held-out prompts where the trained policy's answer scores higher than the untrained one's; ties count half."
    )
    yield from _dots("win-rates", "Win rates", caption, rows, Axes("share of prompts", rule=0.5))
    for column in ("reward", "guard", "gold"):
        yield from _best_of_n(policies, column)
    yield from _less_best_of_n(judged)
    for name, policy in policies:
        for score, word in (("reward", "Reward"), ("gold", "True quality")):
            sides = [(s.first.scores.get(score), s.second.scores.get(score)) for s in policy.answers]
            before = [one for one, _ in sides if one is not None]
            after = [one for _, one in sides if one is not None]
            title = f"{word} of answers" + (f": {name}" if len(policies) > 1 else "")
            caption = f"{len(sides)} held-out prompts, the same seeds before and after."
            parts = (("before", before), ("after", after))
            yield from _distributions(f"answers-{score}-{_slug(name)}", title, caption, *parts)


def _less_best_of_n(judged: Sequence[tuple[str, PolicyJudged]]) -> Iterator[Figure]:
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
    yield from _dots("policy-less-best-of-n", "The policy and best-of-n", caption, rows, Axes("difference", rule=0.0))


# ---- what the figures share -----------------------------------------------------------------------------------------


def _named(run: str, part: str) -> str:
    return f"{run}: {part}"


def _slug(name: str) -> str:
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name.lower())


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> Sequence[Point]:
    """The points, or the means of as many neighbours as make them few enough.

    >>> thinned([(1.0, 0.0), (2.0, 2.0), (3.0, 4.0)], most=2)
    [(1.5, 1.0), (3.0, 4.0)]
    """
    size = -(-len(points) // most)
    if size <= 1:
        return points
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _curves(
    name: str, title: str, caption: str, series: Sequence[tuple[str, Sequence[Point]]], axes: Axes = OVER_STEPS
) -> Iterator[Figure]:
    drawn = [Line(label, points) for label, points in series if points]
    yield from _lines(name, title, caption, drawn, axes)


def _lines(name: str, title: str, caption: str, series: Sequence[Line], axes: Axes) -> Iterator[Figure]:
    if not series:
        return
    thin = [Line(line.name, thinned(line.points)) for line in series]
    said = "; ".join(
        f"{line.name}: from {line.points[0][1]:.4g} at {line.points[0][0]:.4g} to {line.points[-1][1]:.4g} at "
        f"{line.points[-1][0]:.4g}"
        for line in series
    )
    rows = [(line.name, f"{x:.6g}", f"{y:.6g}") for line in thin for x, y in thinned(line.points, _TABLE_ROWS)]
    drawn = charts.svg(charts.lines(thin, axes), name, title, f"Over {axes.x}: {said}.")
    yield Figure(name, title, caption, drawn, ("series", axes.x, axes.y or title.lower()), tuple(rows))


def _dots(name: str, title: str, caption: str, rows: Sequence[Dot], axes: Axes) -> Iterator[Figure]:
    if not rows:
        return
    several = len({dot.series for dot in rows}) > 1
    said = "; ".join(f"{dot.row}{f', {dot.series}' if several else ''}: {dot.estimate}" for dot in rows)
    table = tuple((dot.row, dot.series, *_cells(dot.estimate)) for dot in rows)
    drawn = charts.svg(charts.dots(rows, axes), name, title, said)
    yield Figure(name, title, caption, drawn, ("row", "of", axes.x, "95 % interval", "n"), table)


def _cells(estimate: Estimate) -> tuple[str, str, str]:
    return f"{estimate.value:.3f}", interval(estimate), str(estimate.count)


def interval(estimate: Estimate) -> str:
    """The interval of an estimate as it is shown; empty if it has none."""
    return "" if None in estimate.interval() else f"{estimate.low:.3f} to {estimate.high:.3f}"


def _distributions(
    name: str, title: str, caption: str, first: tuple[str, Sequence[float]], second: tuple[str, Sequence[float]]
) -> Iterator[Figure]:
    if not (first[1] and second[1]):
        return
    parts = distribution(first[1], second[1])
    series = [(first[0], parts[0]), (second[0], parts[1])]
    means = ", ".join(f"{label} {sum(values) / len(values):.3f} on average" for label, values in (first, second))
    drawn = charts.svg(charts.steps(series, Axes("score")), name, title, means)
    rows = _histogram_rows([part.points for part in parts])
    yield Figure(name, title, f"{caption} Means: {means}.", drawn, ("from", first[0], second[0]), rows)


def _histogram_rows(columns: Sequence[Sequence[Point]]) -> tuple[tuple[str, ...], ...]:
    starts = sorted({x for column in columns for x, _ in column[:-1]})
    found = [dict(column) for column in columns]
    return tuple((f"{x:.4g}", *(f"{column.get(x, 0):g}" for column in found)) for x in starts)
