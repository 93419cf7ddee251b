"""The tables of a plan: memory by stage and kind, by moment, time by stage, and how far settings can go."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from helpsteer_rloo.planning.margin import SAID, cannot_fit, may_not_fit, worst_of
from helpsteer_rloo.planning.verdict import GIB, advice, described, gib

if TYPE_CHECKING:
    from helpsteer_rloo.commands.plan import Plan
    from helpsteer_rloo.planning.needs import Need
    from helpsteer_rloo.planning.time import Part

_YEAR = 365 * 86_400
_TIMES = ((_YEAR, "years"), (86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))
_MOST_YEARS, _MOST_SHOWN, _TERA = 1000, 10**9, 1e12


def tables(plan: "Plan") -> list[Table]:
    """All tables of a plan, in order."""
    found = [_kinds(plan), _moments(plan), _time(plan)]
    return [*found, _room(plan)] if plan.room else found


def _table(title: str, *columns: str) -> Table:
    table = Table(title=escape(title), title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(escape(column), justify="right" if number else "left", overflow="fold")
    return table


def _kinds(plan: "Plan") -> Table:
    """What each stage holds at its worst moment, by what it is of."""
    alike = _alike(plan.needs)
    needs = [of[0] for of in alike]
    table = _table("Memory of a process at the worst moment, GiB", "what", *(_title(of) for of in alike))
    kinds = dict.fromkeys(kind for need in needs for kind in need.worst.items)
    for kind in kinds:
        sizes = (need.worst.items.get(kind) for need in needs)
        table.add_row(kind, *("" if size is None else _cell(size) for size in sizes))
    table.add_section()
    table.add_row("all", *(_cell(need.worst.total) for need in needs))
    table.add_row("at the moment", *(escape(need.worst.name) for need in needs))
    if plan.limit is not None:
        table.add_row(f"fits into {gib(plan.limit)}", *_verdicts(needs, plan.limit))
    return table


def _alike(needs: "Sequence[Need]") -> "list[list[Need]]":
    """Stages that need the very same, such as those of an ensemble, together."""
    found: dict[object, list[Need]] = {}
    for need in needs:
        found.setdefault(tuple((phase.name, phase.total) for phase in need.phases), []).append(need)
    return list(found.values())


def _title(needs: "Sequence[Need]") -> str:
    """Stages that need the same, by the first of them."""
    first, more = needs[0].stage, len(needs) - 1
    return first if not more else f"{first} (and {more} more)"


def _cell(size: float) -> str:
    """Bytes as GiB in a column of them: with two digits behind the point, which then stand below each other.

    >>> _cell(25 * 2**30), _cell(2**20)
    ('25.00', '< 0.01')
    """
    shown = gib(size)
    return shown if shown.startswith("<") else f"{size / GIB:,.2f}"


def _verdicts(needs: "Sequence[Need]", limit: float) -> Iterator[str]:
    for need in needs:
        if need.worst.total > limit:
            yield "[red]no[/]"
        else:
            yield "[yellow]barely[/]" if may_not_fit([need], limit) else "[green]yes[/]"


def _moments(plan: "Plan") -> Table:
    table = _table("Memory of a process by moment, GiB", "stage", "moment", "GiB")
    table.columns[1].justify = "left"
    for alike in _alike(plan.needs):
        for phase in alike[0].phases:
            table.add_row(escape(_title(alike)), escape(phase.name), _cell(phase.total))
    return table


def _time(plan: "Plan") -> Table:
    source = plan.rate.source if plan.rate else "no rate is known: give --gpu_name, --tflops or --measure"
    together = sum(part.flops for part in plan.parts)
    unit, name = next((found for found in _FLOP if together >= found[0]), _FLOP[-1])
    table = _table(f"Work and time ({source})", "stage", "part", "tokens", name, "steps", "time", "")
    table.columns[1].justify = table.columns[-1].justify = "left"
    for part in plan.parts:
        steps = f"{part.steps:,}" if part.steps else ""
        row = (_count(part.tokens), _digits(part.flops / unit), steps, *_duration(part.seconds))
        table.add_row(escape(part.stage), escape(part.name), *row)
    table.add_section()
    table.add_row("all", "", "", _digits(together / unit), "", *_all_of(plan.parts))
    return table


_FLOP = tuple((10.0**power, f"{prefix}FLOP") for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M")))
"""Units of work; the largest that a plan has at least one of is that of its table."""


def _digits(value: float) -> str:
    """A number in a column of them: one digit behind the point.

    >>> _digits(1434.2), _digits(0.01), _digits(1e30)
    ('1,434.2', '< 0.1', '> 1,000,000,000')
    """
    if value > _MOST_SHOWN:
        return f"> {_MOST_SHOWN:,}"
    return "< 0.1" if 0 < value < 0.05 else f"{value:,.1f}"


def _count(tokens: float) -> str:
    """Tokens one by one, or so many that nobody will, in millions of millions.

    >>> _count(29_487_500.0), _count(5.084e12)
    ('29,487,500', '5.1 T')
    """
    return f"{tokens:,.0f}" if tokens < _TERA else f"{_digits(tokens / _TERA)} T"


def _all_of(parts: "Sequence[Part]") -> tuple[str, str]:
    seconds = [part.seconds for part in parts if part.seconds is not None]
    return _duration(sum(seconds) if seconds else None)


def _duration(seconds: float | None) -> tuple[str, str]:
    """Seconds as a number and the unit that fits, each of which has a column.

    >>> _duration(90), _duration(7200), _duration(0.01), _duration(None)
    (('1.5', 'min'), ('2.0', 'h'), ('< 0.1', 's'), ('', ''))
    """
    if seconds is None:
        return "", ""
    if seconds > _MOST_YEARS * _YEAR:
        return f"> {_MOST_YEARS:,}", "years"
    size, name = next((found for found in _TIMES if seconds >= found[0]), _TIMES[-1])
    return _digits(seconds / size), name


def _room(plan: "Plan") -> Table:
    title = f"The largest value of each setting, the others as they are, with {SAID} to spare"
    table = _table(title, "flag", "now", "largest")
    for room in plan.room:
        largest = "none alone" if room.largest is None else f"{room.largest:,}{' or more' if room.capped else ''}"
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
    if not may_not_fit([worst], plan.limit):
        return [*lines, f"It fits: {said}"]
    off = f"A prediction may be off by {SAID}."
    if worst.worst.total <= plan.limit:
        return [*lines, f"It fits, barely: {said} {off}", advice(plan.remedies, None)]
    refused = "The pipeline refuses to start (--force)." if cannot_fit([worst], plan.limit) else off
    return [*lines, f"It does not fit: {said} {refused}", advice(plan.remedies, None)]
