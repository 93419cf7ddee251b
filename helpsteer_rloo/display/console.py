"""What a run prints: lines, and tables of data, predictions and results."""

import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from helpsteer_rloo.processes import is_main_process


@dataclass
class _Output:
    """Where everything is printed, and whether that is what matters most alone."""

    console: Console
    quiet: bool = False


_OUTPUT = _Output(Console())
WIDTH_OF_PROMPT = 48
_LEAST_OF_PROMPT, _BESIDE_PROMPT = 12, 44
"""Columns of a prompt at the least, and of scores and frame beside it."""
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal obeys or mirrors text by, all but newlines and tabs; and what cannot be encoded."""
_WIN_RATES = {
    "win rate at equal length": "length_controlled_win_rate",
    "win rate by the guard": "guard_win_rate",
    "win rate by the guard at equal length": "guard_length_controlled_win_rate",
}


@contextmanager
def speaking_to(console: Console, *, quiet: bool = False) -> Generator[None]:
    """Within, lines and tables go to a console; of them, if it is to be quiet, only warnings and conclusions."""
    before = _OUTPUT.console, _OUTPUT.quiet
    _OUTPUT.console, _OUTPUT.quiet = console, quiet
    try:
        yield
    finally:
        _OUTPUT.console, _OUTPUT.quiet = before


def say(message: str) -> None:
    """Print one line of progress, on the main process only."""
    if not _OUTPUT.quiet:
        conclude(message)


def printable(text: str) -> str:
    r"""Text from elsewhere as it may be printed: control characters, and marks that turn its direction, spelled out.

    >>> print(printable("a\tb\x1b[2J"))
    a	b\x1b[2J
    """
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def show(table: Table) -> None:
    """Print a table, on the main process only."""
    if not _OUTPUT.quiet:
        conclude(table)


def warn(message: str) -> None:
    """Print a warning, on the main process only, whether or not it is to be quiet."""
    conclude(f"WARNING: {message}")


def conclude(result: str | Table) -> None:
    """Print a line or table of what came out in the end, on the main process only, whether or not it is to be quiet."""
    if not is_main_process():
        return
    if isinstance(result, Table):
        _OUTPUT.console.print(result)
    else:
        _OUTPUT.console.print(f"[bold cyan]>[/] {escape(result)}", soft_wrap=True, highlight=False)


def data_table(report: Mapping[str, Any]) -> Table:
    """The data report in short: what was read, what was dropped and why, what is left."""
    table = Table(title=f"Data: {escape(str(report['source']))}", title_justify="left")
    table.add_column("what")
    table.add_column("train", justify="right")
    table.add_column("validation", justify="right")
    table.add_column("all", justify="right")
    table.add_row("rows read", "", "", str(report["rows"]))
    for reason, count in {
        **_named("bad row", report["bad_rows"]),
        **_named("not selected", report["not_selected"]),
    }.items():
        table.add_row(escape(str(reason)), "", "", str(count))
    for reason, count in report["dropped"].items():
        table.add_row(f"dropped: {escape(reason)}", "", "", str(count))
    splits = report["splits"]
    for name in ("pairs", "prompts"):
        numbers = [splits[split][name] for split in ("train", "validation")]
        table.add_row(name, *map(str, numbers), str(sum(numbers)))
    for kind in ("domains", "strengths"):
        for value in sorted({key for split in splits.values() for key in split[kind]}):
            numbers = [splits[split][kind].get(value, 0) for split in ("train", "validation")]
            table.add_row(f"{kind[:-1]} {escape(value)}", *map(str, numbers), str(sum(numbers)))
    for part in ("prompt", "chosen", "rejected"):
        cells = [_length(splits[split]["tokens"].get(part)) for split in ("train", "validation")]
        table.add_row(f"{part} tokens, median / p95 / max", *cells, "")
    overlong = report["overlong"]
    for name in ("over_max_length", "context_cut", "response_cut"):
        table.add_row(f"pairs: {name.replace('_', ' ')} ({report['max_length']})", "", "", str(overlong[name]))
    return table


def _named(prefix: str, counts: Mapping[str, int]) -> dict[str, int]:
    return {f"{prefix}: {name}": count for name, count in counts.items()}


def _length(percentiles: Mapping[str, float] | None) -> str:
    return "" if not percentiles else " / ".join(f"{percentiles[p]:.0f}" for p in ("p50", "p95", "p100"))


def predictions_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Sample predictions of the reward model on held-out pairs."""
    room = max(_LEAST_OF_PROMPT, min(WIDTH_OF_PROMPT, _OUTPUT.console.width - _BESIDE_PROMPT))
    table = Table(title="Sample predictions on held-out pairs", title_justify="left")
    table.add_column("prompt", no_wrap=True)
    for name in ("chosen", "rejected", "margin"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in rows:
        prompt = " ".join(str(row["prompt"]).split())
        prompt = prompt if len(prompt) <= room else prompt[: room - 1] + "…"
        numbers = [f"{row[name]:+.3f}" for name in ("chosen_score", "rejected_score", "margin")]
        table.add_row(escape(prompt), *numbers, "[green]right[/]" if row["right"] else "[red]wrong[/]")
    return table


def _of_estimates(title: str) -> Table:
    """A table, still empty, of numbers with their intervals."""
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    return table


def results_table(summary: Mapping[str, Any]) -> Table:
    """The results of a whole run."""
    table = _of_estimates("Results")
    reward, policy = summary.get("reward_model"), summary.get("policy")
    if reward:
        label = f"reward model: held-out accuracy ({reward['heldout_pairs']} pairs)"
        table.add_row(label, f"{reward['heldout_accuracy']:.3f}", _interval(reward["interval"]))
    if policy:
        table.add_row(
            f"policy: win rate ({policy['prompts']} held-out prompts)",
            f"{policy['win_rate']:.3f}",
            _interval(policy["win_rate_interval"]),
        )
        for name, key in _WIN_RATES.items():
            if policy.get(key):
                table.add_row(f"policy: {name}", f"{policy[key]['value']:.3f}", _interval(policy[key]["interval"]))
        best = policy.get("best_of_n", {}).get("at_the_policys_kl", {})
        for name in ("reward", "guard", "gold"):
            if name in best:
                part = best[name]["policy_minus_best_of_n"]
                at = "the same" if best["reaches_the_kl"] else "less"
                label = f"policy: {name}, minus best-of-{best['n']:.3g}'s at {at} KL"
                table.add_row(label, f"{part['value']:+.3f}", _interval(part["interval"]))
        for name, key in (("reward", "reward"), ("guard's score", "guard"), ("gold quality", "gold")):
            if f"{key}_before" in policy:
                value = f"{policy[f'{key}_before']:.3f} -> {policy[f'{key}_after']:.3f}"
                table.add_row(f"policy: {name}", value, "change " + _interval(policy[f"{key}_change"]["interval"]))
        table.add_row(
            "policy: KL from the start (nats a completion)", f"{policy['kl']:z.2f}", _interval(policy["kl_interval"])
        )
        table.add_row("policy: share ending by itself", f"{policy['eos_before']:.3f} -> {policy['eos_after']:.3f}", "")
        table.add_row(
            "policy: tokens a completion", f"{policy['length_before']:.1f} -> {policy['length_after']:.1f}", ""
        )
    for stage, seconds in summary["seconds"].items():
        table.add_row(f"seconds: {stage}", f"{seconds:.1f}", "")
    return table


def watch_sentence(watch: Mapping[str, Any]) -> str:
    """What watching a policy came to."""
    curve, verdict, back = watch["curve"], watch["verdict"], watch["rolled_back_to"]
    judge = "reward" if curve[-1]["guard"] is None else "guard's score"
    best = f"The best step by the {judge} is {watch['best_step']}."
    seen = f"The policy was looked at {len(curve)} times up to step {curve[-1]['step']}"
    if verdict is None:
        return f"{seen}, without an alarm that ends a run. {best}"
    done = f"The policy is that of step {back}." if back is not None else best
    return f"{seen}, with an alarm: {verdict['sentence']} {done}"


def benchmark_table(found: Mapping[str, Any]) -> Table:
    """The result of an offline benchmark: every number of it, in the order of the result."""
    table = _of_estimates(f"{found['benchmark']}, {found['scored']} items")
    for name, value in _flat(found["result"]):
        table.add_row(escape(name), *_cells(value))
    for kind in ("left_out", "counts"):
        for reason, count in found[kind].items():
            table.add_row(escape(f"{kind.replace('_', ' ')}: {reason}"), str(count), "")
    return table


def judgement_table(name: str, judged: Mapping[str, Any]) -> Table:
    """Everything that was measured of a reward model."""
    table = _of_estimates(f"Reward model {escape(name)}, {judged['heldout_pairs']} pairs")
    overall = {"value": judged["heldout_accuracy"], "interval": judged["interval"], "count": judged["heldout_pairs"]}
    shown = (
        "by_domain",
        "by_strength",
        "by_turns",
        "by_length",
        "ceiling",
        "most_certain",
        "calibration",
        "biases",
        "probes",
    )
    for label, value in _flat({"accuracy": overall, **{name: judged[name] for name in shown}}):
        if not isinstance(value, list):
            table.add_row(escape(label.replace("_", " ")), *_cells(value))
    return table


def findings_table(findings: Sequence[Mapping[str, Any]]) -> Table:
    """What the numbers mean, those first that call for a look."""
    table = Table(title="What this means", title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("")
    for found in findings:
        table.add_row("[yellow]look[/]" if found["concern"] else "[green]ok[/]", escape(found["sentence"]))
    return table


def comparison_table(found: Mapping[str, Any]) -> Table:
    """Reward models side by side on the same pairs."""
    table = _of_estimates(f"Compared on {found['pairs']} pairs")
    for name, part in found["accuracy"].items():
        table.add_row(f"accuracy: {escape(name)}", *_cells(part))
    for pair in found["compared"]:
        names = escape(f"{pair['second']} - {pair['first']}")
        table.add_row(f"difference: {names}", *_cells(pair["difference"]))
        table.add_row("agreement of the two", f"{pair['agreement']:.3f}", "")
        table.add_row("McNemar p", f"{pair['mcnemar_p']:.3g}", "")
    return table


def best_of_table(found: Mapping[str, Any]) -> Table:
    """What choosing the best of n answers comes to."""
    table = _of_estimates(f"Best of {found['n']}, by reward")
    for name, value in found.items():
        if isinstance(value, Mapping):
            table.add_row(f"{name} (prompts)", *_cells(value))
    table.add_row("KL from the policy, at the most (nats)", f"{found['kl']:.3f}", "")
    return table


def _flat(result: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The numbers of a nested result by their names, estimates as one."""
    for name, value in result.items():
        if isinstance(value, Mapping) and "interval" not in value:
            yield from _flat(value, f"{prefix}{name}: ")
        else:
            yield prefix + name, value


def _cells(value: Any) -> tuple[str, str]:
    if isinstance(value, Mapping):
        return f"{value['value']:z.3f} ({value['count']})", _interval(value["interval"])
    return (f"{value:z.3f}" if isinstance(value, float) else "" if value in (None, []) else escape(str(value))), ""


def _interval(bounds: Sequence[float | None]) -> str:
    if all(end is None for end in bounds):
        return ""
    return " … ".join("?" if end is None else f"{end:z.3f}" for end in bounds)
