"""Requests to stop: a signal lets training finish its step, save, and end with a code of its own."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

STOPPED = 75
"""Exit code of a run that was asked to stop and has saved: give the same command again (EX_TEMPFAIL)."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):  # noqa: N818 - no error
    """A run was asked to stop, and saved what it had."""


class StopRequest:
    """Whether a signal has asked for a stop, which `listening` sets, and whether who listened has stopped for it."""

    def __init__(self) -> None:
        self.made = False
        self.answered = False

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal.

        Raises:
            KeyboardInterrupt: it is the second one.
        """
        if self.made:
            raise KeyboardInterrupt
        self.made = True
        name = signal.Signals(number).name
        print(f"\n{name}: stopping after this step, with a checkpoint. Once more stops at once.", flush=True)


_UNANSWERED: list[StopRequest] = []
"""Requests that came too late for who listened, as in the last step of a training."""


def stop_before(what: str) -> None:
    """Stop before something is begun, if a request to stop is still unanswered.

    Raises:
        Stopped: there is one.
    """
    if _UNANSWERED:
        _UNANSWERED.clear()
        raise Stopped(f"Stopped as asked, before {what}; what is finished stays.")


@contextmanager
def listening() -> Generator[StopRequest]:
    """Take `SIGTERM` and `SIGINT` as requests to stop; in other threads than the main one nothing is heard."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.receive) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if request.made and not request.answered:
            _UNANSWERED.append(request)
