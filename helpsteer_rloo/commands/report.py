"""`helpsteer-rloo report`: a run, or several side by side, as one page."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from helpsteer_rloo.display.console import say
from helpsteer_rloo.run_dir import RunDir, locked, require_file, require_writable, write_text
from helpsteer_rloo.settings.config import CommandSpec, Settings
from helpsteer_rloo.settings.parsing import parse_command, split_positions

if TYPE_CHECKING:
    from helpsteer_rloo.report.records import Run

MOST_PROBLEMS = 3
"""Of a run, that the command tells."""


@dataclass(frozen=True, kw_only=True)
class ReportKnobs:
    """Which runs are shown, and where the page goes."""

    runs: list[str] = field(
        default_factory=list[str],
        metadata={"help": "Directories of runs, also given without the flag: one, or several to compare."},
    )
    output: str | None = field(
        default=None,
        metadata={"help": "The page (default: report.html in the run's directory; of several runs, in this one)."},
    )


REPORT = CommandSpec(
    program="helpsteer-rloo report",
    description="Show a run, or several side by side, in one page: helpsteer-rloo report RUN [RUN …] [--output FILE]",
    knobs=ReportKnobs,
)


def parse_report(argv: Sequence[str] | None = None) -> Settings[ReportKnobs]:
    """Read the runs' directories and the flags of the command."""
    runs, flags = split_positions(argv or ())
    return parse_command(REPORT, [*(["--runs", *runs] if runs else []), *flags], checks=[check_report])


def check_report(settings: Settings[ReportKnobs]) -> None:
    """Check the flags.

    Raises:
        ValueError: no run is given, or one twice.
    """
    if not settings.own.runs:
        raise ValueError("give the directory of a run: helpsteer-rloo report runs/demo")
    if len({Path(run).resolve() for run in settings.own.runs}) < len(settings.own.runs):
        raise ValueError("a run is given twice; give each once.")


def run_report(settings: Settings[ReportKnobs]) -> None:
    """Write the page, and say where it is.

    Raises:
        ValueError: a directory holds no run, or the same as another; the page cannot be written; or it is written, and
            a file of a run is damaged.
    """
    from helpsteer_rloo.report.collect import find_run
    from helpsteer_rloo.report.page import render

    own = settings.own
    runs = [find_run(name) for name in own.runs]
    if len({run.root.resolve() for run in runs}) < len(runs):
        raise ValueError(f"{', '.join(own.runs)}: a run is given twice; give each once.")
    target = Path(own.output) if own.output else runs[0].report if len(runs) == 1 else Path("report.html")
    require_writable(target, "--output")
    if not own.output and target.exists():
        require_file(target)
    alone = locked(runs[0].report_lock, target) if target == runs[0].report else nullcontext()
    with alone:
        shown = collected(runs)
        write_text(target, render(shown))
    say(f"{target}: {', '.join(run.name for run in shown)}.")
    if broken := [f"{run.name}: {_in_short(run.problems)}" for run in shown if run.problems]:
        raise ValueError(f"{target} is written without what cannot be read. {' '.join(broken)}")


def collected(runs: Sequence[RunDir]) -> "list[Run]":
    """Some runs as they are now, each under a name of its own."""
    from helpsteer_rloo.report.collect import collect, distinct_names

    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    names = distinct_names([run.root for run in runs])
    return [collect(run, now, name) for run, name in zip(runs, names, strict=True)]


def _in_short(problems: Sequence[str]) -> str:
    """The first few problems of a run, and how many more there are."""
    more = f" and {len(problems) - MOST_PROBLEMS} more, which the page has" if problems[MOST_PROBLEMS:] else ""
    return f"{'; '.join(problem.rstrip('.') for problem in problems[:MOST_PROBLEMS])}{more}."
