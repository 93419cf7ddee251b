"""Who shows a run while it goes on, on the main process: a live block, lines of a log, or events as JSON."""

import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from types import FrameType
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.live import Live

from helpsteer_rloo.display.console import say, speaking_to
from helpsteer_rloo.display.progress import RunState, block, clock, line, record
from helpsteer_rloo.display.streams import draw_no_bars, lasting
from helpsteer_rloo.events import Event, Measured, Progressed, StageBegan, StageEnded, publish, subscribed
from helpsteer_rloo.preemption import Stopped
from helpsteer_rloo.processes import is_main_process

REFRESHES = 4
"""Of the live block, in a second."""
_SECONDS = {"plain": 10.0, "json": 1.0}


@contextmanager
def shown(
    progress: str, seconds: float | None = None, otherwise: str = "plain", *, bars: bool = True
) -> Generator[None]:
    """Within, show what happens; to be entered before heavy imports, since libraries are asked to draw no bars then.

    Args:
        progress: As the flag of that name.
        seconds: Least time between two plain lines, or two events of JSON, about the steps of a task.
        otherwise: What "auto" is where there is no terminal; "none" shows nothing that is not said.
        bars: Whether "auto" may be a live block, and libraries may draw bars of their own.
    """
    mode = chosen(progress, otherwise, bars=bars)
    if not bars or mode != "plain" or not sys.stderr.isatty():  # they would run into the block, and fill a log
        draw_no_bars()
    with ExitStack() as stack:
        if mode == "json":
            stack.enter_context(_as_json(_SECONDS["json"] if seconds is None else seconds))
        elif not is_main_process():
            pass
        elif mode == "rich":
            stack.enter_context(_in_a_block())
        elif mode == "plain":
            stack.enter_context(_as_lines(_SECONDS["plain"] if seconds is None else seconds))
        elif mode == "quiet":
            stack.enter_context(speaking_to(Console(), quiet=True))
        yield


@contextmanager
def loading(what: str) -> Generator[None]:
    """Within, a terminal shows that something is loaded, and what is downloaded for that; to be entered as `shown`."""
    draw_no_bars()
    with shown("auto", otherwise="none"):
        publish(StageBegan(f"Loading {what}"))
        yield


def chosen(progress: str, otherwise: str = "plain", *, bars: bool = True) -> str:
    """The way of showing that a flag's value stands for on this standard output."""
    if progress != "auto":
        return progress
    return (
        "rich"
        if bars and sys.stdout.isatty() and os.environ.get("TERM") not in (None, "dumb", "unknown")
        else otherwise
    )


# ---- a live block ---------------------------------------------------------------------------------------------------


@contextmanager
def _in_a_block() -> Generator[None]:
    console, state, lock = Console(), RunState(time.monotonic()), threading.RLock()

    def draw() -> RenderableType:
        with lock:
            return block(state, time.monotonic(), console.width)

    def take(event: Event) -> None:
        with lock:
            state.take(event, time.monotonic())

    live = Live(get_renderable=draw, console=console, refresh_per_second=REFRESHES, transient=True)
    with _ended_by_sigterm(), speaking_to(console), subscribed(take), live:
        yield


class _Terminated(BaseException):
    """SIGTERM has come."""


@contextmanager
def _ended_by_sigterm() -> Generator[None]:
    """Within, SIGTERM ends the process as ever, but not before what is inside has put the terminal in order."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def end(_number: int, _frame: FrameType | None) -> None:
        raise _Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    except _Terminated:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ---- lines of a log -------------------------------------------------------------------------------------------------


@contextmanager
def _as_lines(seconds: float) -> Generator[None]:
    state, is_time = RunState(time.monotonic()), _Every(seconds)
    is_time.begin(state.began)

    def take(event: Event) -> None:
        now = time.monotonic()
        new = state.take(event, now)
        match event:
            case StageBegan():
                is_time.begin(now)
            case StageEnded() if new and not event.before:
                say(f"Stage {event.stage} is finished after {clock(event.seconds)}.")
            case Progressed() | Measured() if (state.stage or state.tasks) and is_time(now):
                say(line(state, now))
            case _:
                pass

    with speaking_to(Console(force_terminal=False)), subscribed(take):
        yield


class _Every:
    """Whether so many seconds have passed since the last time."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._last = seconds, -seconds

    def begin(self, now: float) -> None:
        """Count from now."""
        self._last = now

    def __call__(self, now: float) -> bool:
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True


# ---- JSON -----------------------------------------------------------------------------------------------------------


@contextmanager
def _as_json(seconds: float) -> Generator[None]:
    with _own_stdout() as out, speaking_to(Console(stderr=True)):
        if not is_main_process():
            yield
            return
        view = _JsonView(out, seconds)
        with subscribed(view.take), view.ending():
            yield


class _JsonView:
    """Writes events, those about the steps of a task not too often, and in the end what became of the run."""

    def __init__(self, out: TextIO, seconds: float) -> None:
        self._out, self._seconds = out, seconds
        self._state = RunState(time.monotonic())
        self._last: dict[str, float] = {}

    def take(self, event: Event) -> None:
        """Write an event."""
        now = time.monotonic()
        if self._state.take(event, now) and self._is_due(event, now):
            self._write(record(event, self._state, now))

    def _is_due(self, event: Event, now: float) -> bool:
        if not isinstance(event, Progressed):
            return True
        due = event.ended or now - self._last.get(event.task, -self._seconds) >= self._seconds
        if event.ended:
            self._last.pop(event.task, None)
        elif due:
            self._last[event.task] = now
        return due

    @contextmanager
    def ending(self) -> Generator[None]:
        """Within, what ends the run early is its summary."""
        try:
            yield
        except BaseException as error:
            interrupted = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            status = "stopped" if isinstance(error, Stopped) else interrupted
            seconds = round(time.monotonic() - self._state.began, 3)
            message = str(error) or type(error).__name__
            self._write({"event": "summary", "seconds": seconds, "status": status, "message": message})
            raise

    def _write(self, content: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")
        self._out.flush()


@contextmanager
def _own_stdout() -> Generator[TextIO]:
    """Standard output for one writer alone: what anyone else writes there, also in C, goes to standard error."""
    stream = sys.stdout
    stream.flush()
    try:
        descriptor = stream.fileno()
    except io.UnsupportedOperation:  # one of a program's that has put its own there
        with redirect_stdout(sys.stderr):
            yield stream
        return
    with lasting(os.dup(descriptor), "utf-8", closes=True) as own, redirect_stdout(sys.stderr):
        os.dup2(2, descriptor)
        try:
            yield own
        finally:
            own.flush()
            os.dup2(own.fileno(), descriptor)
