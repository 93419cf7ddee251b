"""Signs of life of the main process, for processes that wait for its results without a connection to it."""

import contextlib
import threading
import time
from collections.abc import Generator
from pathlib import Path

EVERY = 5.0
LIMIT = 180.0
"""Seconds between two signs, and those without one after which a process is given up. Network file systems may show a
sign a minute late; and on some of them locks, which would tell at once, are not seen from other machines."""


@contextlib.contextmanager
def beating(path: Path) -> Generator[None]:
    """Within, the file's time of modification changes again and again; its directory must exist."""
    ended = threading.Event()

    def beat() -> None:
        while True:
            with contextlib.suppress(OSError):
                path.touch()
            if ended.wait(EVERY):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Watch:
    """What a waiting process has seen of such a file; clocks of other machines do not matter to it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last, self._since = self._beat(), time.monotonic()

    def _beat(self) -> int | None:
        try:
            return self._path.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def has_lost_it(self) -> bool:
        """Whether there has been no sign for too long; to be asked again and again."""
        beat = self._beat()
        if beat != self._last:
            self._last, self._since = beat, time.monotonic()
        return time.monotonic() - self._since > LIMIT
