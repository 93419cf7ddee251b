"""How a run opens: whose it is, what is planned, whether it fits, and the record that it has begun."""

import itertools
import sys
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpsteer_rloo.events import RunPlanned, publish
from helpsteer_rloo.heartbeat import beating
from helpsteer_rloo.processes import is_main_process, process_count
from helpsteer_rloo.records.provenance import command_line, provenance
from helpsteer_rloo.run_dir import RunDir, locked, read_json, write_json
from helpsteer_rloo.stages import Stage, finished_stages, seconds_by_stage


def announce(run: RunDir, names: Sequence[str]) -> None:
    """Tell which stages there are, and what they took where they have been run before."""
    if is_main_process():
        publish(RunPlanned(tuple(names), seconds_by_stage(run, names)))


@dataclass(frozen=True)
class Opening:
    """What comes before the work of a run: a look at whether it fits into memory, and the record that it has begun.

    Attributes:
        run: Where it is recorded.
        settings: What the record holds.
        check_fit: Refuses a run that cannot fit, given the stages that are finished.
    """

    run: RunDir
    settings: Mapping[str, Any]
    check_fit: Callable[[Collection[str]], None]

    def stages(self, names: Sequence[str], make: Callable[[], list[Stage]]) -> list[Stage]:
        """The stages of the run, which to make may take a download: a run that cannot fit is refused before.

        A stage with a record is taken for finished until its inputs are known. A run of which all stages are finished
        leaves its record as it is, unless that is of a start with other settings, which came to nothing.

        Raises:
            ValueError: it cannot fit.
        """
        recorded = set(seconds_by_stage(self.run, names))
        if set(names) - recorded:
            self.check_fit(recorded)
        stages = make()
        finished = set(finished_stages(self.run, stages))
        if recorded - finished:
            self.check_fit(finished)
        if set(names) - finished:
            self._record(names, finished, provenance())
        elif not _has_passed(self.run, names):
            self._record(names, finished, (read_json(self.run.summary) or {}).get("provenance") or provenance())
        return stages

    def _record(self, names: Sequence[str], finished: Collection[str], made_with: Mapping[str, Any]) -> None:
        """Write down what the run was started with and for, to be looked at while it goes on and afterwards.

        Of a stage behind one that is not finished nobody knows whether it will count: see `stages.note_passed`.
        """
        if not is_main_process():
            return
        content = {
            "command": command_line(sys.argv),
            "settings": dict(self.settings),
            "stages": list(names),
            "passed": list(itertools.takewhile(lambda name: name in finished, names)),
            "provenance": dict(made_with),
        }
        write_json(self.run.start, content)


def _has_passed(run: RunDir, names: Sequence[str]) -> bool:
    """Whether the start that is recorded has passed these stages, or does not say, as older ones."""
    passed = (read_json(run.start) or {}).get("passed")
    return not isinstance(passed, list) or all(name in passed for name in names)


def record_beside(output_dir: str) -> RunDir:
    """The run directory of a script: beside what it trains, since that is the model's alone."""
    path = Path(output_dir).resolve()
    return RunDir(path.with_name(path.name + ".run"))


@contextmanager
def only_process(run: RunDir, *directories: str) -> Generator[None]:
    """The locks of a run and of the directories it makes, held by its main process; it shows others that it lives."""
    if not is_main_process():
        yield
        return
    with ExitStack() as held:
        held.enter_context(locked(run.lock, run.root))
        for directory in map(Path, directories):  # which runs of several names share
            held.enter_context(locked(directory.with_name(f".{directory.name}.lock"), directory))
        if process_count() > 1:
            held.enter_context(beating(run.heartbeat))
        yield
