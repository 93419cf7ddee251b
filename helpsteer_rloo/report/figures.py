"""The figures of the data and of reward models."""

import itertools
from collections.abc import Iterator, Sequence

from helpsteer_rloo.report import charts
from helpsteer_rloo.report.charts import Axes, Dot
from helpsteer_rloo.report.figure import STEPS, Figure, curves, distributions, dot_figure, histogram_rows, named
from helpsteer_rloo.report.records import Histogram, RewardModel, Run

Named = tuple[str, RewardModel]


def reward_models_of(runs: Sequence[Run]) -> list[Named]:
    """What is drawn side by side: all reward models of one run, or the first one of each of several."""
    if len(runs) == 1:
        return [(model.name, model) for model in runs[0].reward_models]
    return [(run.name, run.reward_models[0]) for run in runs if run.reward_models]


# ---- the data -------------------------------------------------------------------------------------------------------


def data_figures(runs: Sequence[Run]) -> Iterator[Figure]:
    """Lengths, strengths and domains of the pairs."""
    yield from _lengths(runs, "prompts", ("prompt",))
    yield from _lengths(runs, "responses", ("chosen", "rejected"))
    for kind, title in (("strengths", "Strengths of the preferences"), ("domains", "Domains")):
        yield from _shares(runs, kind, title)


def _lengths(runs: Sequence[Run], what: str, parts: Sequence[str]) -> Iterator[Figure]:
    lengths: list[tuple[str, Histogram]] = []
    for run in runs:
        split = run.data.splits.get("train") if run.data else None
        found = [(part, split.lengths[part]) for part in parts if part in split.lengths] if split else []
        names = {
            part: part if len(runs) == 1 else run.name if len(parts) == 1 else named(run.name, part) for part in parts
        }
        lengths += [(names[part], histogram) for part, histogram in found]
    if not lengths:
        return
    name, title = f"lengths-{what}", f"Lengths of {what}"
    said = "; ".join(f"{label}: {histogram.total} in bins of {histogram.width:g}" for label, histogram in lengths)
    drawn = charts.svg(charts.steps(lengths, Axes("tokens", legend=len(runs) > 1)), name, title, said)
    caption = "Tokens before any cut, in the pairs of the train split."
    rows = histogram_rows([histogram.points for _, histogram in lengths])
    yield Figure(name, title, caption, drawn, ("from", *(label for label, _ in lengths)), rows)


def _shares(runs: Sequence[Run], kind: str, title: str) -> Iterator[Figure]:
    rows: list[tuple[str, str, float]] = []
    table: list[tuple[str, ...]] = []
    for run in runs:
        for name, split in run.data.splits.items() if run.data else ():
            if len(runs) > 1 and name != "train":
                continue
            counts = getattr(split, kind)
            series = run.name if len(runs) > 1 else name
            rows += [(value, series, count / max(1, split.pairs)) for value, count in counts.items()]
            table += [
                (value, series, str(count), f"{count / max(1, split.pairs):.1%}") for value, count in counts.items()
            ]
    if rows:
        said = ", ".join(f"{value} in {series} {share:.0%}" for value, series, share in rows)
        drawn = charts.svg(charts.bars(rows, Axes("share of pairs", legend=len(runs) > 1)), kind, title, said)
        yield Figure(kind, title, "", drawn, (kind.removesuffix("s"), "split", "pairs", "share"), tuple(table))


# ---- reward models --------------------------------------------------------------------------------------------------


def reward_figures(models: Sequence[Named]) -> Iterator[Figure]:
    """How reward models were trained and judged."""
    logs = [(name, model.log) for name, model in models]
    for metric, title, unit, caption in (
        ("loss", "Loss in training", "nats", "Of the preferences; 0.693 is that of a coin."),
        ("accuracy", "Accuracy in training", "share", "Share of the pairs of a step that are ordered right."),
        ("margin", "Margin in training", "score", "Mean score of the chosen response less that of the rejected one."),
        ("eval_loss", "Loss on the pairs kept out to choose a step", "nats", ""),
    ):
        series = [(name, log.series(metric)) for name, log in logs]
        yield from curves(f"reward-{metric}", title, caption, series, Axes(STEPS, unit))
    yield from _accuracies(models)
    yield from _reliability(models)
    yield from _biases(models)
    yield from _probes(models)
    for number, (name, model) in enumerate(models[:6], start=1):
        yield from _scores(number, name, model)


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
        yield from dot_figure(
            f"accuracy-{part}",
            title,
            caption.strip(),
            rows,
            Axes("share ordered right", rule=0.5, legend=len(models) > 1),
        )


def _reliability(models: Sequence[Named]) -> Iterator[Figure]:
    judged = [(name, model.judged.reliability) for name, model in models if model.judged and model.judged.reliability]
    if not judged:
        return
    title = "Reliability"
    errors = "; ".join(
        f"{name} {m.judged.calibration_error}" for name, m in models if m.judged and m.judged.calibration_error
    )
    yield Figure(
        "reliability",
        title,
        f"How sure it is of a pair against how often it is right; on the dashed line both agree. Mean error: {errors}.",
        charts.svg(
            charts.reliability(judged, Axes("how sure, by its margin", "share right", legend=len(models) > 1)),
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
    yield from dot_figure(
        "bias",
        "A liking for length or markdown",
        "How often the longer response, or the one with more markdown, is preferred by the model and by the labels.",
        rows,
        Axes("share of pairs", legend=len(models) > 1),
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
    yield from dot_figure(
        "probes", "What changes a score", caption, rows, Axes("change of score", rule=0.0, legend=len(models) > 1)
    )


def _scores(number: int, name: str, model: RewardModel) -> Iterator[Figure]:
    pairs = [(pair.first.scores.get("score"), pair.second.scores.get("score")) for pair in model.pairs]
    rejected = [score for score, _ in pairs if score is not None]
    chosen = [score for _, score in pairs if score is not None]
    caption = f"Of {len(pairs)} held-out pairs."
    yield from distributions(f"scores-{number}", f"Scores: {name}", caption, ("rejected", rejected), ("chosen", chosen))
