"""Standard output and error that outlive whoever reads them: hours of work must not end with `| head`."""

import contextlib
import errno
import io
import os
import select
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, TextIO

_BARS_OFF = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
"""Variables of the environment; transformers, when it is imported, does as the hub's says."""
_NOBODY_READS = (errno.EPIPE, errno.EIO)
"""Of a pipe whose reader has ended, and of a terminal that is gone."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Of a file whose disk, or whose user's share of it, is full."""


class _LastingFile(io.FileIO):
    """A descriptor that becomes the null device, once and for good, when nobody reads any more what is written.

    The same where the disk is full, which is said on standard error. A pipe that does not block is waited for.

    The descriptor itself is replaced, so that it is silent for libraries in C and for child processes too.
    """

    def write(self, content: Any, /) -> int | None:
        """Write what can be written; what nobody reads, or nothing has room for, counts as written."""
        try:
            while (written := super().write(content)) is None:  # it does not block, and is full
                _wait_for_room(self.fileno())
            return written
        except OSError as error:
            if error.errno not in (*_NOBODY_READS, *_FULL):
                raise
            _silence(self.fileno())
            if error.errno in _FULL:
                _tell(f"WARNING: what is printed is left out from here on: {error.strerror}.")
            return memoryview(content).nbytes


def lasting(descriptor: int, encoding: str, *, line_buffering: bool = False, closes: bool = False) -> TextIO:
    """A text stream onto a descriptor that may lose its reader; what the encoding has no sign for is spelled out.

    Args:
        descriptor: Open for writing.
        encoding: Of the text.
        line_buffering: Whether every line is written at once.
        closes: Whether the descriptor is closed with the stream.
    """
    file = io.BufferedWriter(_LastingFile(descriptor, "w", closefd=closes))
    return io.TextIOWrapper(file, encoding=encoding, errors="backslashreplace", line_buffering=line_buffering)


def outlive_readers() -> None:
    """Let standard output and error outlive their readers; streams that a program has put there stay as they are."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):
            found = lasting(stream.fileno(), stream.encoding, line_buffering=stream.line_buffering)
            setattr(sys, name, found)


def open_closed_streams() -> None:
    """Let standard streams that were closed (`2>&-`) lead to the null device.

    Else the next file to be opened would get the number of one, and with it whatever libraries say there.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            _silence(descriptor)
        if getattr(sys, name) is None:
            mode = "w" if descriptor else "r"
            stream = open(descriptor, mode, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


def draw_no_bars() -> None:
    """Ask libraries that are not imported yet for no bars of their own, unless the environment asks for them."""
    for name in _BARS_OFF:
        os.environ.setdefault(name, "1")


@contextmanager
def ended_by_readers() -> Generator[None]:
    """Within, output that nobody reads ends the program without a word, as SIGPIPE ends others.

    Raises:
        SystemExit: it did.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        with contextlib.suppress(OSError):  # from a stream that has no descriptor
            _silence(sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def _wait_for_room(descriptor: int) -> None:
    """Wait until something can be written, or the reader has ended."""
    room = select.poll()  # select() takes no descriptor above 1023
    room.register(descriptor, select.POLLOUT)
    room.poll()


def _tell(message: str) -> None:
    """Say something on standard error past its stream, which may be what is being written; if it can be said."""
    with contextlib.suppress(OSError):
        os.write(2, f"{message}\n".encode())


def _silence(descriptor: int) -> None:
    """Let a descriptor lead to the null device."""
    null = os.open(os.devnull, os.O_RDWR)
    if null == descriptor:
        os.set_inheritable(descriptor, True)
    else:
        os.dup2(null, descriptor)
        os.close(null)
