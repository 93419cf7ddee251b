"""`report.html` kept up to date while a run goes on, by a process of its own of low priority, one at a time."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from pathlib import Path

from helpsteer_rloo.display.console import say, warn
from helpsteer_rloo.preemption import Stopped
from helpsteer_rloo.processes import is_main_process
from helpsteer_rloo.run_dir import RunDir, open_file

SWITCH = "HELPSTEER_RLOO_REPORT"
"""Environment variable; with `off` in it no run writes its report."""
EVERY = 60.0
"""Seconds between two reports while a stage goes on."""
LOOK = 2.0
"""Seconds between two looks at whether a stage has ended."""
LOOK_AT_PARENT = 0.5
"""Seconds between two looks of the process that writes a report at whether the run's is still there."""
LONGEST = 300.0
"""Seconds after which a report is given up."""
LONGEST_WHEN_STOPPED = 10.0
"""The same where the run was asked to stop: whoever asked waits, and ends it before long."""
RUNNING = b'data-state="running"'
"""In the first lines of the page of a run that goes on."""


@contextlib.contextmanager
def reported(run: RunDir) -> Generator[None]:
    """Within, the run's report is written at the end of every stage and once a minute; at the end, the last one.

    A report that cannot be written is a warning, never the end of a run. A run that changed nothing keeps the page that
    it has.
    """
    if not is_main_process() or os.environ.get(SWITCH) == "off":
        yield
        return
    writer = _Writer(run)
    before = _markers(run)
    thread = threading.Thread(target=writer.keep, args=(before,), daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        writer.end(thread)
        raise
    except BaseException as error:
        writer.end(thread)
        if _markers(run) != before:
            writer.write(LONGEST_WHEN_STOPPED if isinstance(error, Stopped) else None)
        raise
    writer.end(thread)
    if _markers(run) != before or not _is_final(run.report):
        writer.write()
    if _is_final(run.report):
        say(f"The report: {run.report}")


def end_with(parent: int) -> None:
    """End this process soon after its parent, which may be killed without a chance to end it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_AT_PARENT)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _markers(run: RunDir) -> dict[str, int]:
    """The records of stages that have begun or ended, with the time of each."""
    found: dict[str, int] = {}
    for path in run.stage("x").parent.glob("*.json"):
        with contextlib.suppress(FileNotFoundError):
            found[path.name] = path.stat().st_mtime_ns
    return found


def _is_final(page: Path) -> bool:
    """Whether there is a page, and it is not that of a run that goes on."""
    try:
        with open_file(page) as file:
            return RUNNING not in file.read(1000)
    except (FileNotFoundError, ValueError):
        return False


class _Writer:
    """Writes the report of a run, again and again in a thread, or once."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._ended = threading.Event()
        self._told = ""

    def keep(self, seen: dict[str, int]) -> None:
        """Write the report when a stage has begun or ended, and once a minute, until the end."""
        written = time.monotonic()
        while not self._ended.wait(LOOK):
            markers = _markers(self._run)
            if markers != seen or (markers and time.monotonic() - written > EVERY):
                seen = markers
                self.write()
                written = time.monotonic()

    def end(self, thread: threading.Thread) -> None:
        """End the writing in the thread, also in the middle of it."""
        self._ended.set()
        thread.join()
        self._ended.clear()

    def write(self, longest: float | None = None) -> None:
        """Write it once, in at most so many seconds; what goes wrong is said, and said once."""
        problem = self._attempt(LONGEST if longest is None else longest)
        if problem and problem != self._told:
            warn(f"the report: {problem}")
        self._told = problem or self._told

    def _attempt(self, longest: float) -> str | None:
        nice = [found, "-n", "19"] if (found := shutil.which("nice")) else []
        command = [*nice, sys.executable, "-m", __name__, str(os.getpid()), str(self._run.root)]
        begin = time.monotonic()
        try:
            with (
                tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
                subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors
                ) as process,
            ):
                while process.poll() is None:
                    if self._ended.wait(0.05) or time.monotonic() - begin > longest:
                        process.kill()
                        return None if self._ended.is_set() else f"it was given up after {longest:g} seconds."
                errors.seek(0)
                lines = errors.read().strip().splitlines()
        except OSError as error:
            return str(error)
        if process.returncode <= 0:  # done, or ended by a signal that was meant for the run
            return None
        return lines[-1].removeprefix("error: ") if lines else f"exit status {process.returncode}"


if __name__ == "__main__":
    from helpsteer_rloo.cli import report

    end_with(int(sys.argv[1]))
    report(sys.argv[2:])
