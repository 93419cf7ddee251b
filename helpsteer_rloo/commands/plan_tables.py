"""The tables of a plan: memory by stage and kind, by moment, time by stage, and how far settings can go."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from helpsteer_rloo.planning.verdict import advice, cannot_fit, described, gib, may_not_fit, worst_of

if TYPE_CHECKING:
    from helpsteer_rloo.commands.plan import Plan
    from helpsteer_rloo.planning.needs import Need
    from helpsteer_rloo.planning.time import Part

_MINUTE, _HOUR, _DAY = 60, 3600, 86_400


def tables(plan: "Plan") -> list[Table]:
    """All tables of a plan, in order."""
    found = [_kinds(plan), _moments(plan), _time(plan)]
    return [*found, _room(plan)] if plan.room else found


def _table(title: str, *columns: str) -> Table:
    table = Table(title=escape(title), title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(escape(column), justify="right" if number else "left")
    return table


def _kinds(plan: "Plan") -> Table:
    """What each stage holds at its worst moment, by what it is of."""
    table = _table("Memory of a process at the worst moment, GiB", "what", *(need.stage for need in plan.needs))
    kinds = dict.fromkeys(kind for need in plan.needs for kind in need.worst.items)
    for kind in kinds:
        sizes = (need.worst.items.get(kind) for need in plan.needs)
        table.add_row(kind, *("" if size is None else gib(size) for size in sizes))
    table.add_section()
    table.add_row("all", *(gib(need.worst.total) for need in plan.needs))
    table.add_row("at the moment", *(escape(need.worst.name) for need in plan.needs))
    if plan.limit is not None:
        table.add_row(f"fits into {gib(plan.limit)}", *_verdicts(plan.needs, plan.limit))
    return table


def _verdicts(needs: "Sequence[Need]", limit: float) -> Iterator[str]:
    for need in needs:
        if need.worst.total > limit:
            yield "[red]no[/]"
        else:
            yield "[yellow]barely[/]" if may_not_fit([need], limit) else "[green]yes[/]"


def _moments(plan: "Plan") -> Table:
    table = _table("Memory of a process by moment, GiB", "stage", "moment", "GiB")
    table.columns[1].justify = "left"
    for need in plan.needs:
        for phase in need.phases:
            table.add_row(escape(need.stage), escape(phase.name), gib(phase.total))
    return table


def _time(plan: "Plan") -> Table:
    source = plan.rate.source if plan.rate else "no rate is known: give --gpu_name, --tflops or --measure"
    table = _table(f"Work and time ({source})", "stage", "part", "tokens", "PFLOP", "steps", "time")
    table.columns[1].justify = "left"
    for part in plan.parts:
        steps = f"{part.steps:,}" if part.steps else ""
        row = (f"{part.tokens:,.0f}", f"{part.flops / 1e15:,.3g}", steps, _duration(part.seconds))
        table.add_row(escape(part.stage), escape(part.name), *row)
    table.add_section()
    table.add_row("all", "", "", f"{sum(part.flops for part in plan.parts) / 1e15:,.3g}", "", _all_of(plan.parts))
    return table


def _all_of(parts: "Sequence[Part]") -> str:
    seconds = [part.seconds for part in parts if part.seconds is not None]
    return _duration(sum(seconds) if seconds else None)


def _duration(seconds: float | None) -> str:
    """Seconds in the unit that fits.

    >>> _duration(90), _duration(7200), _duration(None)
    ('1.5 min', '2.0 h', '')
    """
    if seconds is None:
        return ""
    for unit, name in ((_DAY, "d"), (_HOUR, "h"), (_MINUTE, "min")):
        if seconds >= unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.0f} s"


def _room(plan: "Plan") -> Table:
    table = _table("The largest value of each setting that fits, the others as they are", "flag", "now", "largest")
    for room in plan.room:
        largest = "none" if room.largest is None else f"{room.largest:,}{' or more' if room.capped else ''}"
        table.add_row(escape(f"--{room.flag}"), f"{room.value:,}", largest)
    return table


def verdict_lines(plan: "Plan") -> list[str]:
    """What it comes to, in words."""
    lines = [f"Lengths: {plan.corpus.source}. Completions are counted at full length, rows at their longest."]
    lines += [f"{need.stage}: {note}" for need in plan.needs for note in need.notes]
    if plan.limit is None:
        return [*lines, "Give --gpu_memory_gb to be told whether it fits."]
    worst = worst_of(plan.needs)
    said = f"{described(worst)}; there are {gib(plan.limit)} GiB ({plan.memory})."
    if worst.worst.total <= plan.limit:
        return [*lines, f"It fits{', barely' if may_not_fit([worst], plan.limit) else ''}: {said}"]
    refused = "The pipeline refuses to start (--force)." if cannot_fit([worst], plan.limit) else ""
    return [*lines, f"It does not fit: {said} {refused}".rstrip(), advice(plan.remedies, None)]
