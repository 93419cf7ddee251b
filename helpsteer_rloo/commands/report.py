"""`helpsteer-rloo report`: a run, or several side by side, as one page."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from helpsteer_rloo.display.console import say
from helpsteer_rloo.run_dir import RunDir, locked, require_writable, write_text
from helpsteer_rloo.settings.config import CommandSpec, Settings
from helpsteer_rloo.settings.parsing import parse_command, split_positions


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
        ValueError: a directory holds no run, or the same as another; a file of one is damaged; or the page cannot be
            written.
    """
    from helpsteer_rloo.report.collect import find_run

    own = settings.own
    runs = [find_run(name) for name in own.runs]
    if len({run.root.resolve() for run in runs}) < len(runs):
        raise ValueError(f"{', '.join(own.runs)}: a run is given twice; give each once.")
    target = Path(own.output) if own.output else runs[0].report if len(runs) == 1 else Path("report.html")
    require_writable(target, "--output")
    alone = locked(runs[0].report_lock, target) if target == runs[0].report else nullcontext()
    with alone:
        write_text(target, page_of(runs))
    say(f"{target}: {', '.join(own.runs)}.")


def page_of(runs: Sequence[RunDir]) -> str:
    """The page of some runs, as they are now."""
    from helpsteer_rloo.report.collect import collect, distinct_names
    from helpsteer_rloo.report.page import render

    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    names = distinct_names([run.root for run in runs])
    return render([collect(run, now, name) for run, name in zip(runs, names, strict=True)])
